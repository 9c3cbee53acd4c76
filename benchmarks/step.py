#!/usr/bin/env python3
"""A training step of main_snclr.py without its images: what the method costs, and what each accelerator gains by itself.

    python benchmarks/step.py                        ViT-S/16 at 224 px, 8 images, ResNet-18 at 32 px: some minutes on a CPU
    python benchmarks/step.py -b 128 --cifar-batch 512 --steps 20 --compile      for a GPU
    python benchmarks/step.py --only method          one table of: method, vit, resnet, local, optimiser

Each row is against the first of its table; the sides alternate within one run. The images are noise.
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
from snclr.running.precision import autocast, resolve_amp

VIT = "@configs/vit_small_imagenet.args DATA --dataset tree --amp off"
RESNET = "@configs/cifar10_resnet18.args DATA --amp off"


class Step:
    """What train_epoch of main_snclr.py does with a batch. flags: of main_snclr.py; channels_last: of the convolutions."""

    def __init__(
        self,
        flags: str,
        batch: int,
        device: torch.device,
        *,
        channels_last: bool = False,
        joins: bool | None = None,
    ):
        args = parse(flags)
        torch.manual_seed(0)
        self.amp, self.device = resolve_amp(args.amp, device), device
        layout = torch.channels_last if channels_last else torch.preserve_format
        self.model = (
            build_model(args, bfloat16=self.amp == "bf16").to(device, memory_format=layout).train()
        )
        if joins is not None:
            self.model.joins_views = joins
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
    """Flags of main_snclr.py, for noise instead of images."""
    here = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(here)
    words = [
        word.replace("@configs", f"@{root}/configs").replace("DATA", root) for word in flags.split()
    ]
    return options.parse(words)


class Optimiser:
    """One optimiser step over a model's parameters with given gradients, in one of torch's implementations."""

    def __init__(self, device, **implementation):
        model = build_model(parse(VIT)).to(device)
        groups = optim.parameter_groups(model.named_parameters(), 0.1)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, **implementation)
        for group in groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)

    def __call__(self):
        self.optimizer.step()


def tables(args, device) -> dict:
    """The sides of each table, made when they are asked for."""
    vit = lambda more="", **how: Step(f"{VIT} {more}", args.batch, device, **how)  # noqa: E731
    resnet = lambda more="", **how: Step(f"{RESNET} {more}", args.cifar_batch, device, **how)  # noqa: E731
    amp = "--amp bf16"
    return {
        "method": lambda: {
            "ViT-S/16, mocov3": vit(f"{amp} --method mocov3"),
            "ViT-S/16, snclr": vit(amp),
            "ViT-S/16, mocov3, float32": vit("--method mocov3"),
            "ViT-S/16, snclr, float32": vit(),
        },
        "vit": lambda: {
            "ViT-S/16, float32, a view at a time": vit(joins=False),
            "both views in one call": vit(),
            "bfloat16, a view at a time": vit(amp, joins=False),
            "bfloat16": vit(amp),
            "bfloat16, --grad-checkpointing": vit(f"{amp} --grad-checkpointing"),
            **({"bfloat16, compiled": vit(f"{amp} --compile")} if args.compile else {}),
        },
        "resnet": lambda: {
            "ResNet-18 (CIFAR stem), float32": resnet(),
            "bfloat16": resnet(amp),
            "bfloat16, channels-last": resnet(amp, channels_last=True),
            **(
                {"the same, compiled": resnet(f"{amp} --compile", channels_last=True)}
                if args.compile
                else {}
            ),
        },
        "local": lambda: {
            "ResNet-18 (CIFAR stem), two views of 32 px": resnet(),
            "and 2 local views of 16 px": resnet("--local-views 2"),
            "and 6 local views of 16 px": resnet("--local-views 6"),
            "ViT-S/16, two views of 224 px": vit(),
            "and 2 local views of 96 px": vit("--local-views 2"),
            "and 6 local views of 96 px": vit("--local-views 6"),
        },
        "optimiser": lambda: {
            "AdamW on ViT-S, parameter by parameter": Optimiser(device, foreach=False, fused=False),
            "foreach": Optimiser(device, foreach=True),
            "fused": Optimiser(device, fused=True),
        },
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-b", "--batch", type=int, default=8, help="images of the ViT's batch")
    parser.add_argument("--cifar-batch", type=int, default=64, help="images of the ResNet's batch")
    parser.add_argument("--steps", type=int, default=5, help="steps of each side, alternating")
    parser.add_argument(
        "--compile", action="store_true", help="compiled backbones, too: minutes more"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="TABLE", help="method, vit, resnet, local, optimiser"
    )
    args = parser.parse_args()
    device = process_group.own_device()
    print(
        f"batch {args.batch} (ResNet {args.cifar_batch}); {measure.hardware(device)}; fastest of {args.steps}"
    )
    for name, make in tables(args, device).items():
        if args.only and name not in args.only:
            continue
        sides = make()
        seconds = measure.fastest(sides, args.steps, device)
        first = next(iter(seconds.values()))
        rows = []
        for side, taken in seconds.items():
            rate = f"{sides[side].images / taken:.1f}" if hasattr(sides[side], "images") else ""
            rows.append([side, f"{1000 * taken:.1f}", rate, f"{taken / first:.2f}"])
        print("\n" + measure.table([name, "ms a step", "images/s", "of the first"], rows))


if __name__ == "__main__":
    main()
