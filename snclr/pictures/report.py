"""The report on runs: one HTML file that contains styles, curves (SVG) and pictures."""

import base64
import html
import json
import os
from collections.abc import Iterable, Sequence

from ..options import ON_RESUME
from ..running.errors import UsageError
from ..running.safe_files import read_bytes, save_text
from .curves import curve, key
from .runs import ABOUT, FEW, Run, comparison, differences, group, load

CURVES = (
    ("kNN top-1 in percent", "knn_top1"),
    ("loss", "loss"),
    ("loss over the loss at chance", "loss_ratio"),
    ("neighbours with the image's label (purity)", "neighbour_purity"),
    ("the same, by their weights", "weighted_purity"),
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
LEGEND = """kNN and rank: last evaluation; loss, purity, entropy and std: mean of the log lines of
the last epoch; speed: median; ± sample standard deviation over seeds. Against another: mean
difference over the common seeds; ± its standard error."""
BANDS = """A line is the mean of runs that differ only in their seed; its band reaches from the
lowest to the highest. Point at a line to see only this one."""
# runs that differ only in these settings are in one group
IGNORED = {"seed"} | {name for name, rule in ON_RESUME.items() if rule == "free"}
PNG, MAX_BYTES = b"\x89PNG\r\n\x1a\n", 2**25  # first bytes of a picture, and its largest size
HEAD = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">"""
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --faint: #666; --line: #ddd; --ground: #fff;
  --panel: #f6f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --faint: #a0a0a0; --line: #3a3a3a; --ground: #141414; --panel: #1e1e1e }
  .curves g, .key svg { filter: brightness(1.3) } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground) }
body { max-width: 1200px; margin: auto; padding: 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em }
h3 { font-size: 1em; margin: 1.5em 0 0 }
p, figcaption { color: var(--faint) } figure { margin: 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th { vertical-align: bottom }
th, td { text-align: left; padding: .25em .8em .25em 0; border-bottom: 1px solid var(--line) }
td { white-space: nowrap }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--ground) }
@media (max-width: 600px) { td:first-child { min-width: 8em; max-width: 8em; white-space: normal;
  overflow-wrap: anywhere } }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr));
  gap: 1em }
svg { width: 100%; background: var(--panel) } svg text { fill: var(--faint); font-size: 11px }
svg .grid { stroke: var(--line) }
svg path:not(.band) { fill: none; stroke-width: 1.6; stroke-linejoin: round }
svg path.dot { stroke-width: 4; stroke-linecap: round }
.curves svg:has(g:hover) g:not(:hover) { opacity: .15 } .curves g:hover .band { opacity: .3 }
.key { display: flex; flex-wrap: wrap; gap: .2em 1.4em; padding: 0; list-style: none }
.key svg { width: 28px; height: 10px; background: none }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); padding: .8em }
"""


def page(runs: Sequence[Run], recipes: dict[str, list[Run]] | None = None) -> str:
    """The HTML text of the report. recipes: the groups of the runs, by name; by default runs that
    differ only in their seed are a group, which is named by its settings.
    """
    groups = recipes or group(runs, IGNORED)
    about = [[run.settings.get(x, "?") for x in ("method", "arch", "dataset")] for run in runs]
    title = html.escape("; ".join(dict.fromkeys("{} {}, {}".format(*x) for x in about)))
    parts = [f"<h1>{title}</h1>", _table(*comparison(groups)), f"<p>{LEGEND}</p>"]
    logged = sorted({name for run in runs for line in run.lines for name in line})
    terms = [(html.escape(name), name) for name in logged if name.startswith("term_")]
    names = differences([members[0] for members in groups.values()], IGNORED)
    if len(names) > (0 if recipes else FEW):
        rows = [
            [name, *(members[0].settings.get(setting) for setting in names)]
            for name, members in groups.items()
        ]
        parts += ["<h2>What differs</h2>", _table(["", *names], rows)]
    parts += [
        "<h2>Curves over epochs</h2>",
        f"<p>{BANDS}</p>" if len(runs) > len(groups) else "",
        key(groups),
        '<div class="curves">',
        *(curve(name, metric, groups) for name, metric in (*CURVES, *terms)),
        "</div>",
    ]
    rows = [
        [os.path.join(run.path, folder), *(result.get(name) for name in EVALUATED)]
        for run in runs
        for folder, result in run.results
    ]
    parts += ["<h2>Evaluations</h2>", _table(["", *EVALUATED], rows)] if rows else []
    parts += ["<h2>Neighbours</h2>"] if any(run.pictures for run in runs) else []
    for name, members in groups.items():
        # the last picture; for a single group also the first
        paths = members[0].pictures
        paths = paths[-1:] if len(groups) > 1 else paths[:1] + paths[1:][-1:]
        if paths:
            parts.append(_folded(name, "".join(map(_image, paths)), opened=len(groups) <= FEW))
    parts.append("<h2>How to repeat it</h2>")
    parts += [_repeat(name, members, opened=len(groups) == 1) for name, members in groups.items()]
    body = "\n".join(parts)
    return f"{HEAD}<title>{title}</title><style>{STYLE}</style>\n{body}\n</html>\n"


def write(workdirs: Sequence[str], out: str) -> None:
    """Write the report on the runs in workdirs, whole or not at all.

    Raises UsageError for a workdir without a run, RunError if the file cannot be written.
    """
    save_text(out, page([load(workdir) for workdir in workdirs]))


def write_into(workdir: str) -> str:
    """Write report.html into the workdir at the end of a run. Returns a line for the log."""
    out = os.path.join(workdir, "report.html")
    try:
        write([workdir], out)
    except Exception as error:  # the run succeeded, and must not end with an error
        return f"no report: {error}"
    return f"report: {out}"


def _table(heads: Iterable, rows: Iterable[Iterable]) -> str:
    def line(tag, cells):
        texts = ("" if cell is None else html.escape(str(cell)) for cell in cells)
        return f"<tr>{''.join(f'<{tag}>{text}</{tag}>' for text in texts)}</tr>"

    lines = [line("th", heads), *(line("td", row) for row in rows)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _image(path: str) -> str:
    """A picture of a workdir; '' if the file is not a PNG. A link is not followed: it could lead to
    a private file, and people send the report to others.
    """
    try:
        content = read_bytes(path, MAX_BYTES, follow=False)
    except UsageError:
        content = b""
    if not content.startswith(PNG):
        return ""
    name, data = html.escape(os.path.basename(path)), base64.b64encode(content).decode()
    return f'<p class="wide"><img alt="{name}" src="data:image/png;base64,{data}"></p>'


def _repeat(name: str, members: Sequence[Run], opened: bool) -> str:
    """Command, environment and settings of a group of runs."""
    settings, others = members[0].settings, [run.path for run in members[1:]]
    versions = settings["versions"] if isinstance(settings.get("versions"), dict) else {}
    about = {n: settings.get(n) for n in ABOUT if n not in ("command", "versions")} | versions
    entries = [f"{n} {x}" for n, x in about.items() if x is not None]
    entries += [f"with other seeds: {' '.join(others)}"] if others else []
    environment = f"<p>{html.escape(', '.join(entries))}</p>"
    everything = f"<pre>{html.escape(json.dumps(settings, indent=1))}</pre>"
    return f"""<h3>{html.escape(name)}</h3><pre>{html.escape(str(settings.get("command")))}</pre>
{_folded("environment", environment, opened)}
{_folded("all settings", everything, False)}"""


def _folded(name: str, content: str, opened: bool) -> str:
    title = f"<summary>{html.escape(name)}</summary>"
    return f"<details{' open' if opened else ''}>{title}{content}</details>"
