"""Signals that end a run: all ranks finish the step, save and end; under SLURM the job can be
requeued.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

from .distributed import LaggedMaximum, shared_store, world_size
from .errors import Interrupted, first_line

SIGNALS = [
    each
    for each in signal.Signals  # Windows has only two of these
    if each.name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
    # nohup makes a program ignore SIGHUP
    and not (each.name == "SIGHUP" and signal.getsignal(each) == signal.SIG_IGN)
]

SPACING = 20  # so saves take at most a twentieth of the time


@contextlib.contextmanager
def handlers_given_back() -> Iterator[None]:
    """Restore the earlier signal handlers after the block, for a program that goes on after it.

    The block must include failures_named: otherwise the launcher's SIGTERM would end the process
    before it reports which rank was lost.
    """
    with contextlib.ExitStack() as at_end:
        for number in SIGNALS:
            at_end.callback(signal.signal, number, signal.getsignal(number))
        yield


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Delay signals that arrive during the block until its end, because an exception inside torch's
    file writer would abort the process.
    """
    received: list[int] = []
    with handlers_given_back():
        handle_signals(received.append)
        yield
    for number in received:
        signal.raise_signal(number)


class Interruptions:
    """Decides when a run saves in the middle of an epoch: at a signal, and save_every_minutes after
    the last save (0: only at a signal).

    A second SIGINT kills the process.
    """

    def __init__(self, save_every_minutes: float, timeout_minutes: float):
        self.interval = 60 * save_every_minutes or float("inf")
        self.signal = 0  # the one that asks for the end of the run
        self.ending = 0  # the signal at which all ranks end the run after this step
        self.maximum = LaggedMaximum(timeout_minutes)
        self.saved("nothing was trained since the start")
        handle_signals(lambda number: setattr(self, "signal", number))

    def due(self) -> bool:
        """Whether all ranks save after this step. Each rank calls it in each step; no GPU waits."""
        waited = time.monotonic() - self.last_save
        wanted = 1 + self.signal if self.signal else int(waited > self.interval)
        agreed = self.maximum(wanted)  # 1: save; 1 + a signal: save and end
        self.ending = max(agreed - 1, 0)
        return agreed > 0

    def saved(self, outcome: str = "saved", seconds: float = 0.0) -> None:
        """Restart the interval. outcome: what rank 0 reports if a signal then ends the run.
        seconds: what the save took.
        """
        self.last_save, self.outcome, self.save_seconds = time.monotonic(), outcome, seconds
        self.maximum.forget()  # a rank that asked for this save meanwhile; a signal asks again

    def save_is_cheap(self) -> bool:
        """Whether the time since the last save is at least SPACING times what that save took."""
        return time.monotonic() - self.last_save >= SPACING * self.save_seconds

    def end_here(self, last_checkpoint: str) -> bool:
        """End the run before the next step, if there was a signal; returns whether it ends.

        Several ranks cannot save together then: some may be within the step. So this rank leaves at
        once, and those that lose contact with it do the same (interrupt_like_other_ranks).
        last_checkpoint: what is reported about it.
        """
        if self.signal and world_size() > 1:
            outcome = f"not saved, because a rank got no images; {last_checkpoint}"
            with contextlib.suppress(RuntimeError):  # the launcher may be gone, and its store
                shared_store().set("signal", f"{self.signal} {outcome}")
            interrupt(self.signal, outcome)
        self.ending = self.signal
        return self.ending > 0

    @contextlib.contextmanager
    def nothing_unsaved(self) -> Iterator[None]:
        """During the block, which may take long, a signal ends the run at once."""
        with handlers_given_back():
            handle_signals(lambda number: interrupt(number, self.outcome))
            if self.signal:
                interrupt(self.signal, self.outcome)
            yield


def interrupt_like_other_ranks() -> None:
    """Raise Interrupted if a rank has left because of a signal, in Interruptions.end_here."""
    with contextlib.suppress(RuntimeError):
        if shared_store().check(["signal"]):
            number, _, outcome = shared_store().get("signal").decode().partition(" ")
            interrupt(int(number), outcome)


def end_at_once() -> None:
    """From now on a signal ends the run at once: for work that never leaves a file half written."""
    handle_signals(lambda number: interrupt(number, "ended"))


def handle_signals(react: Callable[[int], None]) -> None:
    """Call react(number) when a signal arrives. A second SIGINT kills the process."""

    def receive(number, frame):
        # in a destructor, such as that of a DataLoader, Python ignores exceptions: try again later
        while frame is not None and frame.f_code.co_name != "__del__":
            frame = frame.f_back
        if frame is not None:
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
            return
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        react(number)

    for number in SIGNALS:
        signal.signal(number, receive)


def interrupt(number: int, outcome: str) -> None:
    """Raise Interrupted for a signal, and requeue the job."""
    name = signal.Signals(number).name
    raise Interrupted(
        f"{name}: {outcome}; the same command with --resume auto goes on{requeue(name)}"
    )


def requeue(name: str) -> str:
    """Requeue the SLURM job after SIGUSR1, which SLURM can send before the time limit (sbatch
    --signal), but not after another signal, such as SIGTERM, which scancel sends. Rank 0 does it.

    Returns the end of a message that says what continues; '' if nothing was tried.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if name != "SIGUSR1" or not job or os.environ.get("RANK", "0") != "0":
        return ""
    try:
        subprocess.run(
            ["scontrol", "requeue", job],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            start_new_session=True,  # torchrun passes the signal on to the group of this process
        )
    except (OSError, subprocess.SubprocessError) as error:  # a container may have no scontrol
        reason = (getattr(error, "stderr", None) or first_line(error)).strip()
        return f" (requeue of job {job} failed: {reason})"
    return f", as job {job} will"
