#!/usr/bin/env python3
"""Draws the figures of these pages.

python docs/figures.py                      method.png: the data's way through one step; renews METHOD.md's links to lines
python docs/figures.py runs/ablations/*     ablations.png: kNN of runs in folders NAME-seedN; prints their table
"""

import itertools
import math
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from PIL import Image, ImageDraw

from snclr.pictures import runs as records
from snclr.pictures.canvas import BLUE, FAINT, GREY, INK, MARGIN, ORANGE, font, page
from snclr.pictures.report import COLUMNS

HERE = os.path.dirname(os.path.abspath(__file__))
FINE = 2  # drawn larger and reduced: smooth lines
LEARNED, FIXED, MEMORY = (222, 235, 247), (240, 240, 240), (253, 235, 208)
# centre, what it is, where it is, and its ground
BOXES = {
    "images": ((70, 190), "images", "snclr/loader.py", FIXED),
    "view 1": ((210, 80), "view 1", "snclr/augment.py", FIXED),
    "view 2": ((210, 300), "view 2", "snclr/augment.py", FIXED),
    "online": ((375, 80), "online encoder", "snclr/backbones.py", LEARNED),
    "momentum": ((375, 300), "momentum encoder", "snclr/builder.py", FIXED),
    "predictor": ((560, 80), "predictor", "snclr/heads.py", LEARNED),
    "search": ((560, 300), "K nearest rows", "snclr/memory_bank.py", MEMORY),
    "bank": ((375, 420), "memory bank", "snclr/memory_bank.py", MEMORY),
    "weights": ((740, 190), "positiveness", "snclr/objectives.py", FIXED),
    "loss": ((920, 80), "contrast", "snclr/objectives.py", FIXED),
}
WIDE, HIGH = 140, 52
# from, to, what travels, dashed; corners are passed on the way
ARROWS = (
    ("images", "view 1", "", False, []),
    ("images", "view 2", "", False, []),
    ("view 1", "online", "", False, []),
    ("view 2", "momentum", "", False, []),
    ("online", "predictor", "y", False, []),
    ("online", "weights", "y", False, [(375, 190)]),
    ("online", "momentum", "moving average", True, []),
    ("momentum", "search", "k", False, []),
    ("bank", "search", "rows", False, [(560, 420)]),
    ("momentum", "bank", "k, after the search", True, []),
    ("search", "weights", "NN", False, [(740, 300)]),
    ("search", "loss", "k, NN", False, [(920, 300)]),
    ("predictor", "loss", "z", False, []),
    ("weights", "loss", "w", False, [(920, 190)]),
)


def method() -> Image.Image:
    """The data's way through one direction of a step."""
    key = [(LEARNED, "learns by gradient"), (FIXED, "does not"), (MEMORY, "the same on every rank")]
    told = "One direction (view 1 asks, view 2 answers); the other is its mirror image, and the loss their sum."
    image, _, top = page(1000, 470, "The data's way through one step", told, key)
    drawing = Image.new("RGB", (1000 * FINE, 470 * FINE), "white")
    draw = ImageDraw.Draw(drawing)
    for start, end, name, dashed, corners in ARROWS:
        points = [BOXES[start][0], *corners, BOXES[end][0]]
        points[0], points[-1] = edge(points[0], points[1]), edge(points[-1], points[-2])
        for a, b in itertools.pairwise(points):
            line(draw, a, b, dashed)
        tip(draw, points[-2], points[-1])
        (x, y), (u, v) = points[0], points[1]
        # beside a line that falls, above one that lies; lower on dashed ones, which another may cross in the middle
        place, anchor = (
            ((x + 8, y + (v - y) * (0.75 if dashed else 0.5)), "lm")
            if x == u
            else (((x + u) / 2, y - 9), "mm")
        )
        draw.text(scaled(place), name, fill=INK, font=font(12 * FINE), anchor=anchor)
    for (x, y), name, where, ground in BOXES.values():
        corner = scaled((x - WIDE / 2, y - HIGH / 2)) + scaled((x + WIDE / 2, y + HIGH / 2))
        draw.rounded_rectangle(corner, 8 * FINE, fill=ground, outline=GREY, width=FINE)
        draw.text(scaled((x, y - 9)), name, fill=INK, font=font(14 * FINE), anchor="mm")
        draw.text(scaled((x, y + 11)), where, fill=FAINT, font=font(11 * FINE), anchor="mm")
    image.paste(drawing.resize((1000, 470), Image.Resampling.LANCZOS), (MARGIN, top))
    return image


def scaled(point: tuple) -> tuple:
    return tuple(FINE * value for value in point)


def edge(centre: tuple, towards: tuple) -> tuple:
    """Where a line from a box's centre leaves the box."""
    (x, y), (u, v) = centre, towards
    reach = min(
        WIDE / 2 / abs(u - x) if u != x else math.inf, HIGH / 2 / abs(v - y) if v != y else math.inf
    )
    return x + reach * (u - x), y + reach * (v - y)


def line(draw: ImageDraw.ImageDraw, a: tuple, b: tuple, dashed: bool) -> None:
    pieces = max(1, int(math.dist(a, b) / 5)) if dashed else 1
    for piece in range(0, pieces, 2):
        ends = [
            tuple(p + (q - p) * share for p, q in zip(a, b, strict=True))
            for share in (piece / pieces, (piece + 1) / pieces)
        ]
        draw.line(scaled(ends[0]) + scaled(ends[1]), fill=FAINT, width=FINE + 1)


def tip(draw: ImageDraw.ImageDraw, a: tuple, b: tuple) -> None:
    angle = math.atan2(b[1] - a[1], b[0] - a[0])
    corners = [
        (b[0] - 9 * math.cos(angle + turn), b[1] - 9 * math.sin(angle + turn))
        for turn in (-0.4, 0.4)
    ]
    draw.polygon([scaled(point) for point in (b, *corners)], fill=FAINT)


def by_name(workdirs: list[str]) -> dict[str, list[records.Run]]:
    """Runs by the name of their folder without -seedN, 'base' first."""
    found: dict[str, list[records.Run]] = {}
    for workdir in sorted(
        workdirs, key=lambda path: (not os.path.basename(path).startswith("base"), path)
    ):
        found.setdefault(re.sub(r"-seed\d+$", "", os.path.basename(workdir)), []).append(
            records.load(workdir)
        )
    return found


def ablations(runs: dict[str, list[records.Run]]) -> Image.Image:
    """kNN top-1 of each run as a dot, the mean over seeds as a bar."""
    values = {
        name: [records.value(run, "knn_top1", "last") for run in members]
        for name, members in runs.items()
    }
    low, high = (
        math.floor(min(map(min, values.values()))) - 1,
        math.ceil(max(map(max, values.values()))) + 1,
    )
    left, width, pace = 190, 460, 22
    told = "kNN top-1 in percent: a dot a seed, a bar their mean; dashed: the mean of base"
    image, draw, top = page(
        left + width, pace * len(values) + 24, "Ablations on the embedded data", told
    )

    def place(value):
        return MARGIN + left + width * (value - low) / (high - low)

    bottom = top + pace * len(values)
    for tick in range(low, high + 1, 2):
        draw.line((place(tick), top, place(tick), bottom), fill=(225, 225, 225))
        draw.text((place(tick), bottom + 12), str(tick), fill=FAINT, font=font(), anchor="mm")
    base = sum(values["base"]) / len(values["base"])
    for y in range(top, bottom, 8):
        draw.line((place(base), y, place(base), y + 3), fill=FAINT)
    for row, (name, found) in enumerate(values.items()):
        y, mean = top + pace * (row + 0.5), sum(found) / len(found)
        draw.text((MARGIN + left - 12, y), name, fill=INK, font=font(), anchor="rm")
        draw.rectangle((place(mean) - 1, y - 8, place(mean) + 1, y + 8), fill=ORANGE)
        for value in found:
            draw.ellipse((place(value) - 3, y - 3, place(value) + 3, y + 3), fill=BLUE)
    return image


def table(runs: dict[str, list[records.Run]]) -> str:
    """The same and what else sets them apart, in Markdown: mean and sample standard deviation over the seeds."""
    columns = [
        column
        for column in COLUMNS
        if column[1] in ("knn_top1", "neighbour_purity", "positiveness_entropy")
    ]
    columns = [column for column in columns if column[2] != "first"]
    lines = [
        "| ablation | seeds | " + " | ".join(name for name, *_ in columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for name, members in runs.items():
        cells = [
            records.mean_and_deviation([records.value(run, *column[1:]) for run in members])
            for column in columns
        ]
        lines.append(f"| `{name}` | {len(members)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def renew_links(page: str) -> str:
    """The page, with links on names of functions and classes leading to the lines where they are."""

    def renewed(link):
        name, path = link.groups()
        with open(os.path.join(HERE, path)) as file:
            line = next(
                number
                for number, text in enumerate(file, 1)
                if re.match(rf"\s*(def|class) {name}\b", text)
            )
        return f"[`{name}`]({path}#L{line})"

    return re.sub(r"\[`(\w+)`\]\(([^)#]+\.py)(?:#L\d+)?\)", renewed, page)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        runs = by_name(sys.argv[1:])
        print(table(runs))
        ablations(runs).save(os.path.join(HERE, "ablations.png"), optimize=True)
    else:
        method().save(os.path.join(HERE, "method.png"), optimize=True)
        with open(os.path.join(HERE, "METHOD.md"), "r+") as file:
            page = renew_links(file.read())
            file.seek(0)
            file.write(page)
            file.truncate()
