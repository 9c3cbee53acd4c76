"""The workdirs of runs: read, grouped by what differs, and their numbers."""

import glob
import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..running.checkpoint import RUNNING
from ..running.errors import UsageError

ABOUT = (
    "command",
    "versions",
    "git",
    "world_size",
    "amp_used",
    "device",
)  # in args.json beside the settings


FEW = 3  # differing settings that still make a name


class Run(NamedTuple):
    """What a workdir tells: args.json, the lines of metrics.jsonl, results.json files below it, its neighbour pictures."""

    path: str
    settings: dict
    lines: list[dict]
    results: list[tuple[str, dict]]
    pictures: list[str]


def load(workdir: str) -> Run:
    """Read a workdir, also of a run that is still going on. Raises UsageError where it holds no run."""
    settings = _read_json(os.path.join(workdir, "args.json"))
    if settings is None:
        raise UsageError(
            f"{workdir} holds no run (no args.json that can be read): give the --workdir of one"
        )
    try:
        with open(
            os.path.join(workdir, "metrics.jsonl"), encoding="utf-8", errors="replace"
        ) as file:
            lines = [
                line
                for line in map(_object, file)
                if number_of(line, "step") is not None and number_of(line, "epoch") is not None
            ]
    except OSError as error:
        raise UsageError(
            f"{workdir} has no metrics.jsonl that can be read: {error.strerror}; was the run started?"
        ) from error
    below = sorted(
        glob.glob(os.path.join(glob.escape(workdir), "**", "results.json"), recursive=True)
    )
    results = [
        (os.path.relpath(os.path.dirname(path), workdir), found)
        for path in below
        if (found := _read_json(path))
    ]
    pictures = sorted(glob.glob(os.path.join(glob.escape(workdir), "pictures", "neighbours_*.png")))
    return Run(workdir, settings, lines, results, pictures)


def group(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by a name that says what sets them apart; those that differ in their seed alone are together."""
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        kinds.setdefault(json.dumps(_kind(run), sort_keys=True, default=str), []).append(run)
    first = [members[0].settings for members in kinds.values()]
    differing = differences([members[0] for members in kinds.values()])
    usual = {
        name: statistics.mode(str(settings.get(name)) for settings in first) for name in differing
    }
    named = {}
    for settings, members in zip(first, kinds.values(), strict=True):
        own = [
            name
            for name in differing
            if len(differing) <= FEW or str(settings.get(name)) != usual[name]
        ]
        name = ", ".join(f"{name} {settings.get(name)}" for name in own)
        if not 0 < len(own) <= FEW:
            folders = [os.path.basename(os.path.abspath(run.path)) for run in members]
            common = os.path.commonprefix(folders)  # noqa: RUF071 - letters, not folders
            name = re.sub(r"[-_. ]*(seed)?[-_. ]*$", "", common) or folders[0]
        named[name if name not in named else members[0].path] = members
    return named


def differences(runs: Sequence[Run]) -> list[str]:
    """Names of the settings that are not the same in all runs, seed and what a run may change apart."""
    kinds = [_kind(run) for run in runs]
    names = dict.fromkeys(name for kind in kinds for name in kind)
    return [name for name in names if any(kind.get(name) != kinds[0].get(name) for kind in kinds)]


def value(run: Run, metric: str, which: str) -> float | None:
    """One number of a run for a table (see COLUMNS); None where it has none."""
    if which == "results":
        return next(
            (
                found
                for _, result in run.results
                if (found := number_of(result, metric)) is not None
            ),
            None,
        )
    told = [
        (line["epoch"], found)
        for line in run.lines
        if (found := number_of(line, metric)) is not None
    ]
    told = told[:1] if which == "first" else told
    if not told or (which == "first" and told[0][0] != 0):
        return None
    if which == "median":
        return statistics.median(found for _, found in told)
    last = [found for epoch, found in told if epoch == told[-1][0]]
    return statistics.fmean(last) if which == "mean" else last[-1]


def mean_and_deviation(values: Sequence[float | None]) -> str:
    """'mean ± sample standard deviation' of what is known, '' for nothing."""
    known = [found for found in values if found is not None]
    if not known:
        return ""
    mean = statistics.fmean(known)
    digits = max(0, 2 - math.floor(math.log10(abs(mean)))) if mean else 2
    digits = min(digits, 1 if abs(mean) >= 10 else 3)
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def _kind(run: Run) -> dict:
    return {
        name: found
        for name, found in run.settings.items()
        if name not in {*RUNNING, *ABOUT, "seed"}
    }


def _read_json(path: str) -> dict | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return _object(file.read()) or None
    except OSError:
        return None


def _object(text: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def number_of(line: dict, name: str) -> float | None:
    found = line.get(name)
    return (
        found
        if isinstance(found, (int, float)) and not isinstance(found, bool) and abs(found) < 1e15
        else None
    )
