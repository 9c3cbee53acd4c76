#!/usr/bin/env python3
"""Training on small images, end to end with data, beside lightly: NNCLR on the same images, backbone, batch and threads.

    pip install -r benchmarks/requirements.txt
    taskset -c 0 python benchmarks/peers.py /data/cifar10                   one core
    python benchmarks/peers.py /data/cifar10 -b 512 -j 16 --turn 40         a GPU; the workers are lightly's: ours needs none

Ours is train_epoch of main_snclr.py with configs/cifar10_resnet18.args; lightly's are its loader, transforms, heads, bank and
loss, in the loop of its own NNCLR example, with our widths, bank size and optimiser. All sides alternate within one run.
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import NNCLRPredictionHead, NNCLRProjectionHead, NNMemoryBankModule
from lightly.transforms import SimCLRTransform

import main_snclr
from benchmarks import measure
from snclr import augment, optim, options
from snclr.builder import build_model
from snclr.datasets import sources
from snclr.datasets.images import ImageSet
from snclr.loader import TwoViewLoader
from snclr.running import process_group
from snclr.running.guard import Guard
from snclr.running.log import Log
from snclr.running.precision import autocast, resolve_amp
from snclr.running.preemption import Interruptions

RECIPE = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs", "cifar10_resnet18.args"
)


class Ours:
    """Steps of main_snclr.py. flags: beside the recipe's."""

    def __init__(self, flags: list[str], train: ImageSet, device: torch.device, turn: int):
        self.args = args = options.parse([f"@{RECIPE}", *flags])
        torch.manual_seed(0)
        self.amp, self.turn, self.step = resolve_amp(args.amp, device), turn, 0
        layout = (
            torch.channels_last
            if device.type == "cuda" or self.amp != "off"
            else torch.preserve_format
        )
        model = build_model(args, bfloat16=self.amp == "bf16").to(device, memory_format=layout)
        bank = model.memory_bank  # full, as lightly's is from the start
        bank.enqueue(
            torch.randn(len(bank), args.snclr_dim, device=device),
            torch.full((len(bank),), -1, device=device),
        )
        recipe = augment.Recipe(args.seed, augment.build_views(args))
        loader = TwoViewLoader(train, recipe, args.batch_size, device, args.workers)
        optimizer = optim.build_optimizer(args.optimizer, model, args.wd)
        scaler = torch.amp.GradScaler(device.type, enabled=self.amp == "fp16")
        guard = Guard(
            model,
            loader,
            os.curdir,
            limit=args.skip_non_finite,
            scaled=scaler.is_enabled(),
        )
        self.run = main_snclr.Run(
            args=args,
            workdir=os.curdir,
            last_step=0,
            amp=self.amp,
            model=model,
            network=model,
            loader=loader,
            fingerprint="",
            val=None,
            optimizer=optimizer,
            scaler=scaler,
            guard=guard,
            interruptions=Interruptions(0, args.timeout_minutes),
            log=Log(os.curdir, step=0, enabled=False),
        )

    def __call__(self):
        self.run = self.run._replace(last_step=self.step + self.turn)
        while self.step < self.run.last_step:
            self.step = main_snclr.train_epoch(self.run, self.step)


class Lightly:
    """Steps of lightly's NNCLR example. args: our flags of the same run; amp: 'off' or 'bf16'."""

    def __init__(
        self, args: argparse.Namespace, device: torch.device, turn: int, workers: int, amp: str
    ):
        torch.manual_seed(0)
        self.device, self.turn, self.amp = device, turn, amp
        transform = SimCLRTransform(
            input_size=args.img_size, cj_strength=0.5, gaussian_blur=0.0
        )  # as in its CIFAR benchmark
        dataset = LightlyDataset(os.path.join(args.data, "train"), transform=transform)
        how = dict(
            shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
        )
        self.loader = torch.utils.data.DataLoader(
            dataset, args.batch_size, pin_memory=device.type == "cuda", **how
        )
        encoder = build_model(args).base_encoder
        features, dim, hidden = encoder.num_features, args.snclr_dim, args.snclr_mlp_dim
        encoder.fc = NNCLRProjectionHead(features, hidden, dim)
        self.encoder, self.predictor = (
            encoder.to(device),
            NNCLRPredictionHead(dim, hidden, dim).to(device),
        )
        self.bank = NNMemoryBankModule(size=(args.bank_size, dim)).to(device)
        self.criterion = NTXentLoss(temperature=args.snclr_t)
        parameters = [*self.encoder.parameters(), *self.predictor.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=args.wd)
        self.batches = self.endless()

    def endless(self):
        while True:
            yield from self.loader

    def __call__(self):
        for _ in range(self.turn):
            views = [view.to(self.device, non_blocking=True) for view in next(self.batches)[0]]
            with autocast(self.amp, self.device):
                online = [self.encoder(view) for view in views]
                predicted = [self.predictor(z) for z in online]
                near = [
                    self.bank(z.detach(), update=update)
                    for z, update in zip(online, (False, True), strict=True)
                ]
                loss = 0.5 * (
                    self.criterion(near[0], predicted[1]) + self.criterion(near[1], predicted[0])
                )
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA", help="folder with train/<class>/<image>")
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-j", "--workers", type=int, default=0, help="of lightly's loader")
    parser.add_argument(
        "--turn",
        type=int,
        default=1,
        help="training steps that a side takes before the next one does",
    )
    parser.add_argument(
        "--steps", type=int, default=3, help="turns of each side; the fastest counts"
    )
    args = parser.parse_args()
    device = process_group.own_device()
    common = [
        args.data,
        "--dataset",
        "folder",
        "--img-size",
        "32",
        "-b",
        str(args.batch_size),
        "-j",
        "0",
        "--amp",
    ]
    parsed = options.parse([f"@{RECIPE}", *common, "off"])
    train = sources.open_data(parsed)[0].to(device)
    sides = {
        "lightly, NNCLR, float32": Lightly(parsed, device, args.turn, args.workers, "off"),
        "ours, nnclr, float32": Ours(
            [*common, "off", "--method", "nnclr"], train, device, args.turn
        ),
        "ours, snclr, float32": Ours([*common, "off"], train, device, args.turn),
        "lightly, NNCLR, under bfloat16 autocast": Lightly(
            parsed, device, args.turn, args.workers, "bf16"
        ),
        "ours, nnclr, bfloat16": Ours(
            [*common, "bf16", "--method", "nnclr"], train, device, args.turn
        ),
        "ours, snclr, bfloat16": Ours([*common, "bf16"], train, device, args.turn),
    }
    seconds = measure.fastest(sides, args.steps, device)
    first, images = next(iter(seconds.values())), args.batch_size * args.turn
    print(
        f"{parsed.arch} with the small stem, {len(train)} images, batch {args.batch_size}; {measure.hardware(device)}\n"
    )
    print(
        measure.table(
            ["", "images/s", "ratio"],
            [[n, f"{images / t:.1f}", f"{first / t:.2f}"] for n, t in seconds.items()],
        )
    )


if __name__ == "__main__":
    main()
