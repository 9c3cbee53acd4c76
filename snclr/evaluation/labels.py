"""Chooses the labelled images of an evaluation: all, a fraction of each class, or a published list;
and the held-out ones.
"""

import argparse
import os

import numpy as np
import torch
from torch import Tensor

from .. import augment
from ..datasets.images import ImageSet
from ..running.errors import UsageError, first_few
from ..running.safe_files import open_text


def select_labelled(
    train: ImageSet, val: ImageSet | None, args: argparse.Namespace
) -> tuple[ImageSet, ImageSet]:
    """The labelled images of both sets; of the training images only those that --label-list or
    --label-fraction selects.

    Raises UsageError if these images cannot train a classifier, or cannot evaluate it.
    """
    if train.labels is None or val is None:
        raise UsageError(
            "evaluation needs labelled training and validation images: "
            "DATA/train/<class>, DATA/val/<class>"
        )
    train, val = train.labelled(), val.labelled()
    if args.label_list is not None:
        train = train.select(_listed(train, args.label_list))
    elif args.label_fraction is not None:
        keys = _keys(args.subset_seed, len(train))
        selected = class_share(train.labels, train.classes, args.label_fraction, keys)
        train = train.select(np.flatnonzero(selected.numpy()))
    present = train.labels.unique()
    if len(present) < 2:
        raise UsageError(f"a classifier needs two classes, the training images have {len(present)}")
    missing = sorted({*val.labels.tolist()} - {*present.tolist()})
    if missing:
        names = first_few([str(train.classes[label]) for label in missing])
        raise UsageError(f"there are validation images of classes without training images: {names}")
    if not len(val):
        raise UsageError("there are no validation images with a label")
    return train, val


def hold_out(train: ImageSet, share: float, seed: int) -> Tensor:
    """(n,) bool: the images that are held out of training, `share` of each class and at least one.

    Raises UsageError if a class has only one image.
    """
    labels, counts = train.labels.unique(return_counts=True)
    rare = [str(train.classes[label]) for label in labels[counts < 2]]
    if rare:
        raise UsageError(
            "every class needs two training images, one to be held out; "
            f"only one has {first_few(rare)} (or --select val)"
        )
    keys = _keys(seed, len(train))
    return class_share(train.labels, train.classes, share, keys, both_sides=True)


def class_share(
    labels: Tensor, classes: list, share: float, keys: Tensor, both_sides: bool = False
) -> Tensor:
    """(n,) bool: the same share of the images of each class, those with the smallest keys.

    A smaller share is a subset of a larger one.

    labels      (n,) int64 indices into classes, the names
    keys        (n,) any numbers, one for each image
    both_sides  select at least one image of each class, and leave at least one

    Raises UsageError if no image of a class would be selected.
    """
    selected = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        count = round(share * len(members))
        if both_sides:
            count = min(max(count, 1), len(members) - 1)
        if not count:
            raise UsageError(
                f"a share of {share:g} leaves class {classes[label]} with its "
                f"{len(members)} images none: use a larger one"
            )
        selected[members[keys[members].argsort()[:count]]] = True
    return selected


def _keys(seed, count):
    """One random number for each image, from the seed and its index."""
    return torch.from_numpy(augment.keyed_uniforms(1, seed, np.arange(count))[:, 0])


def _listed(images, path):
    """Indices of the images whose file names are in a text file, one a line, as in SimCLR's list of
    1 % of ImageNet.
    """
    if images.names is None:
        raise UsageError(
            f"--label-list {path}: images of this --dataset have no file names; "
            "use --label-fraction"
        )
    with open_text(path) as file:
        wanted = {os.path.basename(line.strip()) for line in file if line.strip()}
    is_listed = np.isin(images.names, sorted(wanted))
    if absent := wanted - {*images.names[is_listed].tolist()}:
        raise UsageError(
            f"{len(absent)} names of {path} are no training images: {first_few(sorted(absent))}"
        )
    return np.flatnonzero(is_listed)
