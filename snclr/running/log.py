"""The log of a run: metrics.jsonl, TensorBoard, pictures, and lines on the console."""

import contextlib
import json
import math
import os
import sys
import threading
from argparse import Namespace
from collections.abc import Callable

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from . import console
from .errors import RunError, first_line
from .loggers import Loggers
from .safe_files import (
    json_object,
    new_file,
    open_regular,
    open_to_append,
    read_json_lines,
    writing,
)

# the group of each metric in TensorBoard; a metric that is not listed is in the group loss
GROUPS = {
    "optim": ("lr", "momentum", "grad_norm"),
    "bank": ("bank_fill", "distinct_rows", "largest_count"),
    "neighbours": (
        "neighbour_similarity",
        "positiveness_entropy",
        "neighbour_purity",
        "weighted_purity",
        "same_label_negatives",
    ),
    "features": ("feature_std", "effective_rank", "view_agreement"),
    "speed": ("images_per_s", "data_wait", "slowest_step_s"),
    "eval": ("knn_top1", "knn200_top1", "raw_pixels_knn_top1"),
}


class Log:
    """metrics.jsonl and TensorBoard events in workdir, and the console.

    enabled: on rank 0; on other ranks the log does nothing.
    step: completed steps of a resumed run, else 0. Lines of later steps are removed from the file,
    as is a line that a crash cut short, so that each step is in it once.
    args: all settings, for the loggers of args.log; None: no other loggers.
    """

    def __init__(self, workdir: str, *, step: int, enabled: bool, args: Namespace | None = None):
        self.enabled = enabled
        if not enabled:
            return
        self.path, self.pending = os.path.join(workdir, "metrics.jsonl"), b""
        self.folder = os.path.join(workdir, "tensorboard")
        self.events_lost = False
        threading.excepthook = self._thread_failed
        with writing(workdir):
            # a run that starts anew also evaluates its start anew
            cut_back(self.path, step if step else -1)
            self.file = open_to_append(self.path)  # open for the whole run
            self.events = SummaryWriter(self.folder, purge_step=step + 1 if step else None)
        settings = vars(args) if args else {"log": []}
        self.loggers = Loggers(settings["log"], workdir, settings, self.say)

    def line(self, metrics: dict) -> None:
        """Append one line with 'step' to metrics.jsonl, and its numbers to TensorBoard."""
        if not self.enabled:
            return
        rounded = {name: _rounded(value) for name, value in metrics.items()}
        if console.lost:
            rounded["note"] = "; ".join(console.lost.values())
            console.lost.clear()
        self.pending += json.dumps(rounded).encode() + b"\n"
        self.flush()
        values = {
            f"{next((g for g, names in GROUPS.items() if name in names), 'loss')}/{name}": value
            for name, value in metrics.items()
            if name not in ("epoch", "step") and isinstance(value, (int, float))
        }
        self.loggers.log(values, metrics["step"])
        try:
            self.events = self.events or self._new_events()
            for name, value in values.items():
                self.events.add_scalar(name, value, metrics["step"])
        except OSError as error:  # a full disk ended the writer's thread: try a new one next time
            self.events = None
            self._report_lost_events(error)

    def _new_events(self):
        # raises OSError if the workdir was deleted; TensorBoard would create it again
        os.stat(os.path.dirname(self.path))
        return SummaryWriter(self.folder)

    def _thread_failed(self, failure):
        """Print a line if TensorBoard's thread cannot write, rather than a traceback."""
        if isinstance(failure.exc_value, OSError):
            self._report_lost_events(failure.exc_value)
        else:
            threading.__excepthook__(failure)

    def _report_lost_events(self, error):
        if not self.events_lost:
            self.say(f"note: TensorBoard's events are not written: {error.strerror or error}")
        self.events_lost = True

    def flush(self, durable: bool = False) -> None:
        """Write the pending lines; on a full disk they stay pending.

        durable: before a checkpoint is saved, the lines up to it must be safe from a crash of the
        machine; raises RunError if they cannot be written.
        """
        ignored = () if durable else (RunError,)
        with contextlib.suppress(*ignored), writing(self.path):
            while self.pending:
                self.pending = self.pending[self.file.write(self.pending) :]
            if durable:
                os.fsync(self.file.fileno())

    def last_evaluation(self) -> int | None:
        """The step of the last evaluation in metrics.jsonl."""
        return max(
            (line["step"] for line in read_json_lines(self.path) if "loss" not in line),
            default=None,
        )

    def pictures(self, step: int, draw: Callable[[], tuple[dict, dict[str, Tensor]]]) -> None:
        """Add PIL images and values (n,), by name, to TensorBoard; save the images also as
        pictures/NAME_STEP.png. draw() returns both. If this fails, it prints a line.
        """
        if not self.enabled:
            return
        folder = os.path.join(os.path.dirname(self.path), "pictures")
        try:
            pictures, histograms = draw()
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder)  # not makedirs, which would create a workdir that was deleted
            self.events = self.events or self._new_events()
            for name, picture in pictures.items():
                with new_file(os.path.join(folder, f"{name}_{step:07d}.png")) as file:
                    picture.save(file, format="png")
                self.events.add_image(name, np.asarray(picture), step, dataformats="HWC")
            for name, values in histograms.items():
                if values.isfinite().all():
                    values = values.float().cpu().numpy()
                    self.events.add_histogram(f"neighbours/{name}", values, step, bins=60)
                else:
                    self.say(f"note: no histogram of {name} at step {step}: it is not finite")
        except (OSError, RunError, ValueError) as error:  # the run can continue without pictures
            self.say(f"note: no pictures of step {step}: {first_line(error)}")

    def say(self, text: str) -> None:
        """Print one line on the console, above the progress bar if there is one."""
        if self.enabled:
            # a file name can contain bytes that are not UTF-8
            tqdm.write(text.encode(errors="replace").decode(), file=sys.stdout)
            sys.stdout.flush()

    def progress(self, total: int, done: int, label: str) -> tqdm:
        """A new progress bar, on a terminal; elsewhere only the lines of `say` appear."""
        return tqdm(
            total=total,
            initial=done,
            desc=label,
            unit="step",
            leave=False,
            dynamic_ncols=True,
            disable=not (self.enabled and sys.stderr.isatty()),
        )

    def close(self) -> None:
        """Flush and close the files."""
        if self.enabled:
            self.flush()
            self.file.close()
            self.loggers.close()
            with contextlib.suppress(OSError, AttributeError):
                self.events.close()


def cut_back(path: str, last_step: int) -> None:
    """Remove from a metrics file, atomically, the lines of steps after last_step and lines that are
    not a whole JSON object. Raises UsageError if path is not a regular file, OSError if the disk is
    full.
    """
    if not os.path.lexists(path):
        return
    with open_regular(path) as old, new_file(path) as file:
        for line in old:
            step = json_object(line).get("step") if line.endswith(b"\n") else None
            if isinstance(step, int) and step <= last_step:
                file.write(line)
        file.flush()
        os.fsync(file.fileno())  # before the file gets its name, see tensor_files.save


def _rounded(value):
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None  # JSON has no nan
