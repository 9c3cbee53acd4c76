#!/usr/bin/env python3
"""Evaluates an encoder: kNN, then linear probes on its frozen features, or fine-tuning.

    python main_lincls.py --pretrained FILE                      the embedded data set
    python main_lincls.py /data/imagenet --pretrained FILE       any data set of main_snclr.py
    python main_lincls.py /data/imagenet --pretrained FILE --finetune --label-fraction 0.01
    bash start.sh main_lincls.py /data/imagenet --pretrained FILE           on all GPUs

FILE is a checkpoint of main_snclr.py or any other file that load_encoder reads.

This file reads from top to bottom: settings, encoder, data, kNN, probe or fine-tuning, results.
"""

import os
import sys

from snclr.evaluation import options as lincls_options
from snclr.running.errors import check_packages, one_clear_line

if __name__ == "__main__":
    with one_clear_line("main_lincls.py"):
        lincls_options.parse(sys.argv[1:])  # reports a wrong flag before the slow imports
        check_packages()

from functools import partial

import numpy as np
import torch
from torch import Tensor

from snclr.datasets import sources
from snclr.evaluation import confusion, features, finetune, knn, labels, linear, probe
from snclr.evaluation.task import Task
from snclr.loader import whole_images
from snclr.running import distributed, process_group
from snclr.running.batch_norm import synchronise_batch_norm
from snclr.running.lock import hold
from snclr.running.precision import resolve_amp
from snclr.running.preemption import end_at_once, handlers_given_back
from snclr.running.safe_files import save_json, writing
from snclr.running.settings import save_settings, versions_and_commit
from snclr.weights.load import open_by_flags

KNN_K = (10, 20, 100, 200)


@handlers_given_back()
@process_group.failures_named()
def main(argv: list[str]) -> None:
    # -- settings ------------------------------------------------------------------------------
    args = lincls_options.parse(argv)
    device = process_group.start()
    end_at_once()
    torch.manual_seed(args.seed)
    amp, is_rank_zero = resolve_amp(args.amp, device), distributed.rank() == 0
    log = print if is_rank_zero else lambda line: None

    # -- encoder -------------------------------------------------------------------------------
    branch = "untrained" if args.encoder == "pixels" else args.encoder
    encoder, info = open_by_flags(args, args.pretrained, branch)
    if args.encoder == "pixels":
        encoder = features.Pixels(info["channels"], info["img_size"]).eval()
        info |= {"arch": "none", "encoder": "pixels", "notes": []}

    # -- data ----------------------------------------------------------------------------------
    train, val, notes = sources.open_data(args)
    train, val = labels.select_labelled(train, val, args)
    lincls_options.resolve_training(args, len(train))
    train, encoder = train.to(device), encoder.to(device)
    load = partial(whole_images, size=args.img_size, device=device, workers=args.workers)
    if args.encoder == "untrained":
        # its batch norms get the statistics of training images, over all ranks
        encoder = knn.calibrated_copy(synchronise_batch_norm(encoder, device), train, load)
    distributed.on_rank_zero(lambda: hold(args.workdir, "main_lincls"))
    if is_rank_zero:
        save_settings(args.workdir, args, {"world_size": distributed.world_size(), "amp_used": amp})
    log(
        f"{info['arch']} ({info['encoder']} encoder) of {args.pretrained}, "
        f"{encoder.num_features} features"
    )
    log(
        f"{args.dataset}: {len(train)} + {len(val)} images at {args.img_size} px, "
        f"{len(train.classes)} classes"
    )
    for note in info["notes"] + notes:
        log(f"note: {note}")

    # -- kNN -----------------------------------------------------------------------------------
    embed, digest = linear.embedder(encoder, amp, device), features.digest(encoder)
    train_share, val_share = (features.encode_share(embed, images, load) for images in (train, val))
    settings = {
        name: x for name, x in vars(args).items() if name not in lincls_options.FREE_ON_RESUME
    }
    identity = {"args": settings, "encoder_digest": digest}
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    task = Task(args, encoder, info, identity, embed, load, train, val, device, amp, scaler, log)
    knn_top1 = evaluate_knn(task, train_share, val_share)
    for name, top1 in knn_top1["knn"].items():
        log(f"kNN {name:<23} {top1:.2f} %")

    # -- probe or fine-tuning ------------------------------------------------------------------
    if args.finetune:
        result, counts = finetune.run(task)
    else:
        result, counts = probe.run(task, train_share, val_share)

    # -- results -------------------------------------------------------------------------------
    if is_rank_zero:
        class_top1 = confusion.class_accuracies(counts)
        result |= knn_top1 | {
            "mean_per_class_top1": float(
                np.mean([top1 for top1 in class_top1 if top1 is not None])
            ),
            "encoder": info["encoder"],
            "encoder_digest": digest,
            "arch": info["arch"],
            "pretrained": args.pretrained,
            "pretrained_epoch": info["epoch"],
            "dataset": args.dataset,
            "training_images": len(train),
            "label_fraction": args.label_fraction,
            "per_class_top1": dict(zip(map(str, train.classes), class_top1, strict=True)),
            **versions_and_commit(),
        }
        results_path = os.path.join(args.workdir, "results.json")
        picture_path = os.path.join(args.workdir, "confusion.png")
        save_json(results_path, result)
        kind, top1 = "linear probe", result.get("linear_top1")
        if args.finetune:
            kind, top1 = "fine-tuned", result["finetune_top1"]
        title = f"{info['arch']}: {kind} {top1:.2f} % top-1"
        with writing(picture_path):
            confusion.picture(counts, list(map(str, train.classes)), title).save(picture_path)
        for name, (k, temperature) in knn.NAMED_VOTES.items():
            log(f"kNN (k = {k}, T = {temperature}): {result[name]:.2f} %")
        log(f"results: {results_path}, {picture_path}")
    process_group.stop()


def evaluate_knn(
    task: Task, train_share: tuple[Tensor, Tensor], val_share: tuple[Tensor, Tensor]
) -> dict:
    """Top-1 in percent of kNN with the class token or the pooled features, from one search.

    Returns the entries of results.json: the votes of knn.NAMED_VOTES, and "knn", a table of every
    k, weighted and plain, and of k = 200 with T = 0.1.
    """
    width, votes = task.encoder.num_features, {}
    for k in sorted({min(k, len(task.train)) for k in KNN_K}):
        votes[f"k={k} weighted"] = knn.Vote(k, knn.NAMED_VOTES["knn_top1"].temperature)
        votes[f"k={k} plain"] = knn.Vote(k, None)
    k, temperature = knn.NAMED_VOTES["knn200_top1"]
    votes[f"k={k} weighted, T={temperature}"] = knn.Vote(k, temperature)
    top1 = knn.table(
        (train_share[0][:, :width], train_share[1]),
        val_share[0][:, :width],
        task.val.labels,
        len(task.train.classes),
        votes | knn.NAMED_VOTES,
        task.device,
    )
    named = {name: top1[name] for name in knn.NAMED_VOTES}
    return named | {"knn": {name: top1[name] for name in votes}}


if __name__ == "__main__":
    with one_clear_line("main_lincls.py"):
        main(sys.argv[1:])
