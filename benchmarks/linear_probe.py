#!/usr/bin/env python3
"""The grid of linear probes against a single head, and cached against uncached features: time of the same steps.

    python benchmarks/linear_probe.py                            ViT-S at 224 px with a small batch, about a minute on a CPU
    python benchmarks/linear_probe.py -b 1024 --steps 20         as on ImageNet, for a GPU

Both sides of a ratio alternate within one run, and a CPU counts its own time, whatever else it does. No files are needed: the
images are noise.
"""

import argparse
import os
import platform
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from snclr import lincls_options, linear
from snclr.backbones import build_encoder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("-b", "--batch-size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=4, help="steps of each side, alternating")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    settings = dict(img_size=args.img_size, patch_size=16, width=None, small_stem=False, stop_grad_conv1=False, timm_kwargs={})
    encoder = build_encoder(args.arch, **settings, hidden_dim=8, out_dim=8).to(device).eval()
    kinds = linear.kinds_of(encoder)
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    y = torch.randint(args.classes, (args.batch_size,), device=device)
    first = next(iter(kinds))
    sides = {
        "one head, encoded": (Head(encoder.num_features, args.classes, device), True),
        "grid, encoded": (Grid(kinds, args.classes, lincls_options.RATES, device), True),
        "grid, cached": (Grid(kinds, args.classes, lincls_options.RATES, device), False),
    }
    with torch.no_grad():
        features = linear.features_of(encoder, x)
    seconds = {name: [] for name in sides}
    clock = time.perf_counter if device.type == "cuda" else time.process_time  # of all threads
    for step in range(args.steps + 1):
        for name, (head, encodes) in sides.items():
            synchronise(device)
            start = clock()
            if encodes:
                with torch.no_grad():
                    features = linear.features_of(encoder, x)
            head.step(features, y)
            synchronise(device)
            if step:  # the first one warms up
                seconds[name].append(clock() - start)
    fastest = {name: min(values) for name, values in seconds.items()}  # the others were disturbed
    heads = len(sides["grid, encoded"][0].grid.names())
    print(
        f"{args.arch}, {args.img_size} px, batch {args.batch_size}, {args.classes} classes; grid of {heads} heads ({first} ...)"
    )
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    print(f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}; fastest of {args.steps} steps\n")
    print(f"{'':<20}{'ms a step':>12}{'over one head':>16}")
    for name, time_ in fastest.items():
        print(f"{name:<20}{1000 * time_:>12.1f}{time_ / fastest['one head, encoded']:>16.2f}")


class Head:
    """One linear layer, trained by torch's own SGD."""

    def __init__(self, width, classes, device):
        self.layer = torch.nn.Linear(width, classes, device=device)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.1, momentum=0.9)

    def step(self, features, labels):
        self.optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(self.layer(features[:, : self.layer.in_features]), labels)
        loss.backward()
        self.optimizer.step()


class Grid:
    """The grid of main_lincls.py."""

    def __init__(self, kinds, classes, rates, device):
        self.grid = linear.LinearGrid(kinds, classes, rates).to(device)
        self.optimizer = torch.optim.SGD(self.grid.parameters(), lr=1.0, momentum=0.9)

    def step(self, features, labels):
        self.grid.train_step(self.optimizer, features, labels)


def synchronise(device):
    """Wait for the GPU, if there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
