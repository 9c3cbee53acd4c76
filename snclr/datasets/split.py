"""Chooses images by seed and class: a share of each class, or the images held out of training."""

import numpy as np
import torch
from torch import Tensor

from .. import augment
from ..running.errors import UsageError, first_few
from .images import ImageSet


def hold_out(train: ImageSet, share: float, seed: int) -> Tensor:
    """(n,) bool: the images that are held out of training, `share` of each class and at least one.

    Images without a label are never held out. Raises UsageError if a class has only one image.
    """
    labels, counts = train.labels[train.labels >= 0].unique(return_counts=True)
    rare = [str(train.classes[label]) for label in labels[counts < 2]]
    if rare:
        raise UsageError(
            "every class needs two training images, one to be held out; "
            f"only one has {first_few(rare)}"
        )
    return class_share(
        train.labels, train.classes, share, image_keys(seed, len(train)), both_sides=True
    )


def class_share(
    labels: Tensor, classes: list, share: float, keys: Tensor, both_sides: bool = False
) -> Tensor:
    """(n,) bool: the same share of the images of each class, those with the smallest keys.

    A smaller share is a subset of a larger one.

    labels      (n,) int64 indices into classes, the names; -1: no label, never selected
    keys        (n,) any numbers, one for each image
    both_sides  select at least one image of each class, and leave at least one

    Raises UsageError if no image of a class would be selected.
    """
    selected = torch.zeros(len(labels), dtype=torch.bool)
    order = keys.argsort()
    order = order[labels[order].argsort(stable=True)]
    order = order[labels[order] >= 0]
    classes_in_order, counts = labels[order].unique_consecutive(return_counts=True)
    for label, members in zip(classes_in_order, order.split(counts.tolist()), strict=True):
        count = round(share * len(members))
        if both_sides:
            count = min(max(count, 1), len(members) - 1)
        if not count:
            raise UsageError(
                f"a share of {share:g} leaves class {classes[label]} with its "
                f"{len(members)} images none: use a larger one"
            )
        selected[members[:count]] = True
    return selected


def image_keys(seed: int, count: int) -> Tensor:
    """(count,) float64 random numbers, one for each image, from the seed and its index."""
    return torch.from_numpy(augment.keyed_uniforms(1, seed, np.arange(count))[:, 0])
