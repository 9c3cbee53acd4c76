"""The operations of the augmentation on tensors, on any device.

They take x (B, C, S, S) in [0, 1] and strengths (B, 1, 1, 1). If the name ends in _, they change x
and return it. Of another C than 3, saturation may only be 1 and hue 0: those of RGB images.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

GRAY = (0.2989, 0.587, 0.114)  # luma of ITU-R BT.601, as torchvision's
SIGMA_RANGE = (0.1, 2.0)  # blur, in output pixels
SMALL = 64  # px; on a CPU larger views are augmented one by one, to stay in its cache


def is_large_on_cpu(x: Tensor) -> bool:
    """Whether views are augmented one by one."""
    return x.shape[-1] > SMALL and x.device.type == "cpu"


def crop_and_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut V boxes (top, left, height, width) out of each image and resize them.

    images (B, C, H, W) uint8; boxes (V * B, 4): the first box of every image, then the second, ...
    Returns (V * B, C, size, size) uint8. Bilinear with antialiasing, as torchvision's resize: two
    matrix products a box.
    """
    top, left, height, width = boxes.to(
        images.device, torch.get_default_dtype(), non_blocking=True
    ).unbind(1)
    rows = _resize_matrices(top, height, images.shape[2], size).split(len(images))
    columns = _resize_matrices(left, width, images.shape[3], size).split(len(images))
    images = _channels_inside(images).to(rows[0].dtype)
    views = (_both_ways(r, images, c).round_() for r, c in zip(rows, columns, strict=True))
    # a direct conversion to uint8 takes 5 times as long
    return torch.cat([view.to(torch.int16).to(torch.uint8) for view in views]).transpose(1, 2)


def _channels_inside(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, C, W): two large products an image are faster than 2 C small ones."""
    return x.transpose(1, 2).contiguous()


def _both_ways(rows: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """rows[b] @ x[b, :, c] @ columns[b].T: (B, S, H), (B, H, C, W), (B, S, W) -> (B, S, C, S)."""
    half = x.flatten(1, 2) @ columns.mT
    return (rows @ half.view(*x.shape[:2], -1)).unflatten(2, (x.shape[2], -1))


def _resize_matrices(start: Tensor, extent: Tensor, in_size: int, out_size: int) -> Tensor:
    """Weights (B, out_size, in_size) of the triangle filter that resizes the pixels [start, start +
    extent) to out_size.
    """
    scale = (extent / out_size)[:, None, None]
    steps = torch.arange(out_size, device=start.device)[:, None]
    centre = start[:, None, None] + (steps + 0.5) * scale
    pixel = torch.arange(in_size, device=start.device).to(start.dtype)
    inside = (pixel >= start[:, None]) & (pixel < (start + extent)[:, None])
    # the distance of a pixel outside is infinite, so its weight is 0
    pixel = (pixel + 0.5).expand_as(inside).masked_fill(~inside, math.inf)[:, None]
    weights = (pixel - centre).abs_().div_(-scale.clamp(min=1)).add_(1).clamp_(min=0)
    return weights.div_(weights.sum(dim=2, keepdim=True))


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
        x.mul_(blend[0]).add_(luma).clamp_(0, 1)


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
    return x.copy_(_both_ways(matrices, _channels_inside(x), matrices).transpose(1, 2))


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


def flip_v(x: Tensor) -> Tensor:
    return x.flip(-2)


def _luma(x: Tensor) -> Tensor:
    """(B, C, S, S) -> (B, 1, S, S): of another C than 3 the mean of the channels."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    red, green, blue = x.split(1, dim=1)
    return (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])
