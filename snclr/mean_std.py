"""Measures the mean and standard deviation of the channels of a data set.

python -m snclr.mean_std DATA [data flags]
"""

import argparse
import sys

from .arguments import new_parser
from .running.errors import one_clear_line
from .shared_options import add_data_flags, resolve_data, resolve_views


def parse(argv: list[str]) -> argparse.Namespace:
    """The data flags, checked. Raises UsageError."""
    parser = new_parser(
        "python -m snclr.mean_std [DATA] [flags]",
        "Measures the mean and standard deviation of the channels.",
    )
    add_data_flags(parser)
    args = parser.parse_args(argv)
    resolve_data(args)
    resolve_views(args)
    return args


if __name__ == "__main__":
    with one_clear_line("snclr.mean_std"):
        parse(sys.argv[1:])  # reports a wrong flag before the slow imports

import numpy as np
import torch

from .datasets import sources
from .datasets.images import ImageSet
from .evaluation.embedding import unreadable
from .loader import whole_images


def mean_std(images: ImageSet, size: int, workers: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation (C,) in [0, 1], over all pixels of all images as evaluated,
    without those that cannot be read (images.skip_bad).

    Sets images.mean to 0 and images.std to 1.
    """
    images.mean, images.std = torch.zeros_like(images.mean), torch.ones_like(images.std)
    first, second = torch.zeros(2, len(images.mean), dtype=torch.float64)
    cpu, indices, seen, used = torch.device("cpu"), np.arange(len(images)), 0, 0
    for batch in whole_images(images, indices, size=size, device=cpu, workers=workers):
        chosen = indices[seen : (seen := seen + len(batch))]
        if images.skip_bad:
            batch = batch[~unreadable(images, chosen, batch)]
        first += batch.double().sum(dim=(0, 2, 3))
        second += batch.double().square().sum(dim=(0, 2, 3))
        used += len(batch)
    mean = first / (used * size**2)
    return mean.tolist(), (second / (used * size**2) - mean.square()).sqrt().tolist()


def main(argv: list[str]) -> None:
    args = parse(argv)
    train, _, notes = sources.open_data(args)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{len(train)} images of {args.dataset} at {args.img_size} px", file=sys.stderr)
    mean, std = (
        " ".join(f"{value:.4f}" for value in values)
        for values in mean_std(train, args.img_size, args.workers)
    )
    print(f"--mean {mean} --std {std}")


if __name__ == "__main__":
    with one_clear_line("snclr.mean_std"):
        main(sys.argv[1:])
