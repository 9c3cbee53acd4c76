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
    """What came out, where it lies, and what to do next."""
    with open(os.path.join(workdir, "metrics.jsonl")) as file:
        found = [line for line in map(json.loads, file) if "loss" not in line]  # evaluations
    lines = []
    for name, title, unit_of in (
        ("knn_top1", "kNN top-1", " %"),
        ("effective_rank", "effective rank", ""),
    ):
        told = []
        for line in found[:1] if found and found[0]["epoch"] == 0 else []:
            first = {"raw pixels": line.get(f"raw_pixels_{name}"), "untrained": line.get(name)}
            told += [
                f"{what} {value:.1f}{unit_of}" for what, value in first.items() if value is not None
            ]
        told += [
            f"epoch {line['epoch']}: {line[name]:.1f}{unit_of}"
            for line in found[-1:]
            if line["epoch"] and name in line
        ]
        lines += [f"{title}: {', '.join(told)}"] if told else []
    lines.append(f"checkpoint: {os.path.join(workdir, LAST)}")
    lines.append(
        f"curves: tensorboard --logdir {workdir}   (numbers: {os.path.join(workdir, 'metrics.jsonl')})"
    )
    if done:
        lines.append(
            "next: your own images, with labels or without: bash start.sh @configs/vit_small_imagenet.args DATA"
        )
    else:
        lines.append(
            "stopped early; the same command with --resume auto and without the stop goes on"
        )
    return "\n".join(lines)
