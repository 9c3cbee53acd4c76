"""Two-view augmentation in two halves: what is drawn (numpy, keyed by sample) and how it is applied (torch, any device).

The recipe is MoCo v3's (Chen et al. 2021, appendix; BYOL's two views). Every parameter is a function of (seed, epoch, image
index, view) alone: a counter-based hash replaces generator state, so any number of ranks and workers draws the same.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

GRAY = (0.2989, 0.587, 0.114)  # luma of ITU-R BT.601, as torchvision's
SIGMA_RANGE = (0.1, 2.0)  # blur, in output pixels
JITTER = (0.4, 0.4, 0.2, 0.1)  # half-widths of brightness, contrast, saturation (factors about 1) and hue (turns about 0)
CROP_TRIES = 10

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
    recipe: Recipe, epoch: int, indices: np.ndarray, view: int, heights: np.ndarray, widths: np.ndarray
) -> tuple[np.ndarray, ViewParameters]:
    """Crop boxes (B, 4) int64 (top, left, height, width) and ViewParameters for one view (0 or 1) of B images.

    indices (B,) data-set indices; heights, widths (B,) of the images in pixels.
    """
    u = keyed_uniforms(13 + 2 * CROP_TRIES, recipe.seed, epoch, indices, view)
    boxes = _draw_crops(recipe.crop_min, u[:, 13:], u[:, 0], u[:, 1], heights, widths)
    blur_probability, solarize_probability = ((1.0, 0.0), (0.1, 0.2))[view]
    jitter = (u[:, 2] < 0.8) & recipe.colour
    factors = (2 * u[:, 3:7] - 1) * JITTER + (1, 1, 1, 0)
    order = _PERMUTATIONS[(u[:, 7] * len(_PERMUTATIONS)).astype(np.int64)]
    low, high = SIGMA_RANGE
    sigma = np.where((u[:, 8] < blur_probability) & recipe.blur, low + (high - low) * u[:, 9], 0.0)
    gray, solarize = (u[:, 10] < 0.2) & recipe.colour, (u[:, 11] < solarize_probability) & recipe.colour
    parameters = (jitter, order, factors, gray, sigma, solarize, u[:, 12] < 0.5)
    return boxes, ViewParameters(*map(torch.from_numpy, parameters))


_PERMUTATIONS = np.array(
    [(a, b, c, 6 - a - b - c) for a in range(4) for b in range(4) for c in range(4) if len({a, b, c}) == 3]
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
    """Cut box (top, left, height, width) out of each image (B, 3, H, W) uint8 and resize it: (B, 3, size, size) uint8.

    Bilinear with antialias, as torchvision's resize: two products with (size, H) and (W, size) matrices an image.
    """
    top, left, height, width = boxes.to(images.device, torch.get_default_dtype()).unbind(1)
    rows = _resize_matrices(top, height, images.shape[2], size)
    columns = _resize_matrices(left, width, images.shape[3], size)
    resized = rows[:, None] @ images.to(rows.dtype) @ columns[:, None].transpose(2, 3)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _resize_matrices(start: Tensor, extent: Tensor, in_size: int, out_size: int) -> Tensor:
    """Triangle-filter weights (B, out_size, in_size) that resize the pixels [start, start + extent) to out_size."""
    scale = (extent / out_size)[:, None, None]
    centre = start[:, None, None] + (torch.arange(out_size, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(in_size, device=start.device).to(start.dtype)
    weights = (1 - (pixel + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    inside = (pixel >= start[:, None]) & (pixel < (start + extent)[:, None])
    weights = weights * inside[:, None]
    return weights / weights.sum(dim=2, keepdim=True)


def apply(crops: Tensor, parameters: ViewParameters, mean: Tensor, std: Tensor) -> Tensor:
    """Jitter, grey, blur, solarise, flip and normalise: crops (B, 3, S, S) uint8 -> (B, 3, S, S) float on their device.

    mean, std (3,) of the data set, in [0, 1]. Each operation runs on just the images that were drawn for it, as one batch;
    which these are is known on the host, so a GPU is never asked.
    """
    device = crops.device
    x = crops.to(torch.get_default_dtype()).div_(255)
    factors = parameters.factors.to(x.dtype)
    for position in range(4):
        for number, operation in enumerate((adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)):
            chosen = parameters.jitter & (parameters.order[:, position] == number)
            factor = factors[chosen, number].view(-1, 1, 1, 1).to(device, non_blocking=True)
            _on_some(x, chosen, operation, factor)
    _on_some(x, parameters.gray, grayscale)
    blurred = parameters.sigma > 0
    _on_some(x, blurred, gaussian_blur, parameters.sigma[blurred].to(device, x.dtype, non_blocking=True))
    _on_some(x, parameters.solarize, solarize)
    _on_some(x, parameters.flip, flip)
    return normalize_(x, mean, std)


def normalize_(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std per channel, in place; x (B, 3, S, S) in [0, 1]."""
    return x.sub_(mean.to(x).view(3, 1, 1)).div_(std.to(x).view(3, 1, 1))


def _on_some(x: Tensor, chosen: Tensor, operation, *arguments) -> None:
    where = chosen.nonzero().squeeze(1)
    if len(where):
        where = where.to(x.device, non_blocking=True)
        x.index_copy_(0, where, operation(x.index_select(0, where), *arguments))


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    # rows first: a single large sum would be split over threads, and depend on their number
    mean = _luma(x).mean(dim=3, keepdim=True).mean(dim=2, keepdim=True)
    return torch.lerp(mean, x, factor).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_luma(x), x, factor).clamp_(0, 1)


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of HSV.

    Back to RGB with n = 5, 3, 1 for red, green, blue: value - chroma * clamp(min(k, 4 - k), 0, 1), k = (n + 6 * hue) mod 6.
    """
    red, green, blue = x.unbind(1)
    value, low = x.amax(dim=1), x.amin(dim=1)
    chroma = value - low
    safe = chroma.masked_fill(chroma == 0, 1)
    hue = torch.where(
        value == red, (green - blue) / safe, torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    )
    position = torch.tensor([5.0, 3.0, 1.0], dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
    k = (position + hue[:, None] + 6 * turns).remainder_(6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def grayscale(x: Tensor) -> Tensor:
    return _luma(x).expand_as(x)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image with its own sigma (B,), reflecting at the border: two products with a banded matrix an image."""
    size = x.shape[-1]
    radius = min(int(3 * SIGMA_RANGE[1]), size - 1)
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    taps = torch.softmax(-(offsets.to(x.dtype) ** 2) / (2 * sigma[:, None] ** 2), dim=1)  # (B, 2 * radius + 1)
    source = torch.arange(size, device=x.device)[:, None] + offsets
    source = (size - 1) - ((size - 1) - source.abs()).abs()  # reflected, without repeating the edge
    matrices = x.new_zeros(len(x), size, size)
    matrices.scatter_add_(2, source.expand(len(x), -1, -1), taps[:, None].expand(-1, size, -1))
    return matrices[:, None] @ x @ matrices[:, None].transpose(2, 3)


def solarize(x: Tensor) -> Tensor:
    return torch.where(x >= 128 / 255, 1 - x, x)


def flip(x: Tensor) -> Tensor:
    return x.flip(-1)


def _luma(x: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, 1, S, S)."""
    red, green, blue = x.split(1, dim=1)
    return GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue
