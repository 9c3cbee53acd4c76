"""Reads finished and running runs from their workdirs: the numbers of a run, and groups of runs.

A workdir may come from someone else: any file in it may be missing or have any content.
"""

import glob
import json
import os
import re
import statistics
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from ..running.errors import UsageError
from ..running.safe_files import json_object, read_bytes, read_json_lines

# entries of args.json that are not settings
ABOUT = ("command", "versions", "git", "world_size", "amp_used", "device")
FEW = 3  # runs are named by the settings in which they differ, unless these are more


class Run(NamedTuple):
    """The content of a workdir."""

    path: str
    settings: dict  # args.json
    lines: list[dict]  # metrics.jsonl
    results: list[tuple[str, dict]]  # folder and content of each results.json of an evaluation
    pictures: list[str]  # paths of the neighbour pictures, in the order of their steps


def load(workdir: str) -> Run:
    """Read the workdir of a run, which may still be running. Raises UsageError if it has no run."""
    settings = _read_object(os.path.join(workdir, "args.json"))
    if not settings:
        raise UsageError(
            f"{workdir} holds no run (no args.json that can be read): give the --workdir of one"
        )
    try:
        lines = read_json_lines(os.path.join(workdir, "metrics.jsonl"))
    except UsageError as error:
        raise UsageError(
            f"{workdir} has no metrics.jsonl that can be read: {error}; was the run started?"
        ) from error
    lines = [line for line in lines if None not in (number(line, "step"), number(line, "epoch"))]
    # os.walk does not follow links to folders, which may form a circle
    paths = sorted(os.path.join(folder, "results.json") for folder, _, _ in os.walk(workdir))
    results = [
        (os.path.relpath(os.path.dirname(path), workdir), result)
        for path in paths
        if (result := _read_object(path))
    ]
    pictures = sorted(glob.glob(f"{glob.escape(workdir)}/pictures/neighbours_*.png"))
    return Run(workdir, settings, lines, results, pictures)


def _read_object(path: str) -> dict:
    try:
        return json_object(read_bytes(path))
    except UsageError:
        return {}


def number(line: dict, name: str) -> float | None:
    """The number under a name in a line of the log; None if there is none."""
    x = line.get(name)
    is_number = isinstance(x, (int, float)) and not isinstance(x, bool)
    return x if is_number and abs(x) < 1e15 else None  # a comparison with nan is False


def value(run: Run, metric: str, kind: str) -> float | None:
    """One number of a run for a table; None if it has none. kind:

    last        of the last evaluation that has it
    untrained   of the evaluation before training, if the encoder was untrained
    start       of the evaluation before training, if it had the weights of --init-from
    mean        over the last epoch
    median      over all lines
    results     of an evaluation by main_lincls.py
    """
    if kind == "results":
        results = [number(result, metric) for _, result in run.results]
        return next((x for x in results if x is not None), None)
    lines = [line for line in run.lines if number(line, metric) is not None]
    if kind in ("untrained", "start"):
        lines = [line for line in lines if line["epoch"] == 0]
        is_start = kind == "start"  # main_snclr.py writes 'start (from FILE)'
        lines = [x for x in lines if str(x.get("encoder")).startswith("start") == is_start]
    if not lines:
        return None
    if kind == "median":
        return statistics.median(line[metric] for line in lines)
    last = [line[metric] for line in lines if line["epoch"] == lines[-1]["epoch"]]
    return statistics.fmean(last) if kind == "mean" else last[-1]


def mean_and_deviation(values: Sequence[float | None]) -> str:
    """'mean ± sample standard deviation' of the values that are not None; '' if there are none."""
    known = [x for x in values if x is not None]
    if not known:
        return ""
    mean = statistics.fmean(known)
    digits = 3 - sum(abs(mean) >= least for least in (1, 10, 100)) if mean else 2
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def group(runs: Iterable[Run], ignored: Collection[str]) -> dict[str, list[Run]]:
    """Groups of runs that differ only in settings that are ignored, and in ABOUT, by names made of
    the other differences.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps(_relevant_settings(run, ignored), sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    first = [members[0].settings for members in groups.values()]
    differing = differences([members[0] for members in groups.values()], ignored)
    usual = {
        name: statistics.mode(str(settings.get(name)) for settings in first) for name in differing
    }
    named = {}
    for settings, members in zip(first, groups.values(), strict=True):
        own = [
            name
            for name in differing
            if len(differing) <= FEW or str(settings.get(name)) != usual[name]
        ]
        name = ", ".join(f"{name} {settings.get(name)}" for name in own)
        if not 0 < len(own) <= FEW:
            folders = [os.path.basename(os.path.abspath(run.path)) for run in members]
            common = os.path.commonprefix(folders)  # noqa: RUF071 - of letters, not of folders
            name = re.sub(r"[-_. ]*(seed)?[-_. ]*$", "", common) or folders[0]
        named[name if name not in named else members[0].path] = members
    return named


def differences(runs: Sequence[Run], ignored: Collection[str]) -> list[str]:
    """Names of the settings that differ between runs, without those that are ignored, and ABOUT."""
    settings = [_relevant_settings(run, ignored) for run in runs]
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if any(x.get(name) != settings[0].get(name) for x in settings)]


def _relevant_settings(run: Run, ignored: Collection[str]) -> dict:
    """The settings of a run by which it is grouped."""
    return {name: x for name, x in run.settings.items() if name not in (*ABOUT, *ignored)}
