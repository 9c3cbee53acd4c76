#!/usr/bin/env python3
"""Speed of training on small images, data loading included, compared with lightly's NNCLR.

    pip install -r benchmarks/requirements.txt
    # one core
    taskset -c 0 python benchmarks/peers.py /data/cifar10
    # a GPU; only lightly needs the workers
    python benchmarks/peers.py /data/cifar10 -b 512 -j 16 --turn 40

Ours is train_epoch of main_snclr.py with configs/cifar10_resnet18.args. Lightly's has its loader,
transforms, heads, bank and loss, in the loop of its NNCLR example. Images, backbone, widths, bank
size, batch, optimiser and threads are the same. The rows alternate within one run.
"""

import argparse
import importlib.util
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

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
    """One call is `turn` steps of main_snclr.py. flags: in addition to those of the recipe."""

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
        bank = model.memory_bank  # full, as lightly's bank is from the start
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
    """One call is `turn` steps of lightly's NNCLR example. amp: 'off' or 'bf16'."""

    def __init__(
        self, args: argparse.Namespace, device: torch.device, turn: int, workers: int, amp: str
    ):
        from lightly.data import LightlyDataset
        from lightly.loss import NTXentLoss
        from lightly.models import modules
        from lightly.transforms import SimCLRTransform

        torch.manual_seed(0)
        self.device, self.turn, self.amp = device, turn, amp
        # the settings of lightly's CIFAR benchmark
        transform = SimCLRTransform(input_size=args.img_size, cj_strength=0.5, gaussian_blur=0.0)
        dataset = LightlyDataset(os.path.join(args.data, "train"), transform=transform)
        self.loader = torch.utils.data.DataLoader(
            dataset,
            args.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )
        encoder = build_model(args).base_encoder
        features, dim, hidden = encoder.num_features, args.snclr_dim, args.snclr_mlp_dim
        encoder.fc = modules.NNCLRProjectionHead(features, hidden, dim)
        self.encoder = encoder.to(device)
        self.predictor = modules.NNCLRPredictionHead(dim, hidden, dim).to(device)
        self.bank = modules.NNMemoryBankModule(size=(args.bank_size, dim)).to(device)
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
                nearest = [
                    self.bank(z.detach(), update=update)
                    for z, update in zip(online, (False, True), strict=True)
                ]
                loss = 0.5 * (
                    self.criterion(nearest[0], predicted[1])
                    + self.criterion(nearest[1], predicted[0])
                )
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def main():
    parser = measure.argument_parser(__doc__)
    parser.add_argument("data", metavar="DATA", help="folder with train/<class>/<image>")
    parser.add_argument("-b", "--batch-size", type=int, default=64, metavar="N", help="per step")
    parser.add_argument("-j", "--workers", type=int, default=0, metavar="N", help="of lightly")
    parser.add_argument(
        "--turn",
        type=int,
        default=1,
        metavar="N",
        help="training steps of one turn; the rows take turns",
    )
    parser.add_argument(
        "--steps", type=int, default=3, metavar="N", help="turns of each row; the fastest counts"
    )
    args = parser.parse_args()
    if importlib.util.find_spec("lightly") is None:
        parser.error("lightly is not installed: pip install -r benchmarks/requirements.txt")
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
        f"{parsed.arch} with the small stem, {len(train)} images, batch {args.batch_size}; "
        f"{measure.hardware(device)}\n"
    )
    rows = [[n, f"{images / t:.1f}", f"{first / t:.2f}"] for n, t in seconds.items()]
    print(measure.table(["", "images/s", "ratio"], rows))


if __name__ == "__main__":
    main()
