"""Two-view augmentation in two halves: what is drawn (numpy, keyed by sample) and how it is applied (torch, any device).

The recipe is MoCo v3's (Chen et al. 2021, appendix; BYOL's two views). Every parameter is a function of (seed, epoch, image
index, view) alone: a counter-based hash replaces generator state, so any number of ranks and workers draws the same.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

GRAY = (0.2989, 0.587, 0.114)  # luma of ITU-R BT.601, as torchvision's
SIGMA_RANGE = (0.1, 2.0)  # blur, in output pixels
JITTER = (
    0.4,
    0.4,
    0.2,
    0.1,
)  # half-widths of brightness, contrast, saturation (factors about 1) and hue (turns about 0)
CROP_TRIES = 10
SMALL = 64  # px; a CPU takes larger views one by one, since its cache holds no more
AT_ONCE = (
    2**26
)  # values that a GPU augments at a time: a batch of any size needs but a few times their memory

# -- drawing -------------------------------------------------------------------------------------------------------------


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele et al. 2014): a bijection of uint64 that passes for random."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def keyed_bits(*key: int | np.ndarray) -> np.ndarray:
    """uint64 hash of a key of integers and integer arrays (broadcast together)."""
    bits = np.zeros((), dtype=np.uint64)
    for part in key:
        bits = splitmix64(bits ^ splitmix64(np.asarray(part).astype(np.int64).view(np.uint64)))
    return bits


def keyed_uniforms(count: int, *key: int | np.ndarray) -> np.ndarray:
    """`count` uniform numbers in [0, 1) for each key: (..., count) float64 with 53 random bits."""
    bits = keyed_bits(*key)[..., None]
    return (keyed_bits(bits.view(np.int64), np.arange(count)) >> np.uint64(11)) * 2.0**-53


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The permutation (size,) in which an epoch visits the data set."""
    return np.argsort(keyed_bits(seed, epoch, np.arange(size), -1), kind="stable")


class ViewParameters(NamedTuple):
    """What was drawn for B views, beside the crop. CPU tensors."""

    jitter: Tensor  # (B,) bool
    order: Tensor  # (B, 4) the operation (index into JITTER) at each of the four positions
    factors: Tensor  # (B, 4) float, of brightness, contrast, saturation; hue in turns
    gray: Tensor  # (B,) bool
    sigma: Tensor  # (B,) float, blur in pixels; 0 for none
    solarize: Tensor  # (B,) bool
    flip: Tensor  # (B,) bool


class Recipe(NamedTuple):
    """The settings of the augmentation: smallest crop as a share of the image's area, output side in px, blur on or off;
    without colour only crop and flip are left."""

    seed: int
    crop_min: float
    size: int
    blur: bool
    colour: bool = True


def draw(
    recipe: Recipe,
    epoch: int,
    indices: np.ndarray,
    view: int | np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
) -> tuple[np.ndarray, ViewParameters]:
    """Crop boxes (B, 4) int64 (top, left, height, width) and ViewParameters for one view of each of B images.

    indices (B,) data-set indices; view 0 or 1, one for all or (B,); heights, widths (B,) of the images in pixels.
    """
    u = keyed_uniforms(13 + 2 * CROP_TRIES, recipe.seed, epoch, indices, view)
    boxes = _draw_crops(recipe.crop_min, u[:, 13:], u[:, 0], u[:, 1], heights, widths)
    blur_probability, solarize_probability = np.where(view, 0.1, 1.0), np.where(view, 0.2, 0.0)
    jitter = (u[:, 2] < 0.8) & recipe.colour
    factors = (2 * u[:, 3:7] - 1) * JITTER + (1, 1, 1, 0)
    order = _PERMUTATIONS[(u[:, 7] * len(_PERMUTATIONS)).astype(np.int64)]
    low, high = SIGMA_RANGE
    sigma = np.where((u[:, 8] < blur_probability) & recipe.blur, low + (high - low) * u[:, 9], 0.0)
    gray, solarize = (
        (u[:, 10] < 0.2) & recipe.colour,
        (u[:, 11] < solarize_probability) & recipe.colour,
    )
    parameters = (jitter, order, factors, gray, sigma, solarize, u[:, 12] < 0.5)
    return boxes, ViewParameters(*map(torch.from_numpy, parameters))


_PERMUTATIONS = np.array(
    [
        (a, b, c, 6 - a - b - c)
        for a in range(4)
        for b in range(4)
        for c in range(4)
        if len({a, b, c}) == 3
    ]
)


def _draw_crops(crop_min, tries, u_top, u_left, heights, widths):
    """Random-resized-crop boxes as torchvision draws them: ten tries of area and aspect, then the central fallback."""
    heights, widths = heights.astype(np.float64), widths.astype(np.float64)
    area = (heights * widths)[:, None] * (crop_min + (1 - crop_min) * tries[:, :CROP_TRIES])
    ratio = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * tries[:, CROP_TRIES:])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    pick = np.arange(len(w)), fits.argmax(axis=1)
    # fallback: the whole image, cut centrally to the nearest allowed aspect
    whole_w = np.minimum(widths, np.rint(heights * 4 / 3))
    whole_h = np.minimum(heights, np.rint(widths / (3 / 4)))
    found = fits.any(axis=1)
    w, h = np.where(found, w[pick], whole_w), np.where(found, h[pick], whole_h)
    top = np.where(found, np.floor(u_top * (heights - h + 1)), (heights - h) // 2)
    left = np.where(found, np.floor(u_left * (widths - w + 1)), (widths - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int64)


# -- applying ------------------------------------------------------------------------------------------------------------


def crop_and_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut V boxes (top, left, height, width) out of each image (B, 3, H, W) uint8 and resize them: boxes (V * B, 4), all
    images' first boxes first -> (V * B, 3, size, size) uint8.

    Bilinear with antialias, as torchvision's resize: two matrix products a box.
    """
    top, left, height, width = boxes.to(
        images.device, torch.get_default_dtype(), non_blocking=True
    ).unbind(1)
    rows = _resize_matrices(top, height, images.shape[2], size).split(len(images))
    columns = _resize_matrices(left, width, images.shape[3], size).split(len(images))
    images = _channels_inside(images).to(rows[0].dtype)
    views = (_both_ways(r, images, c).round_() for r, c in zip(rows, columns, strict=True))
    # straight to uint8 takes 5 times as long
    return torch.cat([view.to(torch.int16).to(torch.uint8) for view in views]).transpose(1, 2)


def _channels_inside(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, H, 3, W): two large products an image then do what six small ones take several times as long for."""
    return x.transpose(1, 2).contiguous()


def _both_ways(rows: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """rows[b] @ x[b, :, c] @ columns[b].T: (B, S, H), (B, H, 3, W), (B, S, W) -> (B, S, 3, S)."""
    half = x.flatten(1, 2) @ columns.mT
    return (rows @ half.view(*x.shape[:2], -1)).unflatten(2, (x.shape[2], -1))


def _resize_matrices(start: Tensor, extent: Tensor, in_size: int, out_size: int) -> Tensor:
    """Triangle-filter weights (B, out_size, in_size) that resize the pixels [start, start + extent) to out_size."""
    scale = (extent / out_size)[:, None, None]
    centre = (
        start[:, None, None] + (torch.arange(out_size, device=start.device)[:, None] + 0.5) * scale
    )
    pixel = torch.arange(in_size, device=start.device).to(start.dtype)
    inside = (pixel >= start[:, None]) & (pixel < (start + extent)[:, None])
    pixel = (
        (pixel + 0.5).expand_as(inside).masked_fill(~inside, math.inf)[:, None]
    )  # too far away to weigh anything
    weights = (pixel - centre).abs_().div_(-scale.clamp(min=1)).add_(1).clamp_(min=0)
    return weights.div_(weights.sum(dim=2, keepdim=True))


def apply(crops: Tensor, parameters: ViewParameters, mean: Tensor, std: Tensor) -> Tensor:
    """Jitter, grey, blur, solarise, flip and normalise: crops (B, 3, S, S) uint8 -> (B, 3, S, S) float on their device.

    mean, std (3,) of the data set, in [0, 1]. Each operation runs on just the images that were drawn for it. Which these are
    is known on the host, so a GPU is never asked.
    """
    views = torch.empty(crops.shape, dtype=torch.get_default_dtype(), device=crops.device)
    count = 1 if _large_on_cpu(crops) else max(1, AT_ONCE // (3 * crops.shape[-1] ** 2))
    for start in range(0, len(crops), count):
        here = slice(start, start + count)
        _apply_(
            views[here].copy_(crops[here]).div_(255), *(field[here].numpy() for field in parameters)
        )
        normalize_(views[here], mean, std)
    return views


def _large_on_cpu(x):
    return x.shape[-1] > SMALL and x.device.type == "cpu"


def _apply_(x, jitter, order, factors, gray, sigma, solarize, flips):
    _jitter_(x, np.flatnonzero(jitter), order, factors)
    _on_some_(x, gray, grayscale)
    blurred = sigma > 0
    _on_some_(x, blurred, gaussian_blur_, gaussian_taps(np.where(blurred, sigma, 1)))
    _on_some_(x, solarize, solarize_)
    _on_some_(x, flips, flip)


def _jitter_(x, where, order, factors):
    """The four operations on images x[where], in the order of each: before each turn they are sorted by what is next."""
    operations = adjust_brightness_, adjust_contrast_, adjust_saturation_, adjust_hue_
    if _large_on_cpu(x):
        for number in order[0] if len(where) else ():
            operations[number](x, factors[0, number].item())
        return
    jittered, at = x, where
    for turn in range(4):
        by_operation = np.argsort(order[where, turn], kind="stable")
        jittered, where, at = (
            select(jittered, at[by_operation]),
            where[by_operation],
            np.arange(len(where)),
        )
        strengths = _strengths(factors[where, order[where, turn]], x)
        ends = np.searchsorted(order[where, turn], np.arange(5))
        for operation_, start, end in zip(operations, ends, ends[1:], strict=False):
            if start < end:
                operation_(jittered[start:end], strengths[start:end])
    _put_(x, where, jittered)


def _on_some_(x, chosen, operation, *strengths):
    """The chosen images of x become what the operation returns for them, given the strength of each."""
    where = np.flatnonzero(chosen)
    strengths = [_strengths(values[where], x) for values in strengths]
    if len(where) == len(x):
        x.copy_(operation(x, *strengths))  # nothing to do where the operation worked in place
    elif len(where):
        _put_(x, where, operation(select(x, where), *strengths))


def select(x: Tensor, where: np.ndarray) -> Tensor:
    """x[where], (n, ...) for where (n,), without waiting for x's device."""
    return x.index_select(0, torch.from_numpy(where).to(x.device, non_blocking=True))


def _put_(x, where, images):
    x.index_copy_(0, torch.from_numpy(where).to(x.device, non_blocking=True), images)


def _strengths(values, x):
    values = values.reshape(*values.shape, *[1] * (4 - values.ndim))
    return torch.from_numpy(values).to(x, non_blocking=True)


def normalize_(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std per channel, in place; x (B, 3, S, S) in [0, 1]."""
    mean, std = (values.to(x, non_blocking=True).view(3, 1, 1) for values in (mean, std))
    return x.sub_(mean).mul_(1 / std)


# The operations take x (B, 3, S, S) in [0, 1] and strengths (B, 1, 1, 1); those whose name ends in _ change and return x.


def adjust_brightness_(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor).clamp_(0, 1)


def adjust_contrast_(x: Tensor, factor: Tensor) -> Tensor:
    # rows first: a single large sum would be split over threads, and depend on their number
    mean = _luma(x.mean(dim=3, keepdim=True).mean(dim=2, keepdim=True))
    return x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation_(x: Tensor, factor: Tensor) -> Tensor:
    luma = _luma(x).mul_(1 - factor)
    return x.mul_(factor).add_(luma).clamp_(0, 1)


def adjust_hue_(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of HSV by up to a sixth of a turn either way.

    In units of chroma (a sixth of a turn is one chroma) the angle from red is +-(value - 2 low + green + blue - red), with
    the sign of green - blue: no sextant need be told apart. A channel is low + clamp(2 chroma - angle from its own primary,
    0, chroma), the angle taken the shorter way round: 3 chroma - |3 chroma - |angle||.
    """
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
    primaries = (
        torch.tensor([0.0, -2.0, 2.0]).to(x, non_blocking=True).view(3, 1, 1)
    )  # less red's, green's, blue's angle
    torch.mul(chroma, primaries, out=x).add_(angle).abs_().sub_(chroma, alpha=3).abs_()
    return x.clamp_(chroma, 2 * chroma).add_(low - chroma)


def grayscale(x: Tensor) -> Tensor:
    return _luma(x).expand_as(x)


def gaussian_taps(sigma: np.ndarray) -> np.ndarray:
    """The weights (B, 2R + 1) of a blur with sigma (B,): those beyond 3 sigma are 0, the others add up to 1."""
    radius = math.ceil(3 * SIGMA_RANGE[1])
    offsets, sigma = np.arange(-radius, radius + 1), sigma[:, None]
    taps = np.exp(-(offsets**2) / (2 * sigma**2)) * (np.abs(offsets) <= np.ceil(3 * sigma))
    return taps / taps.sum(axis=1, keepdims=True)


def gaussian_blur_(x: Tensor, taps: Tensor) -> Tensor:
    """Blur each image with its own taps (B, 2R + 1, 1, 1), reflecting at the border."""
    return (_blur_by_shifts_ if _large_on_cpu(x) else _blur_by_products_)(x, taps.flatten(1))


def _blur_by_products_(x, taps):
    """Two products with a banded matrix an image."""
    size, radius = x.shape[-1], taps.shape[1] // 2
    source = torch.arange(size, device=x.device)[:, None] + torch.arange(
        -radius, radius + 1, device=x.device
    )
    source = source.remainder(max(1, 2 * size - 2))  # reflected, without repeating the edge
    source = torch.minimum(source, 2 * size - 2 - source)
    matrices = x.new_zeros(len(x), size, size)
    matrices.scatter_add_(2, source.expand(len(x), -1, -1), taps[:, None].expand(-1, size, -1))
    return x.copy_(_both_ways(matrices, _channels_inside(x), matrices).transpose(1, 2))


def _blur_by_shifts_(x, taps):
    """The same image by image, adding shifted copies, no more than its sigma asks for: the faster way on a CPU."""
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
    """(B, 3, S, S) -> (B, 1, S, S)."""
    red, green, blue = x.split(1, dim=1)
    return (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])
