#!/usr/bin/env python3
"""Augmentation of views on the device that trains: crops of images in memory, the operations, and
on a GPU --fused-augment.

    python benchmarks/augmentation.py                        256 images in two views of 224 px, GPU
    python benchmarks/augmentation.py --images 8 --size 64   on a CPU

The images are random, and the views those of MoCo v3's recipe, with blur. The last column is the
largest difference from the first row's views, in units of the normalised pixels.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

from benchmarks import measure
from snclr import augment, operations
from snclr.choices import IMAGENET
from snclr.datasets.images import ResidentImages
from snclr.running import process_group


def main():
    parser = measure.argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=256, metavar="B", help="images in a batch")
    parser.add_argument("--size", type=int, default=224, metavar="PX", help="side of a view")
    parser.add_argument(
        "--steps", type=int, default=5, metavar="N", help="calls of each row; the fastest counts"
    )
    args = parser.parse_args()
    device = process_group.own_device()
    torch.manual_seed(0)
    pixels = torch.randint(256, (args.images, 3, args.size, args.size), dtype=torch.uint8)
    images = ResidentImages(pixels, None, [], IMAGENET).to(device)
    recipe = augment.Recipe(0, augment.moco_v3_views(args.size, 0.08, blur=True))

    def crop():
        return images.views(recipe, 0, np.arange(args.images))

    (crops,), (parameters,) = crop()[1:]
    applied = {"operations": operations.apply}
    if device.type == "cuda":
        from snclr import fused_augment  # needs triton

        applied["--fused-augment"] = fused_augment.apply
    calls = {"crops of images in memory": crop}
    for name, apply in applied.items():
        calls[name] = lambda apply=apply: apply(crops, parameters, images.mean, images.std)
    views = {name: calls[name]() for name in applied}
    seconds = measure.fastest(calls, args.steps, device)
    on_device = measure.device_seconds(calls, args.steps, device) or seconds
    rows = []
    for name in calls:
        error = (views[name] - views["operations"]).abs().max().item() if name in views else None
        cells = [f"{1000 * taken[name]:.2f}" for taken in (seconds, on_device)]
        rows.append([name, *cells, "" if error is None else f"{error:.0e}"])
    print(f"{args.images} images, two views of {args.size} px; {measure.hardware(device)}")
    print(measure.table(["", "ms", "ms on the device", "difference"], rows))


if __name__ == "__main__":
    main()
