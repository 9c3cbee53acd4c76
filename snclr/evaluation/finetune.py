"""Fine-tunes an encoder together with a linear classifier on top of it."""

import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .. import augment, optim
from ..loader import EpochLoader
from ..running import distributed
from ..running.batch_norm import synchronise_batch_norm
from ..running.precision import autocast, widen
from .features import encode_share
from .options import STATE_FILE
from .task import Task

# peak learning rates of encoder and head for a batch of 256, and weight decay
DEFAULTS = {"sgd": (0.02, 0.2, 0.0), "adamw": (5e-4, 5e-3, 0.05)}
# the same for an untrained encoder, which has no reason to learn more slowly than its head
FROM_SCRATCH = {"sgd": (0.1, 0.1, 5e-4), "adamw": (5e-4, 5e-4, 0.05)}


class Classifier(nn.Module):
    """An encoder and a linear layer, initialised as N(0, 0.01).

    Images (B, C, S, S) to logits (B, classes).
    """

    def __init__(self, encoder: nn.Module, num_classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.num_features, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder.embed(x))


def run(task: Task) -> tuple[dict, np.ndarray]:
    """Train encoder and classifier; returns the results after the last epoch and the confusion
    counts (classes, classes).

    Validation images choose nothing.
    """
    args, train, device, scaler = task.args, task.train, task.device, task.scaler
    settings = resolve_settings(task)
    loader = EpochLoader(train, task.recipe, args.batch_size, device, args.workers)
    model = Classifier(task.encoder, len(train.classes)).to(device)
    model = synchronise_batch_norm(model, device)
    rates = {name: settings[name] * args.batch_size / 256 for name in ("lr", "head_lr")}
    optimizer = build_optimizer(model, **settings | rates)
    epoch, _ = task.resume(STATE_FILE, model, optimizer)
    network = distributed.replicate(model, device)
    labels = train.labels.to(device)
    start = time.perf_counter()
    while epoch < args.epochs:
        network.train()
        for batch, (ids, (x,)) in enumerate(loader.epoch(epoch)):
            step = epoch * loader.steps_per_epoch + batch
            for group in optimizer.param_groups:
                group["lr"] = optim.learning_rate(
                    step,
                    peak=group["peak"],
                    steps_per_epoch=loader.steps_per_epoch,
                    warmup_epochs=args.warmup_epochs,
                    epochs=args.epochs,
                )
            # stochastic layers draw from (seed, step, rank), so a resumed run needs no saved state
            # of the random generator
            torch.manual_seed(int(augment.keyed_bits(args.seed, step, distributed.rank())) >> 1)
            with autocast(task.amp, device):
                logits = network(x)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(cross_entropy(widen(logits), labels[ids])).backward()
            scaler.step(optimizer)
            scaler.update()
        epoch += 1
        if epoch % max(1, args.epochs // 5) == 0 or epoch == args.epochs:
            top1, _, _ = evaluate_classifier(task, model)
            task.report_epoch(train, loader.replaced, epoch, f"top-1 {top1:.2f} %", start)
        task.save(STATE_FILE, model, optimizer, epoch, history=[])
    top1, top5, counts = evaluate_classifier(task, model)
    task.log(
        f"fine-tuned: top-1 {top1:.2f} %, top-5 {top5:.2f} % on {len(task.val)} images, "
        "after the last epoch"
    )
    return {"finetune_top1": top1, "finetune_top5": top5, "finetune": settings}, counts


def resolve_settings(task: Task) -> dict:
    """Optimiser, base rates, weight decay and layer decay: from the flags, else the defaults of
    this kind of encoder.
    """
    args, is_vit = task.args, getattr(task.encoder, "kind", None) == "vit"
    from_scratch = args.encoder == "untrained"
    name = args.optimizer or ("adamw" if is_vit else "sgd")
    default_lr, head_lr, weight_decay = (FROM_SCRATCH if from_scratch else DEFAULTS)[name]
    lr = args.lr or default_lr
    return {
        "optimizer": name,
        "lr": lr,
        "head_lr": args.head_lr or lr * (head_lr / default_lr),
        "weight_decay": weight_decay if args.wd is None else args.wd,
        "layer_decay": args.layer_decay or (0.75 if is_vit and not from_scratch else 1.0),
    }


def build_optimizer(
    model: Classifier,
    optimizer: str,
    lr: float,
    head_lr: float,
    weight_decay: float,
    layer_decay: float,
) -> torch.optim.Optimizer:
    """'sgd' (momentum 0.9) or 'adamw'. Each group's 'peak' is its rate before the schedule, derived
    from lr in the encoder, and head_lr in the head.

    layer_decay: the rate of a layer is that of the next one times this factor (optim.layer_scales);
    1: all layers have the same rate. Raises UsageError if the encoder does not name its layers.
    """
    scales = optim.layer_scales(model.encoder, layer_decay, "", "--layer-decay")
    groups = optim.parameter_groups(model.encoder.named_parameters(), weight_decay, scales)
    groups = [{**group, "peak": lr * group.get("lr_scale", 1.0)} for group in groups]
    head = optim.parameter_groups(model.head.named_parameters(), weight_decay)
    groups += [{**group, "peak": head_lr} for group in head]
    return optim.of_groups(optimizer, groups)


@torch.no_grad()
def evaluate_classifier(task: Task, model: Classifier) -> tuple[float, float, np.ndarray]:
    """Top-1 and top-5 in percent, and confusion counts (classes, classes), on the validation images
    of all ranks.
    """
    classes, device = len(task.train.classes), task.device
    model.eval()

    def best_classes(x):
        with autocast(task.amp, device):
            return model(x).topk(min(5, classes), dim=1).indices

    best, labels = encode_share(best_classes, task.val, task.load)
    counts = torch.bincount(labels * classes + best[:, 0], minlength=classes**2)
    counts = distributed.all_sum(counts.to(device)).cpu().numpy().reshape(classes, classes)
    among_best = distributed.all_sum((best == labels[:, None]).sum().to(device)).item()
    return 100 * counts.trace() / len(task.val), 100 * among_best / len(task.val), counts
