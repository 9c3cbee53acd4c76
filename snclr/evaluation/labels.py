"""Chooses the labelled images of an evaluation: all, a fraction of each class, or a list."""

import argparse
import os

import numpy as np

from ..datasets.images import ImageSet
from ..datasets.split import class_share, image_keys
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
        keys = image_keys(args.subset_seed, len(train))
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
