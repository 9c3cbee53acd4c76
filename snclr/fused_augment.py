"""The augmentation of operations.py in four kernels, for RGB views on a GPU: --fused-augment.

operations.py runs an operation on the images that were drawn for it. Here every image goes through
all operations, with strengths that change nothing where none was drawn. So the host decides
nothing, and sends the device one matrix. Each kernel reads the views once and writes them at most
once: the mean that contrast needs; the colours; the blur along columns; and the blur along rows,
with all that follows.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import operations
from .augment import ViewParameters
from .operations import HUE, gaussian_taps, turn_
from .running.devices import send

BLENDS, CONTRAST, SATURATION = 3, 1, 2  # operations besides hue; two of their numbers in the order
BLOCK = 1024  # pixels of an image that a program takes at a time
CHAIN = tl.constexpr(6 * BLENDS + 1)  # columns of a chain of operations
RADIUS = tl.constexpr(6)  # of the blur: that of operations.gaussian_taps
GRAY, SOLARIZE, FLIP, TAPS = (tl.constexpr(2 * CHAIN.value + n) for n in range(4))
COLUMNS = tl.constexpr(TAPS.value + 2 * RADIUS.value + 1)


def apply(crops: Tensor, parameters: ViewParameters, mean: Tensor, std: Tensor) -> Tensor:
    """As operations.apply, to 1e-5; crops (B, 3, S, S) uint8 on a GPU."""
    if crops.shape[-1] <= RADIUS.value:  # the blur reflects only once
        return operations.apply(crops, parameters, mean, std)
    p = ViewParameters(*(field.numpy() for field in parameters))
    strengths = send(torch.from_numpy(pack(p)), crops.device)
    moments = send(torch.stack([mean, std]).float(), crops.device)
    crops = crops.contiguous()
    batch, _, size, _ = crops.shape
    luma = torch.empty(batch, device=crops.device)
    views, other = (torch.empty(crops.shape, device=crops.device) for _ in range(2))
    blocks = triton.cdiv(size * size, BLOCK)
    _mean_luma[(batch,)](crops, strengths, luma, size * size, BLOCK)
    _colours[(batch, blocks)](crops, strengths, luma, views, size * size, BLOCK)
    for x, out, is_last in ((views, other, False), (other, views, True)):
        _blur[(batch * 3, blocks)](x, strengths, moments, out, size, is_last, BLOCK)
    turn_(views, p)
    return views


def pack(p: ViewParameters) -> np.ndarray:
    """The parameters of B views (arrays) as strengths (B, COLUMNS) float32.

    Brightness, contrast and saturation are blends, clamp(a x + b mean luma + c luma, 0, 1), of
    which contrast is the one with b. The columns:

        a, b, c of each of the three blends, in their order: 1, 0, 0 if it comes after hue
        the turn of hue
        a, b, c of each of the three blends: 1, 0, 0 if it comes before hue
        the same columns, but only of what comes before contrast, which needs the mean of that
        whether the view is grey, solarized, flipped
        the taps of its blur
    """
    count, jitter = len(p.jitter), p.jitter[:, None]
    kinds = p.order[p.order != HUE].reshape(count, BLENDS)
    hue_at = np.argmax(p.order == HUE, axis=1)[:, None]  # number of blends before it
    contrast_at = np.argmax(kinds == CONTRAST, axis=1)[:, None]
    factor = np.take_along_axis(p.factors, kinds, axis=1)
    of_mean, of_luma = ((1 - factor) * (kinds == kind) for kind in (CONTRAST, SATURATION))
    blends = np.stack([factor, of_mean, of_luma], axis=2)
    number, turns = np.arange(BLENDS), p.factors[:, HUE:] * jitter

    def chain(blended, turned):
        sides = [
            np.where((side & blended & jitter)[..., None], blends, (1, 0, 0)).reshape(count, -1)
            for side in (number < hue_at, number >= hue_at)
        ]
        return [sides[0], turns * turned, sides[1]]

    taps = gaussian_taps(np.where(p.sigma > 0, p.sigma, 1))
    unblurred = np.arange(taps.shape[1]) == taps.shape[1] // 2
    columns = [
        *chain(True, True),
        *chain(number < contrast_at, hue_at <= contrast_at),
        *(field[:, None] for field in (p.gray, p.solarize, p.flip)),
        np.where(p.sigma[:, None] > 0, taps, unblurred),
    ]
    return np.concatenate(columns, axis=1, dtype=np.float32)


@triton.jit
def _luma(red, green, blue):
    return 0.2989 * red + 0.587 * green + 0.114 * blue  # as operations.GRAY


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _blended(red, green, blue, row, mean):
    a = tl.load(row)
    added = tl.load(row + 1) * mean + tl.load(row + 2) * _luma(red, green, blue)
    return _clamp(a * red + added), _clamp(a * green + added), _clamp(a * blue + added)


@triton.jit
def _channel(angle, low, chroma):
    distance = tl.abs(3 * chroma - tl.abs(angle))
    return low + tl.minimum(tl.maximum(distance - chroma, 0.0), chroma)


@triton.jit
def _jittered(red, green, blue, row, mean):
    """A chain of operations (see pack); hue as operations.adjust_hue_."""
    for number in tl.static_range(3):
        red, green, blue = _blended(red, green, blue, row + 3 * number, mean)
    turn = tl.load(row + 9)
    value = tl.maximum(tl.maximum(red, green), blue)
    low = tl.minimum(tl.minimum(red, green), blue)
    chroma = value - low
    angle = value - 2 * low + green + blue - red
    angle = tl.where(green < blue, -angle, angle) + chroma * (6 * turn)
    # not only nearly the same where there is no turn: solarize has a threshold
    red = tl.where(turn == 0, red, _channel(angle, low, chroma))
    green = tl.where(turn == 0, green, _channel(angle - 2 * chroma, low, chroma))
    blue = tl.where(turn == 0, blue, _channel(angle + 2 * chroma, low, chroma))
    for number in tl.static_range(3):
        red, green, blue = _blended(red, green, blue, row + 10 + 3 * number, mean)
    return red, green, blue


@triton.jit
def _pixels(crops, image, at, pixels):
    """The three channels of an image's pixels `at`, in 0 .. 1."""
    start = crops + image * 3 * pixels + at
    inside = at < pixels
    red = tl.load(start, inside, 0).to(tl.float32)
    green = tl.load(start + pixels, inside, 0).to(tl.float32)
    blue = tl.load(start + 2 * pixels, inside, 0).to(tl.float32)
    return tl.div_rn(red, 255.0), tl.div_rn(green, 255.0), tl.div_rn(blue, 255.0)


@triton.jit
def _mean_luma(crops, strengths, luma, pixels, BLOCK: tl.constexpr):
    """luma (B,): the mean luma of each image before its contrast."""
    image = tl.program_id(0).to(tl.int64)
    row = strengths + image * COLUMNS + CHAIN
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, pixels, BLOCK):
        at = start + tl.arange(0, BLOCK)
        red, green, blue = _pixels(crops, image, at, pixels)
        red, green, blue = _jittered(red, green, blue, row, 0.0)
        total += tl.where(at < pixels, _luma(red, green, blue), 0.0)
    tl.store(luma + image, tl.sum(total) / pixels)


@triton.jit
def _colours(crops, strengths, luma, out, pixels, BLOCK: tl.constexpr):
    """out (B, 3, S, S): jittered, and grey where it was drawn."""
    image = tl.program_id(0).to(tl.int64)
    row = strengths + image * COLUMNS
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    red, green, blue = _pixels(crops, image, at, pixels)
    red, green, blue = _jittered(red, green, blue, row, tl.load(luma + image))
    gray, is_gray = _luma(red, green, blue), tl.load(row + GRAY) > 0
    start = out + image * 3 * pixels + at
    inside = at < pixels
    tl.store(start, tl.where(is_gray, gray, red), inside)
    tl.store(start + pixels, tl.where(is_gray, gray, green), inside)
    tl.store(start + 2 * pixels, tl.where(is_gray, gray, blue), inside)


@triton.jit
def _blur(x, strengths, moments, out, size, IS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    """out: x blurred along one side, reflecting at the border. IS_LAST: along each row, then
    solarized, flipped and normalised; else along each column.
    """
    plane = tl.program_id(0).to(tl.int64)  # of an image and a channel
    row = strengths + plane // 3 * COLUMNS
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size * size
    y, column = at // size, at % size
    position = y
    if IS_LAST:
        position = tl.where(tl.load(row + FLIP) > 0, size - 1 - column, column)
    total = tl.zeros((BLOCK,), tl.float32)
    for number in tl.static_range(2 * RADIUS + 1):
        tap = tl.load(row + TAPS + number)
        source = tl.abs(position + number - RADIUS)
        source = tl.minimum(source, 2 * size - 2 - source)
        source = tl.where(tap == 0, position, source)  # which is in the cache already
        pixel = y * size + source if IS_LAST else source * size + column
        total += tap * tl.load(x + plane * size * size + pixel, inside, 0.0)
    if IS_LAST:
        solarized = tl.where(total >= 128 / 255, 1 - total, total)
        total = tl.where(tl.load(row + SOLARIZE) > 0, solarized, total)
        channel = plane % 3
        total = (total - tl.load(moments + channel)) / tl.load(moments + 3 + channel)
    tl.store(out + plane * size * size + at, total, inside)
