"""Applies what augment.py has drawn to tensors on any device (torch).

An operation takes x (B, C, S, S) in [0, 1] and strengths (B, 1, 1, 1). If its name ends in _, it
changes x and returns it. If C is not 3, saturation must be 1 and hue 0: those of RGB images.
"""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from .augment import SIGMA_RANGE, ViewParameters
from .datasets.crops import both_ways, channels_inside, select

AT_ONCE = 2**26  # pixel values to augment at a time, which bounds the memory
GRAY = (0.2989, 0.587, 0.114)  # luma of ITU-R BT.601, as torchvision's
SMALL = 64  # px; on a CPU larger views are augmented one by one, to stay in its cache


# -- all operations --------------------------------------------------------------------------------


def apply(crops: Tensor, parameters: ViewParameters, mean: Tensor, std: Tensor) -> Tensor:
    """Jitter, gray, blur, solarize, flip, rotate and normalise.

    crops (B, C, S, S) uint8; mean, std (C,) of the data set, in [0, 1]. Returns (B, C, S, S) float
    on the device of the crops. Each operation runs only on the images that were drawn for it: the
    parameters are on the host, so the host never waits for a GPU.
    """
    views = torch.empty(crops.shape, dtype=torch.get_default_dtype(), device=crops.device)
    count = 1 if is_large_on_cpu(crops) else max(1, AT_ONCE // crops.shape[1:].numel())
    for start in range(0, len(crops), count):
        part = slice(start, start + count)
        x = views[part].copy_(crops[part]).div_(255)
        _apply_(x, ViewParameters(*(field[part].numpy() for field in parameters)))
        normalize_(x, mean, std)
    return views


def _apply_(x, p: ViewParameters):
    """All operations on x (B, C, S, S) in place; p: their parameters, as numpy arrays."""
    _jitter_(x, p)
    _on_chosen_(x, p.gray, grayscale)
    _on_chosen_(
        x,
        p.sigma > 0,
        gaussian_blur_,
        gaussian_taps(np.where(p.sigma > 0, p.sigma, 1)),
    )
    _on_chosen_(x, p.solarize, solarize_)
    _on_chosen_(x, p.flip, flip)
    turn_(x, p)


def turn_(x: Tensor, p: ViewParameters) -> None:
    """Flip the chosen images upside down, and rotate the chosen ones; p: numpy arrays."""
    _on_chosen_(x, p.flip_v, partial(torch.flip, dims=(2,)))
    for quarters in (1, 2, 3):
        _on_chosen_(x, p.quarters == quarters, partial(torch.rot90, k=quarters, dims=(2, 3)))


def _jitter_(x, p):
    """Brightness, contrast, saturation and hue of the chosen images, in the order drawn for each.

    Three ways for three kinds of devices: the operations of a single image, groups of images with
    the same operation, or few calls.
    """
    chosen = np.flatnonzero(p.jitter)
    if is_large_on_cpu(x):
        for number in p.order[0] if len(chosen) else ():
            JITTERS[number](x, p.factors[0, number].item())
    elif x.device.type == "cpu":
        _jitter_by_groups_(x, p, chosen)
    elif len(chosen):
        _jitter_by_blends_(x, p, chosen)


def _jitter_by_groups_(x, p, chosen):
    """In each of four rounds the images are sorted by their next operation, so that each operation
    is one call.
    """
    jittered, at = x, chosen
    for position in range(4):
        by_operation = np.argsort(p.order[chosen, position], kind="stable")
        jittered, chosen = select(jittered, at[by_operation]), chosen[by_operation]
        at = np.arange(len(chosen))
        order = p.order[chosen, position]
        strengths = _strengths(p.factors[chosen, order], x)
        ends = np.searchsorted(order, np.arange(5))
        for operation_, start, end in zip(JITTERS, ends, ends[1:], strict=False):
            if start < end:
                operation_(jittered[start:end], strengths[start:end])
    x.index_copy_(0, _on_device(chosen, x), jittered)


def _jitter_by_blends_(x, p, chosen):
    """The fewest calls: brightness, contrast and saturation are all blends.

    One is clamp(factor x + (1 - factor) y, 0, 1), where y is 0, the mean luma of the image, or the
    luma of the pixel. The images are sorted by the position of hue, 0 to 3, among the blends: then
    those of which blend r comes before their hue are a slice, and so are those of which it comes
    after.
    """
    position = np.argmax(p.order[chosen] == HUE, axis=1)
    by_position = np.argsort(position, kind="stable")
    chosen, ends = chosen[by_position], np.searchsorted(position[by_position], [1, 2, 3])
    order = p.order[chosen]
    kinds = order[order != HUE].reshape(-1, 3)
    factors = p.factors[chosen[:, None], kinds]
    of_mean, of_luma = ((1 - factors) * (kinds == kind) for kind in (1, 2))
    host = np.stack([factors, of_mean, of_luma]).transpose(2, 0, 1)  # (3 rounds, 3, n)
    blends = torch.from_numpy(host[..., None, None, None]).to(x, non_blocking=True)
    at = _on_device(chosen, x)
    jittered = x.index_select(0, at)
    for blend, start in zip(blends, ends, strict=True):
        blend_(jittered[start:], blend[:, start:])
    adjust_hue_(jittered, _strengths(p.factors[chosen, HUE], x))
    for blend, end in zip(blends, ends, strict=True):
        blend_(jittered[:end], blend[:, :end])
    x.index_copy_(0, at, jittered)


def _on_chosen_(x, chosen, operation, *strengths):
    """Replace the images of x that are chosen (B,) by what the operation returns for them."""
    rows = np.flatnonzero(chosen)
    if not len(rows):
        return
    strengths = [_strengths(values[rows], x) for values in strengths]
    if len(rows) == len(x):
        x.copy_(operation(x, *strengths))  # copies nothing if the operation is in place
    else:
        at = _on_device(rows, x)
        x.index_copy_(0, at, operation(x.index_select(0, at), *strengths))


def _on_device(rows, x):
    return torch.from_numpy(rows).to(x.device, non_blocking=True)


def _strengths(values, x):
    values = values.reshape(*values.shape, *[1] * (4 - values.ndim))
    return torch.from_numpy(values).to(x, non_blocking=True)


def normalize_(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std per channel, in place; x (B, C, S, S) in [0, 1]."""
    mean, std = (values.to(x, non_blocking=True).view(-1, 1, 1) for values in (mean, std))
    return x.sub_(mean).mul_(1 / std)


# -- each operation ------------------------------------------------------------------------------


def is_large_on_cpu(x: Tensor) -> bool:
    """Whether views are augmented one by one."""
    return x.shape[-1] > SMALL and x.device.type == "cpu"


def adjust_brightness_(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor).clamp_(0, 1)


def adjust_contrast_(x: Tensor, factor: Tensor) -> Tensor:
    # rows first: torch splits a single large sum over threads, so it depends on their number
    mean = _luma(x.mean(dim=3, keepdim=True).mean(dim=2, keepdim=True))
    return x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation_(x: Tensor, factor: Tensor) -> Tensor:
    luma = _luma(x).mul_(1 - factor)
    return x.mul_(factor).add_(luma).clamp_(0, 1)


def adjust_hue_(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of HSV by up to a third of a turn either way.

    If a sixth of a turn has the length chroma, the angle from red is +-(value - 2 low + green +
    blue - red), with the sign of green - blue: the same formula for all sextants. A channel is
    low + clamp(2 chroma - distance, 0, chroma), where distance is the angle to its own primary, the
    shorter way round: 3 chroma - |3 chroma - |angle||. This is right for angles of up to 7 chroma,
    which is what limits the turn.
    """
    if x.shape[1] != 3:
        return x
    red, green, blue = x.split(1, dim=1)
    value, low = torch.maximum(red, green).maximum(blue), torch.minimum(red, green).minimum(blue)
    chroma = value - low
    angle = (
        (green + blue)
        .sub_(red)
        .add_(value)
        .sub_(low, alpha=2)
        .copysign_(green - blue)
        .add_(chroma * (6 * turns))
    )
    # minus the angle of red, green and blue
    primaries = torch.tensor([0.0, -2.0, 2.0]).to(x, non_blocking=True).view(3, 1, 1)
    torch.mul(chroma, primaries, out=x).add_(angle).abs_().sub_(chroma, alpha=3).abs_()
    return x.clamp_(chroma, 2 * chroma).add_(low - chroma)


def blend_(x: Tensor, blend: Tensor) -> None:
    """clamp(blend[0] x + blend[1] mean luma + blend[2] luma, 0, 1); blend (3, n, 1, 1, 1)."""
    if len(x):
        luma = _luma(x)
        mean = luma.mean(dim=(2, 3), keepdim=True)
        luma.mul_(blend[2]).addcmul_(mean, blend[1])
        torch.addcmul(luma, x, blend[0], out=x).clamp_(0, 1)


JITTERS = adjust_brightness_, adjust_contrast_, adjust_saturation_, adjust_hue_
HUE = JITTERS.index(adjust_hue_)


def grayscale(x: Tensor) -> Tensor:
    return _luma(x).expand_as(x)


def gaussian_taps(sigma: np.ndarray) -> np.ndarray:
    """Weights (B, 2R + 1) of a blur with sigma (B,): 0 beyond 3 sigma; each row adds up to 1."""
    radius = math.ceil(3 * SIGMA_RANGE[1])
    offsets, sigma = np.arange(-radius, radius + 1), sigma[:, None]
    taps = np.exp(-(offsets**2) / (2 * sigma**2)) * (np.abs(offsets) <= np.ceil(3 * sigma))
    return taps / taps.sum(axis=1, keepdims=True)


def gaussian_blur_(x: Tensor, taps: Tensor) -> Tensor:
    """Blur each image with its own taps (B, 2R + 1, 1, 1), reflecting at the border."""
    return (_blur_by_shifts_ if is_large_on_cpu(x) else _blur_by_products_)(x, taps.flatten(1))


def _blur_by_products_(x, taps):
    """For each image two products with a banded matrix."""
    size, radius = x.shape[-1], taps.shape[1] // 2
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    source = torch.arange(size, device=x.device)[:, None] + offsets
    source = source.remainder(max(1, 2 * size - 2))  # reflected, without repeating the edge
    source = torch.minimum(source, 2 * size - 2 - source)
    matrices = x.new_zeros(len(x), size, size)
    matrices.scatter_add_(2, source.expand(len(x), -1, -1), taps[:, None].expand(-1, size, -1))
    return x.copy_(both_ways(matrices, channels_inside(x), matrices).transpose(1, 2))


def _blur_by_shifts_(x, taps):
    """For each image a sum of shifted copies, as many as its sigma needs: faster on a CPU."""
    for image, weights in zip(x, taps.tolist(), strict=True):
        first, *others = (weight for weight in weights if weight)
        blurred = pad(image, (len(others) // 2,) * 4, mode="reflect")
        for axis in (1, 2):
            shifted = [blurred.narrow(axis, start, x.shape[-1]) for start in range(1 + len(others))]
            blurred = shifted[0] * first
            for weight, copy in zip(others, shifted[1:], strict=True):
                blurred.add_(copy, alpha=weight)
        image.copy_(blurred)
    return x


def solarize_(x: Tensor) -> Tensor:
    bright = torch.ge(x, 128 / 255, out=torch.empty_like(x))
    return x.sub_(bright).abs_()


def flip(x: Tensor) -> Tensor:
    return x.flip(-1)


def _luma(x: Tensor) -> Tensor:
    """(B, C, S, S) -> (B, 1, S, S): of another C than 3 the mean of the channels."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    red, green, blue = x.split(1, dim=1)
    return (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])
