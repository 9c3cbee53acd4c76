"""The embedded data set: 32-px images of glyph lattices, drawn from a seed, so it needs no files.

Drawing it takes about a second. Each image is a 3x3 lattice of one kind of glyph, each turned by a
random angle, on an almost grey background with faint clutter and noise. The class is the kind of
glyph. Colour, position, angle and pitch do not depend on the class, so raw pixels and an untrained
network hardly separate the classes; a network that learns what two views have in common does.
"""

import numpy as np

SIZE = 32
SPLITS = {"train": (5000, 0), "val": (1000, 1)}  # images, seed
WINDOW = np.arange(-7, 7)  # px: offsets of the pixels of a glyph from its centre
MARGIN = 24  # px: canvas around the picture


def _box(x, y, half_width, half_height):
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _triangle(x, y):
    return np.maximum(np.abs(x) * 0.866 + y * 0.5, -y) - 0.55


def _star(x, y):
    """Five points: the radius varies with the angle."""
    # 0 between two points, 1 at a point
    angle = np.abs(np.mod(np.arctan2(x, y), 2 * np.pi / 5) - np.pi / 5) / (np.pi / 5)
    return np.hypot(x, y) - (0.28 + 0.85 * angle**2)


# Approximate signed distance to a glyph of radius 1 around the origin, negative inside:
# arrays (x, y) -> array
GLYPHS = {
    "disc": lambda x, y: np.hypot(x, y) - 0.95,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.86) - 0.14,
    "square": lambda x, y: _box(x, y, 0.6, 0.6),
    "frame": lambda x, y: np.abs(_box(x, y, 0.62, 0.62)) - 0.22,
    "triangle": _triangle,
    "plus": lambda x, y: np.minimum(_box(x, y, 1.0, 0.2), _box(x, y, 0.2, 1.0)),
    "bar": lambda x, y: _box(x, y, 1.1, 0.3),
    "star": _star,
    "ell": lambda x, y: np.minimum(_box(x + 0.6, y, 0.22, 0.85), _box(x, y + 0.63, 0.82, 0.22)),
    "stripes": lambda x, y: _box(x, np.abs(np.abs(y) - 0.3) - 0.3, 0.95, 0.13),
}
CLASSES = tuple(GLYPHS)


def draw(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of 'train' or 'val'; always the same."""
    count, seed = SPLITS[split]
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(CLASSES))
    radius = rng.uniform(0.26, 0.29, count)
    pitch = radius * rng.uniform(2.5, 2.9, count)
    lattice_angle = rng.uniform(0, 2 * np.pi, count)
    offset = rng.uniform(-0.5, 0.5, (count, 2)) * pitch[:, None]
    background = rng.uniform(0.47, 0.53, (count, 1, 1, 1))
    foreground = rng.uniform(0.85, 1.0, (count, 1, 1, 1))
    # two blobs of clutter an image
    positions = rng.uniform(-1, 1, (count, 2, 2))
    sizes, strengths = rng.uniform(0.06, 0.12, (count, 2)), rng.uniform(-0.05, 0.05, (count, 2))

    cover = np.zeros((count, SIZE + 2 * MARGIN, SIZE + 2 * MARGIN), np.float32)
    cosine, sine = np.cos(lattice_angle), np.sin(lattice_angle)
    for row in (-1, 0, 1):
        for column in (-1, 0, 1):
            jitter = rng.normal(0, 0.04, (count, 2)) * pitch[:, None]
            turn = rng.uniform(0, 2 * np.pi, count).astype(np.float32)
            across = column * pitch + offset[:, 0] + jitter[:, 0]
            along = row * pitch + offset[:, 1] + jitter[:, 1]
            centre_x, centre_y = cosine * across - sine * along, sine * across + cosine * along
            for label, glyph in enumerate(GLYPHS.values()):
                image = np.flatnonzero(labels == label)
                _add_glyph(
                    cover,
                    glyph,
                    image,
                    centre_x[image],
                    centre_y[image],
                    radius[image],
                    turn[image],
                )
    cover = cover[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
    images = (
        (background + (foreground - background) * cover[:, None])
        .astype(np.float32)
        .repeat(3, axis=1)
    )
    axis = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE * 2 - 1
    y, x = axis[None, :, None], axis[None, None, :]
    for mark in range(2):
        centre_x, centre_y = np.split(positions[:, mark, :, None], 2, axis=1)
        squared_distance = (x - centre_x) ** 2 + (y - centre_y) ** 2
        blob = squared_distance < sizes[:, mark, None, None] ** 2
        images += (blob * strengths[:, mark, None, None].astype(np.float32))[:, None]
    images += 0.08 * rng.standard_normal(images.shape, dtype=np.float32)
    return (np.clip(images, 0, 1) * 255).round().astype(np.uint8), labels


def _add_glyph(cover, glyph, image, centre_x, centre_y, radius, turn):
    """Draw one turned glyph into each canvas cover[image], whose margin holds what is outside."""
    half = SIZE / 2
    column = np.clip((centre_x + 1) * half, -half, SIZE + half).astype(int)[:, None] + WINDOW
    row = np.clip((centre_y + 1) * half, -half, SIZE + half).astype(int)[:, None] + WINDOW
    x = ((column + 0.5) / half - 1 - centre_x[:, None]).astype(np.float32)[:, None, :]
    y = ((row + 0.5) / half - 1 - centre_y[:, None]).astype(np.float32)[:, :, None]
    radius = radius.astype(np.float32)[:, None, None]
    c, s = np.cos(turn)[:, None, None], np.sin(turn)[:, None, None]
    distance = glyph((c * x + s * y) / radius, (c * y - s * x) / radius) * radius
    inside = np.clip(0.5 - distance * half, 0, 1)  # one pixel of anti-aliasing
    pixels = image[:, None, None], row[:, :, None] + MARGIN, column[:, None, :] + MARGIN
    cover[pixels] = np.maximum(cover[pixels], inside)
