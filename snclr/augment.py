"""Augmentation in two halves: random numbers are drawn (numpy), then applied (torch, any device).

A view is one line of a table (`View`): its size, crop range, probabilities and strengths. What is
drawn depends only on (seed, epoch, image index, view number): a hash of these takes the place of a
random generator, so any number of ranks and workers draws the same.

A new operation needs a name in DRAWS, a field in ViewParameters, the line in `draw` that fills it,
a function in operations.py, and the line in `_apply_` that calls it. The draws of all other
operations stay as they are, bit for bit.
"""

import itertools
from argparse import Namespace
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import operations

CROP_TRIES = 10
LOCAL_CROP_MIN = 0.05  # DINO's (Caron et al. 2021)
AT_ONCE = 2**26  # pixel values to augment at a time, which bounds the memory

# -- the table of views ---------------------------------------------------------------------------


class View(NamedTuple):
    """One line of the table of views. By default only a crop and a flip.

    size: height and width in px; crop_min, crop_max: area of the crop as a share of the image; *_p:
    probability of an operation; jitter: half the width of the ranges of brightness, contrast,
    saturation (factors around 1) and hue (turns around 0, at most 1/3). A flip is left to right,
    with flip_v_p upside down; a rotation is by 90, 180 or 270 degrees, equally likely.
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
    flip_v_p: float = 0.0
    rotate_p: float = 0.0


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
    """The table of views that the flags describe (snclr/view_options.py).

    Two global views, then --local-views small ones. A local view has the settings of the first
    global view, also those from flags. Its crop is drawn as DINO's (Caron et al. 2021), and half of
    them are blurred unless --blur-p is given. With --key-view weak follows one of crop, flip and
    rotation only, whose settings are those of the first global view, as in MSF (Koohpayegani et al.
    2021), ReSSL (Zheng et al. 2021) and SCE (Denize et al. 2023). It comes last, so the draws of
    all other views stay as they are.
    """
    global_views = moco_v2_views if args.method == "mocov2" else moco_v3_views
    first, second = global_views(args.img_size, args.crop_min, args.blur)
    local_view = first._replace(
        size=args.local_size,
        crop_min=LOCAL_CROP_MIN,
        crop_max=args.local_crop_max,
        blur_p=0.5 * args.blur,
    )
    flags = {
        "jitter": args.jitter,
        "jitter_p": args.jitter_p,
        "gray_p": args.grey_p,
        "blur_p": args.blur_p,
        "solarize_p": args.solarise_p,
        "flip_p": args.flip_h,
        "flip_v_p": args.flip_v,
        "rotate_p": args.rotate90,
    }
    first, local_view = (_set_by_flags(view, flags, 0) for view in (first, local_view))
    views = first, _set_by_flags(second, flags, 1), *[local_view] * args.local_views
    weak_view = first._replace(jitter_p=0.0, gray_p=0.0, blur_p=0.0, solarize_p=0.0)
    return views + (weak_view,) * (args.key_view == "weak")


def _set_by_flags(view, flags, number):
    """The view with the values of the user's flags, of which None is ignored. A flag with values
    for each global view gives its first (number 0) or second (1).
    """
    for field, values in flags.items():
        if values:
            count = 4 if field == "jitter" else 1
            own = tuple(values[number * count :][:count] or values)
            view = view._replace(**{field: own if count > 1 else own[0]})
    return view


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
    "flip_v": 13 + 2 * CROP_TRIES,
    "rotate": 14 + 2 * CROP_TRIES,
    "quarters": 15 + 2 * CROP_TRIES,
}


class ViewParameters(NamedTuple):
    """What was drawn for B views, besides the crop. CPU tensors."""

    jitter: Tensor  # (B,) bool
    order: Tensor  # (B, 4) jitter operations in their order: 0 brightness .. 3 hue
    factors: Tensor  # (B, 4) float, of brightness, contrast, saturation; hue in turns
    gray: Tensor  # (B,) bool
    sigma: Tensor  # (B,) float, blur in pixels; 0 for none
    solarize: Tensor  # (B,) bool
    flip: Tensor  # (B,) bool, left to right
    flip_v: Tensor  # (B,) bool, upside down
    quarters: Tensor  # (B,) int64, quarter turns anticlockwise; 0 for none


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

    low, high = operations.SIGMA_RANGE
    parameters = ViewParameters(
        jitter=u["jitter"] < settings.jitter_p,
        order=_PERMUTATIONS[(u["order"] * len(_PERMUTATIONS)).astype(np.int64)],
        factors=(2 * u["factors"] - 1) * settings.jitter + (1, 1, 1, 0),
        gray=u["gray"] < settings.gray_p,
        sigma=np.where(u["blur"] < settings.blur_p, low + (high - low) * u["sigma"], 0.0),
        solarize=u["solarize"] < settings.solarize_p,
        flip=u["flip"] < settings.flip_p,
        flip_v=u["flip_v"] < settings.flip_v_p,
        quarters=np.where(
            u["rotate"] < settings.rotate_p, 1 + (3 * u["quarters"]).astype(np.int64), 0
        ),
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


def apply(crops: Tensor, parameters: ViewParameters, mean: Tensor, std: Tensor) -> Tensor:
    """Jitter, gray, blur, solarize, flip, rotate and normalise.

    crops (B, C, S, S) uint8; mean, std (C,) of the data set, in [0, 1]. Returns (B, C, S, S) float
    on the device of the crops. Each operation runs only on the images that were drawn for it: the
    parameters are on the host, so the host never waits for a GPU.
    """
    views = torch.empty(crops.shape, dtype=torch.get_default_dtype(), device=crops.device)
    count = 1 if operations.is_large_on_cpu(crops) else max(1, AT_ONCE // crops.shape[1:].numel())
    for start in range(0, len(crops), count):
        part = slice(start, start + count)
        x = views[part].copy_(crops[part]).div_(255)
        _apply_(x, ViewParameters(*(field[part].numpy() for field in parameters)))
        normalize_(x, mean, std)
    return views


def _apply_(x, p: ViewParameters):
    """All operations on x (B, C, S, S) in place; p: their parameters, as numpy arrays."""
    _jitter_(x, p)
    _on_chosen_(x, p.gray, operations.grayscale)
    _on_chosen_(
        x,
        p.sigma > 0,
        operations.gaussian_blur_,
        operations.gaussian_taps(np.where(p.sigma > 0, p.sigma, 1)),
    )
    _on_chosen_(x, p.solarize, operations.solarize_)
    _on_chosen_(x, p.flip, operations.flip)
    _on_chosen_(x, p.flip_v, operations.flip_v)
    for quarters in (1, 2, 3):
        _on_chosen_(x, p.quarters == quarters, partial(torch.rot90, k=quarters, dims=(2, 3)))


def _jitter_(x, p):
    """Brightness, contrast, saturation and hue of the chosen images, in the order drawn for each.

    Three ways for three kinds of devices: the operations of a single image, groups of images with
    the same operation, or few calls.
    """
    chosen = np.flatnonzero(p.jitter)
    if operations.is_large_on_cpu(x):
        for number in p.order[0] if len(chosen) else ():
            operations.JITTERS[number](x, p.factors[0, number].item())
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
        for operation_, start, end in zip(operations.JITTERS, ends, ends[1:], strict=False):
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
    position = np.argmax(p.order[chosen] == operations.HUE, axis=1)
    by_position = np.argsort(position, kind="stable")
    chosen, ends = chosen[by_position], np.searchsorted(position[by_position], [1, 2, 3])
    order = p.order[chosen]
    kinds = order[order != operations.HUE].reshape(-1, 3)
    factors = p.factors[chosen[:, None], kinds]
    of_mean, of_luma = ((1 - factors) * (kinds == kind) for kind in (1, 2))
    host = np.stack([factors, of_mean, of_luma]).transpose(2, 0, 1)  # (3 rounds, 3, n)
    blends = torch.from_numpy(host[..., None, None, None]).to(x, non_blocking=True)
    at = _on_device(chosen, x)
    jittered = x.index_select(0, at)
    for blend, start in zip(blends, ends, strict=True):
        operations.blend_(jittered[start:], blend[:, start:])
    operations.adjust_hue_(jittered, _strengths(p.factors[chosen, operations.HUE], x))
    for blend, end in zip(blends, ends, strict=True):
        operations.blend_(jittered[:end], blend[:, :end])
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


def select(x: Tensor, rows: np.ndarray) -> Tensor:
    """x[rows], (n, ...) for rows (n,), without waiting for x's device."""
    return x.index_select(0, _on_device(rows, x))


def _on_device(rows, x):
    return torch.from_numpy(rows).to(x.device, non_blocking=True)


def _strengths(values, x):
    values = values.reshape(*values.shape, *[1] * (4 - values.ndim))
    return torch.from_numpy(values).to(x, non_blocking=True)


def normalize_(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std per channel, in place; x (B, C, S, S) in [0, 1]."""
    mean, std = (values.to(x, non_blocking=True).view(-1, 1, 1) for values in (mean, std))
    return x.sub_(mean).mul_(1 / std)
