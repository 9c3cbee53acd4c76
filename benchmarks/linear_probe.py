#!/usr/bin/env python3
"""Time of a step of the linear probe: the grid of heads compared with one head.

    python benchmarks/linear_probe.py                       ViT-S at 224 px, about a minute on a CPU
    python benchmarks/linear_probe.py -b 1024 --steps 20    the batch size of ImageNet, for a GPU

Both are timed with features that the step encodes and with cached ones. The images are random.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from benchmarks import measure
from snclr.backbones import build_encoder
from snclr.evaluation import linear
from snclr.evaluation import options as lincls_options
from snclr.running import process_group


def main():
    parser = measure.argument_parser(__doc__)
    parser.add_argument("--arch", default="vit_small", help="backbone")
    parser.add_argument("--img-size", type=int, default=224, metavar="PX", help="image size")
    parser.add_argument(
        "-b", "--batch-size", type=int, default=32, metavar="N", help="images per step"
    )
    parser.add_argument("--classes", type=int, default=1000, metavar="N", help="number of classes")
    parser.add_argument(
        "--steps", type=int, default=4, metavar="N", help="steps of each row; the fastest counts"
    )
    args = parser.parse_args()
    device = process_group.own_device()
    torch.manual_seed(0)
    encoder = build_encoder(
        args.arch,
        img_size=args.img_size,
        patch_size=16,
        width=None,
        small_stem=False,
        stop_grad_conv1=False,
        timm_kwargs={},
        hidden_dim=8,
        out_dim=8,
    )
    encoder = encoder.to(device).eval()
    kinds = linear.kinds_of(encoder)
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    y = torch.randint(args.classes, (args.batch_size,), device=device)

    @torch.no_grad()
    def encode():
        return linear.features_of(encoder, x)

    cached = encode()
    head = torch.nn.Linear(encoder.num_features, args.classes, device=device)
    head_optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    grid = linear.LinearGrid(kinds, args.classes, lincls_options.RATES).to(device)
    grid_optimizer = torch.optim.SGD(grid.parameters(), lr=1.0, momentum=0.9)

    def train_head(features):
        head_optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(features[:, : head.in_features]), y).backward()
        head_optimizer.step()

    steps = {
        "one head, encoded": lambda: train_head(encode()),
        "grid, encoded": lambda: grid.train_step(grid_optimizer, encode(), y),
        "one head, cached": lambda: train_head(cached),
        "grid, cached": lambda: grid.train_step(grid_optimizer, cached, y),
    }
    seconds = measure.fastest(steps, args.steps, device)
    heads = len(grid.names())
    print(
        f"{args.arch}, {args.img_size} px, batch {args.batch_size}, {args.classes} classes; "
        f"grid of {heads} heads"
    )
    print(f"{measure.hardware(device)}; fastest of {args.steps} steps\n")
    reference = seconds["one head, encoded"]
    rows = [
        [name, f"{1000 * time:.1f}", f"{time / reference:.3f}"] for name, time in seconds.items()
    ]
    print(measure.table(["", "ms per step", "over one head, encoded"], rows))


if __name__ == "__main__":
    main()
