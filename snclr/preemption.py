"""Signals that end a run in good order: finish the step, save, leave on all ranks; under SLURM, ask to be started again."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator

from .distributed import LaggedMaximum
from .errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAVE = 1  # a larger number is the signal that ends the run


class Interruptions:
    """What makes a run save in the middle of an epoch: a signal, or save_every_minutes since it last did (0: nothing).

    A second SIGINT ends the process at once.
    """

    def __init__(self, save_every_minutes: float, timeout_minutes: float):
        self.interval = 60 * save_every_minutes or float("inf")
        self.since = time.monotonic()
        self.signal, self.agreed = 0, 0
        self.unsaved = True  # whether leaving now would lose anything
        self.maximum = LaggedMaximum(timeout_minutes)
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        if not self.unsaved:
            self.leave(number)

    def due(self) -> bool:
        """Whether all ranks save after this step. To be called once a step by each; no GPU waits for it."""
        self.agreed = self.maximum(self.signal or int(time.monotonic() - self.since > self.interval))
        return self.agreed > 0

    def saved(self) -> None:
        """The minutes begin anew."""
        self.since = time.monotonic()

    @property
    def ending(self) -> int:
        """The signal for which all ranks end the run after this step, or 0."""
        return self.agreed if self.agreed > SAVE else 0

    @contextlib.contextmanager
    def nothing_unsaved(self) -> Iterator[None]:
        """While the block runs, which may be long, a signal ends it at once."""
        self.unsaved = False
        if self.signal:
            self.leave(self.signal)
        yield
        self.unsaved = True

    def leave(self, number: int) -> None:
        """Raise Interrupted. SIGUSR1 is how SLURM, asked to (--signal), announces the time limit: the job is put in line again.
        Not so for SIGTERM, which scancel sends."""
        told = f"{signal.Signals(number).name}: saved; the same command with --resume auto goes on"
        job = os.environ.get("SLURM_JOB_ID")
        if number == signal.SIGUSR1 and job and os.environ.get("RANK", "0") == "0":
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
            told += f" (requeue of job {job} refused: {done.stderr.strip()})" if done.returncode else f", as job {job} will"
        raise Interrupted(told)
