"""The embedded data set."""

import functools

import numpy as np
import pytest

from snclr import choices
from snclr.datasets import embedded

draw_once = functools.cache(embedded.draw)


@pytest.mark.parametrize("split, count", [("train", 5000), ("val", 1000)])
def test_the_embedded_set_is_balanced_and_of_the_right_shape(split, count):
    images, labels = draw_once(split)
    assert images.shape == (count, 3, 32, 32) and images.dtype == np.uint8
    assert labels.shape == (count,) and labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [count // len(embedded.CLASSES)] * len(embedded.CLASSES)
    assert np.abs(np.diff(labels)).max() > 1  # not sorted


def test_the_embedded_set_is_the_same_at_every_draw():
    again_images, again_labels = embedded.draw("val")
    images, labels = draw_once("val")
    assert np.array_equal(images, again_images) and np.array_equal(labels, again_labels)


def test_no_validation_picture_of_the_embedded_set_is_a_training_picture():
    train, val = (
        {picture.tobytes() for picture in draw_once(split)[0]} for split in ("train", "val")
    )
    assert len(train) == 5000 and len(val) == 1000 and not train & val


def test_the_stated_moments_are_those_of_the_embedded_training_images():
    pixels = draw_once("train")[0].astype(np.float64) / 255
    np.testing.assert_allclose(
        pixels.mean(axis=(0, 2, 3)), choices.MEAN_STD["embedded"][0], atol=0.01
    )
    np.testing.assert_allclose(
        pixels.std(axis=(0, 2, 3)), choices.MEAN_STD["embedded"][1], atol=0.01
    )
