"""What a run prints: the line of a training step, and the lines at the end."""

import os
import shlex
from argparse import Namespace

from .safe_files import read_json_lines


def describe(metrics: dict, epochs: int, total_steps: int, images_left: int) -> str:
    """The line on the console for a logged step. images_left: those that this start still trains
    on; evaluations and saves are not part of the time left.
    """
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
    minutes = images_left / metrics["images_per_s"] / 60
    parts.append(f"{minutes:.0f} min left" if minutes < 120 else f"{minutes / 60:.1f} h left")
    return "  ".join(parts)


def final_lines(args: Namespace, workdir: str, checkpoint_path: str, done: bool) -> str:
    """The results of a run, the paths of its files, and what to do next.

    args: the settings of the run; done: whether the schedule has ended.
    """
    if not done:
        advice = (
            "stopped early; to continue, run the same command with --resume auto and without the "
            "flag that stopped it"
        )
    elif args.dataset != "embedded":
        words = [checkpoint_path, args.data, "--dataset", args.dataset]
        words += ["--on-bad-image", "skip"] if args.on_bad_image == "skip" else []
        advice = f"next: nearest images, drawn: python -m snclr.visualize {shlex.join(words)}"
    else:
        advice = (
            "next: train on your own images, with or without labels: "
            "bash start.sh @configs/photos_small.args DATA"
        )
    metrics_path = os.path.join(workdir, "metrics.jsonl")
    lines = read_json_lines(metrics_path) if os.path.exists(metrics_path) else []
    evaluations = [line for line in lines if "loss" not in line]
    lines = [
        _progress(evaluations, "knn_top1", "kNN top-1", " %"),
        _progress(evaluations, "effective_rank", "effective rank", ""),
        f"checkpoint: {checkpoint_path}",
        f"curves: tensorboard --logdir {workdir}   (numbers: {metrics_path})",
        advice,
    ]
    return "\n".join(filter(None, lines))


def _progress(evaluations: list[dict], metric: str, title: str, unit: str) -> str:
    """'TITLE: raw pixels 30.1 %, untrained 31.2 %, epoch 5: 40.3 %'; what was not measured is left
    out.
    """
    values = {}
    if evaluations and evaluations[0].get("epoch") == 0:
        values["raw pixels"] = evaluations[0].get(f"raw_pixels_{metric}")
        values[evaluations[0].get("encoder", "untrained")] = evaluations[0].get(metric)
    if evaluations and evaluations[-1].get("epoch"):
        values[f"epoch {evaluations[-1]['epoch']}:"] = evaluations[-1].get(metric)
    parts = [f"{name} {value:.1f}{unit}" for name, value in values.items() if value is not None]
    return f"{title}: {', '.join(parts)}" if parts else ""
