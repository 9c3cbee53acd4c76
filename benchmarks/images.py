#!/usr/bin/env python3
"""Images to two normalised views, against MoCo v3's pipeline in torchvision and PIL: images/s, both views of one counted once.

    taskset -c 0 python benchmarks/images.py /data/imagenet                    photographs, on one core
    taskset -c 0 python benchmarks/images.py /data/cifar10 -b 128 -n 1024      small images of one size, held in memory
    python benchmarks/images.py /data/imagenet -b 256 -n 4096 -j 16            16 workers for either; our device's half on a GPU

The sides take turns on the same images within one run; the fastest turn of each counts, since the others were disturbed.
"""

import argparse
import os
import platform
import random
import sys
import time
from collections import deque

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision import transforms

from snclr import augment, options, sources
from snclr.data import EncodedImages, ViewLoader


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", help="folder with train/<class>/<image>")
    parser.add_argument("-n", "--images", type=int, default=64, help="images a turn")
    parser.add_argument("-b", "--batch-size", type=int, default=32)
    parser.add_argument("-j", "--workers", type=int, default=0)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, *_ = sources.open_data(options.parse_data([args.data, "--dataset", "folder"]))
    encoded = isinstance(images, EncodedImages)
    recipe = augment.Recipe(0, crop_min=0.2, size=224 if encoded else images.images.shape[-1], blur=encoded)
    chosen = np.arange(len(images))[:: max(1, len(images) // args.images)][: args.images]
    requests = [(0, part) for part in np.split(chosen, range(args.batch_size, len(chosen), args.batch_size))]

    theirs = DataLoader(
        PILViews(images, chosen, recipe),
        args.batch_size,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
    )
    in_workers = [images.views(recipe, *request) for request in requests]
    halves = [(views.crops.to(device), views.parameters) for views in in_workers]
    ours = ViewLoader(images.to(device), recipe, device, args.workers)
    sides = {
        "MoCo v3's pipeline, torchvision and PIL": lambda: ([x.to(device, non_blocking=True) for x in both] for both in theirs),
        f"ours, the whole, on {device.type}": lambda: ours.load(requests),
        "    device's half: all after the crop": lambda: (augment.apply(*half, images.mean, images.std) for half in halves),
    }
    if not args.workers:
        sides["    first half: draw, (decode,) crop, resize"] = lambda: (images.views(recipe, *request) for request in requests)
    if encoded and not args.workers:
        sides["    decoding alone"] = lambda: map(images.image, chosen)

    seconds = {name: [] for name in sides}
    for turn in range(args.turns + 1):
        for name, batches in sides.items():
            start = time.perf_counter()
            deque(batches(), maxlen=0)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"{len(chosen)} images to 2 x {recipe.size} px, batch {args.batch_size}, blur {'on' if recipe.blur else 'off'}")
    print(
        f"{hardware}, {torch.get_num_threads()} threads, {args.workers} workers, torch {torch.__version__}; fastest of {args.turns}\n"
    )
    print(f"{'':<46}{'images/s':>10}{'ratio':>8}")
    first, *_ = map(min, seconds.values())
    for name, values in seconds.items():
        print(f"{name:<46}{len(chosen) / min(values):>10.0f}{first / min(values):>8.2f}")


class PILViews:
    """The baseline's map-style data set: item i is two views of image chosen[i], by MoCo v3's published recipe.

    Chen et al. 2021: crop of at least recipe.crop_min, jitter of .4, .4, .2, .1 with p = .8, grey with .2, blur of radius .1 to 2 with
    p = 1 and .1, solarise with p = 0 and .2, flip.
    """

    def __init__(self, images, chosen, recipe):
        self.images, self.chosen, self.recipe = images, chosen, recipe
        self.resident = None
        if not isinstance(images, EncodedImages):  # as torchvision's sets of small images hold them
            self.resident = images.images[chosen].permute(0, 2, 3, 1).contiguous().numpy()
        normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(images.mean, images.std)])
        self.views = [self.view(blur, solarise, normalise) for blur, solarise in ((1.0, 0.0), (0.1, 0.2))]

    def view(self, blur, solarise, normalise):
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(self.recipe.size, scale=(self.recipe.crop_min, 1.0)),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([blurred], p=blur * self.recipe.blur),
                transforms.RandomSolarize(128, p=solarise),
                transforms.RandomHorizontalFlip(),
                normalise,
            ]
        )

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, item):
        if self.resident is not None:
            picture = Image.fromarray(self.resident[item])
        else:
            with Image.open(self.images.paths[self.chosen[item]]) as opened:
                picture = opened.convert("RGB")
        return [view(picture) for view in self.views]


def blurred(picture):
    return picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


if __name__ == "__main__":
    main()
