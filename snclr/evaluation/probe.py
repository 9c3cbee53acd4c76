"""Trains linear classifiers on frozen features, and reports one of them: by default the best on
held-out training images.
"""

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..datasets.images import ImageSet
from ..datasets.split import hold_out
from ..loader import EpochLoader
from ..running import distributed
from ..running.devices import send
from . import cache, features
from .linear import NORMS, LinearGrid, kinds_of
from .options import NOT_IN_FEATURES, STATE_FILE
from .task import Task

RETRAIN_FILE = "retrain_last.pth.tar"  # in the workdir
MOCOV3_RATES = {"vit": 3.0, "resnet": 0.1}  # Chen et al. 2021 and their code, by kind of encoder
PRECISIONS = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}
Share = tuple[Tensor, Tensor]  # features (n_r, F) and labels (n_r,) of this rank's part of a set


def run(task: Task, train_share: Share, val_share: Share) -> tuple[dict, np.ndarray]:
    """Train by --protocol. Returns the results and the confusion counts (classes, classes)."""
    args = task.args
    if args.protocol == "mocov3":
        result, counts = run_mocov3(task, val_share)
    else:
        result, counts = run_grid(task, train_share, val_share)
        if args.retrain:
            result |= retrain(task, result["best_head"], val_share)
    if features.digest(task.encoder) != task.identity["encoder_digest"]:
        raise RuntimeError("the encoder changed during its evaluation: this is a bug")
    names = ("protocol", "epochs", "batch_size", "crop_min")
    result["probe"] = {name: getattr(args, name) for name in names} | {"amp": task.amp}
    if args.cache_features:
        result["probe"]["cache_copies"] = args.cache_copies
    return result, counts


def run_grid(task: Task, train_share: Share, val_share: Share) -> tuple[dict, np.ndarray]:
    """Train a grid of heads on the training images that are not held out. Report the head that is
    best on the held-out ones.

    With --select val nothing is held out, and the validation images choose the head.
    """
    args, images, selection = task.args, task.train, val_share
    choice = f"the validation images, on which it is also reported; trained on {len(images)}"
    if args.select == "heldout":
        is_held = hold_out(images, args.heldout, args.seed)
        rank_held = is_held[distributed.rank() :: distributed.world_size()]
        selection = train_share[0][rank_held], train_share[1][rank_held]
        images = images.select(np.flatnonzero(~is_held.numpy()))
        choice = f"{is_held.sum()} held-out training images; trained on the other {len(images)}"
    grid = new_heads(task, kinds_of(task.encoder), args.lrs)
    (top1, _), _ = train_heads(task, grid, images, selection, STATE_FILE, f"best {args.select}")
    heads = results_of(grid, args.lrs, accuracies(grid, *val_share))
    best = int(top1.argmax())
    for head, percent in zip(heads, top1.tolist(), strict=True):
        head[f"{args.select}_top1"] = percent
    protocol = f"grid: best of {len(heads)} heads on {choice}; {describe_training(task)}"
    task.log(table(heads, args.lrs))
    result = report(task, "linear probe", heads[best], protocol)
    result |= {"best_head": heads[best], "select": args.select, "heads": heads}
    return result, distributed.all_sum(grid.confusion(best, *val_share)).cpu().numpy()


def retrain(task: Task, head: dict, val_share: Share) -> dict:
    """Train only the chosen head of the grid again, on all training images."""
    kind, lrs = head["features"], [head["lr"]]
    heads = new_heads(task, {kind: kinds_of(task.encoder)[kind]}, lrs, (head["norm"],))
    percents, _ = train_heads(task, heads, task.train, val_share, RETRAIN_FILE, "retrained, val")
    (retrained,) = results_of(heads, lrs, percents)
    protocol = f"retrained on all {len(task.train)} training images; {describe_training(task)}"
    report(task, "retrained probe", retrained, protocol)
    return {
        "retrained_protocol": protocol,
        "retrained_top1": retrained["val_top1"],
        "retrained_top5": retrained["val_top5"],
    }


def run_mocov3(task: Task, val_share: Share) -> tuple[dict, np.ndarray]:
    """MoCo v3's protocol: one plain head on the class token or the pooled features of all images.

    Its learning rate is the published one and changes from epoch to epoch, not from step to step.
    One difference to the published code: an incomplete last batch of an epoch is left out.
    """
    kind, width = next(iter(kinds_of(task.encoder).items()))
    lrs = [MOCOV3_RATES[getattr(task.encoder, "kind", "resnet")]]
    heads = new_heads(task, {kind: width}, lrs, ("plain",))
    percents, history = train_heads(task, heads, task.train, val_share, STATE_FILE, "val")
    (head,) = results_of(heads, lrs, percents)
    best = int(np.argmax(history))
    protocol = (
        f"mocov3: one head on all {len(task.train)} training images, after the last epoch; "
        f"{describe_training(task)}"
    )
    result = report(task, "linear probe", head, protocol)
    task.log(f"  best epoch on the validation images: {best + 1}, top-1 {history[best]:.2f} %")
    result |= {"best_head": head, "heads": [head]}
    result |= {"best_epoch": best + 1, "best_epoch_top1": history[best]}
    return result, distributed.all_sum(heads.confusion(0, *val_share)).cpu().numpy()


def new_heads(
    task: Task, dims: dict[str, int], lrs: list[float], norms: Sequence[str] = NORMS
) -> LinearGrid:
    """Heads with the learning rates lrs * batch/256. dims: width of each kind of features."""
    rates = [lr * task.args.batch_size / 256 for lr in lrs]
    return LinearGrid(dims, len(task.train.classes), rates, task.args.seed, norms).to(task.device)


def train_heads(
    task: Task, heads: LinearGrid, images: ImageSet, evaluated: Share, state_file: str, title: str
) -> tuple[Tensor, list[float]]:
    """Train all heads on images for --epochs, or for the rest of them after a resume.

    Returns top-1 and top-5 (2, heads) in percent on `evaluated` after the last epoch, and the best
    head's top-1 after each epoch. title: name of that top-1 in the lines that show progress.
    """
    args, labels = task.args, images.labels.to(task.device)
    loader = EpochLoader(images, task.recipe, args.batch_size, task.device, args.workers)
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    epoch, history = task.resume(state_file, heads, optimizer)
    cached = cached_features(task, loader) if args.cache_features and epoch < args.epochs else None
    correct, start = accuracies(heads, *evaluated), time.perf_counter()
    while epoch < args.epochs:
        for step, (ids, x) in enumerate(epoch_features(task, loader, epoch, cached)):
            position = epoch if args.protocol == "mocov3" else epoch + step / loader.steps_per_epoch
            optimizer.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * position / args.epochs))
            heads.train_step(optimizer, x, labels[ids])
        epoch += 1
        correct = accuracies(heads, *evaluated)
        history.append(correct[0].max().item())
        text = f"{title} top-1 {history[-1]:.2f} %"
        task.report_epoch(images, loader.replaced, epoch, text, start)
        task.save(state_file, heads, optimizer, epoch, history)
    return correct, history


def cached_features(task: Task, loader: EpochLoader) -> Tensor:
    """Features (copies, n, F) float32 of all images of a loader, the same on every rank.

    --cache-copies 1: the view that evaluation uses; more: that many random crops of each image,
    those of epochs 0 .. copies - 1 of `loader`. Above --cache-limit-gb they are in a file.
    """
    args, images = task.args, loader.images

    def load_parts(copy, parts):
        if args.cache_copies == 1:
            return task.load(images, np.concatenate(parts), chunk=features.CHUNK)
        return (x for _, (x,) in loader.load([(copy, part) for part in parts]))

    def chunks():
        for copy in range(args.cache_copies):
            yield from features.encode_in_order(task.embed, len(images), partial(load_parts, copy))

    shape = (args.cache_copies, len(images), max(kinds_of(task.encoder).values()))
    key = partial(cache_key, task, images)
    return cache.keep(chunks(), shape, args.workdir, key, args.cache_limit_gb * 2**30)


def cache_key(task: Task, images: ImageSet) -> str:
    """SHA-256 of everything that cached features depend on, see features.key_of.

    A new flag is part of the key unless its definition has changes_features=False.
    """
    return features.key_of(
        images,
        sorted((name, x) for name, x in vars(task.args).items() if name not in NOT_IN_FEATURES),
        sorted((name, x) for name, x in task.info.items() if name not in ("epoch", "notes")),
        (task.identity["encoder_digest"], task.amp, task.device.type),
    )


def epoch_features(
    task: Task, loader: EpochLoader, epoch: int, cached: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's (ids, features) of each batch: from the cache, or of crops, encoded now."""
    if cached is None:
        for ids, (x,) in loader.epoch(epoch):
            yield ids, task.embed(x)
        return
    for _, part in loader.requests(epoch):
        ids, x = torch.from_numpy(part), cached[epoch % len(cached), part]
        yield send(ids, task.device), send(x, task.device)


def accuracies(heads: LinearGrid, x: Tensor, labels: Tensor) -> Tensor:
    """Top-1 and top-5 of every head in percent, (2, heads), over the images of all ranks."""
    total = distributed.all_sum(torch.tensor(float(len(labels)), device=heads.rates.device))
    return 100 * distributed.all_sum(heads.correct(x, labels)).cpu().double() / total.cpu()


def results_of(heads: LinearGrid, lrs: list[float], percents: Tensor) -> list[dict]:
    """Features, norm, base rate, top-1 and top-5 of each head. percents (2, heads): top-1 and top-5
    on the validation images.
    """
    return [
        {"features": kind, "norm": norm, "lr": lrs[rate], "val_top1": top1, "val_top5": top5}
        for (kind, norm, rate), top1, top5 in zip(heads.names(), *percents.tolist(), strict=True)
    ]


def describe_training(task: Task) -> str:
    """A description of schedule, crops and precision."""
    args, crops = task.args, "whole images, flipped at random"
    if args.crop_min < 1:
        crops = f"crops of at least {args.crop_min:.0%} of the area"
    if args.cache_features:
        crops = f"{args.cache_copies} copies: {crops}" if args.cache_copies > 1 else "no crops"
    return (
        f"{args.epochs} epochs, batch {args.batch_size}, {crops}, encoder in {PRECISIONS[task.amp]}"
    )


def report(task: Task, title: str, head: dict, protocol: str) -> dict:
    """Print the results of a head, and return its entries in results.json."""
    task.log(
        f"{title}: top-1 {head['val_top1']:.2f} %, top-5 {head['val_top5']:.2f} % "
        f"on {len(task.val)} images"
    )
    task.log(f"  ({protocol}; {head['features']}, {head['norm']}, base lr {head['lr']:g})")
    return {
        "linear_top1": head["val_top1"],
        "linear_top5": head["val_top5"],
        "best_lr": head["lr"],
        "protocol": protocol,
    }


def table(heads: list[dict], rates: list[float]) -> str:
    """Validation top-1 of every head as text: one line for each learning rate, one column for each
    input.
    """
    inputs = list(dict.fromkeys((head["features"], head["norm"]) for head in heads))
    names = [f"{kind}, {norm}" for kind, norm in inputs]
    lines = ["base lr    " + "  ".join(f"{name:>20}" for name in names)]
    for number, rate in enumerate(rates):
        cells = [head["val_top1"] for head in heads[number :: len(rates)]]
        lines.append(f"{rate:<9g}  " + "  ".join(f"{top1:>18.2f} %" for top1 in cells))
    return "\n".join(lines)
