"""Reads torchvision's data sets: --dataset cifar10 and so on."""

from argparse import Namespace

import numpy as np
import torchvision

from ..running.distributed import local_rank_zero_first
from ..running.errors import UsageError, first_line
from .folders import Paths

TEST, TRAIN_AND_VAL = [{"split": "test"}], [{"split": "train"}, {"split": "val"}]
# torchvision's class; its attributes with pixels (data) or paths, and with labels; the arguments of
# the parts that form the training set; those of the test set
TORCHVISION = {
    "cifar10": ("CIFAR10", "data", "targets", [{"train": True}], [{"train": False}]),
    "cifar100": ("CIFAR100", "data", "targets", [{"train": True}], [{"train": False}]),
    "stl10": ("STL10", "data", "labels", [{"split": "train+unlabeled"}], TEST),
    "svhn": ("SVHN", "data", "labels", [{"split": "train"}], TEST),
    "flowers102": ("Flowers102", "_image_files", "_labels", TRAIN_AND_VAL, TEST),
    "pets": ("OxfordIIITPet", "_images", "_labels", [{"split": "trainval"}], TEST),
    "food101": ("Food101", "_image_files", "_labels", [{"split": "train"}], TEST),
    "dtd": ("DTD", "_image_files", "_labels", TRAIN_AND_VAL, TEST),
    "aircraft": ("FGVCAircraft", "_image_files", "_labels", [{"split": "trainval"}], TEST),
}


def read_torchvision(
    args: Namespace, is_training: bool
) -> tuple[np.ndarray | Paths, np.ndarray, list]:
    """The training or test set of --dataset: images (n, 3, S, S) uint8 or their files, labels (n,)
    int64 and the names of the classes.

    Raises UsageError if the files are not in DATA.
    """
    name, images_in, labels_in, train_parts, test_parts = TORCHVISION[args.dataset]
    try:
        with local_rank_zero_first():  # it downloads the files that the other ranks read
            parts = [
                getattr(torchvision.datasets, name)(args.data, download=args.download, **part)
                for part in (train_parts if is_training else test_parts)
            ]
    except ImportError as error:
        raise UsageError(
            f"--dataset {args.dataset} needs scipy to read its labels: pip install scipy"
        ) from error
    except (RuntimeError, OSError) as error:
        if args.download:
            message = f"{name} cannot be downloaded to {args.data}: {first_line(error)}"
        else:
            message = (
                f"no complete {name} in {args.data}: put torchvision's files there, or add "
                "--download; for images in train/<class>/ add --dataset folder"
            )
        raise UsageError(message) from error
    labels = np.concatenate([getattr(part, labels_in) for part in parts]).astype(np.int64)
    classes = list(getattr(parts[0], "classes", range(labels.max() + 1)))
    if images_in != "data":
        paths = [str(path) for part in parts for path in getattr(part, images_in)]
        return Paths(paths), labels, classes
    images = parts[0].data  # there is one part
    if images.shape[-1] == 3:  # CIFAR's; STL-10 and SVHN have the channels first
        images = images.transpose(0, 3, 1, 2).copy()
    return images, labels, classes
