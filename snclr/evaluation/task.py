"""What probe and fine-tuning share: the encoder and images of an evaluation, and its progress."""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import augment
from ..datasets.images import ImageSet
from ..running.bad_images import record_bad_images


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
