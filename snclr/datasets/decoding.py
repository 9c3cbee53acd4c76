"""From the bytes of an image file to pixels.

Images of more than 8 bits per channel are scaled to 8 bits. In PIL, grey ones have the modes I;16,
I;16B, I (integers) and F (floating point). From PNG and TIFF files with 16 bits per colour PIL
reads only the upper byte; with the byte order swapped it reads the lower byte.
"""

import contextlib
import functools
import io
import itertools
import sys
import warnings
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor

from .reading import unreadable

# PIL would read others too, and start Ghostscript for a file that begins like PostScript
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
# PIL's names of byte orders: little-endian, big-endian, native
SWAPPED = {";16L": ";16B", ";16B": ";16L", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}
SAMPLED = 8  # images of a set whose range of values is checked at the start
MODES = {1: "L", 3: "RGB"}  # number of channels: PIL's mode with them


def jpeg_decoders() -> dict[str, Callable[[Tensor], Tensor] | None]:
    """Functions from the bytes of a JPEG file to upright RGB, by library, the best first.

    They are torchcodec's (from 0.16) if it is installed and works, and torchvision's, which will be
    removed (deprecated in 0.29). They raise RuntimeError for a file that they cannot read. PIL
    needs no function: it reads all formats. It gives the same pixels, more slowly.
    """
    decoders = {}
    with contextlib.suppress(ImportError, OSError, RuntimeError):  # absent, or for another torch
        from torchcodec.decoders import decode_jpeg  # optional

        decoders["torchcodec"] = decode_jpeg
    with contextlib.suppress(ImportError):
        from torchvision.io import ImageReadMode, decode_image

        decoders["torchvision"] = functools.partial(
            decode_image, mode=ImageReadMode.RGB, apply_exif_orientation=True
        )
    return {**decoders, "PIL": None}


warnings.filterwarnings(
    "ignore", message=".*capabilities of TorchVision are deprecated", category=DeprecationWarning
)
decode_jpeg = next(iter(jpeg_decoders().values()))


def decode(
    encoded: np.ndarray,
    name: str,
    grey_range: tuple[float, float] | None = None,
    channels: int = 3,
) -> Tensor:
    """Decode an image file and turn it upright: bytes (n,) uint8 -> (channels, H, W) uint8.

    grey_range: for images of more than 8 bits, the values that become 0 and 255; None: the lowest
    and highest value of the pixel format. channels: of 1 or 3, pictures are converted to grey or
    RGB; of another number, all pages of the picture together must have as many. An array (.npy) is
    (channels, H, W), (H, W, channels), or (H, W) for 1. Raises RunError, which includes `name`, if
    the file is damaged or has other channels.
    """
    try:
        array = read_array(encoded)
        if array is not None:
            array = _channels_first(array, channels)
            return torch.from_numpy(
                array if array.dtype == np.uint8 else to_8_bits(array, grey_range)
            )
        # PIL only reads the header here; it refuses an image that would fill the memory
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as picture:
            # only JPEG: torchvision's PNG decoder crashes on damaged files
            if channels == 3 and encoded[:3].tobytes() == b"\xff\xd8\xff" and decode_jpeg:
                with contextlib.suppress(RuntimeError):  # then PIL reads it or says why not
                    return decode_jpeg(torch.from_numpy(encoded))
            if channels in MODES:
                pixels = np.array(_page(picture, encoded, grey_range).convert(MODES[channels]))
            else:
                pages = [
                    _page(page, encoded, grey_range)
                    for page in itertools.islice(ImageSequence.Iterator(picture), channels + 1)
                ]
                pixels = np.dstack(
                    [page.convert("L") if page.mode in ("1", "P") else page for page in pages]
                )
                if pixels.shape[2] != channels:
                    raise ValueError(
                        f"its pages have {pixels.shape[2]} channels, --channels is {channels}"
                    )
            return torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1)
    except UnidentifiedImageError as error:
        hint = "" if channels in MODES else ", or a page has more than 4 channels: write it as .npy"
        raise unreadable(name, f"it is not an image of a known format{hint}") from error
    except Exception as error:  # damaged bytes can raise any exception in a decoder
        raise unreadable(name, error) from error


def _channels_first(array, channels):
    """An array of an .npy file as (channels, H, W)."""
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or channels not in array.shape[::2]:
        raise ValueError(f"its array is {array.shape}, --channels is {channels}")
    return array if len(array) == channels else np.moveaxis(array, 2, 0)


def _page(picture, encoded, grey_range) -> Image.Image:
    """The current page of a picture with 8 bits per channel, upright."""
    # of 16 bits per colour PIL reads the upper 8, which are enough without a range
    if picture.mode[0] in "IF" or grey_range:
        pixels = read_pixels(picture, encoded)
        if pixels is not None:
            return Image.fromarray(to_8_bits(pixels, grey_range))
    return ImageOps.exif_transpose(picture)


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
                    pixels = read_pixels(picture, content)
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
        f"{len(lines)} of {len(sampled)} sampled images use little of the range of their pixel "
        f"format: {lines[0]}. Give the range of all images: --grey-range LOW HIGH"
    )
