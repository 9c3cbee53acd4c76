import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from accelerator import DEVICE, Accelerator
from PIL import ImageFilter
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from snclr import augment, operations, options
from snclr.augment import (
    Recipe,
    View,
    ViewParameters,
    draw,
    epoch_order,
    keyed_uniforms,
    moco_v2_views,
    moco_v3_views,
)
from snclr.datasets.crops import crop_and_resize

RECIPE = Recipe(3, moco_v3_views(size=16, crop_min=0.2, blur=True))


def crops_from(crop_min, crop_max=1.0):
    """RECIPE with another range of crops."""
    views = (v._replace(crop_min=crop_min, crop_max=crop_max) for v in RECIPE.views)
    return RECIPE._replace(views=tuple(views))


MANY = 20_000
KEY_PARTS = {
    "seed": (1, 0, 0, 0),
    "epoch": (0, 1, 0, 0),
    "index": (0, 0, MANY, 0),
    "view": (0, 0, 0, 1),
}


def draw_many(recipe=RECIPE, epoch=0, view=0, count=MANY, height=48, width=64, first=0):
    indices = np.arange(first, first + count)
    return draw(recipe, epoch, indices, view, np.full(count, height), np.full(count, width))


def pictures(count, size=16, seed=0):
    """Float pictures in [0, 1] with coarse structure, noise, a grey one, a black one and a white
    one.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    x = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    x = (0.8 * x + 0.2 * torch.rand(x.shape, generator=generator)).mul(255).round().div(255)
    x[0] = x[0, :1]
    x[1], x[2] = 0, 1
    return x


# -- the hash -------------------------------------------------------------------------------------


def test_splitmix64_gives_the_published_sequence():
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + step * gamma) % 2**64 for step in range(3)], dtype=np.uint64)
    assert augment.splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


EACH = np.arange(MANY)


@pytest.mark.parametrize("key", [(0, 0, EACH, 0), (7, EACH, 5, 1), (EACH,), (-3, -EACH)])
def test_keyed_uniforms_are_uniform(key):
    u = keyed_uniforms(3, *key)
    assert u.shape == (MANY, 3) and u.min() >= 0 and u.max() < 1
    steps = np.arange(1, MANY + 1) / MANY
    for column in np.sort(u, axis=0).T:
        assert np.abs(column - steps).max() < 1.95 / MANY**0.5  # Kolmogorov-Smirnov, p = .001
    np.testing.assert_allclose(
        [(u**power).mean() for power in (1, 2, 3)], [1 / 2, 1 / 3, 1 / 4], atol=0.005
    )


def test_columns_of_keyed_uniforms_are_independent():
    u = keyed_uniforms(33, 0, 0, EACH, 0)
    assert np.abs(np.corrcoef(u.T) - np.eye(33)).max() < 0.035


@pytest.mark.parametrize("offset", KEY_PARTS.values(), ids=KEY_PARTS)
def test_every_part_of_the_key_gives_independent_numbers(offset):
    here = keyed_uniforms(4, 0, 0, EACH, 0)
    there = keyed_uniforms(4, offset[0], offset[1], EACH + offset[2], offset[3])
    correlations = np.corrcoef(here.T, there.T)[:4, 4:]
    assert np.abs(correlations).max() < 0.035
    assert np.abs((here + there) % 1 - 0.5).mean() == pytest.approx(
        0.25, abs=0.01
    )  # no pair copies or mirrors the other


def test_the_parts_of_a_key_are_not_exchangeable():
    numbers = [float(keyed_uniforms(1, *key)[0]) for key in itertools.permutations((1, 2, 3, 4))]
    assert len(set(numbers)) == 24


def test_keyed_uniforms_of_one_sample_do_not_depend_on_the_others():
    alone = np.concatenate([keyed_uniforms(5, 1, 2, np.array([index]), 0) for index in range(7)])
    assert np.array_equal(keyed_uniforms(5, 1, 2, np.arange(7), 0), alone)
    assert np.array_equal(keyed_uniforms(9, 1, 2, np.arange(7), 0)[:, :5], alone)
    assert np.array_equal(keyed_uniforms(5, 1, 2, 6, 0), alone[6])


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_epoch_order_is_a_permutation(size):
    assert np.array_equal(np.sort(epoch_order(0, 0, size)), np.arange(size))


def test_epoch_order_is_shuffled_anew_by_epoch_and_seed():
    orders = {key: epoch_order(*key, 1000) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert np.array_equal(orders[0, 1], epoch_order(0, 1, 1000))
    for order in orders.values():
        assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
    for one, other in itertools.combinations(orders.values(), 2):
        assert (one == other).mean() < 0.01


# -- the table of views ---------------------------------------------------------------------------

EVERYTHING = View(
    16, 0.2, 1.0, 0.5, 0.7, (1, 1, 1, 1 / 3), 0.3, 0.5, 0.5, flip_v_p=0.5, rotate_p=0.7
)
PROBABILITY_FLAGS = {
    "--jitter-p": "jitter_p",
    "--grey-p": "gray_p",
    "--solarise-p": "solarize_p",
    "--blur-p": "blur_p",
    "--flip-h": "flip_p",
    "--flip-v": "flip_v_p",
    "--rotate90": "rotate_p",
}


def views_of(*flags):
    return augment.build_views(options.parse(["--img-size=48", "--local-views=2", *flags]))


@pytest.mark.parametrize("method", ["snclr", "mocov2"])
def test_without_flags_the_global_views_are_those_of_the_method(method):
    flags = ["--method", method, "--img-size", "48", "--crop-min", "0.1"]
    of_method = {"snclr": moco_v3_views, "mocov2": moco_v2_views}[method]
    assert augment.build_views(options.parse(flags)) == of_method(48, 0.1, True)


@pytest.mark.parametrize("flag", PROBABILITY_FLAGS)
def test_a_probability_changes_one_field_of_both_views_or_of_each(flag):
    first, second, *local = views_of()
    field = PROBABILITY_FLAGS[flag]
    one, other = {field: 0.25}, {field: 0.75}
    both = [view._replace(**one) for view in (first, second, *local)]
    assert views_of(flag, "0.25") == tuple(both)
    each = [*both[:1], second._replace(**other), *both[2:]]  # local views follow the first view
    assert views_of(flag, "0.25", "0.75") == tuple(each)


def test_jitter_changes_the_strengths_of_both_views_or_of_each():
    first, second, *local = views_of()
    some, others = (0.1, 0.2, 0.3, 0.0), (0.5, 0.6, 0.7, 0.2)
    both = [view._replace(jitter=some) for view in (first, second, *local)]
    assert views_of("--jitter", *map(str, some)) == tuple(both)
    each = [*both[:1], second._replace(jitter=others), *both[2:]]
    assert views_of("--jitter", *map(str, some + others)) == tuple(each)


@pytest.mark.parametrize("p", [0, 1])
@pytest.mark.parametrize("field", PROBABILITY_FLAGS.values())
def test_probabilities_0_and_1_are_never_and_always(field, p):
    recipe = RECIPE._replace(views=(EVERYTHING._replace(**{field: p}),))
    _, drawn = draw_many(recipe, count=500)
    name = {"blur_p": "sigma", "rotate_p": "quarters"}.get(field, field.removesuffix("_p"))
    values = getattr(drawn, name)
    assert (values != 0).all() if p else not values.any()


def test_rotations_and_flips_are_independent_and_of_equal_shares():
    recipe = RECIPE._replace(views=(EVERYTHING._replace(rotate_p=0.75),))
    _, p = draw_many(recipe)
    cases = np.stack([p.flip, p.flip_v, p.quarters])
    kinds, counts = np.unique(cases, axis=1, return_counts=True)
    assert kinds.shape == (3, 16)
    np.testing.assert_allclose(counts / MANY, 1 / 16, atol=0.006)


# -- drawing --------------------------------------------------------------------------------------


def test_parameters_of_a_sample_do_not_depend_on_the_batch():
    heights, widths = np.array([30, 64, 5, 200]), np.array([40, 64, 90, 10])
    boxes, parameters = draw(RECIPE, 2, np.array([8, 3, 11, 4]), 1, heights, widths)
    for row, index in enumerate((8, 3, 11, 4)):
        box, alone = draw(
            RECIPE, 2, np.array([index]), 1, heights[row : row + 1], widths[row : row + 1]
        )
        assert np.array_equal(box[0], boxes[row])
        assert all(
            torch.equal(one[0], many[row]) for one, many in zip(alone, parameters, strict=True)
        )


@pytest.mark.parametrize("change", KEY_PARTS)
def test_seed_epoch_index_and_view_each_change_crop_and_parameters(change):
    other = {
        "seed": {"recipe": RECIPE._replace(seed=4)},
        "epoch": {"epoch": 1},
        "index": {"first": 1},
        "view": {"view": 1},
    }
    boxes, parameters = draw_many(count=500)
    other_boxes, other_parameters = draw_many(count=500, **other[change])
    assert (boxes == other_boxes).all(axis=1).mean() < 0.05
    assert (parameters.factors == other_parameters.factors).all(dim=1).double().mean() < 0.05
    assert (parameters.flip == other_parameters.flip).double().mean() < 0.65


@pytest.mark.parametrize("view, blur, solarize", [(0, 1.0, 0.0), (1, 0.1, 0.2)])
def test_probabilities_are_those_of_moco_v3(view, blur, solarize):
    _, parameters = draw_many(view=view)
    chances = {"jitter": 0.8, "gray": 0.2, "flip": 0.5, "solarize": solarize}
    actual = {name: getattr(parameters, name).double().mean().item() for name in chances}
    assert actual == pytest.approx(chances, abs=0.015)
    assert (parameters.sigma > 0).double().mean().item() == pytest.approx(blur, abs=0.01)
    if blur == 1:
        assert (parameters.sigma > 0).all()
    if solarize == 0:
        assert not parameters.solarize.any()


def test_probabilities_and_strengths_of_moco_v2_are_the_same_for_both_views():
    recipe = RECIPE._replace(views=moco_v2_views(size=16, crop_min=0.2, blur=True))
    chances = {"jitter": 0.8, "gray": 0.2, "flip": 0.5, "solarize": 0.0}
    for view in (0, 1):
        _, p = draw_many(recipe, view=view)
        actual = {name: getattr(p, name).double().mean().item() for name in chances}
        assert actual == pytest.approx(chances, abs=0.015)
        assert (p.sigma > 0).double().mean().item() == pytest.approx(0.5, abs=0.015)
        half_widths = (p.factors - torch.tensor([1, 1, 1, 0])).abs().amax(dim=0)
        assert half_widths.tolist() == pytest.approx([0.4, 0.4, 0.4, 0.1], abs=1e-3)


def test_views_of_the_whole_table_are_drawn_in_one_call_as_one_by_one():
    views = (*RECIPE.views, View(8, 0.05, 0.25, jitter_p=0.3, blur_p=0.5), View(24, 0.7))
    recipe, numbers = RECIPE._replace(views=views), np.array([3, 0, 2, 1, 2])
    sides, indices = np.full(5, 40), np.array([7, 7, 7, 3, 1])
    boxes, parameters = draw(recipe, 1, indices, numbers, sides, sides)
    for row, number in enumerate(numbers):
        part = slice(row, row + 1)
        box, alone = draw(recipe, 1, indices[part], number, sides[part], sides[part])
        assert np.array_equal(box, boxes[part])
        for one, many in zip(alone, parameters, strict=True):
            assert torch.equal(one, many[part])


def test_more_views_change_nothing_in_those_before_them():
    more = RECIPE._replace(views=(*RECIPE.views, View(8, 0.05, 0.25, blur_p=0.5)))
    for view in (0, 1):
        (boxes, p), (other_boxes, others) = (
            draw_many(recipe, view=view, count=500) for recipe in (RECIPE, more)
        )
        assert np.array_equal(boxes, other_boxes)
        assert all(torch.equal(a, b) for a, b in zip(p, others, strict=True))


def test_a_new_draw_changes_no_other_draw_nor_the_crops(monkeypatch):
    boxes, p = draw_many(count=500)
    next_column = 1 + np.r_[tuple(augment.DRAWS.values())].max()
    monkeypatch.setitem(augment.DRAWS, "erase", slice(next_column, next_column + 3))
    other_boxes, others = draw_many(count=500)
    assert np.array_equal(boxes, other_boxes)
    assert all(torch.equal(a, b) for a, b in zip(p, others, strict=True))


def test_no_two_draws_share_a_column():
    columns = np.r_[tuple(augment.DRAWS.values())]
    assert sorted(columns) == list(range(len(columns)))


@pytest.mark.parametrize(
    "draws, digest",
    [
        ("boxes", "c6dc60f8a48d04ed"),
        ("parameters", "f9726d703101ae25"),
    ],
)
def test_draws_are_those_of_all_earlier_versions(draws, digest):
    """A changed draw would change every run, so this digest must not change. Draws that were added
    later are those after the seventh.
    """
    boxes, p = draw_many(view=1, count=1000, epoch=2)
    assert p._fields[:7] == ("jitter", "order", "factors", "gray", "sigma", "solarize", "flip")
    arrays = {"boxes": [boxes], "parameters": [field.numpy() for field in p[:7]]}[draws]
    bits = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    assert hashlib.sha256(bits).hexdigest()[:16] == digest


def test_which_operations_are_drawn_is_independent():
    _, p = draw_many(view=1)
    switches = np.stack([p.jitter, p.gray, p.flip, p.solarize, p.sigma > 0])
    assert np.abs(np.corrcoef(switches) - np.eye(5)).max() < 0.035


@pytest.mark.parametrize("view", [0, 1])
def test_without_blur_no_sigma_is_drawn_and_the_rest_stays(view):
    _, with_blur = draw_many(view=view, count=1000)
    no_blur = RECIPE._replace(views=moco_v3_views(size=16, crop_min=0.2, blur=False))
    _, without = draw_many(no_blur, view=view, count=1000)
    assert with_blur.sigma.any() and not without.sigma.any()
    others = with_blur._replace(sigma=without.sigma)
    assert all(torch.equal(one, other) for one, other in zip(others, without, strict=True))


def test_the_weak_view_has_crop_and_flip_only_and_leaves_the_other_views_as_they_are():
    flags = ["--local-views", "1", "--img-size", "64", "--patch-size", "16", "--seed", "3"]
    strong, weak = (
        augment.build_views(options.parse([*flags, "--key-view", kind]))
        for kind in ("strong", "weak")
    )
    assert weak[:-1] == strong and weak[-1][:3] == strong[0][:3]
    _, p = draw_many(Recipe(3, weak), view=3)
    assert not (p.jitter.any() or p.gray.any() or p.solarize.any() or p.sigma.any())
    assert abs(p.flip.double().mean() - 0.5) < 0.02


def test_strengths_cover_their_ranges_evenly():
    _, p = draw_many()
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), (0.1, 2.0)]
    for values, (low, high) in zip([*p.factors.unbind(1), p.sigma], ranges, strict=True):
        share = np.sort((values.numpy() - low) / (high - low))
        assert share[0] >= 0 and share[-1] <= 1
        assert np.abs(share - np.arange(1, MANY + 1) / MANY).max() < 1.95 / MANY**0.5


def test_all_orders_of_jitter_are_equally_likely():
    _, parameters = draw_many()
    orders, counts = np.unique(parameters.order.numpy(), axis=0, return_counts=True)
    assert sorted(map(tuple, orders)) == list(itertools.permutations(range(4)))
    np.testing.assert_allclose(counts / MANY, 1 / 24, atol=0.008)


@pytest.mark.parametrize("smallest, largest", [(0.05, 0.25), (0.3, 0.3)])
def test_areas_of_crops_lie_between_both_ends_of_the_range(smallest, largest):
    boxes, _ = draw_many(crops_from(smallest, largest), height=200, width=200)
    areas = boxes[:, 2] * boxes[:, 3] / 200**2
    assert areas.min() == pytest.approx(smallest, abs=0.01)
    assert areas.max() == pytest.approx(largest, abs=0.01)
    assert areas.mean() == pytest.approx((smallest + largest) / 2, abs=0.005)


# -- crop boxes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("crop_min", [0.08, 0.2, 0.7])
@pytest.mark.parametrize("height, width", [(96, 96), (60, 160), (110, 80)])
def test_crops_are_distributed_as_torchvisions(crop_min, height, width):
    torch.manual_seed(0)
    canvas = torch.empty(3, height, width)
    expected = np.array(
        [RandomResizedCrop.get_params(canvas, (crop_min, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)]
    )
    actual, _ = draw_many(crops_from(crop_min), count=3000, height=height, width=width)

    def summary(boxes):
        top, left, h, w = boxes.T
        area, aspect = h * w / (height * width), np.log(w / h)
        place = (top + h / 2) / height, (left + w / 2) / width
        values = [area, aspect, *place]
        return [value.mean() for value in values] + [value.std() for value in values]

    np.testing.assert_allclose(summary(actual), summary(expected), atol=0.02)


@pytest.mark.parametrize("crop_min", [1e-4, 0.2, 1.0])
def test_boxes_lie_inside_the_image(crop_min):
    sides = np.stack(np.meshgrid([1, 2, 3, 5, 17, 100, 3000], [1, 2, 3, 5, 17, 100, 3000])).reshape(
        2, -1
    )
    heights, widths = np.repeat(sides, 50, axis=1)
    boxes, _ = draw(crops_from(crop_min), 0, np.arange(len(heights)), 0, heights, widths)
    top, left, h, w = boxes.T
    assert boxes.dtype == np.int64
    assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= heights).all() and (left + w <= widths).all()


def test_crops_are_placed_evenly_up_to_all_borders_and_independently_in_both_axes():
    boxes, _ = draw_many(count=10_000, height=10, width=12)
    top, left, h, w = boxes.T
    for start, extent, side in ((top, h, 10), (left, w, 12)):
        places, counts = np.unique(start[extent == 8], return_counts=True)
        assert places.tolist() == list(range(side - 8 + 1))
        np.testing.assert_allclose(counts / counts.sum(), 1 / len(places), atol=0.04)
    assert abs(np.corrcoef((top + 0.5) / (11 - h), (left + 0.5) / (13 - w))[0, 1]) < 0.05


@pytest.mark.parametrize("crop_min", [0.2, 1.0])
@pytest.mark.parametrize("height, width", [(10, 1000), (1000, 10), (1, 300), (300, 1), (7, 101)])
def test_extreme_aspects_fall_back_to_torchvisions_central_cut(height, width, crop_min):
    expected = RandomResizedCrop.get_params(
        torch.empty(3, height, width), (crop_min, 1.0), (3 / 4, 4 / 3)
    )
    boxes, _ = draw_many(crops_from(crop_min), count=50, height=height, width=width)
    assert (boxes == np.array(expected)).all()


@pytest.mark.parametrize("height, width", [(32, 32), (30, 40), (40, 30), (40, 60), (1, 1)])
def test_crop_min_1_takes_all_that_the_aspect_allows(height, width):
    boxes, _ = draw_many(crops_from(1.0), count=200, height=height, width=width)
    aspect_limited = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    rounding = 1 if height * width > 1 else 0
    assert (np.abs(boxes[:, 2:] - aspect_limited) <= rounding).all()


# -- crop and resize ------------------------------------------------------------------------------

BOXES = {
    "whole": (0, 0, 37, 50),
    "down": (3, 5, 30, 41),
    "up": (20, 30, 7, 9),
    "up and down": (0, 10, 37, 4),
    "same size": (10, 11, 16, 16),
    "one pixel": (36, 49, 1, 1),
    "one row": (12, 0, 1, 50),
    "one column": (0, 0, 37, 1),
    "corner": (30, 42, 7, 8),
}


@pytest.mark.parametrize("size", [1, 16, 45, 64])
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_crop_and_resize_equals_torchvision_to_one_level(box, size):
    image = torch.randint(
        0, 256, (3, 37, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    actual = crop_and_resize(image[None], torch.tensor([box]), size)
    expected = F.resized_crop(image, *box, [size, size], InterpolationMode.BILINEAR, antialias=True)
    assert actual.shape == (1, 3, size, size) and actual.dtype == torch.uint8
    assert (actual[0].int() - expected.int()).abs().max() <= 1
    assert (actual[0] != expected).double().mean() < 0.01  # only rounding of halves


def test_each_image_gets_its_own_box():
    images = torch.randint(0, 256, (len(BOXES), 3, 37, 50), dtype=torch.uint8)
    boxes = torch.tensor(list(BOXES.values()))
    together = crop_and_resize(images, boxes, 16)
    for image, box, crop in zip(images, boxes, together, strict=True):
        assert torch.equal(crop_and_resize(image[None], box[None], 16)[0], crop)
    twice = crop_and_resize(images, torch.cat([boxes, boxes.flip(0)]), 16)
    assert torch.equal(twice, torch.cat([together, crop_and_resize(images, boxes.flip(0), 16)]))


def test_a_box_of_the_output_size_is_copied_exactly():
    image = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)
    assert torch.equal(
        crop_and_resize(image, torch.tensor([[4, 7, 24, 24]]), 24),
        image[:, :, 4:28, 7:31],
    )


# -- each operation against torchvision -----------------------------------------------------------

THEIRS = {
    "adjust_brightness_": F.adjust_brightness,
    "adjust_contrast_": F.adjust_contrast,
    "adjust_saturation_": F.adjust_saturation,
    "adjust_hue_": F.adjust_hue,
    "gaussian_blur_": lambda x, sigma: F.gaussian_blur(x, 2 * math.ceil(3 * sigma) + 1, sigma),
}
STRENGTHS = dict.fromkeys(THEIRS, (0.0, 0.6, 0.8, 1.0, 1.2, 1.4))
STRENGTHS |= {
    "adjust_hue_": (-1 / 3, -0.2, -0.1, -0.05, -0.001, 0.0, 0.03, 0.1, 0.25, 1 / 3),
    "gaussian_blur_": (0.1, 0.3, 0.7, 1.0, 1.5, 2.0),
}


def ours(name, x, strengths):
    """Our operation of that name, with the strength (B,) of each image."""
    if name == "gaussian_blur_":
        strengths = torch.from_numpy(operations.gaussian_taps(strengths.numpy())).to(x)
    return getattr(operations, name)(x.clone(), strengths.view(len(x), -1, 1, 1))


@pytest.mark.parametrize(
    "name, strength", [(name, strength) for name in THEIRS for strength in STRENGTHS[name]]
)
def test_operation_equals_torchvisions(name, strength):
    x = pictures(8)
    torch.testing.assert_close(
        ours(name, x, torch.full((8,), strength)), THEIRS[name](x, strength), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", THEIRS)
def test_each_image_of_a_batch_has_its_own_strength(name):
    x = pictures(8)
    strengths = (
        torch.linspace(-0.1, 0.1, 8) if name == "adjust_hue_" else torch.linspace(0.2, 1.9, 8)
    )
    expected = torch.stack(
        [THEIRS[name](image, strength.item()) for image, strength in zip(x, strengths, strict=True)]
    )
    torch.testing.assert_close(ours(name, x, strengths), expected, atol=1e-5, rtol=0)


def test_hue_of_every_kind_of_pixel_equals_torchvisions():
    levels = torch.tensor([0.0, 0.25, 0.5, 1.0])
    x = torch.cartesian_prod(levels, levels, levels).T.reshape(
        1, 3, 8, 8
    )  # greys, ties of two channels, pure colours
    for turns in (-1 / 3, -0.1, 0.0, 0.1, 1 / 3):
        torch.testing.assert_close(
            ours("adjust_hue_", x, torch.tensor([turns])), F.adjust_hue(x, turns), atol=1e-5, rtol=0
        )


def test_hue_leaves_grey_pixels_exactly_as_they_are():
    grey = torch.linspace(0, 1, 16).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    assert torch.equal(ours("adjust_hue_", grey, torch.tensor([0.1])), grey)


def test_grayscale_solarize_and_flip_equal_torchvisions():
    x = pictures(8)
    torch.testing.assert_close(operations.grayscale(x), F.rgb_to_grayscale(x, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        operations.solarize_(x.clone()), F.solarize(x, 128 / 255), atol=0, rtol=0
    )
    assert torch.equal(operations.flip(x), F.hflip(x))


def test_solarize_inverts_from_level_128_on():
    levels = torch.tensor([0, 127, 128, 255])
    x = (levels / 255).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert (operations.solarize_(x.clone())[0, 0].flatten() * 255).round().tolist() == [
        0,
        127,
        127,
        0,
    ]


@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_blur_of_a_picture_smaller_than_the_kernel_keeps_flat_areas_and_stays_in_range(size):
    flat, sigma = torch.full((1, 3, size, size), 0.3), torch.tensor([2.0])
    torch.testing.assert_close(ours("gaussian_blur_", flat, sigma), flat)
    blurred = ours("gaussian_blur_", torch.rand(1, 3, size, size), sigma)
    assert blurred.min() >= 0 and blurred.max() <= 1


@pytest.mark.parametrize("form", [operations._blur_by_products_, operations._blur_by_shifts_])
def test_both_ways_to_blur_equal_torchvisions_at_every_size(form):
    """One is used on GPUs, the other on CPUs for large images."""
    sigmas = torch.linspace(0.1, 2, 9)
    taps = torch.from_numpy(operations.gaussian_taps(sigmas.numpy())).float()
    for size in (7, 64, 65, 100):
        x = pictures(9, size)
        blur = THEIRS["gaussian_blur_"]
        expected = torch.stack(
            [blur(image, sigma.item()) for image, sigma in zip(x, sigmas, strict=True)]
        )
        torch.testing.assert_close(form(x.clone(), taps), expected, atol=1e-5, rtol=0)


# -- all operations on the device -----------------------------------------------------------------

# operations that change only how a tensor is seen, or only allocate memory
METADATA = {"view", "_unsafe_view", "expand", "transpose", "permute", "slice", "select", "alias"}
METADATA |= {"unsqueeze", "squeeze", "split", "split_with_sizes", "detach", "empty", "empty_like"}

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


def apply_one_by_one(crops, p):
    """Image after image, torchvision's operations in the drawn order."""
    jitters = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    views = []
    for i, crop in enumerate(crops):
        x = crop / 255
        if p.jitter[i]:
            for operation in p.order[i].tolist():
                x = jitters[operation](x, p.factors[i, operation].item())
        if p.gray[i]:
            x = F.rgb_to_grayscale(x, 3)
        if p.sigma[i] > 0:
            x = THEIRS["gaussian_blur_"](x, p.sigma[i].item())
        if p.solarize[i]:
            x = F.solarize(x, 128 / 255)
        if p.flip[i]:
            x = F.hflip(x)
        if p.flip_v[i]:
            x = F.vflip(x)
        x = F.rotate(x, 90 * p.quarters[i].item())
        views.append(F.normalize(x, MEAN.tolist(), STD.tolist()))
    return torch.stack(views)


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("size, count", [(16, 150), (33, 20), (8, 1)])
def test_apply_equals_torchvision_image_by_image(view, size, count):
    crops = pictures(max(count, 3), size, seed=view)[-count:].mul(255).round().to(torch.uint8)
    _, parameters = draw_many(view=view, count=count)
    before = crops.clone()
    views = operations.apply(crops, parameters, MEAN, STD)
    torch.testing.assert_close(views, apply_one_by_one(crops, parameters), atol=1e-5, rtol=0)
    assert torch.equal(crops, before)


@pytest.mark.parametrize("form", [operations._jitter_by_groups_, operations._jitter_by_blends_])
@pytest.mark.parametrize("count", [1, 2, 150])
def test_both_ways_to_jitter_equal_torchvisions_image_by_image(form, count):
    """One is used on CPUs, the other on accelerators."""
    recipe = RECIPE._replace(views=(EVERYTHING._replace(jitter=(0.8, 0.9, 1, 0.3)),))
    for start in range(8 if count < 3 else 1):
        _, drawn = draw_many(recipe, count=count, first=start)
        crops = pictures(count + 3)[3:].mul(255).round().to(torch.uint8)
        off = torch.zeros(count, dtype=torch.bool)
        only_jitter = dict(gray=off, sigma=off.double(), solarize=off, flip=off, flip_v=off)
        drawn = drawn._replace(**only_jitter, quarters=off.long())
        x = crops / 255
        form(
            x,
            ViewParameters(*(field.numpy() for field in drawn)),
            drawn.jitter.nonzero()[:, 0].numpy(),
        )
        expected = apply_one_by_one(crops, drawn) * STD.view(3, 1, 1) + MEAN.view(3, 1, 1)
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=0)


def test_an_accelerator_gets_few_calls_and_never_waits():
    """The jitter by groups of images, which a CPU uses, would make it 245."""
    calls = []

    class Counting(Accelerator):
        def call(self, function, args, kwargs):
            calls.append(function.overloadpacket.__name__)
            return super().call(function, args, kwargs)

    crops = pictures(64).mul(255).round().to(torch.uint8)
    _, parameters = draw_many(RECIPE, count=64, view=np.repeat([0, 1], 32))
    with Counting() as accelerator:
        on_device = crops.to(DEVICE, non_blocking=True)
        calls.clear()
        views = operations.apply(on_device, parameters, MEAN, STD)
    assert accelerator.waits == []
    count = sum(name not in METADATA for name in calls)
    assert 50 < count < 140, f"{count} kernels and copies"
    torch.testing.assert_close(
        views.local, apply_one_by_one(crops, parameters), atol=3e-5, rtol=0
    )  # after the division by std


@pytest.mark.parametrize("size", [16, 66])
def test_apply_with_flips_and_rotations_equals_torchvision_image_by_image(size):
    crops = pictures(40, size).mul(255).round().to(torch.uint8)
    recipe = RECIPE._replace(views=(EVERYTHING,))
    _, parameters = draw_many(recipe, count=40)
    cases = set(zip(parameters.flip_v.tolist(), parameters.quarters.tolist(), strict=True))
    assert len(cases) == 2 * 4
    views = operations.apply(crops, parameters, MEAN, STD)
    torch.testing.assert_close(views, apply_one_by_one(crops, parameters), atol=1e-5, rtol=0)


def view_of_picture(picture, box, p, i, size, throughout):
    """View i as MoCo v3 makes it of a PIL image: cropped by PIL; the rest in PIL's 8 bits
    throughout, or in torchvision's float. (3, S, S) in [0, 1].
    """
    x = F.resized_crop(picture, *box, [size, size], InterpolationMode.BILINEAR)
    x = x if throughout else F.to_tensor(x)
    jitters = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    if p.jitter[i]:
        for operation in p.order[i].tolist():
            x = jitters[operation](x, p.factors[i, operation].item())
    if p.gray[i]:
        x = F.rgb_to_grayscale(x, 3)
    if sigma := p.sigma[i].item():
        x = (
            x.filter(ImageFilter.GaussianBlur(sigma))
            if throughout
            else THEIRS["gaussian_blur_"](x, sigma)
        )
    if p.solarize[i]:
        x = F.solarize(x, 128 if throughout else 128 / 255)
    x = F.hflip(x) if p.flip[i] else x
    return F.to_tensor(x) if throughout else x


# PIL cuts off the fraction after each of up to seven steps, half a level each, and keeps hue in 8
# bits
@pytest.mark.parametrize("throughout, mean, most", [(False, 0.2, 1.0), (True, 1.5, 3.0)])
@pytest.mark.parametrize("view", [0, 1])
def test_whole_views_are_those_of_pil_and_torchvision(view, throughout, mean, most):
    """From the decoded picture on; mean distance of a view in grey levels."""
    count, size = 40, 80
    pixels = pictures(count, 150, seed=9).mul(255).round().to(torch.uint8)
    boxes, p = draw_many(view=view, count=count, height=150, width=150)
    crops = crop_and_resize(pixels, torch.from_numpy(boxes), size)
    actual = operations.apply(crops, p, torch.zeros(3), torch.ones(3))
    pictured = map(F.to_pil_image, pixels)
    expected = [
        view_of_picture(picture, boxes[i].tolist(), p, i, size, throughout)
        for i, picture in enumerate(pictured)
    ]
    apart = 255 * (actual - torch.stack(expected)).abs().mean(dim=(1, 2, 3))
    assert apart.mean() < mean and apart.max() < most


def test_with_nothing_drawn_apply_only_normalises():
    crops = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    off = torch.zeros(4, dtype=torch.bool)
    order, zeros = torch.arange(4).expand(4, 4), torch.zeros(4, 4)
    nothing = ViewParameters(off, order, zeros, off, zeros[0], off, off, off, zeros[0])
    expected = F.normalize(crops / 255, MEAN.tolist(), STD.tolist())
    torch.testing.assert_close(operations.apply(crops, nothing, MEAN, STD), expected)


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads, size", [(1, 32), (2, 32), (2, 192)], indirect=["threads"])
@pytest.mark.parametrize("part", [1, 3])
def test_a_view_is_the_same_bit_for_bit_in_any_batch(threads, size, part):
    """Otherwise pixels would depend on the number of ranks. Beyond 181 px torch shares the sum over
    one image among threads.
    """
    crops = pictures(6, size).mul(255).round().to(torch.uint8)
    _, parameters = draw_many(view=0, count=6)
    whole = operations.apply(crops, parameters, MEAN, STD)
    parts = []
    for start in range(0, 6, part):
        share = slice(start, start + part)
        parts.append(
            operations.apply(
                crops[share], ViewParameters(*(field[share] for field in parameters)), MEAN, STD
            )
        )
    identical = torch.equal(torch.cat(parts), whole)
    assert identical


@pytest.mark.parametrize("size", [32, 192])
def test_a_view_is_the_same_bit_for_bit_with_any_number_of_threads(size):
    images = pictures(8, size + 8).mul(255).round().to(torch.uint8)
    _, parameters = draw_many(view=0, count=8)
    boxes = torch.tensor([[0, 3, size + 8, size], [5, 0, size // 2, size]]).repeat(8, 1)
    before, actual = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        crops = crop_and_resize(images, boxes, size)[:8]
        actual.append(operations.apply(crops, parameters, MEAN, STD))
    torch.set_num_threads(before)
    assert all(torch.equal(actual[0], other) for other in actual[1:])


def test_a_large_batch_in_parts_is_the_same(monkeypatch):
    crops = pictures(7, 16).mul(255).round().to(torch.uint8)
    _, parameters = draw_many(view=1, count=7)
    whole = operations.apply(crops, parameters, MEAN, STD)
    monkeypatch.setattr(operations, "AT_ONCE", 2 * 3 * 16**2)
    parts = operations.apply(crops, parameters, MEAN, STD)
    assert torch.equal(parts, whole)
