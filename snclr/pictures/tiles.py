"""Images of a data set as the tiles of a picture."""

from collections.abc import Sequence

import numpy as np

from ..datasets.images import ImageSet
from .canvas import BLUE, GREY, ORANGE, Colour, Tile

SAME_OR_OTHER = ((BLUE, "same class"), (ORANGE, "another class"), (GREY, "no label"))


def row_of(
    queries: ImageSet, query: int, pool: ImageSet, neighbours: Sequence[tuple], size: int
) -> list[Tile]:
    """Tiles of one image and of its neighbours: an (index, line, ...) of `pool` for each.

    A frame says whether the neighbour has the image's class. size: side in px at which images are
    read.
    """
    name = _class_of(queries, query)
    tiles = [Tile(_pixels(queries, [query], size)[0], [name] if name else ())]
    images = _pixels(pool, [index for index, *_ in neighbours], size)
    for image, (index, *lines) in zip(images, neighbours, strict=True):
        other = _class_of(pool, index)
        frame = GREY if "" in (name, other) else BLUE if name == other else ORANGE
        tiles.append(Tile(image, [other, *lines] if other else lines, frame))
    return tiles


def key_of(rows: Sequence[Sequence[Tile]]) -> list[tuple[Colour, str]]:
    """The colours of frames that occur in a picture, with their meaning."""
    frames = {tile.frame for row in rows for tile in row}
    return [(colour, name) for colour, name in SAME_OR_OTHER if colour in frames]


def _pixels(images: ImageSet, indices: Sequence[int], size: int) -> np.ndarray:
    """Images as (n, S, S, 3) uint8."""
    whole = images.whole(np.array(indices, dtype=np.int64), size)
    return whole.permute(0, 2, 3, 1).cpu().numpy()


def _class_of(images: ImageSet, index: int) -> str:
    label = -1 if images.labels is None else int(images.labels[index])
    return str(images.classes[label]) if label >= 0 else ""
