"""Cuts boxes out of images and resizes them. A box is (top, left, height, width) in pixels."""

import contextlib
import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import get_worker_info


def select(x: Tensor, rows: np.ndarray) -> Tensor:
    """x[rows], (n, ...) for rows (n,), without waiting for x's device."""
    return x.index_select(0, torch.from_numpy(rows).to(x.device, non_blocking=True))


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
    images = channels_inside(images).to(rows[0].dtype)
    views = (both_ways(r, images, c).round_() for r, c in zip(rows, columns, strict=True))
    # a direct conversion to uint8 takes 5 times as long
    return torch.cat([view.to(torch.int16).to(torch.uint8) for view in views]).transpose(1, 2)


def channels_inside(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, C, W): two large products an image are faster than 2 C small ones."""
    return x.transpose(1, 2).contiguous()


def both_ways(rows: Tensor, x: Tensor, columns: Tensor) -> Tensor:
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
    pixel = torch.arange(in_size, dtype=start.dtype, device=start.device)
    outside = (pixel < start[:, None]) | (pixel >= (start + extent)[:, None])
    # the distance of a pixel outside is infinite, so its weight is 0
    pixel = (pixel + 0.5).expand_as(outside).masked_fill(outside, torch.inf)[:, None]
    weights = (pixel - centre).abs_().div_(-scale.clamp(min=1)).add_(1).clamp_(min=0)
    return weights.div_(weights.sum(dim=2, keepdim=True))


def shared_empty(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised uint8 tensor, in a worker process in shared memory: it is sent to the rank
    without a copy.
    """
    if get_worker_info() is not None:
        with contextlib.suppress(RuntimeError):  # it is full: sending reports that
            memory = torch.UntypedStorage._new_shared(math.prod(shape))
            return torch.empty(0, dtype=torch.uint8).set_(memory, 0, shape)
    return torch.empty(shape, dtype=torch.uint8)


def crop_one(image: Tensor, box: Iterable[int], size: int) -> Tensor:
    """A box of a (C, H, W) uint8 image, resized with antialias: (1, C, size, size) uint8."""
    top, left, height, width = (int(side) for side in box)
    crop = image[None, :, top : top + height, left : left + width]
    if height == width == size:
        return crop.contiguous()
    return interpolate(crop, (size, size), mode="bilinear", antialias=True).contiguous()


def evaluation_box(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the part that is evaluated."""
    if height == width == size:
        return 0, 0, size, size
    side = round(min(height, width) * 7 / 8)
    return (height - side) // 2, (width - side) // 2, side, side
