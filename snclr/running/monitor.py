"""What a run tells: metrics of a step, metrics.jsonl, TensorBoard scalars and the lines on the console."""

import contextlib
import json
import math
import os
import shlex
import sys
import time
from argparse import Namespace

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ..builder import StepView
from ..loader import ViewLoader
from ..objectives import loss_at_chance
from .checkpoint import LAST, provenance
from .distributed import all_sum, rank, union, world_size
from .errors import RunError, one_line, save_text, writing
from .precision import unit

# TensorBoard group of each metric of a training or evaluation line
GROUPS = {
    "loss": ("loss", "loss_ratio"),
    "optim": ("lr", "momentum", "grad_norm"),
    "bank": ("bank_fill", "distinct_rows", "largest_count"),
    "neighbours": ("neighbour_similarity", "positiveness_entropy", "neighbour_purity"),
    "features": ("feature_std", "effective_rank", "view_agreement"),
    "speed": ("images_per_s", "data_wait", "slowest_step_s"),
    "eval": ("knn_top1", "knn200_top1"),
}


@torch.no_grad()
def step_metrics(
    loss: Tensor,
    shown: StepView,
    ids: Tensor,
    labels: Tensor | None,
    *,
    method: str,
    form: str,
    temperature: float,
) -> dict:
    """Metrics of one step over the global batch, from every rank's share: one all-reduce, the same on every rank.

    loss, and loss_ratio to the loss at chance (None if undefined); feature_std: standard deviation of the unit projections
    over the batch times sqrt(D), about 1 when spread over the sphere, 0 at collapse; bank_fill. With a search in the bank:
    neighbour_similarity (mean cosine), positiveness_entropy (share of the uniform weights' entropy), distinct_rows and
    largest_count of the picks, and neighbour_purity (of the neighbours where both have a label, the share with the query's).
    """
    projection = unit(shown.projection).double()
    valid = shown.neighbour_ids >= 0
    number = valid.sum(dim=1)
    weights = shown.weights.double()
    shares = weights / weights.sum(dim=1, keepdim=True).clamp(
        min=1e-12
    )  # a threshold leaves sums below 1
    several = number > 1
    entropy = torch.special.entr(shares).sum(dim=1)[several] / number[several].log()
    known = same = valid.new_zeros(())
    if labels is not None:
        theirs, own = labels[shown.neighbour_ids], labels[ids][:, None]
        known = valid & (theirs >= 0) & (own >= 0)
        same = known & (theirs == own)
    sums = (
        loss.detach(),
        ids.new_tensor(len(ids)),
        weights.sum(),
        valid.sum(),
        shown.scores[valid].sum(),
        entropy.sum(),
        several.sum(),
        known.sum(),
        same.sum(),
    )
    mine = torch.cat(
        [
            torch.stack([x.double() for x in sums]),
            projection.sum(dim=0),
            projection.square().sum(dim=0),
        ]
    )
    total, first, second = all_sum(mine).split(
        [len(sums), projection.shape[1], projection.shape[1]]
    )
    loss_sum, images, weight_sum, picks, score_sum, entropy_sum, entropies, known_sum, same_sum = (
        total.tolist()
    )
    mean_loss = loss_sum / world_size()
    chance = loss_at_chance(
        method, form, temperature, int(shown.num_candidates), 1 + weight_sum / images
    )
    variance = second / images - (first / images).square()
    metrics = {
        "loss": mean_loss,
        "loss_ratio": mean_loss / chance if chance else None,
        "feature_std": (variance.clamp(min=0).sqrt().mean() * projection.shape[1] ** 0.5).item(),
    }
    if shown.bank_fill is not None:
        metrics["bank_fill"] = shown.bank_fill.item()
    if picks:
        metrics["neighbour_similarity"] = score_sum / picks
        metrics["positiveness_entropy"] = entropy_sum / entropies if entropies else None
        metrics["distinct_rows"] = int((shown.counts > 0).sum())
        metrics["largest_count"] = int(shown.counts.max())
        if known_sum:
            metrics["neighbour_purity"] = same_sum / known_sum
    return metrics


class Waits:
    """How long training waits for what happens in `with` blocks. On a GPU by its own clock: the host runs ahead, and while it
    is busy in a block the GPU still has work; between the two marks that the host leaves there it can but wait."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.marks = device.type == "cuda", []

    def _mark(self, *_):
        if self.on_gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append(mark)

    __enter__ = __exit__ = _mark

    def seconds(self) -> float:
        """Of all blocks since the last call. A GPU must have passed them, as it has where a value was read."""
        pairs, self.marks = list(zip(self.marks[::2], self.marks[1::2], strict=True)), []
        if self.on_gpu:
            return sum(start.elapsed_time(end) for start, end in pairs) / 1000
        return sum(end - start for start, end in pairs)


class Log:
    """metrics.jsonl and TensorBoard events in workdir, and the console; silent on every rank but 0.

    step: completed steps of a resumed run, else 0. Lines of later steps, and a line torn by a crash, are cut off, so that
    each step stands there once.
    """

    def __init__(self, workdir: str, *, step: int, enabled: bool):
        self.enabled = enabled
        self.bar = None
        if not enabled:
            return
        self.path, self.pending = os.path.join(workdir, "metrics.jsonl"), b""
        with writing(workdir):
            cut_back(
                self.path, step if step else -1
            )  # a run that starts anew says its beginning anew
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open for the whole run
            self.events = SummaryWriter(
                os.path.join(workdir, "tensorboard"), purge_step=step + 1 if step else None
            )

    def line(self, metrics: dict) -> None:
        """Append one line with 'step' to metrics.jsonl and its numbers to TensorBoard."""
        if not self.enabled:
            return
        self.pending += (
            json.dumps({name: _rounded(value) for name, value in metrics.items()}).encode() + b"\n"
        )
        self.flush()
        try:
            self.events = self.events or SummaryWriter(
                os.path.join(os.path.dirname(self.path), "tensorboard")
            )
            for group, names in GROUPS.items():
                for name in names:
                    if metrics.get(name) is not None:
                        self.events.add_scalar(f"{group}/{name}", metrics[name], metrics["step"])
        except OSError:  # a full disk ends its thread: another one at the next line
            self.events = None

    def flush(self, durable: bool = False) -> None:
        """Write the lines that wait, which on a full disk they do. durable: so that a checkpoint that follows finds them after
        a crash of the machine, or RunError."""
        try:
            with writing(self.path):
                while self.pending:
                    self.pending = self.pending[self.file.write(self.pending) :]
                if durable:
                    os.fsync(self.file.fileno())
        except RunError:
            if durable:
                raise

    def last_evaluation(self) -> int | None:
        """The step of the last evaluation in metrics.jsonl."""
        with open(self.path) as file:
            return max(
                (line["step"] for line in map(json.loads, file) if "loss" not in line), default=None
            )

    def pictures(self, step: int, pictures: dict, histograms: dict[str, Tensor]) -> None:
        """PIL images and values (n,) by name to TensorBoard; the images also to pictures/, as NAME_STEP.png."""
        if not self.enabled:
            return
        folder = os.path.join(os.path.dirname(self.path), "pictures")
        try:
            os.makedirs(folder, exist_ok=True)
            for name, picture in pictures.items():
                picture.save(os.path.join(folder, f"{name}_{step:07d}.png"))
                self.events.add_image(name, np.asarray(picture), step, dataformats="HWC")
            for name, values in histograms.items():
                self.events.add_histogram(
                    f"neighbours/{name}", values.float().cpu().numpy(), step, bins=60
                )
        except OSError as error:  # no reason to stop a run
            self.say(f"note: no pictures of step {step}: {error}")

    def say(self, text: str) -> None:
        """One line on the console, above the progress bar if there is one."""
        if self.enabled:
            tqdm.write(
                text.encode(errors="replace").decode(), file=sys.stdout
            )  # names of files may hold anything
            sys.stdout.flush()

    def progress(self, total: int, done: int, label: str) -> None:
        """Start a progress bar, on a terminal; elsewhere the lines of `say` have to do."""
        if self.enabled and sys.stderr.isatty():
            self.bar = tqdm(
                total=total, initial=done, desc=label, unit="step", leave=False, dynamic_ncols=True
            )

    def advance(self) -> None:
        """One step further on the progress bar."""
        if self.bar is not None:
            self.bar.update()

    def end_progress(self) -> None:
        """Take the progress bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def close(self) -> None:
        """Flush and close the files."""
        if self.enabled:
            self.flush()
            self.file.close()
            with contextlib.suppress(OSError, AttributeError):
                self.events.close()


def save_settings(workdir: str, args: Namespace, more: dict) -> None:
    """Leave args.json in workdir: every setting by its name, and the command, versions and git commit of this start."""
    os.makedirs(workdir, exist_ok=True)
    command = shlex.join([sys.executable, *sys.argv])
    save_json(
        os.path.join(workdir, "args.json"),
        {**vars(args), **more, "command": command, **provenance()},
    )


def save_json(path: str, content: dict) -> None:
    """Write a JSON file for people, as save_text does."""
    save_text(path, json.dumps(content, indent=1))


def bad_images(loader: ViewLoader, workdir: str) -> str | None:
    """Add the images that could not be read since the last call, on any rank, to workdir/bad_images.txt; a line for the log
    where there are new ones, or where they cannot be written down. Collective."""
    found = union(loader.replaced)
    loader.replaced.clear()
    path, known = os.path.join(workdir, "bad_images.txt"), set()
    if rank() != 0 or not found:
        return None
    if os.path.exists(path):
        with open(path) as file:
            known = set(file.read().splitlines())
    told = set()
    for index in found:
        try:
            loader.images.image(index)
            told.add(f"image {index} could not be read once")
        except RunError as error:
            told.add(one_line(error).partition("cannot read image ")[2].partition("; remove")[0])
    try:
        save_text(path, "".join(f"{line}\n" for line in sorted(known | told)))
    except RunError as error:  # a full disk: no reason to stop a run
        path = str(error)
    new = sorted(told - known)
    return (
        f"{len(new)} more images cannot be read and are replaced, see {path}: {new[0]}"
        if new
        else None
    )


def farewell(workdir: str, done: bool) -> str:
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


def cut_back(path: str, step: int) -> None:
    """Drop from a metrics file what comes after `step`, and lines that are no whole JSON object; atomically."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        kept = [line for line in file if (number := _step_of(line)) is not None and number <= step]
    with open(f"{path}.tmp", "wb") as file:
        file.writelines(kept)
    os.replace(f"{path}.tmp", path)


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _rounded(value):
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None  # JSON knows no nan
