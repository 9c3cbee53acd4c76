"""The user's own images: --dataset folder, tree, list, shards and hf.

Classes are read by name, and numbered in the same way for training and validation.
"""

import os
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..choices import IMAGENET
from ..running.distributed import local_rank_zero_first
from ..running.errors import RunError, UsageError, first_few
from ..running.safe_files import open_text
from . import hugging_face, shards
from .decoding import decode
from .folders import EXTENSIONS, Paths, extensions, read_list
from .high_bit_depth import RANGE_ADVICE, little_used_range
from .images import EncodedImages, ImageSet, ResidentImages
from .trees import files_below


class FileImages(EncodedImages):
    """Images in files, or in parts of files.

    files       reads them: files.read(number) returns the name of an image, for messages, and its
                bytes (n,) uint8, or raises RunError. It has num_images, their paths, and names or
                sizes in bytes (size), an array each; and states(numbers), see
                EncodedImages.file_states
    numbers     (n,) of the images in `files`
    grey_range  see decoding.decode
    """

    per_image = ("labels", "numbers")

    def __init__(
        self,
        files: Paths | shards.Index | hugging_face.Table,
        labels: np.ndarray | None = None,
        classes: Sequence[str] = (),
        mean_std: tuple = IMAGENET,
    ):
        super().__init__(labels, list(classes), mean_std)
        self.files, self.numbers = files, np.arange(files.num_images)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def names(self) -> np.ndarray | None:
        return None if self.files.names is None else self.files.names[self.numbers]

    @property
    def size(self) -> np.ndarray:
        return self.files.size[self.numbers]

    @property
    def paths(self) -> np.ndarray:
        return self.files.paths[self.numbers]

    def file_states(self) -> object:
        return self.files.states(self.numbers)

    def encoded(self, index: int) -> tuple[str, np.ndarray]:
        """The name of an image, for messages, and its bytes (n,) uint8. Raises RunError."""
        return self.files.read(int(self.numbers[index]))

    def image(self, index: int) -> Tensor:
        name, encoded = self.encoded(index)
        return decode(encoded, name, self.grey_range, self.channels)


def open_files(args: Namespace) -> tuple[ImageSet, ImageSet | None, list[str]]:
    """Training set, validation set (None without labelled validation images), and notes.

    Raises UsageError if the data do not have the layout of --dataset, or an image cannot be read.
    """
    train_path, val_path = args.data, args.val
    if os.path.isdir(os.path.join(args.data, "train")):
        train_path, val_folder = (os.path.join(args.data, split) for split in ("train", "val"))
        val_path = val_path or (val_folder if os.path.isdir(val_folder) else None)
    elif args.dataset == "folder":
        raise UsageError(
            f"{args.data} has no folder train/; expected {args.data}/train/<class>/<image> "
            f"and {args.data}/val/<class>/<image>"
        )
    elif args.dataset == "hf":
        val_path = args.data if hugging_face.validation_split(args.data) else None
    elif args.dataset == "shards" and val_path is None:
        val_path = args.data if 1 in _index(args.data, args).split else None  # 1: val
    check_range = args.grey_range is None
    train, names, notes = _open_part(train_path, args.labels, args, "train", check_range)
    if names is None:
        return (
            train,
            None,
            [*notes, "the images have no labels, which kNN and neighbour purity need"],
        )
    # by name, then numbers by value
    train.classes = sorted(
        {*names} - {None}, key=lambda name: (int(name) if name.isdecimal() else -1, name)
    )
    train.labels = _numbers(names, train.classes)
    if args.val_fraction:
        return train, None, notes  # sources.open_data takes them out of the training images
    check_range &= RANGE_ADVICE not in " ".join(notes)  # advice once is enough
    val, val_names, val_notes = (
        _open_part(val_path, args.val_labels, args, "val", check_range)
        if val_path
        else (None, None, [])
    )
    notes += val_notes
    if val_names is None:
        return train, None, [*notes, "there are no validation images with labels: no kNN"]
    only_one = sorted(({*val_names} ^ {*names}) - {None})
    if only_one:
        raise UsageError(
            "training and validation images must have the same classes; "
            f"only one of the two has {first_few(only_one, 5)}"
        )
    val.classes, val.labels = train.classes, _numbers(val_names, train.classes)
    return train, val, notes


def _numbers(names, classes):
    numbers = {name: number for number, name in enumerate(classes)} | {None: -1}
    return torch.tensor([numbers[name] for name in names])


def _open_part(
    path, labels, args, split, check_range
) -> tuple[ImageSet, list[str | None] | None, list[str]]:
    """Images at path, only those of a split if path has several; the class name of each (None for
    an image without a class), or None if no image has one; notes.
    """
    names, ignored, kinds, notes = None, 0, Counter(), []
    if args.dataset == "list":
        files = Paths(read_list(path))
    elif args.dataset == "hf":
        files, names, notes = hugging_face.open_split(path, split)
    elif args.dataset == "shards":
        whole = _index(path, args)
        if (index := shards.of_split(whole, split)) is not whole:
            notes.append(
                f"{path} has {len(whole.size)} images; those for {split}, {len(index.size)}, are "
                "recognised by the names of its files or folders"
            )
        files, ignored = index, int(index.ignored)
        classes = [*index.classes.tolist(), None]  # label -1 takes the last one
        names = [classes[label] for label in index.label]
    else:
        paths, kinds = files_below(path, extensions(args.channels))
        ignored = kinds.total()
        expected = "image files in it or its subfolders"
        if args.dataset == "folder":
            start = len(os.path.join(path, ""))
            in_folders = [file for file in paths if os.sep in file[start:]]
            if stray := len(paths) - len(in_folders):
                notes.append(f"{stray} images in {path} are in no class folder and are ignored")
            paths = in_folders
            names = [file[start:].split(os.sep)[0] for file in paths]
            expected = f"{path}/<class>/<image>"
        if not paths:
            raise UsageError(
                f"no image in {path}; expected {expected} with one of "
                f"{' '.join(EXTENSIONS)}, or .npy with --channels"
            )
        files = Paths(paths)
    images = FileImages(files)
    if labels not in (None, "none"):
        names = _read_labels(labels, path, len(images))
    images.skip_bad, images.grey_range = args.on_bad_image == "skip", args.grey_range
    images.channels = args.channels
    if ignored:
        others = "links, or not images" if args.dataset == "shards" else "not images"
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6))
        notes.append(
            f"{ignored} files in {path} are ignored: {others} of a known format"
            + f" ({counts})" * bool(counts)
        )
    if check_range and (note := little_used_range(images.encoded, len(images))):
        notes.append(f"{path}: {note}")
    try:
        images = images.resident(args.workers)
    except RunError as error:
        raise UsageError(str(error)) from error
    if isinstance(images, ResidentImages) and images.errors is not None:
        bad = list(filter(None, images.errors))
        notes.append(
            f"{len(bad)} images in {path} are replaced, by other images in training and by grey in "
            f"evaluation; the first: {bad[0]}"
        )
    return images, names if labels != "none" and any(names or ()) else None, notes


def _index(path, args) -> shards.Index:
    with local_rank_zero_first():  # it writes the index that the other ranks read
        return shards.open_index(path, extensions(args.channels), fallback=args.workdir)


def _read_labels(path, source, count):
    """Class names in a text file, one per line in the order of the images; None for '' and -1."""
    with open_text(path) as file:
        names = [name if name not in ("", "-1") else None for name in map(str.strip, file)]
    if len(names) != count:
        raise UsageError(
            f"{path} has {len(names)} labels for the {count} images of {source}: "
            "it needs one per line, in their order"
        )
    return names
