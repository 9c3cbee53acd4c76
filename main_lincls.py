#!/usr/bin/env python3
"""What an encoder is worth: kNN, and a grid of linear probes on its frozen features, or fine-tuning on few labels.

    python main_lincls.py --pretrained runs/NAME/checkpoint_last.pth.tar                     the embedded data set
    python main_lincls.py /data/imagenet --pretrained FILE --workdir runs/NAME/probe         any data set of main_snclr.py
    python main_lincls.py /data/imagenet --pretrained FILE --finetune --label-fraction 0.01  semi-supervised
    bash start.sh main_lincls.py /data/imagenet --pretrained FILE                            the same on all GPUs

Reads from top to bottom: settings, encoder, data, kNN, then probe or fine-tuning, results.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from snclr.evaluation import options as lincls_options
from snclr.running.errors import UsageError, first_few, first_line, one_clear_line

if __name__ == "__main__":
    with one_clear_line("main_lincls.py"):
        lincls_options.parse(sys.argv[1:])  # a wrong flag is answered here, before the slow imports

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from snclr import augment, optim
from snclr.datasets import sources
from snclr.datasets.images import ImageSet
from snclr.evaluation import confusion, features, finetune, knn, linear
from snclr.loader import ViewLoader, share, whole_images
from snclr.running import checkpoint, distributed, process_group, tensor_files
from snclr.running.bad_images import record_bad_images
from snclr.running.batch_norm import synchronise_batch_norm
from snclr.running.lock import hold
from snclr.running.precision import autocast, resolve_amp, widen
from snclr.running.preemption import end_at_once, handlers_given_back, signals_wait
from snclr.running.provenance import save_settings, versions_and_commit
from snclr.running.safe_files import save_json, writing
from snclr.weights import reading as weights

LAST = "lincls_last.pth.tar"
KNN_K, KNN_TEMPERATURE = (10, 20, 100, 200), 0.07
RUNNING = {
    "data",
    "val",
    "labels",
    "val_labels",
    "workers",
    "workdir",
    "resume",
    "pretrained",
}  # may change on resume


class Task(NamedTuple):
    """What is evaluated on what."""

    args: argparse.Namespace
    encoder: torch.nn.Module
    train: ImageSet
    val: ImageSet
    device: torch.device
    amp: str
    digest: str  # of the encoder as it was opened
    say: Callable[[str], None]


@handlers_given_back()
@process_group.failures_named()
def main(argv: list[str]) -> None:
    args = lincls_options.parse(argv)

    # -- encoder and data ------------------------------------------------------------------------------------------------
    device = process_group.start()
    end_at_once()
    torch.manual_seed(args.seed)
    encoder, info = open_encoder(args)
    args.img_size, args.mean, args.std = info["img_size"], info["mean"], info["std"]
    train, val, notes = sources.open_data(args)
    train, val = labelled(train, val, args)
    train, encoder = train.to(device), encoder.to(device)
    if args.encoder == "untrained":
        encoder = knn.calibrated_copy(
            encoder, train, size=args.img_size, device=device, workers=args.workers
        )
    amp, speaks = resolve_amp(args.amp, device), distributed.rank() == 0
    distributed.on_rank_zero(lambda: hold(args.workdir, "main_lincls"))
    if speaks:
        save_settings(args.workdir, args, {"world_size": distributed.world_size(), "amp_used": amp})
    task = Task(
        args,
        encoder,
        train,
        val,
        device,
        amp,
        features.digest(encoder),
        print if speaks else lambda _: None,
    )
    task.say(
        f"{info['arch']} ({info['encoder']} encoder) of {args.pretrained}, {encoder.num_features} features"
    )
    task.say(
        f"{args.dataset}: {len(train)} + {len(val)} images at {args.img_size} px, {len(train.classes)} classes"
    )
    for note in info["notes"] + notes:
        task.say(f"note: {note}")

    # -- kNN, probe or fine-tuning ---------------------------------------------------------------------------------------
    shares = [
        features.encode_share(embedder(task), images, **where(task)) for images in (train, val)
    ]
    neighbours = knn_table(task, *shares)
    for name, top1 in neighbours.items():
        task.say(f"kNN {name:<15} {top1:.2f} %")
    result, counts = tune(task) if args.finetune else probe(task, *shares)

    # -- results ---------------------------------------------------------------------------------------------------------
    if speaks:
        per_class = percent_right(counts)
        result |= {
            "knn_top1": neighbours[f"k={min(KNN_K[1], len(train))} weighted"],
            "mean_per_class_top1": float(np.mean([top1 for top1 in per_class if top1 is not None])),
            "encoder": info["encoder"],
            "encoder_digest": task.digest,
            "arch": info["arch"],
            "pretrained": args.pretrained,
            "pretrained_epoch": info["epoch"],
            "dataset": args.dataset,
            "training_images": len(train),
            "label_fraction": args.label_fraction,
            "knn": neighbours,
            "per_class_top1": dict(zip(map(str, train.classes), per_class, strict=True)),
            **versions_and_commit(),
        }
        save_json(os.path.join(args.workdir, "results.json"), result)
        top1 = result["finetune_top1" if args.finetune else "linear_top1"]
        title = f"{info['arch']}: {'fine-tuned' if args.finetune else 'linear probe'} {top1:.2f} % top-1"
        with writing(path := os.path.join(args.workdir, "confusion.png")):
            confusion.picture(counts, list(map(str, train.classes)), title).save(path)
        task.say(f"kNN (k = {KNN_K[1]}, T = {KNN_TEMPERATURE}): {result['knn_top1']:.2f} %")
        task.say(f"results: {os.path.join(args.workdir, 'results.json')}, {path}")
    process_group.stop()


# -- what is evaluated -----------------------------------------------------------------------------------------------------


def open_encoder(args) -> tuple[torch.nn.Module, dict]:
    """The encoder that the flags name, and its info."""
    given = {
        name: getattr(args, name)
        for name in ("arch", "img_size", "patch_size", "width", "small_stem", "timm_kwargs")
    }
    which = "untrained" if args.encoder == "pixels" else args.encoder
    encoder, info = weights.open_encoder(
        args.pretrained, which, mean=args.mean, std=args.std, **given
    )
    if args.encoder == "pixels":
        encoder, info = (
            finetune.Pixels(info["img_size"]).eval(),
            {**info, "arch": "none", "encoder": "pixels", "notes": []},
        )
    return encoder, info


def labelled(train: ImageSet, val: ImageSet | None, args) -> tuple[ImageSet, ImageSet]:
    """The images with labels, and of the training images those asked for; UsageError where a classifier would have nothing to
    learn or to be judged by."""
    if train.labels is None or val is None:
        raise UsageError(
            "evaluation needs labelled training and validation images: DATA/train/<class>, DATA/val/<class>"
        )
    train, val = train.labelled(), val.labelled()
    if args.label_list is not None:
        train = train.select(listed(train, args.label_list))
    elif args.label_fraction is not None:
        keys = torch.from_numpy(
            augment.keyed_uniforms(1, args.subset_seed, np.arange(len(train)))[:, 0]
        )
        train = train.select(
            np.flatnonzero(
                linear.class_share(train.labels, train.classes, args.label_fraction, keys).numpy()
            )
        )
    present = train.labels.unique()
    if len(present) < 2:
        raise UsageError(f"a classifier needs two classes, the training images have {len(present)}")
    missing = sorted({*val.labels.tolist()} - {*present.tolist()})
    if missing or not len(val):
        names = first_few([str(train.classes[label]) for label in missing]) or "none at all"
        raise UsageError(f"there are validation images of classes without training images: {names}")
    return train, val


def listed(images: ImageSet, path: str) -> np.ndarray:
    """Indices of the images whose file names a text file lists, one a line (as the published splits of ImageNet do)."""
    if images.names is None:
        raise UsageError(
            f"--label-list {path}: images of this --dataset have no file names; use --label-fraction"
        )
    with open(path) as file:
        wanted = {os.path.basename(line.strip()) for line in file if line.strip()}
    found = np.isin(images.names, sorted(wanted))
    if len(absent := wanted - {*images.names[found].tolist()}):
        raise UsageError(
            f"{len(absent)} names of {path} are no training images: {first_few(sorted(absent))}"
        )
    return np.flatnonzero(found)


def where(task) -> dict:
    """How images are loaded."""
    return dict(size=task.args.img_size, device=task.device, workers=task.args.workers)


def embedder(task) -> Callable[[torch.Tensor], torch.Tensor]:
    """Images to the features that probes see."""

    @torch.no_grad()
    def embed(x):
        with autocast(task.amp, task.device):
            return widen(linear.features_of(task.encoder, x))

    return embed


def knn_table(task, train_share, val_share) -> dict[str, float]:
    """kNN of the class token's or pooled features, for every k, weighted and plain."""
    width = task.encoder.num_features
    shares = [(features[:, :width], labels) for features, labels in (train_share, val_share)]
    ks = sorted({min(k, len(task.train)) for k in KNN_K})
    return knn.table(
        *shares, len(task.val), len(task.train.classes), ks, KNN_TEMPERATURE, task.device
    )


# -- linear probe ----------------------------------------------------------------------------------------------------------


def probe(task, train_share, val_share) -> tuple[dict, np.ndarray]:
    """Train the grid of heads on frozen features; results, and the best head's confusion counts."""
    args, train, device = task.args, task.train, task.device
    kinds, select = linear.kinds_of(task.encoder), args.select
    held = torch.zeros(len(train), dtype=torch.bool)
    if select == "heldout":
        if rare := [
            str(train.classes[label])
            for label in train.labels.unique()
            if (train.labels == label).sum() < 2
        ]:
            names = first_few(rare)
            raise UsageError(
                f"every class needs two training images, one to be held out; only one has {names} (or --select val)"
            )
        keys = torch.from_numpy(augment.keyed_uniforms(1, args.seed, np.arange(len(train)))[:, 0])
        held = linear.class_share(train.labels, train.classes, args.heldout, keys, both_sides=True)
    held_share = held[distributed.rank() :: distributed.world_size()]
    judges = {"val": val_share, "heldout": (train_share[0][held_share], train_share[1][held_share])}
    fit = train.select(np.flatnonzero(~held.numpy()))
    steps = steps_of(fit, args)
    rates = [rate * args.batch_size / 256 for rate in args.lrs]
    grid = linear.LinearGrid(kinds, len(train.classes), rates, args.seed).to(device)
    optimizer = torch.optim.SGD(grid.parameters(), lr=1.0, momentum=0.9)
    epoch = resume(task, grid, optimizer) if args.resume else 0
    recipe = augment.Recipe(args.seed, (augment.View(args.img_size, args.crop_min),))
    loader, cached = ViewLoader(fit, recipe, device, args.workers), None
    if args.cache_features:
        settings = (
            "dataset",
            "data",
            "subset",
            "subset_seed",
            "label_fraction",
            "label_list",
            "select",
            "heldout",
        )
        key = f"{task.digest} {[getattr(args, name) for name in settings]} {recipe} {task.amp}"
        place = dict(limit=args.cache_limit_gb * 2**30, folder=args.workdir, key=key)
        cached = features.cache(
            embedder(task),
            max(kinds.values()),
            loader,
            args.cache_copies,
            workers=args.workers,
            **place,
        )
    correct, start = accuracies(grid, *judges[select]), time.perf_counter()
    labels = fit.labels.to(device)
    while epoch < args.epochs:
        for step, (ids, x) in enumerate(batches(task, fit, loader, epoch, steps, cached)):
            optimizer.param_groups[0]["lr"] = 0.5 * (
                1 + math.cos(math.pi * (epoch + step / steps) / args.epochs)
            )
            grid.train_step(optimizer, x, labels[ids])
        epoch += 1
        correct = accuracies(grid, *judges[select])
        tell(task, loader, epoch, f"best {select} top-1 {correct[0].max():.2f} %", start)
        save(task, grid, optimizer, epoch)

    best, final = int(correct[0].argmax()), accuracies(grid, *val_share)
    if features.digest(task.encoder) != task.digest:
        raise RuntimeError("the encoder has changed during its evaluation: this must not happen")
    heads = [
        {
            "features": kind,
            "norm": norm,
            "lr": args.lrs[rate],
            f"{select}_top1": chosen,
            "val_top1": top1,
            "val_top5": top5,
        }
        for (kind, norm, rate), chosen, top1, top5 in zip(
            grid.names(), correct[0].tolist(), *final.tolist(), strict=True
        )
    ]
    protocol = (
        f"best head on {int(held.sum())} held-out training images; trained on the other {len(fit)}"
    )
    if select == "val":
        protocol = "best head on the validation images, which also judge it"
    head = heads[best]
    result = {
        "linear_top1": head["val_top1"],
        "linear_top5": head["val_top5"],
        "best_lr": head["lr"],
        "best_head": head,
    }
    task.say(table(heads, args.lrs))
    task.say(
        f"linear probe: top-1 {head['val_top1']:.2f} %, top-5 {head['val_top5']:.2f} % on {len(task.val)} images"
    )
    task.say(f"  ({protocol}: {head['features']}, {head['norm']}, base lr {head['lr']:g})")
    result |= {"select": select, "protocol": protocol, "heads": heads}
    return result, distributed.all_sum(grid.confusion(best, *val_share)).cpu().numpy()


def batches(task, fit, loader, epoch, steps, cached):
    """This rank's (ids, features) of an epoch: encoded now, in fresh crops, or taken from the cache."""
    parts = parts_of(fit, task.args, epoch, steps)
    if cached is not None:
        for part in parts:
            ids, x = torch.from_numpy(part), cached[epoch % len(cached), part]
            if task.device.type == "cuda":
                x = x.pin_memory()  # else so large a copy would be waited for
            yield ids.to(task.device, non_blocking=True), x.to(task.device, non_blocking=True)
    else:
        embed = embedder(task)
        for ids, (x,) in loader.load([(epoch, part, (0,)) for part in parts]):
            yield ids, embed(x)


def accuracies(grid, x, labels) -> torch.Tensor:
    """Top-1 and top-5 of every head in percent, (2, heads), over the images of all ranks."""
    total = distributed.all_sum(torch.tensor(float(len(labels)), device=grid.rates.device))
    return 100 * distributed.all_sum(grid.correct(x, labels)).cpu().double() / total.cpu()


def table(heads: list[dict], rates: list[float]) -> str:
    """Validation top-1 of every head: a line a learning rate, a column an input."""
    inputs = list(dict.fromkeys((head["features"], head["norm"]) for head in heads))
    names = [f"{kind}, {norm}" for kind, norm in inputs]
    lines = ["base lr    " + "  ".join(f"{name:>20}" for name in names)]
    for number, rate in enumerate(rates):
        cells = [heads[column * len(rates) + number]["val_top1"] for column in range(len(inputs))]
        lines.append(f"{rate:<9g}  " + "  ".join(f"{top1:>18.2f} %" for top1 in cells))
    return "\n".join(lines)


# -- fine-tuning -----------------------------------------------------------------------------------------------------------


def tune(task) -> tuple[dict, np.ndarray]:
    """Train encoder and classifier; results after the last epoch (nothing is chosen on validation images), confusion counts."""
    args, train, device = task.args, task.train, task.device
    is_vit, scratch = getattr(task.encoder, "kind", None) == "vit", args.encoder == "untrained"
    name = args.optimizer or ("adamw" if is_vit else "sgd")
    lr, head_lr, weight_decay = (finetune.FROM_SCRATCH if scratch else finetune.DEFAULTS)[name]
    head_lr = args.head_lr or (args.lr or lr) * (head_lr / lr)
    lr, weight_decay = args.lr or lr, weight_decay if args.wd is None else args.wd
    layer_decay = args.layer_decay or (0.75 if is_vit and not scratch else 1.0)
    scale, steps = args.batch_size / 256, steps_of(train, args)
    model = finetune.Classifier(task.encoder, len(train.classes)).to(device)
    model = synchronise_batch_norm(model, device)
    optimizer = finetune.build_optimizer(
        model, name, lr * scale, head_lr * scale, weight_decay, layer_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=task.amp == "fp16")
    epoch = resume(task, model, optimizer) if args.resume else 0
    network = distributed.replicate(model, device)
    recipe = augment.Recipe(args.seed, (augment.View(args.img_size, args.crop_min),))
    loader, labels = ViewLoader(train, recipe, device, args.workers), train.labels.to(device)
    start = time.perf_counter()
    schedule = dict(steps_per_epoch=steps, warmup_epochs=args.warmup_epochs, epochs=args.epochs)
    while epoch < args.epochs:
        network.train()
        requests = [(epoch, part, (0,)) for part in parts_of(train, args, epoch, steps)]
        for step, (ids, (x,)) in enumerate(loader.load(requests)):
            for group in optimizer.param_groups:
                group["lr"] = optim.learning_rate(
                    epoch * steps + step, peak=group["peak"], **schedule
                )
            torch.manual_seed(
                int(augment.keyed_bits(args.seed, epoch * steps + step, distributed.rank())) >> 1
            )
            with autocast(task.amp, device):
                logits = network(x)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(cross_entropy(widen(logits), labels[ids])).backward()
            scaler.step(optimizer)
            scaler.update()
        epoch += 1
        if epoch % max(1, args.epochs // 5) == 0 or epoch == args.epochs:
            tell(task, loader, epoch, f"top-1 {judge(task, model)[0]:.2f} %", start)
        save(task, model, optimizer, epoch)
    top1, top5, counts = judge(task, model)
    task.say(
        f"fine-tuned: top-1 {top1:.2f} %, top-5 {top5:.2f} % on {len(task.val)} images, after the last epoch"
    )
    settings = {
        "optimizer": name,
        "lr": lr,
        "head_lr": head_lr,
        "weight_decay": weight_decay,
        "layer_decay": layer_decay,
    }
    return {"finetune_top1": top1, "finetune_top5": top5, "finetune": settings}, counts


@torch.no_grad()
def judge(task, model) -> tuple[float, float, np.ndarray]:
    """Top-1 and top-5 in percent and confusion counts of a classifier on the validation images of all ranks."""
    model.eval()
    classes = len(task.train.classes)
    # the counts, and how many are among the best five
    found = torch.zeros(classes * classes + 1, dtype=torch.long, device=task.device)
    indices = np.arange(distributed.rank(), len(task.val), distributed.world_size())
    labels = task.val.labels[indices].to(task.device)
    for batch, y in zip(
        whole_images(task.val, indices, **where(task)),
        labels.split(features.EVALUATION_BATCH),
        strict=True,
    ):
        with autocast(task.amp, task.device):
            best = model(batch).topk(min(5, classes), dim=1).indices
        found[:-1] += torch.bincount(y * classes + best[:, 0], minlength=classes * classes)
        found[-1] += (best == y[:, None]).sum()
    found = distributed.all_sum(found).cpu().numpy()
    counts = found[:-1].reshape(classes, classes)
    return 100 * counts.trace() / len(task.val), 100 * found[-1] / len(task.val), counts


# -- what both share -------------------------------------------------------------------------------------------------------


def steps_of(images, args) -> int:
    """Whole batches in an epoch; UsageError for none."""
    if args.batch_size > len(images):
        raise UsageError(
            f"--batch-size {args.batch_size} exceeds the {len(images)} training images"
        )
    return len(images) // args.batch_size


def parts_of(images, args, epoch: int, steps: int) -> list[np.ndarray]:
    """This rank's indices of each batch of an epoch."""
    order = augment.epoch_order(args.seed, epoch, len(images))
    return [
        share(order[step * args.batch_size : (step + 1) * args.batch_size]) for step in range(steps)
    ]


def percent_right(counts: np.ndarray) -> list[float | None]:
    """Of each class, from the confusion counts; None without images."""
    return [
        round(100 * row[label] / row.sum(), 2) if row.sum() else None
        for label, row in enumerate(counts)
    ]


def tell(task, loader, epoch, text, start) -> None:
    """A line on the console, ten times in all or so, and images that could not be read. Collective."""
    if note := record_bad_images(loader.images, loader.replaced, task.args.workdir):
        task.say(f"note: {note}")
    if epoch % max(1, task.args.epochs // 10) == 0 or epoch == task.args.epochs:
        task.say(f"epoch {epoch}/{task.args.epochs}  {text}  {time.perf_counter() - start:.0f} s")


def save(task, model, optimizer, epoch) -> None:
    """The state after `epoch` epochs, by rank 0; all ranks wait."""
    if distributed.rank() == 0:
        settings = {name: value for name, value in vars(task.args).items() if name not in RUNNING}
        state = {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {
            "args": settings,
            "encoder_digest": task.digest,
            "provenance": versions_and_commit(),
        }
        with signals_wait():
            tensor_files.save(os.path.join(task.args.workdir, LAST), state)
    distributed.barrier()


def resume(task, model, optimizer) -> int:
    """Load the state that `save` left in the workdir, if any; returns the completed epochs."""
    path = os.path.join(task.args.workdir, LAST)
    if not os.path.exists(path):
        return 0
    state = tensor_files.read(path)
    kinds = dict(epoch=int, model=dict, optimizer=dict, args=dict, encoder_digest=str)
    if tensor_files.wrong_entries(state, kinds):
        raise UsageError(f"{path} is no state of an evaluation; choose a new --workdir")
    changed = [
        str(name)
        for name, value in state["args"].items()
        if tensor_files.differ(value, vars(task.args).get(name))
    ]
    changed += ["the encoder"] if state["encoder_digest"] != task.digest else []
    if changed:
        raise UsageError(
            f"{path} is of another evaluation: {', '.join(changed)} changed; choose a new --workdir"
        )
    try:
        plain = tensor_files.plain_tensors(state["model"])
        if (
            state["epoch"] not in range(task.args.epochs + 1)
            or plain.keys() != state["model"].keys()
        ):
            raise ValueError("no sensible epoch or weights")
        model.load_state_dict(state["model"])
    except Exception as error:  # whatever odd content leads to
        raise UsageError(
            f"{path} does not fit this evaluation: {first_line(error)}; choose a new --workdir"
        ) from error
    checkpoint.load_optimizer(path, state["optimizer"], optimizer)
    return state["epoch"]


if __name__ == "__main__":
    with one_clear_line("main_lincls.py"):
        main(sys.argv[1:])
