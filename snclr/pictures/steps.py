"""Pictures and histograms of one training step."""

import argparse

import numpy as np
from PIL import Image
from torch import Tensor

from ..datasets.images import ImageSet
from ..loader import Batch
from ..running.metrics import StepView
from .canvas import Tile, frame_key, in_colour, neighbour_tiles, sheet

QUERIES, ACROSS = 8, 10  # rows of a picture, and largest number of neighbours in a row
NEIGHBOUR_LINES = """Images of the batch, and their neighbours in the bank, those of largest \
positiveness first.
weight: positiveness of the neighbour; cosine: its similarity to the image's key."""


def of_step(
    batch: Batch, shown: StepView, images: ImageSet, args: argparse.Namespace, step: int
) -> tuple[dict[str, Image.Image], dict[str, Tensor]]:
    """Pictures and histograms of this rank's part of a step, by name. step: its number, from 1."""
    weak = args.key_view == "weak"
    pictures = {"views": view_picture(batch, images, f"Views at step {step}", weak)}
    valid = shown.neighbour_ids >= 0
    if not valid.any():
        return pictures, {}
    pictures["neighbours"] = neighbour_picture(
        batch.ids, shown, images, args.img_size, f"Soft neighbours at step {step}"
    )
    return pictures, {
        "positiveness": shown.weights[valid],
        "bank_age_steps": bank_ages(shown.counts, step, args.batch_size),
    }


def neighbour_picture(
    ids: Tensor, shown: StepView, images: ImageSet, size: int, title: str
) -> Image.Image:
    """Images of a step beside their positives in the bank, those of largest weight first.

    ids (B,): indices of the images; shown: the step's record of them; size: side in px at which
    images are read.
    """
    order = shown.weights[:QUERIES].float().argsort(dim=1, descending=True, stable=True)[:, :ACROSS]
    columns = [
        values[:QUERIES].gather(1, order).tolist()
        for values in (shown.neighbour_ids, shown.weights, shown.scores)
    ]
    rows = []
    for query, *values in zip(ids[:QUERIES].tolist(), *columns, strict=True):
        neighbours = [
            (index, f"weight {weight:.3f}", f"cosine {cosine:.2f}")
            for index, weight, cosine in zip(*values, strict=True)
            if index >= 0
        ]
        rows.append(neighbour_tiles(images, query, images, neighbours, size))
    return sheet(rows, title, NEIGHBOUR_LINES, frame_key(rows), ("image", "neighbours"))


def view_picture(batch: Batch, images: ImageSet, title: str, weak: bool = False) -> Image.Image:
    """The first two views of images of a batch as they entered the network, but not normalised.

    weak: whether the last view is the weak one, which is then shown below them.
    """
    rows = [
        [Tile(image) for image in denormalize(view[:QUERIES], images.mean, images.std)]
        for view in batch.views[:2] + batch.views[-1:] * weak
    ]
    names = "view 1, view 2 and the weak view" if weak else "view 1 and view 2"
    text = f"From top to bottom: {names} of the same image, as the network sees them."
    return sheet(rows, title, text, side=128)


def bank_ages(counts: Tensor, step: int, batch_size: int) -> Tensor:
    """The age in steps of each bank row that the global batch of a step picked: (picks,) floats.

    counts (M,): number of picks of each row; step: its number, from 1. Key n of the run is in row n
    modulo M. The last key of the previous step has age 1; with B keys a step, the key before it is
    1 / B of a step older, and so on.
    """
    rows = counts.nonzero()[:, 0]
    ages = ((step - 1) * batch_size - 1 - rows) % len(counts) / batch_size + 1
    return ages.repeat_interleave(counts[rows])


def denormalize(x: Tensor, mean: Tensor, std: Tensor) -> np.ndarray:
    """Network input (B, C, S, S) as images (B, S, S, 3) uint8."""
    x = x.detach().float().cpu() * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    return in_colour((x.clamp(0, 1) * 255).round().byte())
