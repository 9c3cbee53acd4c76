"""Images of more than 8 bits per channel, and arrays: reading all bits, and scaling a range of
values to 8.

Grey images have PIL's modes I;16, I;16B, I (integers) and F (floating point). From PNG and TIFF
files with 16 bits per colour PIL reads only the upper byte; with the byte order swapped it reads
the lower byte. It misreads most TIFF files with more than 8 bits in a plane for each channel,
unless it is told their layout.
"""

import io
import sys
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

# PIL would read others too, and start Ghostscript for a file that begins like PostScript
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
SAMPLED = 32  # images of a set whose range of values is checked at the start
RANGE_ADVICE = "Give the range of all images: --grey-range LOW HIGH"
# PIL's names of byte orders: little-endian, big-endian, native
SWAPPED = {";16L": ";16B", ";16B": ";16L", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}
COLOURS = ("RGB", "RGBA", "RGBX", *"RGBA")  # layouts of which both bytes can be read
# TIFF's tags: bits of a number; 2: a plane for each channel; the kind of numbers
BITS, PLANES, NUMBERS = 258, 284, 339
UNSIGNED, SIGNED, FLOATING = 1, 2, 3  # kinds of numbers


def read_array(encoded: np.ndarray) -> np.ndarray | None:
    """The numbers of an .npy file, from its bytes (n,) uint8; None for another format.

    Raises ValueError for an array that is no image.
    """
    if encoded[:6].tobytes() != b"\x93NUMPY":
        return None
    array = np.load(io.BytesIO(encoded), allow_pickle=False)
    if array.dtype.kind not in "uif" or not array.size:
        raise ValueError(f"an array of {array.dtype}, {array.shape}, is no image")
    return array


def restore_layout(picture: Image.Image) -> None:
    """Tell PIL the layout of the planes of the current page, before it is loaded.

    Of uncompressed planes PIL keeps only the first letter of it: R of RGB;16L, which means 8 bits.
    """
    tags = getattr(picture, "tag_v2", {})
    bits, numbers = tags.get(BITS, (8,))[0], tags.get(NUMBERS, (UNSIGNED,))[0]
    if tags.get(PLANES) != 2 or bits <= 8 or (bits > 16 and numbers == UNSIGNED):
        return
    little = "" if picture.mode[0] in "IF" else "L"
    order = "B" if tags.prefix == b"MM" else little
    end = f";{bits}{order}{ {SIGNED: 'S', FLOATING: 'F'}.get(numbers, '') }"
    layouts = [(tile, _layout(tile)) for tile in picture.tile]
    picture.tile = [_with_layout(t, x + end) if len(x) == 1 else t for t, x in layouts]


def read_pixels(
    picture: Image.Image, encoded: np.ndarray, as_stored: bool = False
) -> np.ndarray | None:
    """Grey (H, W) or RGB (H, W, 3) pixels with all bits, upright; None for an image of 8 bits.

    picture: opened from the bytes `encoded`, its current page not yet loaded. as_stored: refuse
    grey values that PIL scales. Raises ValueError for 16 bits in a layout that cannot be read
    (with premultiplied alpha, grey with alpha, CMYK, compressed planes of a TIFF file, PPM).
    """
    restore_layout(picture)
    layouts, codecs = [*map(_layout, picture.tile)], {tile[0] for tile in picture.tile}
    # args of a PPM file: the layout and the largest value
    is_scaled = bool(codecs & {"ppm", "ppm_plain"}) and picture.tile[0][3][1] > 255
    if picture.mode[0] in "IF" and not (is_scaled and as_stored):
        return np.asarray(ImageOps.exif_transpose(picture))
    if not is_scaled and not any(layout.endswith(tuple(SWAPPED)) for layout in layouts):
        return None
    # of planes, libtiff gives the upper bytes whatever the layout says
    is_unswappable = "libtiff" in codecs and picture.tag_v2.get(PLANES) == 2
    if is_scaled or is_unswappable or not all(layout[:-4] in COLOURS for layout in layouts):
        raise ValueError(f"only 8 of its 16 bits can be read ({', '.join({*layouts})})")
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as lower:
        lower.seek(picture.tell())
        swapped = [layout[:-4] + SWAPPED[layout[-4:]] for layout in layouts]
        lower.tile = [*map(_with_layout, lower.tile, swapped)]
        upper, lower = (
            np.asarray(ImageOps.exif_transpose(part).convert("RGB")).astype(np.uint16)
            for part in (picture, lower)
        )
    return upper << 8 | lower


def _layout(tile) -> str:
    """The layout of the encoded pixels in a tile of a PIL image: its args, or the first of them."""
    args = tile[3] or ""  # PIL calls it the raw mode
    return args if isinstance(args, str) else str(args[0])


def _with_layout(tile, layout):
    codec, extents, offset, args = tile
    fields = codec, extents, offset, layout if isinstance(args, str) else (layout, *args[1:])
    return tile._make(fields) if hasattr(tile, "_make") else fields  # a plain tuple until PIL 11


def default_range(pixels: np.ndarray) -> tuple[float, float]:
    """The range without --grey-range: 0..1 for floating point, 0..65535 for integers."""
    return (0.0, 1.0) if pixels.dtype.kind == "f" else (0.0, 65535.0)


def to_8_bits(pixels: np.ndarray, grey_range: tuple[float, float] | None) -> np.ndarray:
    """Scale the values of a range (None: the default) to 0..255, rounded; others are clipped.

    NaN, which often means 'no data' in satellite images, becomes 0.
    """
    low, high = grey_range or default_range(pixels)
    scaled = (pixels.astype(np.float64) - low) * (255 / (high - low))
    return np.nan_to_num(scaled, nan=0).clip(0, 255).round().astype(np.uint8)


def little_used_range(encoded: Callable[[int], tuple[str, np.ndarray]], count: int) -> str | None:
    """A line that suggests --grey-range, if the range of the pixel format suits an image badly.

    encoded: from the number of an image to its name and bytes, see FileImages. SAMPLED of the
    `count` images are checked, evenly spread. The range suits an image badly if the image uses less
    than a sixteenth of it (at most 16 of 256 levels), or if more than half of the pixels are
    outside.
    """
    lines, sampled = [], np.unique(np.linspace(0, count - 1, SAMPLED).astype(int))
    for index in sampled:
        try:
            name, content = encoded(index)
            pixels = read_array(content)
            if pixels is None:
                with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                    try:
                        pixels = read_pixels(picture, content)
                    except ValueError:  # the upper byte shows the range as well
                        pixels = np.asarray(picture.convert("RGB")).astype(np.uint16) * 255
        except Exception:  # an unreadable image is reported when it is used
            continue
        if pixels is None or pixels.dtype == np.uint8:
            continue
        low, high = default_range(pixels)
        outside = ((pixels < low) | (pixels > high)).mean()
        smallest, largest = (f.reduce(pixels, axis=None) for f in (np.fmin, np.fmax))  # without NaN
        if largest - smallest < (high - low) / 16 or outside > 0.5:
            lines.append(f"{name} has grey values {smallest:g}..{largest:g} of {low:g}..{high:g}")
    if not lines:
        return None
    return (
        f"{len(lines)} of {len(sampled)} sampled images use little of the range of their pixel "
        f"format: {lines[0]}. {RANGE_ADVICE}"
    )
