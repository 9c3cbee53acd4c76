"""Drawing with PIL: a page with title and key, and a sheet of small images with lines of text."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
INK, FAINT = (0, 0, 0), (90, 90, 90)
# distinct for colour-blind readers: the first three from Okabe and Ito, the others Paul Tol's
# 'muted'
BLUE, ORANGE, GREY = (0, 114, 178), (230, 120, 0), (170, 170, 170)
COLOURS = (
    (51, 34, 136),
    (136, 204, 238),
    (17, 119, 51),
    (221, 204, 119),
    (204, 102, 119),
    (68, 170, 153),
    (136, 34, 85),
)
COLOURS += ((153, 153, 51), (170, 68, 153), (120, 120, 120))
MARGIN, GAP, FRAME, LINE = 24, 10, 4, 16  # pixels


class Tile(NamedTuple):
    """A small image (H, W, 3) uint8 with lines of text below it and a frame."""

    image: np.ndarray
    lines: Sequence[str] = ()
    frame: Colour | None = None


def font(size: int = 13) -> ImageFont.FreeTypeFont:
    """PIL's own font, the same on every machine."""
    return ImageFont.load_default(size)


def page(
    width: int, height: int, title: str, text: str = "", key: Sequence[tuple[Colour, str]] = ()
) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """A white page with a title, lines of text and a key of colours above an empty area of width x
    height pixels.

    Returns the page, its ImageDraw, and the y of the area; its x is MARGIN.
    """
    lines = text.splitlines()
    width = max(
        width,
        *(
            int(font(size).getlength(line))
            for size, line in [(17, title), *((13, line) for line in lines)]
        ),
    )
    positions, x, y = [], 0, MARGIN + 26 + 19 * len(lines)
    for _, name in key:  # from left to right, in several lines if needed
        needed = 20 + int(font().getlength(name)) + 20
        x, y = (0, y + 19) if x and x + needed > width else (x, y)
        positions.append((MARGIN + x, y))
        x += needed
    top = y + (19 if key else 0) + GAP
    image = Image.new("RGB", (width + 2 * MARGIN, top + height + MARGIN), "white")
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN - 4), title, fill=INK, font=font(17))
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + 26 + 19 * number), line, fill=FAINT, font=font())
    for (colour, name), (x, y) in zip(key, positions, strict=True):
        draw.rectangle((x, y + 1, x + 12, y + 13), fill=colour)
        draw.text((x + 20, y), name, fill=FAINT, font=font())
    return image, draw, top


def sheet(
    rows: Sequence[Sequence[Tile]],
    title: str,
    text: str = "",
    key: Sequence[tuple[Colour, str]] = (),
    heads: Sequence[str] = (),
    side: int = 96,
) -> Image.Image:
    """Rows of tiles, each image resized to side x side pixels, below heads of the columns."""
    columns, lines = max(map(len, rows)), max(len(tile.lines) for row in rows for tile in row)
    pitch, pace = side + 2 * FRAME + GAP, side + 2 * FRAME + LINE * lines + GAP
    head = 22 if heads else 0
    image, draw, top = page(columns * pitch, head + len(rows) * pace, title, text, key)
    for column, name in enumerate(heads):
        draw.text((MARGIN + column * pitch, top), name, fill=INK, font=font())
    for row, tiles in enumerate(rows):
        for column, tile in enumerate(tiles):
            x, y = MARGIN + column * pitch, top + head + row * pace
            if tile.frame is not None:
                draw.rectangle(
                    (x, y, x + side + 2 * FRAME - 1, y + side + 2 * FRAME - 1), fill=tile.frame
                )
            enlarged = tile.image.shape[0] < side  # its pixels become squares
            method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
            image.paste(
                Image.fromarray(tile.image).resize((side, side), method), (x + FRAME, y + FRAME)
            )
            for number, line in enumerate(tile.lines):
                draw.text(
                    (x + FRAME, y + side + 2 * FRAME + 1 + LINE * number),
                    fitting(line, pitch),
                    fill=INK,
                    font=font(),
                )
    return image


def fitting(text: str, width: float) -> str:
    """The text, shortened with a dot if it is wider than `width` pixels."""
    while font().getlength(text) > width and len(text) > 2:
        text = text[:-2].rstrip(".") + "."
    return text
