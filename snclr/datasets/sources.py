"""Where images come from: each --dataset, opened as a training and a validation set, with labels where there are any."""

import os
from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import ConcatDataset

from .. import augment
from ..options import IMAGENET
from ..running.distributed import local_rank_zero_first
from ..running.errors import RunError, UsageError
from . import embedded, shards
from .decoding import to_rgb, unreadable
from .images import EncodedImages, ImageFiles, ImageSet, ResidentImages

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".tif", ".tiff")

# torchvision's class; the arguments of its parts that make the training set, and of the test set
TORCHVISION = {
    "cifar10": ("CIFAR10", [{"train": True}], {"train": False}),
    "cifar100": ("CIFAR100", [{"train": True}], {"train": False}),
    "stl10": ("STL10", [{"split": "train+unlabeled"}], {"split": "test"}),
    "svhn": ("SVHN", [{"split": "train"}], {"split": "test"}),
    "flowers102": ("Flowers102", [{"split": "train"}, {"split": "val"}], {"split": "test"}),
    "pets": ("OxfordIIITPet", [{"split": "trainval"}], {"split": "test"}),
    "food101": ("Food101", [{"split": "train"}], {"split": "test"}),
    "dtd": ("DTD", [{"split": "train"}, {"split": "val"}], {"split": "test"}),
    "aircraft": ("FGVCAircraft", [{"split": "trainval"}], {"split": "test"}),
}


def open_data(args: Namespace) -> tuple[ImageSet, ImageSet | None, list[str]]:
    """Training set, validation set (None where there is none), and what a user should know about them.

    args: the data flags (snclr/options.py). Raises UsageError where nothing readable is there.
    """
    notes = []
    if args.dataset == "embedded":
        train, val = (
            ResidentImages(*embedded.draw(split), list(embedded.CLASSES), IMAGENET)
            for split in ("train", "val")
        )
    elif args.dataset in TORCHVISION:
        name, train_parts, test_part = TORCHVISION[args.dataset]
        train, val = (
            _open_torchvision(name, train_parts, args),
            _open_torchvision(name, [test_part], args),
        )
    else:
        train, val, notes = _open_files(args)
    if args.labels == "none":
        train.labels, val = None, None
    if args.subset is not None:
        train = train.select(_subset(len(train), args.subset, args.subset_seed))
    for images in filter(None, (train, val)):
        images.skip_bad = args.on_bad_image == "skip"
        images.mean, images.std = torch.tensor(args.mean), torch.tensor(args.std)
    return train, val, notes


def _subset(total: int, amount: float, seed: int) -> np.ndarray:
    """Sorted indices of `amount` images (a share, if below 1), keyed by seed: a smaller subset is part of a larger one."""
    count = int(amount) if amount >= 1 else max(1, round(amount * total))
    if count > total:
        raise UsageError(f"--subset {count} exceeds the {total} training images")
    return np.sort(np.argsort(augment.keyed_bits(seed, np.arange(total)), kind="stable")[:count])


# -- torchvision's sets --------------------------------------------------------------------------------------------------


class TorchvisionImages(EncodedImages):
    """Images of torchvision data sets that keep them in files: item by item, as torchvision decodes them."""

    per_image = ("labels", "numbers")

    def __init__(
        self, dataset: ConcatDataset, labels: np.ndarray, classes: list[str], mean_std: tuple
    ):
        super().__init__(labels, classes, mean_std)
        self.dataset, self.numbers = dataset, np.arange(len(dataset))

    def __len__(self) -> int:
        return len(self.numbers)

    def image(self, index: int) -> Tensor:
        try:
            return to_rgb(self.dataset[int(self.numbers[index])][0])
        except (OSError, SyntaxError, ValueError) as error:
            raise unreadable(
                f"{self.numbers[index]} of {type(self.dataset.datasets[0]).__name__}", error
            ) from error


def _open_torchvision(name, parts, args) -> ImageSet:
    kind = getattr(torchvision.datasets, name)
    try:
        with local_rank_zero_first():  # it downloads what the others of this machine then find
            datasets = [kind(args.data, download=args.download, **part) for part in parts]
    except ImportError as error:
        raise UsageError(
            f"--dataset {args.dataset} needs scipy to read its labels: pip install scipy"
        ) from error
    except (RuntimeError, OSError) as error:
        if args.download:
            raise UsageError(
                f"{name} cannot be downloaded to {args.data}: {str(error).splitlines()[0]}"
            ) from error
        raise UsageError(
            f"no whole {name} in {args.data}: put torchvision's files there, or add --download"
        ) from error
    labels = np.concatenate([_labels(dataset) for dataset in datasets]).astype(np.int64)
    classes = list(getattr(datasets[0], "classes", range(labels.max() + 1)))
    if hasattr(datasets[0], "data"):
        images = (
            np.concatenate([dataset.data for dataset in datasets])
            if len(datasets) > 1
            else datasets[0].data
        )
        if images.shape[-1] == 3:  # CIFAR's; STL-10 and SVHN have the channels first
            images = images.transpose(0, 3, 1, 2).copy()
        return ResidentImages(images, labels, classes, IMAGENET)
    return TorchvisionImages(ConcatDataset(datasets), labels, classes, IMAGENET)


def _labels(dataset) -> Sequence[int]:
    for name in (
        "targets",
        "labels",
        "_labels",
    ):  # torchvision has no common name; _labels where it has no public one
        if hasattr(dataset, name):
            return getattr(dataset, name)
    return [label for _, label in dataset]  # decodes every image, but is right


# -- files, lists and shards ---------------------------------------------------------------------------------------------


def _open_files(args) -> tuple[ImageSet, ImageSet | None, list[str]]:
    """Sets of one's own. Their classes have names, which are numbered here, the same for training and validation."""
    train_path, val_path = args.data, args.val
    if os.path.isdir(os.path.join(args.data, "train")):
        train_path, beside = (os.path.join(args.data, split) for split in ("train", "val"))
        val_path = val_path or (beside if os.path.isdir(beside) else None)
    elif args.dataset == "folder":
        where = args.data
        raise UsageError(
            f"{where} has no folder train/; expected {where}/train/<class>/<image> and {where}/val/<class>/<image>"
        )
    train, names, notes = _open_part(train_path, args.labels, args)
    if names is None:
        return train, None, [*notes, "the images have no labels: no kNN, no neighbour purity"]
    train.classes = sorted(
        {*names} - {None}, key=lambda name: (int(name), "") if name.isdecimal() else (-1, name)
    )
    train.labels = _numbers(names, train.classes)
    val, val_names, more = (
        _open_part(val_path, args.val_labels, args) if val_path else (None, None, [])
    )
    notes += more
    if val_names is None:
        return train, None, [*notes, "there are no validation images with labels: no kNN"]
    odd = sorted(({*val_names} ^ {*names}) - {None})
    if odd:
        told = ", ".join(odd[:5]) + (" ..." if len(odd) > 5 else "")
        raise UsageError(
            f"training and validation images must hold the same classes; only one of them has {told}"
        )
    val.classes, val.labels = train.classes, _numbers(val_names, train.classes)
    return train, val, notes


def _numbers(names, classes):
    numbers = {name: number for number, name in enumerate(classes)} | {None: -1}
    return torch.tensor([numbers[name] for name in names])


def _open_part(path, labels, args) -> tuple[ImageSet, list[str | None] | None, list[str]]:
    """Images at path, the class name of each (None: it has none; None for all: nobody has), and notes."""
    names, ignored = None, 0
    if args.dataset == "list":
        images = ImageFiles(_read_list(path), None, [], IMAGENET)
    elif args.dataset == "shards":
        with (
            local_rank_zero_first()
        ):  # it writes the index that the others of this machine then find
            index = shards.open_index(path, EXTENSIONS, fallback=args.workdir)
        images, ignored = shards.ShardImages(index, None, [], IMAGENET), int(index.ignored)
        if len(index.classes):
            names = [*index.classes.tolist(), None]
            names = [names[label] for label in index.label]
    else:
        paths, ignored = _images_below(path)
        if args.dataset == "folder":
            paths = [file for file in paths if os.path.dirname(file) != path]
            names = [os.path.relpath(file, path).split(os.sep)[0] for file in paths]
        if not paths:
            form = (
                f"{path}/<class>/<image>"
                if args.dataset == "folder"
                else "image files in it or its subfolders"
            )
            raise UsageError(
                f"no image in {path}; expected {form} with one of {' '.join(EXTENSIONS)}"
            )
        images = ImageFiles(paths, None, [], IMAGENET)
    if labels not in (None, "none"):
        names = _read_labels(labels, path, len(images))
    images.skip_bad = args.on_bad_image == "skip"
    try:
        images = images.resident()
    except RunError as error:
        advice = ", or say --on-bad-image skip" if args.on_bad_image == "fail" else ""
        raise UsageError(f"{error}{advice}") from error
    notes = [f"{ignored} files in {path} are no images and were left out"] if ignored else []
    if isinstance(images, ResidentImages) and images.errors is not None:
        bad = list(filter(None, images.errors))
        notes += [
            f"{len(bad)} images in {path} are replaced in training and grey in evaluation; the first: {bad[0]}"
        ]
    return images, None if labels == "none" else names, notes


def _images_below(root):
    """Paths of all images in a tree, sorted folder by folder, and the number of other files; hidden files count as neither. A
    folder that links lead to again, perhaps in a circle, counts once."""
    paths, others, seen = [], 0, set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_unreadable_folder):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files = sorted(name for name in files if not name.startswith("."))
        images = [os.path.join(folder, name) for name in files if name.lower().endswith(EXTENSIONS)]
        paths += images
        others += len(files) - len(images)
    return paths, others


def _unreadable_folder(error):
    raise UsageError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def _read_list(path):
    """Paths of a text file, one a line; relative ones start at the file's folder."""
    folder = os.path.dirname(path)
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        paths = [os.path.join(folder, line.rstrip("\n")) for line in file if line.strip()]
    if not paths:
        raise UsageError(f"{path} lists no image: one path a line is expected")
    for number in range(
        0, len(paths), -(-len(paths) // 100)
    ):  # not all: a million looks at a network disk take minutes
        if not os.path.isfile(paths[number]):
            raise UsageError(
                f"{path} names {paths[number]}, which does not exist; relative paths start at the list's folder"
            )
    return paths


def _read_labels(path, source, count):
    """Class names of a text file, one a line in the order of the images; an empty line or -1 is no label."""
    with open(path, encoding="utf-8", errors="replace") as file:
        names = [name if name not in ("", "-1") else None for name in map(str.strip, file)]
    if len(names) != count:
        raise UsageError(
            f"{path} has {len(names)} labels for the {count} images of {source}: one a line is needed, in order"
        )
    return names
