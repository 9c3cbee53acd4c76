"""The encoder and images of an evaluation, and the batches of its training images. Probe and
fine-tuning share them.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import augment
from ..datasets.images import ImageSet
from ..running.bad_images import record_bad_images
from ..running.distributed import share
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

    @property
    def recipe(self) -> augment.Recipe:
        """The view on which a classifier is trained: a random crop, half of them flipped."""
        args = self.args
        return augment.Recipe(args.seed, (augment.View(args.img_size, args.crop_min),))


def steps_per_epoch(images: ImageSet, batch_size: int) -> int:
    """Number of whole batches (global size) in an epoch. Raises UsageError if there is none."""
    if batch_size > len(images):
        raise UsageError(f"--batch-size {batch_size} exceeds the {len(images)} training images")
    return len(images) // batch_size


def rank_batches(task: Task, images: ImageSet, epoch: int) -> list[np.ndarray]:
    """This rank's part of each batch of an epoch: indices into images."""
    size = task.args.batch_size
    order = augment.epoch_order(task.args.seed, epoch, len(images))
    starts = range(0, size * steps_per_epoch(images, size), size)
    return [share(order[start : start + size]) for start in starts]


def report_epoch(
    task: Task, images: ImageSet, replaced: set[int], epoch: int, text: str, start: float
) -> None:
    """Print progress about ten times during training, and report images that could not be read. All
    ranks call it.
    """
    epochs = task.args.epochs
    if note := record_bad_images(images.image, replaced, task.args.workdir):
        task.log(f"note: {note}")
    if epoch % max(1, epochs // 10) == 0 or epoch == epochs:
        task.log(f"epoch {epoch}/{epochs}  {text}  {time.perf_counter() - start:.0f} s")
