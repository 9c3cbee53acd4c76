"""Images of more than 8 bits per channel, and arrays: reading all bits, and scaling a range of
values to 8.

Grey images have PIL's modes I;16, I;16B, I (integers) and F (floating point). From PNG and TIFF
files with 16 bits per colour PIL reads only the upper byte; with the byte order swapped it reads
the lower byte.
"""

import io
import sys
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageOps

# PIL would read others too, and start Ghostscript for a file that begins like PostScript
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
INTEGERS, FLOATS = (0.0, 65535.0), (0.0, 1.0)  # the ranges without --grey-range
# PIL's names of byte orders: little-endian, big-endian, native
SWAPPED = {";16L": ";16B", ";16B": ";16L", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}


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


def read_pixels(picture: Image.Image, encoded: np.ndarray) -> np.ndarray | None:
    """Grey (H, W) or RGB (H, W, 3) pixels with all bits, upright; None for an image of 8 bits.

    picture: opened from the bytes `encoded`, its current page not yet loaded. Raises ValueError
    for 16 bits in a layout that cannot be read (with premultiplied alpha, grey with alpha, CMYK).
    """
    if picture.mode[0] in "IF":
        return np.asarray(ImageOps.exif_transpose(picture))
    rawmodes = {args if isinstance(args, str) else args[0] for *_, args in picture.tile if args}
    if not any(str(rawmode).endswith(tuple(SWAPPED)) for rawmode in rawmodes):
        return None
    if not all(rawmode[:-4] in ("RGB", "RGBA", "RGBX") for rawmode in rawmodes):
        raise ValueError(f"only 8 of its 16 bits can be read ({', '.join(rawmodes)})")
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as lower:
        lower.seek(picture.tell())
        lower.tile = [_with_swapped_bytes(tile) for tile in lower.tile]
        upper, lower = (
            np.asarray(ImageOps.exif_transpose(part).convert("RGB")).astype(np.uint16)
            for part in (picture, lower)
        )
    return upper << 8 | lower


def _with_swapped_bytes(tile):
    """A tile of a PIL image with the byte order swapped.

    Its args are the layout of the encoded pixels, or a sequence whose first entry is the layout.
    """
    codec, extents, offset, args = tile
    rawmode = args if isinstance(args, str) else args[0]
    swapped = rawmode[:-4] + SWAPPED[rawmode[-4:]]
    fields = codec, extents, offset, swapped if isinstance(args, str) else (swapped, *args[1:])
    return tile._make(fields) if hasattr(tile, "_make") else fields  # a plain tuple until PIL 11


def default_range(pixels: np.ndarray) -> tuple[float, float]:
    """The range of a pixel format: 0..65535 for integers, 0..1 for floating point."""
    return FLOATS if pixels.dtype.kind == "f" else INTEGERS


def to_8_bits(pixels: np.ndarray, grey_range: tuple[float, float] | None) -> np.ndarray:
    """Scale the values of a range (None: the default) to 0..255, rounded; others are clipped.

    NaN, which often means 'no data' in satellite images, becomes 0.
    """
    low, high = grey_range or default_range(pixels)
    scaled = (pixels.astype(np.float64) - low) * (255 / (high - low))
    return np.nan_to_num(scaled, nan=0).clip(0, 255).round().astype(np.uint8)


def little_used_range(samples: Iterable[tuple[str, np.ndarray]]) -> str | None:
    """A line that suggests --grey-range, if the range of the pixel format suits a sample badly.

    samples: names and encoded files. The range suits an image badly if the image uses less than a
    sixteenth of it (at most 16 of 256 levels), or if more than half of the pixels are outside.
    """
    count, lines = 0, []
    for name, encoded in samples:
        count += 1
        try:
            pixels = read_array(encoded)
            if pixels is None:
                with Image.open(io.BytesIO(encoded), formats=FORMATS) as picture:
                    pixels = read_pixels(picture, encoded)
        except Exception:  # an unreadable image is reported when it is used
            continue
        if pixels is None or pixels.dtype == np.uint8:
            continue
        low, high = default_range(pixels)
        outside = ((pixels < low) | (pixels > high)).mean()
        smallest, largest = np.nanmin(pixels), np.nanmax(pixels)
        if largest - smallest < (high - low) / 16 or outside > 0.5:
            lines.append(f"{name} has grey values {smallest:g}..{largest:g} of {low:g}..{high:g}")
    if not lines:
        return None
    return (
        f"{len(lines)} of {count} sampled images use little of the range of their pixel format: "
        f"{lines[0]}. Give the range of all images: --grey-range LOW HIGH"
    )
