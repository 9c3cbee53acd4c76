#!/usr/bin/env python3
"""Draws the figures of these pages.

python docs/figures.py                      method.png: one training step as boxes and arrows
python docs/figures.py runs/ablations/*-seed*    ablations.png: kNN of runs in folders NAME-seedN;
                                                 prints their table
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
from snclr.pictures.runs import MAIN, comparison, markdown

HERE = os.path.dirname(os.path.abspath(__file__))
SCALE = 2  # drawn larger and reduced, for smooth lines
LEARNED, FIXED, MEMORY = (222, 235, 247), (240, 240, 240), (253, 235, 208)
# name: (centre, label, file, fill colour)
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
    "loss": ((920, 80), "loss", "snclr/objectives.py", FIXED),
}
BOX_WIDTH, BOX_HEIGHT = 140, 52
# from, to, label, dashed, corners that the line passes
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


def draw_method() -> Image.Image:
    """One direction of a training step."""
    key = [
        (LEARNED, "trained by gradient"),
        (FIXED, "not trained"),
        (MEMORY, "the same on every rank"),
    ]
    subtitle = "One direction. The other swaps the views; the loss of a step is the sum of both."
    image, _, top = page(1000, 470, "One training step", subtitle, key)
    drawing = Image.new("RGB", (1000 * SCALE, 470 * SCALE), "white")
    draw = ImageDraw.Draw(drawing)
    for start, end, label, dashed, corners in ARROWS:
        points = [BOXES[start][0], *corners, BOXES[end][0]]
        points[0] = box_edge(points[0], points[1])
        points[-1] = box_edge(points[-1], points[-2])
        for a, b in itertools.pairwise(points):
            draw_line(draw, a, b, dashed)
        draw_tip(draw, points[-2], points[-1])
        (x, y), (u, v) = points[0], points[1]
        if x == u:  # beside a vertical line; lower on a dashed one, which another may cross
            position, anchor = (x + 8, y + (v - y) * (0.75 if dashed else 0.5)), "lm"
        else:
            position, anchor = ((x + u) / 2, y - 9), "mm"
        draw.text(scaled(position), label, fill=INK, font=font(12 * SCALE), anchor=anchor)
    for (x, y), label, path, fill in BOXES.values():
        corners = scaled((x - BOX_WIDTH / 2, y - BOX_HEIGHT / 2))
        corners += scaled((x + BOX_WIDTH / 2, y + BOX_HEIGHT / 2))
        draw.rounded_rectangle(corners, 8 * SCALE, fill=fill, outline=GREY, width=SCALE)
        draw.text(scaled((x, y - 9)), label, fill=INK, font=font(14 * SCALE), anchor="mm")
        draw.text(scaled((x, y + 11)), path, fill=FAINT, font=font(11 * SCALE), anchor="mm")
    image.paste(drawing.resize((1000, 470), Image.Resampling.LANCZOS), (MARGIN, top))
    return image


def scaled(point: tuple) -> tuple:
    return tuple(SCALE * value for value in point)


def box_edge(centre: tuple, towards: tuple) -> tuple:
    """The point in which a line from a box's centre leaves the box."""
    (x, y), (u, v) = centre, towards
    across = BOX_WIDTH / 2 / abs(u - x) if u != x else math.inf
    down = BOX_HEIGHT / 2 / abs(v - y) if v != y else math.inf
    share = min(across, down)
    return x + share * (u - x), y + share * (v - y)


def draw_line(draw: ImageDraw.ImageDraw, a: tuple, b: tuple, dashed: bool) -> None:
    pieces = max(1, int(math.dist(a, b) / 5)) if dashed else 1
    for piece in range(0, pieces, 2):
        ends = [
            tuple(p + (q - p) * share for p, q in zip(a, b, strict=True))
            for share in (piece / pieces, (piece + 1) / pieces)
        ]
        draw.line(scaled(ends[0]) + scaled(ends[1]), fill=FAINT, width=SCALE + 1)


def draw_tip(draw: ImageDraw.ImageDraw, a: tuple, b: tuple) -> None:
    """The head of an arrow from a to b."""
    angle = math.atan2(b[1] - a[1], b[0] - a[0])
    corners = [
        (b[0] - 9 * math.cos(angle + turn), b[1] - 9 * math.sin(angle + turn))
        for turn in (-0.4, 0.4)
    ]
    draw.polygon([scaled(point) for point in (b, *corners)], fill=FAINT)


def load_by_name(workdirs: list[str]) -> dict[str, list[records.Run]]:
    """Runs by the name of their folder without -seedN, 'base' first."""

    def base_first(workdir):
        return not os.path.basename(workdir).startswith("base"), workdir

    runs: dict[str, list[records.Run]] = {}
    for workdir in sorted(workdirs, key=base_first):
        name = re.sub(r"-seed\d+$", "", os.path.basename(workdir))
        runs.setdefault(name, []).append(records.load(workdir))
    return runs


def draw_ablations(runs: dict[str, list[records.Run]]) -> Image.Image:
    """kNN top-1 of each run as a dot, the mean over seeds as a bar."""
    values = {
        name: [records.value(run, "knn_top1", "last") for run in members]
        for name, members in runs.items()
    }
    low = math.floor(min(map(min, values.values()))) - 1
    high = math.ceil(max(map(max, values.values()))) + 1
    left, width, row_height = 190, 460, 22
    subtitle = "kNN top-1 in percent: a dot a seed, a bar their mean; dashed: the mean of base"
    size = left + width, row_height * len(values) + 24
    image, draw, top = page(*size, "Ablations on the embedded data", subtitle)

    def x_of(value):
        return MARGIN + left + width * (value - low) / (high - low)

    bottom = top + row_height * len(values)
    for tick in range(low, high + 1, 2):
        draw.line((x_of(tick), top, x_of(tick), bottom), fill=(225, 225, 225))
        draw.text((x_of(tick), bottom + 12), str(tick), fill=FAINT, font=font(), anchor="mm")
    base = sum(values["base"]) / len(values["base"])
    for y in range(top, bottom, 8):
        draw.line((x_of(base), y, x_of(base), y + 3), fill=FAINT)
    for row, (name, seeds) in enumerate(values.items()):
        y, mean = top + row_height * (row + 0.5), sum(seeds) / len(seeds)
        draw.text((MARGIN + left - 12, y), name, fill=INK, font=font(), anchor="rm")
        draw.rectangle((x_of(mean) - 1, y - 8, x_of(mean) + 1, y + 8), fill=ORANGE)
        for value in seeds:
            draw.ellipse((x_of(value) - 3, y - 3, x_of(value) + 3, y + 3), fill=BLUE)
    return image


if __name__ == "__main__":
    if len(sys.argv) > 1:
        runs = load_by_name(sys.argv[1:])
        print(markdown(*comparison(runs, MAIN)))
        draw_ablations(runs).save(os.path.join(HERE, "ablations.png"), optimize=True)
    else:
        draw_method().save(os.path.join(HERE, "method.png"), optimize=True)
