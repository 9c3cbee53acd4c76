"""Signals that end a run in good order: finish the step, save, leave on all ranks; under SLURM, ask to be started again."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator

from .distributed import LaggedMaximum, world_size
from .errors import Interrupted, first_line

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAVE = 1  # a larger number is the signal that ends the run


@contextlib.contextmanager
def handlers_given_back() -> Iterator[None]:
    """For a process that goes on after the block: what it did at a signal before, it does again. (Not before failures_named
    has said which rank was lost: the launcher's SIGTERM would end it first.)"""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Signals that come during the block are heeded after it: torch's writer of files aborts the process when it is left."""
    came = []
    with handlers_given_back():
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    for number in came:
        signal.raise_signal(number)


class Interruptions:
    """What makes a run save in the middle of an epoch: a signal, or save_every_minutes since it last did (0: nothing).

    A second SIGINT ends the process at once.
    """

    def __init__(self, save_every_minutes: float, timeout_minutes: float):
        self.interval = 60 * save_every_minutes or float("inf")
        self.signal, self.agreed = 0, 0
        self.unsaved = True  # whether leaving now would lose anything
        self.saved()
        self.maximum = LaggedMaximum(timeout_minutes)
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        if not self.unsaved:
            interrupt(number, self.told)

    def due(self) -> bool:
        """Whether all ranks save after this step. To be called once a step by each; no GPU waits for it."""
        self.agreed = self.maximum(
            self.signal or int(time.monotonic() - self.since > self.interval)
        )
        return self.agreed > 0

    def saved(self, told: str = "saved") -> None:
        """The minutes begin anew. told: what to say of it, on rank 0, when a signal ends the run."""
        self.since, self.told = time.monotonic(), told

    def end_here(self) -> bool:
        """End the run before the next step, if a signal asks for it and no other rank needs to
        agree."""
        self.agreed = self.signal if world_size() == 1 else 0
        return self.agreed > 0

    @property
    def ending(self) -> int:
        """The signal for which all ranks end the run after this step, or 0."""
        return self.agreed if self.agreed > SAVE else 0

    @contextlib.contextmanager
    def nothing_unsaved(self) -> Iterator[None]:
        """While the block runs, which may be long, a signal ends it at once."""
        self.unsaved = False
        if self.signal:
            interrupt(self.signal, self.told)
        yield
        self.unsaved = True


def leave_at_once() -> None:
    """For work whose files are whole at any moment: from now on a signal ends it where it is."""

    def receive(number, frame):
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        interrupt(number, "ended")

    for number in SIGNALS:
        signal.signal(number, receive)


def interrupt(number: int, told: str) -> None:
    """Raise Interrupted. SIGUSR1 is how SLURM, asked to (--signal), announces the time limit: the job is put in line again.
    Not so for SIGTERM, which scancel sends."""
    told = f"{signal.Signals(number).name}: {told}; the same command with --resume auto goes on"
    job = os.environ.get("SLURM_JOB_ID")
    if number == signal.SIGUSR1 and job and os.environ.get("RANK", "0") == "0":
        try:
            subprocess.run(
                ["scontrol", "requeue", job], capture_output=True, text=True, check=True, timeout=60
            )
            told += f", as job {job} will"
        except (OSError, subprocess.SubprocessError) as error:  # a container may have no scontrol
            told += f" (requeue of job {job} failed: {(getattr(error, 'stderr', None) or first_line(error)).strip()})"
    raise Interrupted(told)
