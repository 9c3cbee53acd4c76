"""From the bytes of an image file to pixels."""

import contextlib
import functools
import io
import itertools
import warnings
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor

from .high_bit_depth import FORMATS, read_array, read_pixels, restore_layout, to_8_bits
from .reading import unreadable

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
    restore_layout(picture)
    # of 16 bits per colour PIL reads the upper 8, which are enough without a range
    if picture.mode[0] in "IF" or grey_range:
        pixels = read_pixels(picture, encoded, as_stored=grey_range is not None)
        if pixels is not None:
            return Image.fromarray(to_8_bits(pixels, grey_range))
    return ImageOps.exif_transpose(picture)
