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

from benchmarks import measure
from benchmarks.training import CIFAR, Training
from snclr import options
from snclr.builder import build_model
from snclr.datasets import sources
from snclr.running import process_group
from snclr.running.precision import autocast


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
    flags = f"--dataset folder --img-size 32 -b {args.batch_size} -j 0 --amp"
    common = [CIFAR, args.data, *flags.split()]
    parsed = options.parse([*common, "off"])
    train = sources.open_data(parsed)[0].to(device)

    def lightly(amp: str) -> Lightly:
        return Lightly(parsed, device, args.turn, args.workers, amp)

    def ours(*flags: str) -> Training:
        return Training([*common, *flags], train, device, args.turn)

    sides = {
        "lightly, NNCLR, float32": lightly("off"),
        "ours, nnclr, float32": ours("off", "--method", "nnclr"),
        "ours, snclr, float32": ours("off"),
        "lightly, NNCLR, under bfloat16 autocast": lightly("bf16"),
        "ours, nnclr, bfloat16": ours("bf16", "--method", "nnclr"),
        "ours, snclr, bfloat16": ours("bf16"),
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
