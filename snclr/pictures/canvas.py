"""Drawing with PIL: a page with a title and a key of colours, and a sheet of small images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..datasets.images import ImageSet

Colour = tuple[int, int, int]
INK, FAINT = (0, 0, 0), (90, 90, 90)
# colour-blind readers can tell them apart: the first three are from Okabe and Ito, the others are
# Paul Tol's 'muted'
BLUE, ORANGE, GREY = (0, 114, 178), (230, 120, 0), (170, 170, 170)
COLOURS = (
    (51, 34, 136),
    (136, 204, 238),
    (17, 119, 51),
    (221, 204, 119),
    (204, 102, 119),
    (68, 170, 153),
    (136, 34, 85),
    (153, 153, 51),
    (170, 68, 153),
    (120, 120, 120),
)
FRAMES = ((BLUE, "same class"), (ORANGE, "another class"), (GREY, "no label"))
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
    """A white page: a title, lines of text and a key of colours above an empty area of width x
    height pixels.

    Returns the page, its ImageDraw, and the y of the area; its x is MARGIN.
    """
    lines = text.splitlines()
    needed = [font(17).getlength(title), *map(font().getlength, lines)]
    width = max(width, *map(int, needed))
    positions, x, y = [], 0, MARGIN + 26 + 19 * len(lines)
    for _, name in key:  # from left to right, in several lines if needed
        entry = 20 + int(font().getlength(name)) + 20
        x, y = (0, y + 19) if x and x + entry > width else (x, y)
        positions.append((MARGIN + x, y))
        x += entry
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
    """Rows of tiles, each image resized to side x side pixels. heads: names above the columns."""
    columns, lines = max(map(len, rows)), max(len(tile.lines) for row in rows for tile in row)
    framed, head = side + 2 * FRAME, 22 if heads else 0
    pitch_x, pitch_y = framed + GAP, framed + LINE * lines + GAP
    image, draw, top = page(columns * pitch_x, head + len(rows) * pitch_y, title, text, key)
    for column, name in enumerate(heads):
        draw.text((MARGIN + column * pitch_x, top), name, fill=INK, font=font())
    for row, tiles in enumerate(rows):
        for column, tile in enumerate(tiles):
            x, y = MARGIN + column * pitch_x, top + head + row * pitch_y
            if tile.frame is not None:
                draw.rectangle((x, y, x + framed - 1, y + framed - 1), fill=tile.frame)
            enlarged = tile.image.shape[0] < side  # its pixels become squares
            method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
            resized = Image.fromarray(tile.image).resize((side, side), method)
            image.paste(resized, (x + FRAME, y + FRAME))
            for number, line in enumerate(tile.lines):
                corner = (x + FRAME, y + framed + 1 + LINE * number)
                draw.text(corner, fitting(line, pitch_x - 6), fill=INK, font=font())
    return image


def fitting(text: str, width: float) -> str:
    """The text, shortened with a dot if it is wider than `width` pixels."""
    while font().getlength(text) > width and len(text) > 2:
        text = text[:-2].rstrip(".") + "."
    return text


def neighbour_tiles(
    queries: ImageSet, query: int, pool: ImageSet, neighbours: Sequence[tuple], size: int
) -> list[Tile]:
    """Tiles of an image of `queries` and of its neighbours in `pool`: an (index, line, ...) each.

    The frame of a neighbour shows whether it has the image's class; without labels there is none.
    size: side in px at which images are read.
    """
    indices = np.array([index for index, *_ in neighbours], dtype=np.int64)  # also if it is empty
    (name,), names = _names(queries, np.array([query])), _names(pool, indices)
    tiles = [Tile(in_colour(queries.whole(np.array([query]), size))[0], [name] if name else ())]
    images = in_colour(pool.whole(indices, size))
    for image, other, (_, *lines) in zip(images, names, neighbours, strict=True):
        frame = GREY if "" in (name, other) else BLUE if name == other else ORANGE
        frame = None if queries.labels is None or pool.labels is None else frame
        tiles.append(Tile(image, [other, *lines] if other else lines, frame))
    return tiles


def frame_key(rows: Sequence[Sequence[Tile]]) -> list[tuple[Colour, str]]:
    """The colours of the frames in a picture, with their meaning."""
    present = {tile.frame for row in rows for tile in row}
    return [(colour, name) for colour, name in FRAMES if colour in present]


def in_colour(images: Tensor) -> np.ndarray:
    """Images (n, C, S, S) uint8 for a picture, (n, S, S, 3): the first three channels, or if there
    are fewer, the first one in grey.
    """
    shown = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return shown.permute(0, 2, 3, 1).cpu().numpy()


def _names(images: ImageSet, indices: np.ndarray) -> list[str]:
    """The class of each image, '' if it has no label; of images without labels, the file's name."""
    if images.labels is None:
        names = images.select(indices).names
        return [""] * len(indices) if names is None else names.tolist()
    classes = [*map(str, images.classes), ""]  # label -1 takes the last one
    return [classes[label] for label in images.labels[indices].tolist()]
