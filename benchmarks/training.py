"""A training run without its folder, for benchmarks: train_epoch of main_snclr.py, a few steps a
call.
"""

import os

import torch

import main_snclr
from snclr import augment, optim, options
from snclr.builder import build_model
from snclr.datasets.images import ImageSet
from snclr.loader import EpochLoader
from snclr.running import step_graph
from snclr.running.devices import bank_products
from snclr.running.forward import resolve_compile
from snclr.running.guard import Guard
from snclr.running.log import Log
from snclr.running.precision import resolve_amp
from snclr.running.preemption import Interruptions

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIGS = os.path.join(ROOT, "configs")
CIFAR = f"@{os.path.join(CONFIGS, 'cifar10_resnet18.args')}"
VIT = f"@{os.path.join(CONFIGS, 'vit_small_imagenet.args')}"


class Training:
    """One call is `turn` steps of main_snclr.py, from images to the optimiser; the bank is full.

    flags: a recipe and further flags of main_snclr.py. train: images on the device.
    """

    def __init__(self, flags: list[str], train: ImageSet, device: torch.device, turn: int):
        args = options.parse(flags)
        args.compile = resolve_compile(args, device)
        torch.manual_seed(0)
        amp, self.turn, self.step = resolve_amp(args.amp, device), turn, 0
        self.images = args.batch_size * turn
        layout = (
            torch.channels_last if device.type == "cuda" or amp != "off" else torch.preserve_format
        )
        model = build_model(args, products=bank_products(amp, device))
        model = model.to(device, memory_format=layout)
        if (bank := model.memory_bank) is not None:
            bank.enqueue(
                torch.randn(len(bank), args.snclr_dim, device=device),
                torch.full((len(bank),), -1, device=device),
            )
        recipe = augment.Recipe(args.seed, augment.build_views(args))
        augment_crops = main_snclr.choose_augmentation(args, device)
        loader = EpochLoader(train, recipe, args.batch_size, device, args.workers, augment_crops)
        scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        guard = Guard(model, loader, os.curdir, limit=args.skip_non_finite, scaler=scaler)
        log = Log(os.curdir, step=0, enabled=False)
        optimizer = optim.build_optimizer(args.optimizer, model, args.wd)
        self.run = main_snclr.Run(
            args=args,
            workdir=os.curdir,
            last_step=0,
            amp=amp,
            model=model,
            network=model,
            loader=loader,
            fingerprint="",
            val=None,
            optimizer=optimizer,
            scaler=scaler,
            guard=guard,
            interruptions=Interruptions(0, args.timeout_minutes),
            log=log,
            graph=step_graph.build(args, device, amp, optimizer, log.say),
        )

    def __call__(self):
        self.run = self.run._replace(last_step=self.step + self.turn)
        while self.step < self.run.last_step:
            self.step, _ = main_snclr.train_epoch(self.run, self.step)
