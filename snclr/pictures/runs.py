"""Reads runs from their workdirs, and compares them: the numbers of a run, groups of runs, a table.

A run may not have ended. A workdir may come from someone else: any file in it may be missing or
have any content.
"""

import glob
import json
import os
import re
import statistics
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from ..running.errors import UsageError
from ..running.safe_files import read_json, read_json_lines

# entries of args.json that are not settings
ABOUT = ("command", "versions", "git", "world_size", "amp_used", "device")
FEW = 3  # runs are named by the settings in which they differ, unless these are more
# title, metric, and kind of value (see `value`)
COLUMNS = (
    ("kNN top-1 %", "knn_top1", "last"),
    ("untrained %", "knn_top1", "untrained"),
    ("start (from --init-from) %", "knn_top1", "start"),
    ("raw pixels %", "raw_pixels_knn_top1", "last"),
    ("linear probe %", "linear_top1", "results"),
    ("loss / chance", "loss_ratio", "mean"),
    ("purity", "neighbour_purity", "mean"),
    ("weighted purity", "weighted_purity", "mean"),
    ("weights' entropy", "positiveness_entropy", "mean"),
    ("feature std", "feature_std", "mean"),
    ("effective rank", "effective_rank", "last"),
    ("images/s", "images_per_s", "median"),
)
# titles of columns that have differences beside them
COMPARED = ("kNN top-1 %", "linear probe %", "purity", "weighted purity")
# the columns of a small table
MAIN = [column for column in COLUMNS if column[0] in (*COMPARED, "weights' entropy")]


class Run(NamedTuple):
    """The content of a workdir."""

    path: str
    settings: dict  # args.json
    lines: list[dict]  # metrics.jsonl
    results: list[tuple[str, dict]]  # folder and content of each results.json of an evaluation
    pictures: list[str]  # paths of the neighbour pictures, in the order of their steps


def load(workdir: str) -> Run:
    """Read the workdir of a run, which may still be running. Raises UsageError if it has no run."""
    settings = read_json(os.path.join(workdir, "args.json"))
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
        if (result := read_json(path))
    ]
    pictures = sorted(glob.glob(f"{glob.escape(workdir)}/pictures/neighbours_*.png"))
    return Run(workdir, settings, lines, results, pictures)


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
    results     of an evaluation of the run's encoder by main_lincls.py, not of a baseline
    """
    if kind == "results":
        results = [
            number(result, metric)
            for _, result in run.results
            if result.get("encoder") not in ("untrained", "pixels")
        ]
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


def comparison(
    groups: dict[str, list[Run]], columns: Sequence[tuple] = COLUMNS
) -> tuple[list[str], list[tuple]]:
    """Heads and rows of the table, a row for each group. Columns without any value are left out.

    A column 'against NAME' has the mean difference from the first group, NAME, over the seeds that
    both have, and its standard error.
    """
    first = next(iter(groups), "")
    table = {}  # from the head of a column to its cells
    for title, *column in columns:
        values = [[value(run, *column) for run in members] for members in groups.values()]
        table[title] = list(map(mean_and_deviation, values))
        if title in COMPARED:
            paired = [paired_differences(x, groups[first], *column) for x in groups.values()]
            table[f"{title} against {first}"] = ["", *map(difference_text, paired[1:])]
    table = {head: cells for head, cells in table.items() if any(cells)}
    sizes = map(len, groups.values())
    return ["", "runs", *table], list(zip(groups, sizes, *table.values(), strict=True))


def paired_differences(
    members: Sequence[Run], base: Sequence[Run], metric: str, kind: str
) -> list[float]:
    """The metric of each run minus that of the run of the same seed in `base`, if there is one."""
    by_seed = {str(run.settings.get("seed")): value(run, metric, kind) for run in base}
    pairs = [
        (value(run, metric, kind), by_seed.get(str(run.settings.get("seed")))) for run in members
    ]
    return [x - y for x, y in pairs if x is not None and y is not None]


def difference_text(differences: Sequence[float]) -> str:
    """'+mean ± standard error of the mean'; without the error for one value, '' for none."""
    if not differences:
        return ""
    mean = statistics.fmean(differences)
    digits = 3 if abs(mean) < 0.1 else 2
    errors = [statistics.stdev(differences) / len(differences) ** 0.5] if differences[1:] else []
    return f"{mean:+.{digits}f}" + "".join(f" ± {error:.{digits}f}" for error in errors)


def markdown(heads: Sequence, rows: Iterable[Sequence]) -> str:
    """The table as Markdown, with aligned columns."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(map(str.ljust, row, widths)) for row in cells)
    return "".join(f"| {line} |\n" for line in lines)
