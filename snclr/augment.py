"""The augmentation of a view: the table of views, and the random numbers (numpy) that are drawn.

operations.py applies what was drawn. A view is one line of a table (`View`): its size, crop range,
probabilities and strengths. What is drawn depends only on (seed, epoch, image index, view number):
a hash of these takes the place of a random generator, so any number of ranks and workers draws the
same.

A new operation needs a name in DRAWS, a field in ViewParameters, and the line in `draw` that fills
it; in operations.py a function, and the line in `_apply_` that calls it. --fused-augment does not
have it, unless fused_augment.py gets it, too. The draws of all other operations stay as they are,
bit for bit.
"""

import functools
import itertools
from argparse import Namespace
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CROP_TRIES = 10
LOCAL_CROP_MIN = 0.05  # DINO's (Caron et al. 2021)
SIGMA_RANGE = (0.1, 2.0)  # blur, in output pixels

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
    global view, also those from flags, but its crop is drawn as DINO's (Caron et al. 2021), and
    half of the local views are blurred unless --blur-p is given. With --key-view weak, the last
    view has only the crop, flip and rotation of the first one, as in MSF (Koohpayegani et al.
    2021), ReSSL (Zheng et al. 2021) and SCE (Denize et al. 2023). As it is the last, the draws of
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


@functools.lru_cache(maxsize=2)  # of the running epoch and the next
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The permutation (size,) in which an epoch visits the data set. Not to be changed in place."""
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


_PERMUTATIONS = np.array(list(itertools.permutations(range(4))))  # orders of the jitter


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

    low, high = SIGMA_RANGE
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
