#!/usr/bin/env python3
"""What a frozen encoder is worth: kNN, and a grid of linear probes trained side by side.

    python main_lincls.py --pretrained runs/NAME/checkpoint_last.pth.tar                     the embedded data set
    python main_lincls.py /data/imagenet --pretrained FILE --workdir runs/NAME/probe         any data set of main_snclr.py
    bash start.sh main_lincls.py /data/imagenet --pretrained FILE                            the same on all GPUs

Reads from top to bottom: settings, encoder, data, kNN, probe (train, evaluate, save), results.
"""

import math
import os
import sys
import time

from snclr import lincls_options
from snclr.errors import UsageError, one_clear_line

if __name__ == "__main__":
    with one_clear_line("main_lincls.py"):
        lincls_options.parse(sys.argv[1:])  # a wrong flag is answered here, before the slow imports

import numpy as np
import torch

from snclr import augment, checkpoint, confusion, distributed, features, knn, linear, monitor, sources, weights
from snclr.data import ImageSet, ViewLoader, share
from snclr.precision import autocast, resolve_amp, unit

LAST = "probe_last.pth.tar"
KNN_K, KNN_TEMPERATURE = (10, 20, 100, 200), 0.07
RUNNING = {"data", "val", "labels", "val_labels", "workers", "workdir", "resume", "pretrained"}  # may change on resume


def main(argv: list[str]) -> None:
    args = lincls_options.parse(argv)

    # -- encoder and data ------------------------------------------------------------------------------------------------
    device = distributed.start()
    given = {name: getattr(args, name) for name in ("arch", "img_size", "patch_size", "width", "small_stem", "timm_kwargs")}
    encoder, info = weights.open_encoder(args.pretrained, args.encoder, mean=args.mean, std=args.std, **given)
    args.img_size, args.mean, args.std = info["img_size"], info["mean"], info["std"]
    train, val, notes = sources.open_data(args)
    train, val = labelled(train, val)
    train = train.to(device)
    encoder = encoder.to(device)
    amp = resolve_amp(args.amp, device)
    before = features.digest(encoder)

    def embed(x):
        with autocast(amp, device):
            return linear.features_of(encoder, x)

    speaks = distributed.rank() == 0
    if speaks:
        monitor.save_settings(args.workdir, args, {"world_size": distributed.world_size(), "amp_used": amp})
    say = print if speaks else lambda _: None
    say(f"{info['arch']} ({args.encoder} encoder) of {args.pretrained}, {info['num_features']} features")
    say(f"{args.dataset}: {len(train)} + {len(val)} images at {args.img_size} px, {len(train.classes)} classes")
    for note in info["notes"] + notes:
        say(f"note: {note}")

    # -- kNN -------------------------------------------------------------------------------------------------------------
    where = dict(size=args.img_size, device=device, workers=args.workers)
    train_features, train_labels = features.encode_share(embed, train, **where)
    val_features, val_labels = features.encode_share(embed, val, **where)
    neighbours = knn_table(train_features, train_labels, val_features, val_labels, info["num_features"], train, val, device)
    for name, top1 in neighbours.items():
        say(f"kNN {name:<15} {top1:.2f} %")

    # -- probe -----------------------------------------------------------------------------------------------------------
    kinds = linear.kinds_of(encoder)
    keys = torch.from_numpy(augment.keyed_uniforms(1, args.seed, np.arange(len(train)))[:, 0])
    held = linear.held_out(train.labels, args.heldout, keys) if args.select == "heldout" else torch.zeros(len(train)).bool()
    held_share = held[distributed.rank() :: distributed.world_size()]
    judges = {"val": (val_features, val_labels), "heldout": (train_features[held_share], train_labels[held_share])}
    del train_features
    fit = train.select(np.flatnonzero(~held.numpy()))
    steps = len(fit) // args.batch_size
    if not steps:
        raise UsageError(f"--batch-size {args.batch_size} exceeds the {len(fit)} training images")
    rates = [rate * args.batch_size / 256 for rate in args.lrs]
    grid = linear.LinearGrid(kinds, len(train.classes), rates, args.seed).synchronised(device)
    optimizer = torch.optim.SGD(grid.parameters(), lr=1.0, momentum=0.9)
    epoch = resume(args, grid, optimizer, before) if args.resume else 0
    recipe = augment.Recipe(args.seed, args.crop_min, args.img_size, blur=False, colour=False)
    loader = ViewLoader(fit, recipe, device, args.workers)
    cached = None
    if args.cache_features:
        key = (
            f"{before} {args.dataset} {args.data} {args.subset} {args.subset_seed} {recipe} {args.select} {args.heldout} {amp}"
        )
        limit = args.cache_limit_gb * 2**30
        where = dict(size=args.img_size, workers=args.workers, limit=limit, folder=args.workdir, key=key)
        cached = features.cache(embed, max(kinds.values()), fit, args.cache_copies, loader, **where)
    select = "heldout" if args.select == "heldout" else "val"
    correct, start = accuracies(grid, *judges[select]), time.perf_counter()
    while epoch < args.epochs:
        for step, (ids, x) in enumerate(batches(fit, loader, epoch, steps, args, cached, embed)):
            optimizer.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * (epoch + step / steps) / args.epochs))
            grid.train_step(optimizer, x, fit.labels[ids].to(device))
        epoch += 1
        correct = accuracies(grid, *judges[select])
        if epoch % max(1, args.epochs // 10) == 0 or epoch == args.epochs:
            seconds = time.perf_counter() - start
            say(f"epoch {epoch}/{args.epochs}  best {select} top-1 {correct[0].max():.2f} %  {seconds:.0f} s")
        if speaks:
            save(args, grid, optimizer, epoch, before)
        distributed.barrier()

    # -- results ---------------------------------------------------------------------------------------------------------
    best = int(correct[0].argmax())
    final = accuracies(grid, *judges["val"])
    counts = distributed.all_sum(grid.confusion(best, *judges["val"])).cpu().numpy()
    if features.digest(encoder) != before:
        raise RuntimeError("the encoder has changed during its evaluation: this must not happen")
    if speaks:
        heads = [
            {"features": kind, "norm": norm, "lr": args.lrs[rate], f"{select}_top1": chosen, "val_top1": top1, "val_top5": top5}
            for (kind, norm, rate), chosen, top1, top5 in zip(grid.names(), correct[0].tolist(), *final.tolist(), strict=True)
        ]
        if select == "val":
            protocol = "best head on the validation images, which also judge it"
        else:
            protocol = f"best head on {int(held.sum())} held-out training images; trained on the other {len(fit)}"
        result = {
            "linear_top1": heads[best]["val_top1"],
            "linear_top5": heads[best]["val_top5"],
            "knn_top1": neighbours[f"k={KNN_K[1]} weighted"],
            "best_lr": heads[best]["lr"],
            "best_head": heads[best],
            "select": select,
            "protocol": protocol,
            "encoder": args.encoder,
            "encoder_digest": before,
            "arch": info["arch"],
            "pretrained": args.pretrained,
            "pretrained_epoch": info["epoch"],
            "knn": neighbours,
            "per_class_top1": dict(zip(train.classes, percent_right(counts), strict=True)),
            "heads": heads,
            **checkpoint.provenance(),
        }
        monitor.save_json(os.path.join(args.workdir, "results.json"), result)
        title = f"{info['arch']}: linear probe {result['linear_top1']:.2f} % top-1"
        confusion.picture(counts, [str(name) for name in train.classes], title).save(
            os.path.join(args.workdir, "confusion.png")
        )
        say(table(heads, args.lrs))
        say(f"linear probe: top-1 {result['linear_top1']:.2f} %, top-5 {result['linear_top5']:.2f} % on {len(val)} images")
        say(f"  ({protocol}: {heads[best]['features']}, {heads[best]['norm']}, base lr {heads[best]['lr']:g})")
        say(f"kNN (k = {KNN_K[1]}, T = {KNN_TEMPERATURE}): {result['knn_top1']:.2f} %")
        say(f"results: {os.path.join(args.workdir, 'results.json')}, {os.path.join(args.workdir, 'confusion.png')}")
    distributed.barrier()
    distributed.stop()


def labelled(train: ImageSet, val: ImageSet | None) -> tuple[ImageSet, ImageSet]:
    """The images with labels; UsageError where a classifier would have nothing to learn or to be judged by."""
    if train.labels is None or val is None:
        raise UsageError("evaluation needs labelled training and validation images: DATA/train/<class>, DATA/val/<class>")
    train, val = train.labelled(), val.labelled()
    present = train.labels.unique()
    if len(present) < 2:
        raise UsageError(f"a classifier needs two classes, the training images have {len(present)}")
    alone = [str(train.classes[label]) for label in present if (train.labels == label).sum() < 2]
    if alone:
        raise UsageError(f"every class needs two training images; only one has {checkpoint.first_few(alone)}")
    missing = sorted({*val.labels.tolist()} - {*present.tolist()})
    if missing or not len(val):
        names = [str(train.classes[label]) for label in missing]
        raise UsageError(
            f"validation images of classes without training images: {checkpoint.first_few(names) or 'none at all'}"
        )
    return train, val


def knn_table(features_, labels, queries, truth, width, train, val, device) -> dict[str, float]:
    """kNN of the class token's or pooled features, for every k, weighted and plain."""
    queries = knn.join_shares(unit(queries[:, :width]).to(device), len(val))
    truth = knn.join_shares(truth.to(device), len(val))
    mine = unit(features_[:, :width]).to(device), labels.to(device)
    ks = [k for k in KNN_K if k <= len(train)] or [len(train)]
    return knn.table(*mine, queries, truth, len(train.classes), ks, KNN_TEMPERATURE)


def batches(fit, loader, epoch, steps, args, cached, embed):
    """This rank's (ids, features) of an epoch: encoded now, in fresh crops, or taken from the cache."""
    order = augment.epoch_order(args.seed, epoch, len(fit))
    parts = [share(order[step * args.batch_size : (step + 1) * args.batch_size]) for step in range(steps)]
    if cached is not None:
        for part in parts:
            yield torch.from_numpy(part), cached[epoch % len(cached), part].to(loader.device)
    else:
        with torch.no_grad():
            for ids, x in loader.load([(epoch, part, (0,)) for part in parts]):
                yield ids.cpu(), embed(x).float()


def accuracies(grid, x, labels) -> torch.Tensor:
    """Top-1 and top-5 of every head in percent, (2, heads), over the images of all ranks."""
    total = distributed.all_sum(torch.tensor(float(len(labels)), device=grid.rates.device))
    return 100 * distributed.all_sum(grid.correct(x, labels)).cpu() / total.cpu()


def percent_right(counts: np.ndarray) -> list[float | None]:
    """Of each class, from the confusion counts; None without images."""
    return [round(100 * row[label] / row.sum(), 2) if row.sum() else None for label, row in enumerate(counts)]


def table(heads: list[dict], rates: list[float]) -> str:
    """Validation top-1 of every head: a line a learning rate, a column an input."""
    inputs = list(dict.fromkeys((head["features"], head["norm"]) for head in heads))
    names = [f"{kind}, {norm}" for kind, norm in inputs]
    lines = ["base lr    " + "  ".join(f"{name:>20}" for name in names)]
    for number, rate in enumerate(rates):
        cells = [heads[column * len(rates) + number]["val_top1"] for column in range(len(inputs))]
        lines.append(f"{rate:<9g}  " + "  ".join(f"{top1:>18.2f} %" for top1 in cells))
    return "\n".join(lines)


def save(args, grid, optimizer, epoch, encoder_digest) -> None:
    """The state of the probe after `epoch` epochs."""
    settings = {name: value for name, value in vars(args).items() if name not in RUNNING}
    state = {"epoch": epoch, "grid": grid.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.save(os.path.join(args.workdir, LAST), {**state, "args": settings, "encoder_digest": encoder_digest})


def resume(args, grid, optimizer, encoder_digest) -> int:
    """Load the state that `save` left in the workdir, if any; returns the completed epochs."""
    path = os.path.join(args.workdir, LAST)
    if not os.path.exists(path):
        return 0
    state = checkpoint.read(path)
    changed = [name for name, value in state["args"].items() if getattr(args, name) != value]
    changed += ["the encoder"] if state["encoder_digest"] != encoder_digest else []
    if changed:
        raise UsageError(f"{path} is of another evaluation: {', '.join(changed)} changed; choose a new --workdir")
    grid.load_state_dict(state["grid"])
    optimizer.load_state_dict(state["optimizer"])
    return state["epoch"]


if __name__ == "__main__":
    with one_clear_line("main_lincls.py"):
        main(sys.argv[1:])
