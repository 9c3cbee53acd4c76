"""Curves of metrics over epochs as inline SVG."""

import html
import math
import statistics
from collections.abc import Iterable, Sequence

from .runs import Run, number

# from Okabe and Ito: colour-blind readers can tell them apart, on black and on white
INKS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
# pixels: size of a drawing, and of the space for numbers at its left and bottom
WIDTH, HEIGHT, LEFT, BELOW = 360, 190, 44, 22


def curve(title: str, metric: str, groups: dict[str, list[Run]]) -> str:
    """A figure of a metric over epochs; '' if no run has the metric.

    The line of a group is the mean of its runs; its band reaches from the lowest to the highest.
    """
    curves = {
        name: points for name, members in groups.items() if (points := _points(members, metric))
    }
    if not curves:
        return ""
    ys = [y for points in curves.values() for _, values in points for y in values]
    end, low, high = max(1, *(points[-1][0] for points in curves.values())), min(ys), max(ys)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    x_scale, y_scale = (WIDTH - LEFT - 8) / end, (HEIGHT - BELOW - 16) / (high - low)

    def path(points):
        return "L".join(
            f"{LEFT + x_scale * x:.1f} {8 + y_scale * (high - y):.1f}" for x, y in points
        )

    parts = [f'<path class="grid" d="M{path([(0, y), (end, y)])}"/>' for y in _ticks(low, high)]
    labels = [(LEFT - 6, 12 + y_scale * (high - y), "end", y) for y in _ticks(low, high)]
    labels += [(LEFT + x_scale * x, HEIGHT - 6, "middle", x) for x in _ticks(0, end)]
    parts += [
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{tick:g}</text>'
        for x, y, anchor, tick in labels
    ]
    opacity = min(0.2, 0.5 / len(groups))  # many bands overlap, so each is lighter
    for index, name in enumerate(groups):
        points, ink = curves.get(name, []), INKS[index % len(INKS)]
        mean = [(x, statistics.fmean(values)) for x, values in points]
        parts.append(f"<g><title>{html.escape(name)}</title>")
        if any(len(values) > 1 for _, values in points):
            upper = [(x, max(values)) for x, values in points]
            lower = [(x, min(values)) for x, values in reversed(points)]
            parts.append(
                f'<path class="band" fill="{ink}" opacity="{opacity:.2f}"'
                f' d="M{path(upper + lower)}Z"/>'
            )
        parts.append(f'<path {_stroke(index)} d="M{path(mean)}"/>' if points else "")
        if len(points) < 12:  # a line of length 0 with round ends is a dot
            parts += [f'<path class="dot" stroke="{ink}" d="M{path([p])}h0"/>' for p in mean]
        parts.append("</g>")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
    return f"<figure>{svg}{''.join(parts)}</svg><figcaption>{title}</figcaption></figure>"


def key(groups: Iterable[str]) -> str:
    """A list of the groups: stroke and name of each."""
    entry = '<li><svg viewBox="0 0 28 10"><path {} d="M0 5H28"/></svg> {}</li>'
    entries = [entry.format(_stroke(n), html.escape(name)) for n, name in enumerate(groups)]
    return f'<ul class="key">{"".join(entries)}</ul>'


def _points(members: Sequence[Run], metric: str) -> list[tuple[float, list[float]]]:
    """(epoch, values of the runs at this epoch), in order."""
    values: dict[float, list[float]] = {}
    for run in members:
        # epochs count from 1 and the last step of each is logged, so this is the largest ratio
        ratios = [line["step"] / line["epoch"] for line in run.lines if line["epoch"] > 0]
        steps_per_epoch = max(ratios, default=1) or 1
        for line in run.lines:
            if (y := number(line, metric)) is not None:
                values.setdefault(line["step"] / steps_per_epoch, []).append(y)
    return sorted(values.items())


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers in low .. high."""
    power = 10 ** math.floor(math.log10(high - low))
    step = next(
        power * factor for factor in (0.2, 0.5, 1, 2) if (high - low) / (power * factor) <= 5.5
    )
    return [round(step * n, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _stroke(index: int) -> str:
    dashes = ("", "6 3", "2 3", "8 3 2 3")[index // len(INKS) % 4]
    stroke = f'stroke="{INKS[index % len(INKS)]}"'
    return f'{stroke} stroke-dasharray="{dashes}"' if dashes else stroke
