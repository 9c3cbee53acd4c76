"""Augmentation in two halves: random numbers are drawn (numpy), then applied (torch, any device).

A view is one line of a table (`View`): its size, crop range, probabilities and strengths. What is
drawn depends only on (seed, epoch, image index, view number): a hash of these takes the place of a
random generator, so any number of ranks and workers draws the same.

A new operation needs a name in DRAWS, a field in ViewParameters, the line in `draw` that fills it,
a function, and the line in `_apply_` that calls it. The draws of all other operations stay as they
are, bit for bit.
"""

import itertools
import math
from argparse import Namespace
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

GRAY = (0.2989, 0.587, 0.114)  # luma of ITU-R BT.601, as torchvision's
SIGMA_RANGE = (0.1, 2.0)  # blur, in output pixels
CROP_TRIES = 10
LOCAL_CROP_MIN = 0.05  # DINO's (Caron et al. 2021)
SMALL = 64  # px; on a CPU larger views are augmented one by one, to stay in its cache
AT_ONCE = 2**26  # otherwise: pixel values to augment at a time, which bounds the memory

# -- the table of views ---------------------------------------------------------------------------


class View(NamedTuple):
    """One line of the table of views. By default only a crop and a flip.

    size: height and width in px; crop_min, crop_max: area of the crop as a share of the image; *_p:
    probability of an operation; jitter: half the width of the ranges of brightness, contrast,
    saturation (factors around 1) and hue (turns around 0).
    """

    size: int
    crop_min: float
    crop_max: float = 1.0
    flip_p: float = 0.5
    jitter_p: float = 0.0
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    gray_p: float = 0.0
    blur_p: float = 0.0
    solarize_p: float = 0.0


class Recipe(NamedTuple):
    """The augmentation of a run: its seed and one line for each view of an image."""

    seed: int
    views: tuple[View, ...]


def moco_v3_views(size: int, crop_min: float, blur: bool) -> tuple[View, View]:
    """MoCo v3's two views (Chen et al. 2021, appendix), which are BYOL's."""
    first = View(size, crop_min, jitter_p=0.8, gray_p=0.2, blur_p=1.0 * blur)
    return first, first._replace(blur_p=0.1 * blur, solarize_p=0.2)


def moco_v2_views(size: int, crop_min: float, blur: bool) -> tuple[View, View]:
    """MoCo v2's two views, which have the same settings (Chen et al. 2020)."""
    view = View(
        size, crop_min, jitter_p=0.8, jitter=(0.4, 0.4, 0.4, 0.1), gray_p=0.2, blur_p=0.5 * blur
    )
    return view, view


def build_views(args: Namespace) -> tuple[View, ...]:
    """The table of views that the flags describe (snclr/options.py).

    Two global views, then --local-views small ones, drawn as DINO's (Caron et al. 2021), then with
    --key-view weak one of crop and flip only, whose crop is that of the global views, as in MSF
    (Koohpayegani et al. 2021), ReSSL (Zheng et al. 2021) and SCE (Denize et al. 2023). It comes
    last, so the draws of all other views stay as they are.
    """
    global_views = moco_v2_views if args.method == "mocov2" else moco_v3_views
    views = global_views(args.img_size, args.crop_min, args.blur)
    local_view = views[0]._replace(
        size=args.local_size,
        crop_min=LOCAL_CROP_MIN,
        crop_max=args.local_crop_max,
        blur_p=0.5 * args.blur,
    )
    weak_view = View(args.img_size, args.crop_min)
    return views + (local_view,) * args.local_views + (weak_view,) * (args.key_view == "weak")


def by_size(recipe: Recipe, numbers: Iterable[int]) -> list[tuple[int, list[int]]]:
    """Groups of consecutive views of one size, which are cut and augmented in one call.

    Returns (size, view numbers) of each group.
    """
    groups = itertools.groupby(numbers, key=lambda number: recipe.views[number].size)
    return [(size, list(group)) for size, group in groups]


# -- drawing --------------------------------------------------------------------------------------


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele et al. 2014): a bijection that scrambles uint64."""
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


# Name of a draw: its columns of the keyed uniforms. A new draw takes the columns after the last
# one. Each column is hashed by itself, so a new one changes none of the others.
DRAWS = {
    "top": 0,
    "left": 1,
    "jitter": 2,
    "factors": slice(3, 7),
    "order": 7,
    "blur": 8,
    "sigma": 9,
    "gray": 10,
    "solarize": 11,
    "flip": 12,
    "areas": slice(13, 13 + CROP_TRIES),
    "aspects": slice(13 + CROP_TRIES, 13 + 2 * CROP_TRIES),
}


class ViewParameters(NamedTuple):
    """What was drawn for B views, besides the crop. CPU tensors."""

    jitter: Tensor  # (B,) bool
    order: Tensor  # (B, 4) jitter operations in their order: 0 brightness .. 3 hue
    factors: Tensor  # (B, 4) float, of brightness, contrast, saturation; hue in turns
    gray: Tensor  # (B,) bool
    sigma: Tensor  # (B,) float, blur in pixels; 0 for none
    solarize: Tensor  # (B,) bool
    flip: Tensor  # (B,) bool


def draw(
    recipe: Recipe,
    epoch: int,
    indices: np.ndarray,
    view: int | np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
) -> tuple[np.ndarray, ViewParameters]:
    """Draw one view of each of B images.

    indices (B,)        data-set indices
    view                number of the view, a line of recipe.views: one for all images, or (B,)
    heights, widths     (B,) of the images, in pixels

    Returns crop boxes (B, 4) int64 (top, left, height, width), and ViewParameters.
    """
    columns = 1 + np.r_[tuple(DRAWS.values())].max()
    uniforms = keyed_uniforms(columns, recipe.seed, epoch, indices, view)
    u = {name: uniforms[:, column] for name, column in DRAWS.items()}
    settings = View(*(np.array(column)[view] for column in zip(*recipe.views, strict=True)))

    low, high = SIGMA_RANGE
    parameters = ViewParameters(
        jitter=u["jitter"] < settings.jitter_p,
        order=_PERMUTATIONS[(u["order"] * len(_PERMUTATIONS)).astype(np.int64)],
        factors=(2 * u["factors"] - 1) * settings.jitter + (1, 1, 1, 0),
        gray=u["gray"] < settings.gray_p,
        sigma=np.where(u["blur"] < settings.blur_p, low + (high - low) * u["sigma"], 0.0),
        solarize=u["solarize"] < settings.solarize_p,
        flip=u["flip"] < settings.flip_p,
    )
    return _draw_crops(u, settings, heights, widths), ViewParameters(
        *map(torch.from_numpy, parameters)
    )


_PERMUTATIONS = np.array(list(itertools.permutations(range(4))))


def _draw_crops(u, settings, heights, widths):
    """Boxes of random resized crops, as torchvision draws them: the first of ten tries of area and
    aspect that fits, else a central crop.
    """
    heights, widths = heights.astype(np.float64), widths.astype(np.float64)
    smallest, largest = (x[..., None] for x in (settings.crop_min, settings.crop_max))
    area = (heights * widths)[:, None] * (smallest + (largest - smallest) * u["areas"])
    ratio = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * u["aspects"])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    first = np.arange(len(w)), fits.argmax(axis=1)
    # otherwise the whole image, cut centrally to the nearest allowed aspect
    whole_w = np.minimum(widths, np.rint(heights * 4 / 3))
    whole_h = np.minimum(heights, np.rint(widths / (3 / 4)))
    any_fits = fits.any(axis=1)
    w, h = np.where(any_fits, w[first], whole_w), np.where(any_fits, h[first], whole_h)
    top = np.where(any_fits, np.floor(u["top"] * (heights - h + 1)), (heights - h) // 2)
    left = np.where(any_fits, np.floor(u["left"] * (widths - w + 1)), (widths - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int64)


# -- applying -------------------------------------------------------------------------------------


def crop_and_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut V boxes (top, left, height, width) out of each image and resize them.

    images (B, 3, H, W) uint8; boxes (V * B, 4): the first box of every image, then the second, ...
    Returns (V * B, 3, size, size) uint8. Bilinear with antialiasing, as torchvision's resize: two
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
    """(B, 3, H, W) -> (B, H, 3, W): two large products an image are faster than six small ones."""
    return x.transpose(1, 2).contiguous()


def _both_ways(rows: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """rows[b] @ x[b, :, c] @ columns[b].T: (B, S, H), (B, H, 3, W), (B, S, W) -> (B, S, 3, S)."""
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


def apply(crops: Tensor, parameters: ViewParameters, mean: Tensor, std: Tensor) -> Tensor:
    """Jitter, gray, blur, solarize, flip and normalise.

    crops (B, 3, S, S) uint8; mean, std (3,) of the data set, in [0, 1]. Returns (B, 3, S, S) float
    on the device of the crops. Each operation runs only on the images that were drawn for it: the
    parameters are on the host, so the host never waits for a GPU.
    """
    views = torch.empty(crops.shape, dtype=torch.get_default_dtype(), device=crops.device)
    count = 1 if _large_on_cpu(crops) else max(1, AT_ONCE // (3 * crops.shape[-1] ** 2))
    for start in range(0, len(crops), count):
        part = slice(start, start + count)
        x = views[part].copy_(crops[part]).div_(255)
        _apply_(x, ViewParameters(*(field[part].numpy() for field in parameters)))
        normalize_(x, mean, std)
    return views


def _large_on_cpu(x):
    return x.shape[-1] > SMALL and x.device.type == "cpu"


def _apply_(x, p: ViewParameters):
    """All operations on x (B, 3, S, S) in place; p: their parameters, as numpy arrays."""
    _jitter_(x, p)
    _on_chosen_(x, p.gray, grayscale)
    _on_chosen_(x, p.sigma > 0, gaussian_blur_, gaussian_taps(np.where(p.sigma > 0, p.sigma, 1)))
    _on_chosen_(x, p.solarize, solarize_)
    _on_chosen_(x, p.flip, flip)


def _jitter_(x, p):
    """Brightness, contrast, saturation and hue of the chosen images, in the order drawn for each.

    There are four rounds. In each, the images are sorted by their next operation, so that each
    operation is one call.
    """
    operations = adjust_brightness_, adjust_contrast_, adjust_saturation_, adjust_hue_
    chosen = np.flatnonzero(p.jitter)
    if _large_on_cpu(x):  # a single image
        for number in p.order[0] if len(chosen) else ():
            operations[number](x, p.factors[0, number].item())
        return
    jittered, at = x, chosen
    for position in range(4):
        by_operation = np.argsort(p.order[chosen, position], kind="stable")
        jittered, chosen = select(jittered, at[by_operation]), chosen[by_operation]
        at = np.arange(len(chosen))
        order = p.order[chosen, position]
        strengths = _strengths(p.factors[chosen, order], x)
        ends = np.searchsorted(order, np.arange(5))
        for operation_, start, end in zip(operations, ends, ends[1:], strict=False):
            if start < end:
                operation_(jittered[start:end], strengths[start:end])
    _put_(x, chosen, jittered)


def _on_chosen_(x, chosen, operation, *strengths):
    """Replace the images of x that are chosen (B,) by what the operation returns for them."""
    rows = np.flatnonzero(chosen)
    strengths = [_strengths(values[rows], x) for values in strengths]
    if len(rows) == len(x):
        x.copy_(operation(x, *strengths))  # copies nothing if the operation is in place
    elif len(rows):
        _put_(x, rows, operation(select(x, rows), *strengths))


def select(x: Tensor, rows: np.ndarray) -> Tensor:
    """x[rows], (n, ...) for rows (n,), without waiting for x's device."""
    return x.index_select(0, torch.from_numpy(rows).to(x.device, non_blocking=True))


def _put_(x, rows, images):
    x.index_copy_(0, torch.from_numpy(rows).to(x.device, non_blocking=True), images)


def _strengths(values, x):
    values = values.reshape(*values.shape, *[1] * (4 - values.ndim))
    return torch.from_numpy(values).to(x, non_blocking=True)


def normalize_(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std per channel, in place; x (B, 3, S, S) in [0, 1]."""
    mean, std = (values.to(x, non_blocking=True).view(3, 1, 1) for values in (mean, std))
    return x.sub_(mean).mul_(1 / std)


# The operations take x (B, 3, S, S) in [0, 1] and strengths (B, 1, 1, 1); if the name ends in _,
# they change x and return it.


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
    """Rotate the hue of HSV by up to a sixth of a turn either way.

    If a sixth of a turn has the length chroma, the angle from red is +-(value - 2 low + green +
    blue - red), with the sign of green - blue: the same formula for all sextants. A channel is
    low + clamp(2 chroma - distance, 0, chroma), where distance is the angle to its own primary, the
    shorter way round: 3 chroma - |3 chroma - |angle||.
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
    # minus the angle of red, green and blue
    primaries = torch.tensor([0.0, -2.0, 2.0]).to(x, non_blocking=True).view(3, 1, 1)
    torch.mul(chroma, primaries, out=x).add_(angle).abs_().sub_(chroma, alpha=3).abs_()
    return x.clamp_(chroma, 2 * chroma).add_(low - chroma)


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
    return (_blur_by_shifts_ if _large_on_cpu(x) else _blur_by_products_)(x, taps.flatten(1))


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


def _luma(x: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, 1, S, S)."""
    red, green, blue = x.split(1, dim=1)
    return (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])
