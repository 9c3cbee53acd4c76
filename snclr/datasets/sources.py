"""Opens --dataset as a training and a validation set, with labels if there are any."""

from argparse import Namespace

import numpy as np
import torch

from .. import augment
from ..choices import IMAGENET
from ..running.errors import UsageError
from . import embedded
from .files import FileImages, open_files
from .folders import Paths
from .images import ImageSet, ResidentImages
from .split import hold_out
from .torchvision_sets import TORCHVISION, read_torchvision


def open_data(args: Namespace) -> tuple[ImageSet, ImageSet | None, list[str]]:
    """Training set, validation set (None if there is none), and notes for the user.

    With --val-fraction the validation set is a part of the training images, whatever --subset is.

    args: the data flags (snclr/options.py). Raises UsageError if there are no readable images.
    """
    notes = []
    if args.channels != 3 and args.dataset in ("embedded", *TORCHVISION):
        raise UsageError(f"--dataset {args.dataset} has RGB images, not --channels {args.channels}")
    if args.dataset == "embedded":
        train, val = (
            ResidentImages(*embedded.draw(split), list(embedded.CLASSES), IMAGENET)
            for split in ("train", "val")
        )
    elif args.dataset in TORCHVISION:
        train = _open_torchvision(args, is_training=True)
        val = None if args.val_fraction else _open_torchvision(args, is_training=False)
    else:
        train, val, notes = open_files(args)
    for images in filter(None, (train, val)):
        if images.paths is None:  # a subset keeps the numbers of its images
            images.paths = np.arange(len(images)).astype(str)
    if args.labels == "none":
        train.labels, val = None, None
    if args.val_fraction:
        if train.labels is None:
            raise UsageError("--val-fraction needs training images with labels, found none")
        is_held = hold_out(train, args.val_fraction, args.val_seed).numpy()
        train, val = (train.select(np.flatnonzero(part)) for part in (~is_held, is_held))
    if args.subset is not None:
        train = train.select(_subset(len(train), args.subset, args.subset_seed))
    for images in filter(None, (train, val)):
        images.skip_bad = args.on_bad_image == "skip"
        images.mean, images.std = torch.tensor(args.mean), torch.tensor(args.std)
    return train, val, notes


def _open_torchvision(args, is_training) -> ImageSet:
    images, labels, classes = read_torchvision(args, is_training)
    kind = FileImages if isinstance(images, Paths) else ResidentImages
    return kind(images, labels, classes, IMAGENET)


def _subset(total: int, amount: float, seed: int) -> np.ndarray:
    """Sorted indices of `amount` images (below 1: a share of all), chosen by seed.

    With the same seed, a smaller subset is part of a larger one.
    """
    count = int(amount) if amount >= 1 else max(1, round(amount * total))
    if count > total:
        raise UsageError(f"--subset {count} exceeds the {total} training images")
    return np.sort(np.argsort(augment.keyed_bits(seed, np.arange(total)), kind="stable")[:count])
