#!/usr/bin/env python3
"""Time of a training step without data loading: cost of the method, gain of each setting.

    # all tables: ViT-S/16 at 224 px with 8 images, ResNet-18 at 32 px; some minutes on a CPU
    python benchmarks/step.py
    # for a GPU
    python benchmarks/step.py -b 128 --cifar-batch 512 --steps 20 --compile
    # some of the tables
    python benchmarks/step.py --only method optimiser

Each row is compared with the first of its table; the rows alternate. The images are random.
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from benchmarks import measure
from snclr import augment, optim, options
from snclr.builder import build_model
from snclr.running import process_group
from snclr.running.devices import bank_products
from snclr.running.precision import autocast, resolve_amp

VIT = "@configs/vit_small_imagenet.args DATA --dataset tree --amp off"
RESNET = "@configs/cifar10_resnet18.args DATA --amp off"


class Step:
    """One call is the step of train_epoch (main_snclr.py) on a batch of random images.

    flags          flags of main_snclr.py
    batch          number of images
    channels_last  whether the weights of convolutions are in torch.channels_last
    joins_views    whether both views are encoded in one call; None: as the model decides
    """

    def __init__(
        self,
        flags: str,
        batch: int,
        device: torch.device,
        *,
        channels_last: bool = False,
        joins_views: bool | None = None,
    ):
        args = parse(flags)
        torch.manual_seed(0)
        self.amp, self.device = resolve_amp(args.amp, device), device
        layout = torch.channels_last if channels_last else torch.preserve_format
        model = build_model(args, products=bank_products(self.amp, device))
        self.model = model.to(device, memory_format=layout).train()
        if joins_views is not None:
            self.model.joins_views = joins_views
        self.optimizer = optim.build_optimizer(args.optimizer, self.model, args.wd)
        self.images = batch
        self.views = [
            torch.randn(batch, 3, view.size, view.size, device=device)
            for view in augment.build_views(args)
        ]
        self.ids = torch.arange(batch, device=device)
        if (bank := self.model.memory_bank) is not None:  # full, as it is after the first epochs
            bank.enqueue(
                torch.randn(len(bank), args.snclr_dim, device=device),
                len(self.ids) + torch.arange(len(bank), device=device),
            )

    def __call__(self):
        with autocast(self.amp, self.device):
            loss, _ = self.model(self.views, self.ids, 0.99)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optim.set_learning_rate(self.optimizer, 1e-4)
        self.optimizer.step()


def parse(flags: str) -> argparse.Namespace:
    """Parsed flags of main_snclr.py. @configs is that of the repository; DATA is never read."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    words = [
        word.replace("@configs", f"@{root}/configs").replace("DATA", root) for word in flags.split()
    ]
    return options.parse(words)


class Optimiser:
    """One call is a step of AdamW on the parameters of a ViT-S with random gradients.

    flags choose torch's implementation: foreach, fused.
    """

    def __init__(self, device: torch.device, **flags: bool):
        model = build_model(parse(VIT)).to(device)
        groups = optim.parameter_groups(model.named_parameters(), 0.1)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, **flags)
        for group in groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)

    def __call__(self):
        self.optimizer.step()


def tables(args, device) -> dict:
    """For each table a function that builds its rows: a name and what to time."""

    def vit(flags: str = "", **kwargs) -> Step:
        return Step(f"{VIT} {flags}", args.batch, device, **kwargs)

    def resnet(flags: str = "", **kwargs) -> Step:
        return Step(f"{RESNET} {flags}", args.cifar_batch, device, **kwargs)

    amp = "--amp bf16"
    choices = ["on"] * args.compile + ["graphs"] * (args.compile and device.type == "cuda")
    return {
        "method": lambda: {
            "ViT-S/16, mocov3": vit(f"{amp} --method mocov3"),
            "ViT-S/16, snclr": vit(amp),
            "ViT-S/16, mocov3, float32": vit("--method mocov3"),
            "ViT-S/16, snclr, float32": vit(),
        },
        "vit": lambda: {
            "ViT-S/16, float32, views one by one": vit(joins_views=False),
            "float32, both views in one call": vit(),
            "bfloat16, views one by one": vit(amp, joins_views=False),
            "bfloat16, both views in one call": vit(amp),
            "bfloat16, --grad-checkpointing": vit(f"{amp} --grad-checkpointing"),
            **{
                f"bfloat16, --compile {choice}": vit(f"{amp} --compile {choice}")
                for choice in choices
            },
        },
        "resnet": lambda: {
            "ResNet-18 (CIFAR stem), float32": resnet(),
            "bfloat16": resnet(amp),
            "bfloat16, channels-last": resnet(amp, channels_last=True),
            **{
                f"bfloat16, channels-last, --compile {choice}": resnet(
                    f"{amp} --compile {choice}", channels_last=True
                )
                for choice in choices
            },
        },
        "local": lambda: {
            "ResNet-18 (CIFAR stem), two views of 32 px": resnet(),
            "plus 2 local views of 16 px": resnet("--local-views 2"),
            "plus 6 local views of 16 px": resnet("--local-views 6"),
            "ViT-S/16, two views of 224 px": vit(),
            "plus 2 local views of 96 px": vit("--local-views 2"),
            "plus 6 local views of 96 px": vit("--local-views 6"),
        },
        "optimiser": lambda: {
            "AdamW on ViT-S, one parameter at a time": Optimiser(
                device, foreach=False, fused=False
            ),
            "foreach": Optimiser(device, foreach=True),
            "fused": Optimiser(device, fused=True),
        },
    }


def main():
    parser = measure.argument_parser(__doc__)
    parser.add_argument(
        "-b", "--batch", type=int, default=8, metavar="N", help="images per step, ViT"
    )
    parser.add_argument(
        "--cifar-batch", type=int, default=64, metavar="N", help="images per step, ResNet"
    )
    parser.add_argument(
        "--steps", type=int, default=5, metavar="N", help="steps of each row; the fastest counts"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also time compiled backbones: minutes more"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("method", "vit", "resnet", "local", "optimiser"),
        metavar="TABLE",
        help="tables to print: method, vit, resnet, local, optimiser; None: all",
    )
    args = parser.parse_args()
    device = process_group.own_device()
    print(
        f"batch {args.batch} (ResNet {args.cifar_batch}); {measure.hardware(device)}; "
        f"fastest of {args.steps}"
    )
    for name, make in tables(args, device).items():
        if args.only and name not in args.only:
            continue
        sides = make()
        seconds = measure.fastest(sides, args.steps, device)
        on_device = measure.device_seconds(sides, args.steps, device)
        first = next(iter(seconds.values()))
        rows = []
        for side, taken in seconds.items():
            rate = f"{sides[side].images / taken:.1f}" if hasattr(sides[side], "images") else ""
            rows.append([side, f"{1000 * taken:.1f}", rate, f"{taken / first:.2f}"])
            if on_device:
                rows[-1].append(f"{1000 * on_device[side]:.2f}")
        head = [name, "ms per step", "images/s", "over the first"]
        print("\n" + measure.table(head + ["ms on the GPU"] * bool(on_device), rows))


if __name__ == "__main__":
    main()
