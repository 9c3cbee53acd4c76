"""Trains linear classifiers on frozen features, and reports the one that was chosen on held-out
images.
"""

import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..loader import ImageSet, ViewLoader
from ..running import distributed
from . import features, state
from .labels import hold_out
from .linear import LinearGrid, kinds_of
from .options import NOT_IN_FEATURES, STATE_FILE
from .task import Task, crop_loader, rank_batches, report_epoch, steps_per_epoch

Share = tuple[Tensor, Tensor]  # features (n_r, F) and labels (n_r,) of this rank's part of a set


def run(task: Task, train_share: Share, val_share: Share) -> tuple[dict, np.ndarray]:
    """Train the grid of heads; returns the results, and the confusion counts (classes, classes) of
    the chosen head.
    """
    args, train, select = task.args, task.train, task.args.select
    is_held = torch.zeros(len(train), dtype=torch.bool)
    if select == "heldout":
        is_held = hold_out(train, args.heldout, args.seed)
    rank_held = is_held[distributed.rank() :: distributed.world_size()]
    heldout_share = train_share[0][rank_held], train_share[1][rank_held]
    fit = train.select(np.flatnonzero(~is_held.numpy()))
    rates = [rate * args.batch_size / 256 for rate in args.lrs]
    grid = LinearGrid(kinds_of(task.encoder), len(train.classes), rates, args.seed)
    grid = grid.to(task.device)
    selected, _ = train_heads(task, grid, fit, val_share if select == "val" else heldout_share)
    best = int(selected[0].argmax())
    heads = [
        {
            "features": kind,
            "norm": norm,
            "lr": args.lrs[rate],
            f"{select}_top1": select_top1,
            "val_top1": top1,
            "val_top5": top5,
        }
        for (kind, norm, rate), select_top1, top1, top5 in zip(
            grid.names(), selected[0].tolist(), *accuracies(grid, *val_share).tolist(), strict=True
        )
    ]
    head = heads[best]
    protocol = (
        f"best head on {int(is_held.sum())} held-out training images; "
        f"trained on the other {len(fit)}"
    )
    if select == "val":
        protocol = "best head on the validation images, on which it is also reported"
    task.log(table(heads, args.lrs))
    task.log(
        f"linear probe: top-1 {head['val_top1']:.2f} %, top-5 {head['val_top5']:.2f} % "
        f"on {len(task.val)} images"
    )
    task.log(f"  ({protocol}: {head['features']}, {head['norm']}, base lr {head['lr']:g})")
    result = {
        "linear_top1": head["val_top1"],
        "linear_top5": head["val_top5"],
        "best_lr": head["lr"],
        "best_head": head,
        "select": select,
        "protocol": protocol,
        "heads": heads,
    }
    return result, distributed.all_sum(grid.confusion(best, *val_share)).cpu().numpy()


def train_heads(
    task: Task, heads: LinearGrid, images: ImageSet, evaluated: Share
) -> tuple[Tensor, list[float]]:
    """Train all heads on images for --epochs, or what is left of them after a resume.

    Returns top-1 and top-5 (2, heads) on `evaluated` after the last epoch, and the best head's
    top-1 after each epoch.
    """
    args, labels = task.args, images.labels.to(task.device)
    steps = steps_per_epoch(images, args.batch_size)
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    epoch, history = state.resume(task, STATE_FILE, heads, optimizer)
    loader = crop_loader(task, images)
    cached = cached_features(task, loader) if args.cache_features else None
    correct, start = accuracies(heads, *evaluated), time.perf_counter()
    while epoch < args.epochs:
        for step, (ids, x) in enumerate(epoch_features(task, images, loader, epoch, cached)):
            position = (epoch + step / steps) / args.epochs
            optimizer.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * position))
            heads.train_step(optimizer, x, labels[ids])
        epoch += 1
        correct = accuracies(heads, *evaluated)
        history.append(correct[0].max().item())
        report_epoch(task, loader, epoch, f"best {args.select} top-1 {history[-1]:.2f} %", start)
        state.save(task, STATE_FILE, heads, optimizer, epoch, history)
    if features.digest(task.encoder) != task.encoder_digest:
        raise RuntimeError("the encoder has changed during its evaluation: this must not happen")
    return correct, history


def epoch_features(
    task: Task, images: ImageSet, loader: ViewLoader, epoch: int, cached: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's (ids, features) of each batch of an epoch: from the cache, or of random crops
    that are encoded now.
    """
    parts = rank_batches(task, images, epoch)
    if cached is None:
        for ids, x in loader.load([(epoch, part, (0,)) for part in parts]):
            yield ids, task.embed(x)
        return
    for part in parts:
        ids, x = torch.from_numpy(part), cached[epoch % len(cached), part]
        if task.device.type == "cuda":
            x = x.pin_memory()  # the host would wait for a copy from pageable memory
        yield ids.to(task.device, non_blocking=True), x.to(task.device, non_blocking=True)


def cached_features(task: Task, loader: ViewLoader) -> Tensor:
    """Features (copies, n, F) of all images of a loader, encoded now, or read from the workdir."""
    args = task.args
    return features.cache(
        task.embed,
        max(kinds_of(task.encoder).values()),
        loader,
        args.cache_copies,
        workers=args.workers,
        limit=args.cache_limit_gb * 2**30,
        folder=args.workdir,
        key=cache_key(task),
    )


def cache_key(task: Task) -> str:
    """Everything that cached features depend on, except for labels and names of the images, which
    features.cache adds.

    Derived, so that a new flag is part of the key unless options.NOT_IN_FEATURES names it.
    """
    settings = {
        name: value
        for name, value in sorted(vars(task.args).items())
        if name not in NOT_IN_FEATURES
    }
    architecture = {
        name: value for name, value in sorted(task.info.items()) if name not in ("epoch", "notes")
    }
    numerics = task.amp, task.device.type, torch.__version__
    return repr((settings, architecture, task.encoder_digest, numerics))


def accuracies(heads: LinearGrid, x: Tensor, labels: Tensor) -> Tensor:
    """Top-1 and top-5 of every head in percent, (2, heads), over the images of all ranks."""
    total = distributed.all_sum(torch.tensor(float(len(labels)), device=heads.rates.device))
    return 100 * distributed.all_sum(heads.correct(x, labels)).cpu().double() / total.cpu()


def table(heads: list[dict], rates: list[float]) -> str:
    """Validation top-1 of every head as text: one line for each learning rate, one column for each
    input.
    """
    inputs = list(dict.fromkeys((head["features"], head["norm"]) for head in heads))
    names = [f"{kind}, {norm}" for kind, norm in inputs]
    lines = ["base lr    " + "  ".join(f"{name:>20}" for name in names)]
    for number, rate in enumerate(rates):
        cells = [heads[column * len(rates) + number]["val_top1"] for column in range(len(inputs))]
        lines.append(f"{rate:<9g}  " + "  ".join(f"{top1:>18.2f} %" for top1 in cells))
    return "\n".join(lines)
