"""Runs recipes over seeds, several at a time, and compares them.

    python -m snclr.sweep RECIPE... --seeds 0 1 2 --workdir DIR [--base RECIPE] [-- FLAGS]

A run is `main_snclr.py @BASE @RECIPE FLAGS` with a seed, in DIR/RECIPE-seedN. FLAGS include DATA. A
RECIPE may be "NAME=FLAGS". After a stop or a crash, the same command continues: runs that had begun
are resumed, finished ones are skipped.
"""

import itertools
import json
import math
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from .arguments import new_parser, number, read_recipes, seed
from .running.errors import Interrupted, RunError, UsageError, check_packages, one_clear_line


def parse(argv: Sequence[str]) -> Namespace:
    """The flags of the sweep, and as `flags` those of all runs. Raises UsageError."""
    words = read_recipes(list(argv), [])
    end = [*words, "--"].index("--")
    parser = new_parser(
        "python -m snclr.sweep RECIPE... --workdir DIR [flags] [-- DATA and flags of all runs]",
        "Runs recipes over seeds, and compares each with the first one by seed.",
    )
    add, count = parser.add_argument, number(int, above_zero=True)
    add("recipes", nargs="+", metavar="RECIPE", help="recipe, or NAME=FLAGS in quotes")
    add("--base", metavar="RECIPE", help="recipe that is read before each RECIPE")
    add("--seeds", nargs="+", type=seed, default=[0], metavar="N", help="--seed of the runs")
    add("--workdir", metavar="DIR", required=True, help="folder of the runs and their comparison")
    add(
        "--side-by-side",
        type=count,
        default=1,
        metavar="N",
        help="runs at a time on each GPU, or on the CPU",
    )
    about = "stop after M minutes; the runs save, and the exit code is 75 (default: no limit)"
    add("--minutes", type=number(float, above_zero=True), metavar="M", help=about)
    return parser.parse_args(words[:end], Namespace(flags=words[end + 1 :]))


if __name__ == "__main__":
    with one_clear_line("snclr.sweep"):
        parse(sys.argv[1:])  # reports a wrong flag before the slow imports
        check_packages()

import torch

from . import options
from .pictures import report, runs
from .running.jobs import DONE, FAILED, STOPPED, WAITS, Job, run_jobs
from .running.lock import hold
from .running.preemption import requeue
from .running.safe_files import save_json, save_text
from .running.settings import changes, saved_settings
from .shared_options import num_cores


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    gpus = (visible_gpus() or [""]) * args.side_by_side
    cores = max(1, num_cores() // len(gpus))
    os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    jobs = plan(args, args.flags, cores)
    hold(args.workdir, "sweep")
    reason = run_jobs(jobs, gpus, 60 * (args.minutes or math.inf))
    print(summarise(jobs, args.workdir), end="")
    if left := sum(job.state in (WAITS, STOPPED) for job in jobs):
        reason = reason or "a signal to a run"
        raise Interrupted(
            f"{reason}: {left} runs are left; the same command continues{requeue(reason)}"
        )
    if failed := [job.name for job in jobs if job.state == FAILED]:
        raise RunError(f"failed: {', '.join(failed)}; the same command tries again")


def plan(args: Namespace, flags: Sequence[str], cores: int) -> list[Job]:
    """The runs, seed by seed, so that a sweep that is stopped has compared all recipes.

    cores: of each run. Raises UsageError for flags that are wrong.
    """
    jobs, workers = {}, f"--workers={min(8, cores)}"
    base = [f"@{args.base}"] if args.base else []
    for word in flags:
        if word.split("=")[0] in ("--seed", "--workdir", "--resume"):
            raise UsageError(f"{word} cannot be a flag of all runs: the sweep sets it for each run")
    for run_seed, recipe in itertools.product(args.seeds, args.recipes):
        stem, equals, words = recipe.partition("=")
        name = f"{stem if equals else Path(recipe).stem}-seed{run_seed}"
        if name in jobs:
            raise UsageError(f"{name} would run twice: give each RECIPE and seed once")
        workdir = os.path.join(args.workdir, name)
        try:
            own = shlex.split(words) if equals else [f"@{recipe}"]
            settings = [*base, *own, *flags, "--seed", str(run_seed)]
            all_flags = [workers, *settings, f"--workdir={workdir}", "--resume=auto"]
            now = json.loads(json.dumps(vars(options.parse(all_flags))))  # as in args.json
            begun = saved_settings(workdir)
            if changed := changes(begun, Namespace(**now), options.ON_RESUME)[1]:
                raise UsageError(
                    f"it was begun with other settings ({', '.join(changed)}): repeat them, or "
                    f"choose another NAME or --workdir, or remove {workdir}"
                )
        except ValueError as error:  # an open quote; a UsageError is a ValueError, too
            raise UsageError(f"{name}: {error}") from error
        command = [sys.executable, "-m", "main_snclr", *all_flags]
        jobs[name] = Job(name, workdir, command, read_recipes(settings, []))
    return list(jobs.values())


def visible_gpus() -> list[str]:
    """The GPUs of this process, by the names of CUDA_VISIBLE_DEVICES, which SLURM sets."""
    numbers = ",".join(map(str, range(torch.cuda.device_count())))
    names = os.environ.get("CUDA_VISIBLE_DEVICES", numbers)
    return [name for name in names.split(",") if name not in ("", "-1")]


def summarise(jobs: Sequence[Job], workdir: str) -> str:
    """Write the comparison of the finished runs into the workdir; returns its table."""
    content = {job.name: {"state": job.state, "message": job.message} for job in jobs}
    groups: dict[str, list[runs.Run]] = {}
    for job in jobs:
        members = groups.setdefault(job.name.rpartition("-seed")[0], [])
        if job.state == DONE:
            run = runs.load(job.workdir)
            members.append(run)
            content[job.name] |= {title: runs.value(run, *column) for title, *column in runs.MAIN}
    groups = {name: members for name, members in groups.items() if members}
    heads, rows = runs.comparison(groups, runs.MAIN)
    table = runs.markdown(heads, rows) if groups else "no run is finished\n"
    save_json(os.path.join(workdir, "sweep.json"), {"runs": content})
    save_text(os.path.join(workdir, "sweep.md"), table)
    page = report.page([run for members in groups.values() for run in members], groups)
    save_text(os.path.join(workdir, "report.html"), page)
    return table


if __name__ == "__main__":
    with one_clear_line("snclr.sweep"):
        main(sys.argv[1:])
