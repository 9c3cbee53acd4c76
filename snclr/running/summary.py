"""Lines about a run for people: of a training step, and at the end."""

import json
import os

from .checkpoint import LAST


def describe(metrics: dict, epochs: int, total_steps: int) -> str:
    """A training line for people."""
    ratio = metrics["loss_ratio"]
    parts = [
        f"epoch {metrics['epoch']}/{epochs}",
        f"step {metrics['step']}/{total_steps}",
        f"loss {metrics['loss']:.3f}" + (f" ({ratio:.2f} of chance)" if ratio is not None else ""),
        f"lr {metrics['lr']:.2e}",
        f"{metrics['images_per_s']:.0f} images/s",
        f"data {100 * metrics['data_wait']:.0f} %",
        f"std {metrics['feature_std']:.2f}",
    ]
    if "neighbour_purity" in metrics:
        parts.append(f"purity {metrics['neighbour_purity']:.2f}")
    return "  ".join(parts)


def final_lines(workdir: str, done: bool) -> str:
    """The results of a run, where its files are, and what to do next. done: the schedule has ended."""
    metrics_path = os.path.join(workdir, "metrics.jsonl")
    with open(metrics_path) as file:
        evaluations = [line for line in map(json.loads, file) if "loss" not in line]
    lines = []
    for name, title, unit in (
        ("knn_top1", "kNN top-1", " %"),
        ("effective_rank", "effective rank", ""),
    ):
        values = {}
        if evaluations and evaluations[0]["epoch"] == 0:
            first = evaluations[0]
            values["raw pixels"] = first.get(f"raw_pixels_{name}")
            values[first.get("encoder", "untrained")] = first.get(name)
        if evaluations and evaluations[-1]["epoch"]:
            values[f"epoch {evaluations[-1]['epoch']}:"] = evaluations[-1].get(name)
        parts = [f"{k} {value:.1f}{unit}" for k, value in values.items() if value is not None]
        lines += [f"{title}: {', '.join(parts)}"] if parts else []
    lines.append(f"checkpoint: {os.path.join(workdir, LAST)}")
    lines.append(f"curves: tensorboard --logdir {workdir}   (numbers: {metrics_path})")
    if done:
        lines.append(
            "next: train on your own images, with or without labels: "
            "bash start.sh @configs/vit_small_imagenet.args DATA"
        )
    else:
        lines.append(
            "stopped early; to continue, run the same command with --resume auto and without the "
            "flag that stopped it"
        )
    return "\n".join(lines)
