#!/usr/bin/env python3
"""Speed of loading: images to two normalised views, compared with torchvision and PIL.

    # photographs to 224 px, on one core
    taskset -c 0 python benchmarks/images.py /data/imagenet
    # small images of one size, which are held in memory
    taskset -c 0 python benchmarks/images.py /data/cifar10 -b 128 -n 1024
    # 16 workers for both pipelines; our second half runs on the GPU
    python benchmarks/images.py /data/imagenet -b 256 -n 4096 -j 16

The other pipeline has the transforms of MoCo v3. Images per second count an image once, not twice
for its two views.
"""

import os
import random
import sys
from collections import deque

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks import measure
from snclr import augment, mean_std, operations
from snclr.datasets import decoding, sources
from snclr.datasets.files import FileImages
from snclr.loader import ViewLoader
from snclr.running import process_group


def main():
    parser = measure.argument_parser(__doc__)
    parser.add_argument("data", metavar="DATA", help="folder with train/<class>/<image>")
    parser.add_argument(
        "-n", "--images", type=int, default=64, metavar="N", help="number of images"
    )
    parser.add_argument("-b", "--batch-size", type=int, default=32, metavar="N", help="per batch")
    parser.add_argument(
        "-j", "--workers", type=int, default=0, metavar="N", help="worker processes per pipeline"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=9,
        metavar="N",
        help="passes over the images; the fastest counts",
    )
    args = parser.parse_args()
    device = process_group.own_device()
    images, *_ = sources.open_data(mean_std.parse([args.data, "--dataset", "folder"]))
    resident = None if isinstance(images, FileImages) else images.images
    size, blur = (224, True) if resident is None else (resident.shape[-1], False)
    recipe = augment.Recipe(0, augment.moco_v3_views(size, crop_min=0.2, blur=blur))
    chosen = np.arange(len(images))[:: max(1, len(images) // args.images)][: args.images]
    requests = [
        (0, part) for part in np.split(chosen, range(args.batch_size, len(chosen), args.batch_size))
    ]

    # torchvision's data sets hold small images as arrays; its ImageFolder reads files
    pictures = (
        images.paths[chosen]
        if resident is None
        else resident[chosen].permute(0, 2, 3, 1).contiguous().numpy()
    )
    pairs = PILViews(pictures, recipe, images.mean, images.std)
    theirs = DataLoader(
        pairs,
        args.batch_size,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
    )
    halves = [images.views(recipe, *request) for request in requests]
    halves = [(views.crops[0].to(device), views.parameters[0]) for views in halves]
    ours = ViewLoader(images.to(device), recipe, device, args.workers)
    sides = {
        "torchvision and PIL": lambda: (
            [view.to(device, non_blocking=True) for view in pair] for pair in theirs
        ),
        "ours": lambda: ours.load(requests),
        "  first half: decode, draw, crop, resize": lambda: (
            images.views(recipe, *request) for request in requests
        ),
        **{
            f"  only decoding, {library}": lambda decoder=decoder: decoded(images, chosen, decoder)
            for library, decoder in decoding.jpeg_decoders().items()
            if resident is None
        },
        "  second half: all the rest": lambda: (
            operations.apply(*half, images.mean, images.std) for half in halves
        ),
    }
    if args.workers:  # these run in this process, so they cannot be compared with workers
        sides = {name: side for name, side in sides.items() if "decod" not in name}
    calls = {name: lambda side=side: deque(side(), maxlen=0) for name, side in sides.items()}
    seconds = measure.fastest(calls, args.steps, device)
    rows = [
        [name, f"{len(chosen) / time:.0f}", f"{seconds['torchvision and PIL'] / time:.2f}"]
        for name, time in seconds.items()
    ]
    print(
        f"{len(chosen)} images to 2 x {size} px, blur {'on' if blur else 'off'}, "
        f"batch {args.batch_size}"
    )
    print(f"{measure.hardware(device)}, {args.workers} workers\n")
    print(measure.table(["", "images/s", "ratio"], rows))


def decoded(images, chosen, decoder):
    """Decoded images, with a decoder of decoding.jpeg_decoders."""
    used, decoding.decode_jpeg = decoding.decode_jpeg, decoder
    yield from map(images.image, chosen)
    decoding.decode_jpeg = used


class PILViews:
    """Data set whose item i is the views of picture i, made by torchvision and PIL.

    pictures: paths, or uint8 arrays (H, W, 3). The settings are those of the recipe's views.
    """

    def __init__(self, pictures, recipe, mean, std):
        self.pictures = pictures
        self.views = [
            transforms.Compose(
                [
                    transforms.RandomResizedCrop(view.size, (view.crop_min, view.crop_max)),
                    transforms.RandomApply([transforms.ColorJitter(*view.jitter)], p=view.jitter_p),
                    transforms.RandomGrayscale(p=view.gray_p),
                    transforms.RandomApply([gaussian_blur], p=view.blur_p),
                    transforms.RandomSolarize(128, p=view.solarize_p),
                    transforms.RandomHorizontalFlip(view.flip_p),
                    transforms.ToTensor(),
                    transforms.Normalize(mean, std),
                ]
            )
            for view in recipe.views
        ]

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, item):
        if isinstance(self.pictures[item], str):
            with Image.open(self.pictures[item]) as file:
                picture = file.convert("RGB")
        else:
            picture = Image.fromarray(self.pictures[item])
        return [view(picture) for view in self.views]


def gaussian_blur(picture):
    return picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


if __name__ == "__main__":
    main()
