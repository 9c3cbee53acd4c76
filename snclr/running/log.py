"""What a run tells: metrics of a step, metrics.jsonl, TensorBoard scalars and the lines on the console."""

import contextlib
import json
import math
import os
import sys

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .errors import RunError
from .safe_files import writing

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
