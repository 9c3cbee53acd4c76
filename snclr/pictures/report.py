"""The report: one HTML file with styles, curves as SVG and pictures inside it."""

import base64
import contextlib
import html
import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence

from ..running.safe_files import save_text
from .runs import ABOUT, FEW, Run, differences, group, load, mean_and_deviation, number_of, value

# title, metric, which of a run's values: of the last evaluation, the first one, the mean of the last epoch, or the median
COLUMNS = (
    ("kNN top-1 %", "knn_top1", "last"),
    ("untrained %", "knn_top1", "first"),
    ("raw pixels %", "raw_pixels_knn_top1", "first"),
    ("linear probe %", "linear_top1", "results"),
    ("loss / chance", "loss_ratio", "mean"),
    ("purity", "neighbour_purity", "mean"),
    ("weights' entropy", "positiveness_entropy", "mean"),
    ("feature std", "feature_std", "mean"),
    ("effective rank", "effective_rank", "last"),
    ("images/s", "images_per_s", "median"),
)
CURVES = (
    ("kNN top-1 in percent", "knn_top1"),
    ("loss", "loss"),
    ("loss over the loss at chance", "loss_ratio"),
    ("neighbours with the image's label (purity)", "neighbour_purity"),
    ("feature std: 1 is spread out, 0 collapse", "feature_std"),
    ("entropy of the positiveness: 1 is uniform", "positiveness_entropy"),
    ("effective rank", "effective_rank"),
    ("images a second", "images_per_s"),
)
EVALUATED = (
    "linear_top1",
    "finetune_top1",
    "knn_top1",
    "mean_per_class_top1",
    "encoder",
    "dataset",
    "label_fraction",
)
LEGEND = (
    "kNN and rank: last evaluation; loss, purity, entropy and std: mean of the last epoch's log lines; speed: median; \
± sample standard deviation over seeds."
)
BANDS = (
    "A line is the mean of runs that differ in their seed alone, its band reaches from the lowest to the highest; \
point at one to see it alone."
)
INKS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#d55e00",
    "#56b4e9",
)  # Okabe and Ito: readable on black and white
WIDTH, HEIGHT, LEFT, BELOW = 360, 190, 44, 22  # of a curve's drawing
HEAD = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">\
<link rel="icon" href="data:,">'
)
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --faint: #666; --line: #ddd; --ground: #fff; --panel: #f6f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --faint: #a0a0a0; --line: #3a3a3a; --ground: #141414; --panel: #1e1e1e }
  .curves g, .key svg { filter: brightness(1.3) } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground) }
body { max-width: 1200px; margin: auto; padding: 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em } h3 { font-size: 1em; margin: 1.5em 0 0 }
p, figcaption { color: var(--faint) } figure { margin: 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums } th { vertical-align: bottom }
th, td { text-align: left; padding: .25em .8em .25em 0; border-bottom: 1px solid var(--line) } td { white-space: nowrap }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--ground) }
@media (max-width: 600px) { td:first-child { min-width: 8em; max-width: 8em; white-space: normal; overflow-wrap: anywhere } }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 1em }
svg { width: 100%; background: var(--panel) } svg text { fill: var(--faint); font-size: 11px } svg .grid { stroke: var(--line) }
svg path:not(.band) { fill: none; stroke-width: 1.6; stroke-linejoin: round }
svg path.dot { stroke-width: 4; stroke-linecap: round }
.curves svg:has(g:hover) g:not(:hover) { opacity: .15 } .curves g:hover .band { opacity: .3 }
.key { display: flex; flex-wrap: wrap; gap: .2em 1.4em; padding: 0; list-style: none }
.key svg { width: 28px; height: 10px; background: none }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); padding: .8em }
"""


def page(runs: Sequence[Run]) -> str:
    """The whole HTML file."""
    groups, whats = (
        group(runs),
        [[run.settings.get(name, "?") for name in ("method", "arch", "dataset")] for run in runs],
    )
    title = html.escape(
        "; ".join(dict.fromkeys(f"{method} {arch}, {dataset}" for method, arch, dataset in whats))
    )
    columns = [
        column for column in COLUMNS if any(value(run, *column[1:]) is not None for run in runs)
    ]
    rows = [
        [
            name,
            len(members),
            *(
                mean_and_deviation([value(run, *column[1:]) for run in members])
                for column in columns
            ),
        ]
        for name, members in groups.items()
    ]
    parts = [
        f"<h1>{title}</h1>",
        _table(["", "runs", *(column[0] for column in columns)], rows),
        f"<p>{LEGEND}</p>",
    ]
    names = differences([members[0] for members in groups.values()])
    if len(names) > FEW:
        rows = [
            [name, *(members[0].settings.get(setting) for setting in names)]
            for name, members in groups.items()
        ]
        parts += ["<h2>What differs</h2>", _table(["", *names], rows)]
    several = any(len(members) > 1 for members in groups.values())
    parts += [
        "<h2>Curves over epochs</h2>",
        f"<p>{BANDS}</p>" if several else "",
        _key(groups),
        '<div class="curves">',
    ]
    parts += [_curve(name, metric, groups) for name, metric in CURVES] + ["</div>"]
    rows = [
        [os.path.join(run.path, where), *(result.get(name) for name in EVALUATED)]
        for run in runs
        for where, result in run.results
    ]
    parts += ["<h2>Evaluations</h2>", _table(["", *EVALUATED], rows)] if rows else []
    parts += ["<h2>Neighbours</h2>"] if any(run.pictures for run in runs) else []
    for name, members in groups.items():
        found = members[0].pictures
        shown = (
            found[-1:] if len(groups) > 1 else found[:1] + found[1:][-1:]
        )  # of one run before and after
        parts += (
            [_folded(name, "".join(map(_image, shown)), opened=len(groups) <= FEW)] if shown else []
        )
    parts.append("<h2>How to repeat it</h2>")
    parts += [_repeat(name, members, opened=len(groups) == 1) for name, members in groups.items()]
    return (
        f"{HEAD}<title>{title}</title><style>{STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )


def write(workdirs: Sequence[str], out: str) -> None:
    """Write the report of the runs in workdirs, whole or not at all."""
    save_text(out, page([load(workdir) for workdir in workdirs]))


def write_into(workdir: str) -> str:
    """Write report.html into the workdir of a run that ends; a line that says where, or why not."""
    out = os.path.join(workdir, "report.html")
    try:
        write([workdir], out)
    except Exception as error:  # whatever it is: the run has succeeded, and must be seen to
        return f"no report: {error}"
    return f"report: {out}"


# -- pieces --------------------------------------------------------------------------------------------------------------


def _curve(title: str, metric: str, groups: dict[str, list[Run]]) -> str:
    """A metric over epochs as inline SVG, a line a group (see BANDS); '' where no run has it."""
    curves = {
        name: points for name, members in groups.items() if (points := _points(members, metric))
    }
    if not curves:
        return ""
    ys = [y for points in curves.values() for _, found in points for y in found]
    end, low, high = max(1, *(points[-1][0] for points in curves.values())), min(ys), max(ys)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    across, upwards = (WIDTH - LEFT - 8) / end, (HEIGHT - BELOW - 16) / (high - low)

    def way(points):
        return "L".join(
            f"{LEFT + across * x:.1f} {8 + upwards * (high - y):.1f}" for x, y in points
        )

    drawn = [f'<path class="grid" d="M{way([(0, y), (end, y)])}"/>' for y in _ticks(low, high)]
    words = [(LEFT - 6, 12 + upwards * (high - y), "end", y) for y in _ticks(low, high)]
    words += [(LEFT + across * x, HEIGHT - 6, "middle", x) for x in _ticks(0, end)]
    drawn += [
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{side}">{tick:g}</text>'
        for x, y, side, tick in words
    ]
    for number, name in enumerate(groups):
        points = curves.get(name, [])
        ink, mean = INKS[number % len(INKS)], [(x, statistics.fmean(found)) for x, found in points]
        drawn.append(f"<g><title>{html.escape(name)}</title>")
        if any(len(found) > 1 for _, found in points):
            edge = [(x, max(found)) for x, found in points] + [
                (x, min(found)) for x, found in reversed(points)
            ]
            light = min(
                0.2, 0.5 / len(groups)
            )  # where many bands lie over each other, each is lighter
            drawn.append(
                f'<path class="band" fill="{ink}" opacity="{light:.2f}" d="M{way(edge)}Z"/>'
            )
        drawn.append(f'<path {_stroke(number)} d="M{way(mean)}"/>' if points else "")
        if len(points) < 12:  # a line of no length with round ends is a dot
            drawn += [f'<path class="dot" stroke="{ink}" d="M{way([point])}h0"/>' for point in mean]
        drawn.append("</g>")
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(drawn)}</svg>'
    return f"<figure>{picture}<figcaption>{title}</figcaption></figure>"


def _points(members: Sequence[Run], metric: str) -> list[tuple[float, list[float]]]:
    """(epoch, the value of each run that has one there), in order."""
    found: dict[float, list[float]] = {}
    for run in members:
        # every epoch's last step is logged: its number over the epoch's is the steps of an epoch
        pace = (
            max(
                (line["step"] / line["epoch"] for line in run.lines if line["epoch"] > 0), default=1
            )
            or 1
        )
        for line in run.lines:
            if (y := number_of(line, metric)) is not None:
                found.setdefault(line["step"] / pace, []).append(y)
    return sorted(found.items())


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers in low .. high."""
    step = 10 ** math.floor(math.log10(high - low))
    step = next(
        step * factor for factor in (0.2, 0.5, 1, 2) if (high - low) / (step * factor) <= 5.5
    )
    return [
        round(step * number, 10)
        for number in range(math.ceil(low / step), math.floor(high / step) + 1)
    ]


def _stroke(number: int) -> str:
    dashes = ("", "6 3", "2 3", "8 3 2 3")[number // len(INKS) % 4]
    return f'stroke="{INKS[number % len(INKS)]}"' + (
        f' stroke-dasharray="{dashes}"' if dashes else ""
    )


def _key(groups: Iterable[str]) -> str:
    entry = '<li><svg viewBox="0 0 28 10"><path {} d="M0 5H28"/></svg> {}</li>'
    return (
        '<ul class="key">'
        + "".join(entry.format(_stroke(n), html.escape(name)) for n, name in enumerate(groups))
        + "</ul>"
    )


def _table(heads: Iterable, rows: Iterable[Iterable]) -> str:
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in heads)
    cells = [
        "".join(f"<td>{'' if cell is None else html.escape(str(cell))}</td>" for cell in row)
        for row in rows
    ]
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in cells)}</table></div>'


def _image(path: str) -> str:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        data = base64.b64encode(file.read()).decode()
        return f'<p class="wide"><img alt="{html.escape(os.path.basename(path))}" src="data:image/png;base64,{data}"></p>'
    return ""


def _repeat(name: str, members: Sequence[Run], opened: bool) -> str:
    """Command, environment and settings of a group of runs."""
    settings, others = members[0].settings, [run.path for run in members[1:]]
    versions = settings["versions"] if isinstance(settings.get("versions"), dict) else {}
    about = {
        key: settings.get(key) for key in ABOUT if key not in ("command", "versions")
    } | versions
    words = [f"{key} {found}" for key, found in about.items() if found is not None]
    words += [f"with other seeds: {' '.join(others)}"] if others else []
    command, environment = html.escape(str(settings.get("command"))), html.escape(", ".join(words))
    return f"""<h3>{html.escape(name)}</h3><pre>{command}</pre>
{_folded("environment", f"<p>{environment}</p>", opened)}
{_folded("all settings", f"<pre>{html.escape(json.dumps(settings, indent=1))}</pre>", False)}"""


def _folded(name: str, content: str, opened: bool) -> str:
    return f"<details{' open' if opened else ''}><summary>{html.escape(name)}</summary>{content}</details>"
