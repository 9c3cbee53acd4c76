"""Runs commands as processes, several at a time, until a deadline or a signal stops them."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .lock import is_held
from .preemption import handle_signals
from .safe_files import open_to_append, read_json, save_json, writing

WAITS, RUNS, DONE, FAILED = "waits", "runs", "finished", "failed"
STOPPED = "stopped"  # by a signal that this process did not send: it is not started again
SAVED = 75  # the exit code of such a job
POLL = 2  # seconds between two looks at the jobs
TAIL = 2**16  # bytes at the end of a job's output that are searched for its last line


@dataclass(eq=False)
class Job:
    """A command that continues what it began in its workdir when it is started again."""

    name: str
    workdir: str  # its output goes into console.txt here; finished.json is written at its end
    command: list[str]
    settings: list[str]  # a job that has finished with the same settings is not run again
    state: str = WAITS
    message: str = ""  # its last line about an epoch, or why it failed
    shown: tuple[str, str] = (WAITS, "")  # the state and epoch that were printed last
    gpu: str = ""
    process: subprocess.Popen | None = None


def run_jobs(jobs: Sequence[Job], gpus: Sequence[str], seconds: float) -> str:
    """Run the jobs that have not finished, one for each entry of gpus at a time. A failed job stops
    no other.

    gpus: names as in CUDA_VISIBLE_DEVICES; several jobs share a GPU that is named several times.
    Returns what stopped the jobs: the name of a signal, "--minutes" after so many seconds, or "" if
    nothing did. A stopped job gets a SIGTERM, saves and ends; its state is then WAITS. A second
    SIGINT kills this process, which does not wait for a job that hangs.
    """
    received: list[int] = []
    handle_signals(received.append)
    free, reason, height, deadline = list(gpus), "", 0, time.monotonic() + seconds
    for job in jobs:
        if read_json(f"{job.workdir}/finished.json").get("settings") == job.settings:
            job.state, job.message = DONE, last_line(job, "epoch ")
    while True:
        if not reason and (received or time.monotonic() > deadline):
            reason = signal.Signals(received[0]).name if received else "--minutes"
            for job in jobs:
                if job.state == RUNS:
                    job.process.terminate()
        for job in jobs:
            if job.state == RUNS:
                update(job, is_stopped=bool(reason or received))
                if job.state != RUNS:
                    free.append(job.gpu)
            elif job.state == WAITS and is_held(job.workdir, "main_snclr"):
                job.message = "another process uses its folder"
            elif job.state == WAITS and free and not reason:
                start(job, free.pop(0))
        height = show(jobs, height)
        if not any(job.state == RUNS or (job.state == WAITS and not reason) for job in jobs):
            return reason
        time.sleep(POLL)


def start(job: Job, gpu: str) -> None:
    """Start a job on a GPU. Raises RunError if its output cannot be written."""
    # SLURM signals the jobs as well: the first that has saved must not requeue this process's job
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    with writing(job.workdir):
        os.makedirs(job.workdir, exist_ok=True)
        console = open_to_append(f"{job.workdir}/console.txt")
    with console:
        job.process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            env=environment | {"CUDA_VISIBLE_DEVICES": gpu},
            start_new_session=True,  # Ctrl-C reaches only this process, which stops its jobs
            # PR_SET_PDEATHSIG: the job gets a SIGTERM, and saves, when this process is killed
            preexec_fn=(
                (lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM))
                if sys.platform == "linux"
                else None
            ),
        )
    job.state, job.gpu, job.message = RUNS, gpu, ""


def update(job: Job, is_stopped: bool) -> None:
    """Set the message of a running job, and its state if it has ended."""
    code, job.message = job.process.poll(), last_line(job, "epoch ")
    if code == 0:
        job.state = DONE
        save_json(f"{job.workdir}/finished.json", {"settings": job.settings})
    elif code is not None and is_stopped:
        job.state = WAITS
    elif code == SAVED:
        job.state = STOPPED
    elif code is not None:
        job.state, job.message = FAILED, last_line(job) or f"exit code {code}"
        if code < 0:  # its last line does not say why
            job.message = f"ended by {signal.Signals(-code).name}"


def last_line(job: Job, beginning: str = "") -> str:
    """The last line of a job's output that is not empty and begins like this; '' if none does, or
    if somebody removed the output.
    """
    lines = []
    with contextlib.suppress(OSError), open(f"{job.workdir}/console.txt", "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        lines = file.read(TAIL).decode(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line and line.startswith(beginning)), "")


def show(jobs: Sequence[Job], height: int) -> int:
    """Print a line for each job that has reached another state or epoch.

    On a terminal, the lines of running jobs stay at the bottom and change in place. height: the
    number of these lines that the last call printed. Returns the number of this call.
    """
    live = [job for job in jobs if job.state == RUNS and sys.stdout.isatty()]
    width = os.get_terminal_size().columns if live else None
    text = "\x1b[A\x1b[2K" * height
    for job in [*(job for job in jobs if job not in live), *live]:
        state_and_epoch = (job.state, job.message.split("  ")[0])
        if job in live or state_and_epoch != job.shown:
            text += f"{job.name}  {job.state}  {job.message}".rstrip()[:width] + "\n"
        job.shown = state_and_epoch
    print(text, end="", flush=True)
    return len(live)
