"""Runs recipes over seeds, several at a time, and compares them.

    python -m snclr.sweep RECIPE... --seeds 0 1 2 --workdir DIR [--base RECIPE] [-- FLAGS]

A run is `main_snclr.py @BASE @RECIPE FLAGS` with a seed, in DIR/RECIPE-seedN. FLAGS include DATA. A
RECIPE may be "NAME=FLAGS". After a stop or a crash, the same command continues: runs that had begun
are resumed, finished ones are skipped.
"""

import contextlib
import ctypes
import dataclasses
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from . import options
from .arguments import new_parser, number, read_recipes, seed
from .pictures import report, runs
from .pictures.compare import MAIN, comparison, markdown
from .running import safe_files
from .running.errors import Interrupted, RunError, UsageError, one_clear_line
from .running.lock import hold, is_held
from .shared_options import num_cores

WAITS, RUNS, DONE, FAILED, STOPPED = "waits", "runs", "finished", "failed", "to be continued"
POLL, GRACE = 2, 120  # seconds between looks at the runs; in which a run that is stopped must save
MARKER, CONSOLE = "finished.json", "console.txt"  # in the workdir of a run


@dataclasses.dataclass
class Job:
    """A recipe with a seed."""

    name: str  # RECIPE-seedN
    recipe: str
    workdir: str
    flags: list[str]  # of main_snclr.py
    settings: list[str]  # the flags without those of its place, and without @recipes
    state: str = WAITS
    message: str = ""  # how far it is, or why it failed
    gpu: str | None = None
    process: subprocess.Popen | None = None


def main(argv: Sequence[str]) -> None:
    words = read_recipes(list(argv), [])
    split = words.index("--") if "--" in words else len(words)
    args = parse(words[:split])
    slots = args.side_by_side * (visible_gpus() or [None])
    jobs = plan(args, words[split + 1 :], num_cores() // len(slots))
    hold(args.workdir, "sweep")
    for job in jobs:
        with contextlib.suppress(UsageError):
            marker = safe_files.read_bytes(os.path.join(job.workdir, MARKER))
            if safe_files.json_object(marker).get("settings") == job.settings:
                job.state, job.message = DONE, progress(job.workdir)
    try:
        reason = work(jobs, slots, 60 * (args.minutes or math.inf))
    finally:
        for job in jobs:
            if job.process is not None:
                job.process.terminate()
    print(summarise(jobs, args.workdir), end="")
    if left := sum(job.state in (WAITS, STOPPED) for job in jobs):
        raise Interrupted(f"{reason}: {left} runs are left; the same command continues")
    if failed := [job.name for job in jobs if job.state == FAILED]:
        raise RunError(f"failed: {', '.join(failed)}; the same command tries again")


def parse(argv: list[str]) -> Namespace:
    """The flags of the sweep. Raises UsageError."""
    parser = new_parser("snclr.sweep", "Runs recipes over seeds, and compares them by seed.")
    add = parser.add_argument
    about = "recipe, or NAME=FLAGS in quotes; each is compared with the first"
    add("recipes", nargs="+", metavar="RECIPE", help=about)
    add("--base", metavar="RECIPE", help="recipe that is read before each RECIPE")
    add("--seeds", nargs="+", type=seed, default=[0], metavar="N", help="--seed of the runs")
    add("--workdir", metavar="DIR", required=True, help="folder of the runs and their comparison")
    above_zero = number(int, above_zero=True)
    add("--side-by-side", type=above_zero, default=1, metavar="N", help="runs at a time on a GPU")
    about = "stop after M minutes; the runs save, and the exit code is 75 (default: no limit)"
    add("--minutes", type=number(float, above_zero=True), metavar="M", help=about)
    parser.epilog = "Flags after -- are those of all runs, DATA included. " + parser.epilog
    return parser.parse_args(argv)


def plan(args: Namespace, flags: list[str], cores: int) -> list[Job]:
    """The runs, recipe by recipe, with checked flags. cores: of each run. Raises UsageError."""
    for word in flags:
        if word.split("=")[0] in ("--seed", "--workdir", "--resume"):
            raise UsageError(f"{word} cannot be a flag of all runs: the sweep sets it for each run")
    jobs, base = {}, [f"@{args.base}"] if args.base else []
    for recipe in args.recipes:
        stem, equals, words = recipe.partition("=")
        stem, words = (stem, words) if equals else (Path(recipe).stem, f"@{recipe}")
        for run_seed in args.seeds:
            name = f"{stem}-seed{run_seed}"
            if name in jobs:
                raise UsageError(f"{name} would run twice: give each RECIPE and seed once")
            workdir = os.path.join(args.workdir, name)
            own = ["--workdir", workdir, "--resume", "auto"]
            try:
                settings = [*base, *shlex.split(words), *flags, "--seed", str(run_seed)]
                all_flags = ["--workers", str(max(1, min(8, cores))), *settings, *own]
                options.parse(all_flags)
            except ValueError as error:  # an open quote; a UsageError is a ValueError, too
                raise UsageError(f"{name}: {error}") from error
            jobs[name] = Job(name, stem, workdir, all_flags, read_recipes(settings, []))
    return list(jobs.values())


def visible_gpus() -> list[str]:
    """The GPUs of this process, by the names of CUDA_VISIBLE_DEVICES, which SLURM sets."""
    if (names := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in names.split(",") if name not in ("", "-1")]
    import torch  # slow

    return list(map(str, range(torch.cuda.device_count())))


def work(jobs: list[Job], slots: list[str | None], seconds: float) -> str:
    """Run all jobs that wait, one in each slot at a time. Returns why runs are left, if any are."""
    received: list[int] = []
    for number_ in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number_, lambda number_, frame: received.append(number_))
    free, display, deadline, stopped_at = list(slots), Display(), time.monotonic() + seconds, None
    while True:
        now = time.monotonic()
        is_stop = stopped_at is None and (bool(received) or now > deadline)
        stopped_at = now if is_stop else stopped_at
        for job in jobs:
            if job.process is not None and job.process.poll() is not None:
                end(job, is_stopped=stopped_at is not None)
                free.append(job.gpu)
            elif job.process is not None:
                job.message = progress(job.workdir)
                if is_stop:
                    job.process.terminate()
                elif stopped_at is not None and now > stopped_at + GRACE:
                    job.process.kill()
            elif job.state == WAITS and free and stopped_at is None:
                if is_held(job.workdir, "main_snclr"):
                    job.message = "another process uses its folder"
                else:
                    start(job, free.pop(0), len(slots))
        display.update(jobs)
        is_over = stopped_at is not None or not any(job.state == WAITS for job in jobs)
        if is_over and not any(job.process for job in jobs):
            return signal.Signals(received[0]).name if received else "--minutes"
        time.sleep(POLL)


def start(job: Job, gpu: str | None, num_slots: int) -> None:
    """Start a run on a GPU, or on the CPU; its output is appended to a file in its workdir."""
    with safe_files.writing(job.workdir):
        os.makedirs(job.workdir, exist_ok=True)
        console = safe_files.open_to_append(os.path.join(job.workdir, CONSOLE))
    environment = {"OMP_NUM_THREADS": str(max(1, num_cores() // num_slots)), **os.environ}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with console:
        job.process = subprocess.Popen(
            [sys.executable, "-m", "main_snclr", *job.flags],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches only the sweep, which ends its runs
            preexec_fn=_end_with_parent,
        )
    job.state, job.gpu, job.message = RUNS, gpu, ""


def _end_with_parent():
    """PR_SET_PDEATHSIG: the run gets a SIGTERM, and saves, when the sweep ends or is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def end(job: Job, is_stopped: bool) -> None:
    """Record how a run ended."""
    code, job.process, job.message = job.process.returncode, None, progress(job.workdir)
    if code == 0:
        job.state = DONE
        safe_files.save_json(os.path.join(job.workdir, MARKER), {"settings": job.settings})
    elif is_stopped or code == 75:
        job.state = STOPPED
    else:
        lines = safe_files.read_text(os.path.join(job.workdir, CONSOLE)).split("\n")
        job.state, job.message = FAILED, ([*filter(None, lines)] or [f"exit code {code}"])[-1]


def progress(workdir: str) -> str:
    """Epoch, last kNN and speed of a run, as far as its log has them."""
    path = os.path.join(workdir, "metrics.jsonl")
    lines = safe_files.read_json_lines(path) if os.path.exists(path) else []
    formats = {"epoch": "epoch {}", "knn_top1": "kNN {:.2f} %", "images_per_s": "{:.0f} images/s"}
    last = {name: x for line in lines for name in formats if (x := runs.number(line, name))}
    return "  ".join(form.format(last[name]) for name, form in formats.items() if name in last)


class Display:
    """Prints a line when a run reaches another state or epoch. On a terminal, the lines of the runs
    that work stay at the bottom and change in place.
    """

    def __init__(self):
        self.height, self.printed = 0, {}

    def update(self, jobs: list[Job]) -> None:
        live = [job for job in jobs if job.state == RUNS] if sys.stdout.isatty() else []
        width = os.get_terminal_size().columns if live else None
        text, self.height = "\x1b[A\x1b[2K" * self.height, len(live)
        for job in [*(job for job in jobs if job not in live), *live]:
            key = (job.state, job.message.split("  ")[0])
            if job in live or key not in ((WAITS, ""), self.printed.get(job.name)):
                text += f"{job.name}  {job.state}  {job.message}".rstrip()[:width] + "\n"
            self.printed[job.name] = key
        print(text, end="", flush=True)


def summarise(jobs: list[Job], workdir: str) -> str:
    """Write the comparison of the finished runs into the workdir; returns its table."""
    groups, content = {}, {}
    for job in jobs:
        content[job.name] = {"state": job.state, "message": job.message}
        if job.state == DONE:
            run = runs.load(job.workdir)
            groups.setdefault(job.recipe, []).append(run)
            content[job.name] |= {title: runs.value(run, *column) for title, *column in MAIN}
    safe_files.save_json(os.path.join(workdir, "sweep.json"), {"runs": content})
    table = markdown(*comparison(groups, MAIN)) if groups else "no run is finished\n"
    safe_files.save_text(os.path.join(workdir, "sweep.md"), table)
    if groups:
        paths = [run.path for members in groups.values() for run in members]
        report.write(paths, os.path.join(workdir, "report.html"))
    return table


if __name__ == "__main__":
    with one_clear_line("snclr.sweep"):
        main(sys.argv[1:])
