"""The encoder and images of an evaluation, and the batches of its training images. Probe and
fine-tuning share them.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import augment
from ..datasets.images import ImageSet
from ..loader import EpochLoader
from ..running.bad_images import record_bad_images
from ..running.errors import UsageError


class Task(NamedTuple):
    """An encoder and the labelled images on which it is evaluated."""

    args: argparse.Namespace
    encoder: nn.Module
    info: dict  # of snclr.weights.load.open_encoder
    identity: dict  # what a resumed evaluation must repeat: encoder_digest, and settings (args)
    embed: Callable[[Tensor], Tensor]  # images to frozen features, from linear.embedder
    load: Callable[..., Iterator[Tensor]]  # images and indices to batches: loader.whole_images
    train: ImageSet
    val: ImageSet
    device: torch.device
    amp: str  # precision of the encoder: 'off', 'bf16' or 'fp16'
    log: Callable[[str], None]  # prints a line on rank 0; does nothing on other ranks


def epoch_loader(task: Task, images: ImageSet) -> EpochLoader:
    """Batches of the views on which a classifier is trained: random crops, half of them flipped.

    Raises UsageError if there is no whole batch.
    """
    args = task.args
    if args.batch_size > len(images):
        raise UsageError(
            f"--batch-size {args.batch_size} exceeds the {len(images)} training images"
        )
    recipe = augment.Recipe(args.seed, (augment.View(args.img_size, args.crop_min),))
    return EpochLoader(images, recipe, args.batch_size, task.device, args.workers)


def report_epoch(task: Task, loader: EpochLoader, epoch: int, text: str, start: float) -> None:
    """Print progress about ten times during training, and report images that could not be read. All
    ranks call it.
    """
    epochs = task.args.epochs
    if note := record_bad_images(loader.images.image, loader.replaced, task.args.workdir):
        task.log(f"note: {note}")
    if epoch % max(1, epochs // 10) == 0 or epoch == epochs:
        task.log(f"epoch {epoch}/{epochs}  {text}  {time.perf_counter() - start:.0f} s")
