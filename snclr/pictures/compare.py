"""The table of groups of runs: mean and deviation over seeds, and differences by seed."""

import statistics
from collections.abc import Iterable, Sequence

from .runs import Run, mean_and_deviation, value

# title, metric, and kind of value (runs.value)
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
