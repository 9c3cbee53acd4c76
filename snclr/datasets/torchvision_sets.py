"""Torchvision's data sets as image sets: --dataset cifar10 and so on."""

from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset

from ..choices import IMAGENET
from ..running.distributed import local_rank_zero_first
from ..running.errors import UsageError, first_line
from .decoding import to_rgb
from .images import EncodedImages, ImageSet, ResidentImages
from .reading import file_states, unreadable

# torchvision's class; the arguments of the parts that form the training set; those of the test set
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


class TorchvisionImages(EncodedImages):
    """Images of torchvision data sets that keep them in files, decoded by torchvision."""

    per_image = ("labels", "numbers")

    def __init__(
        self, dataset: ConcatDataset, labels: np.ndarray, classes: list[str], mean_std: tuple
    ):
        super().__init__(labels, classes, mean_std)
        self.dataset, self.numbers = dataset, np.arange(len(dataset))

    def __len__(self) -> int:
        return len(self.numbers)

    def file_states(self) -> object:
        paths = [path for dataset in self.dataset.datasets for path in _image_paths(dataset)]
        return file_states(paths[number] for number in self.numbers)

    def image(self, index: int) -> Tensor:
        number = int(self.numbers[index])
        try:
            return to_rgb(self.dataset[number][0])
        except (OSError, SyntaxError, ValueError) as error:
            name = f"{number} of {type(self.dataset.datasets[0]).__name__}"
            raise unreadable(name, error) from error


def open_torchvision(args: Namespace) -> tuple[ImageSet, ImageSet | None]:
    """Training and test set of --dataset; with --val-fraction no test set is read.

    Raises UsageError if the files are not in DATA.
    """
    Image.init()
    if "EPS" in Image.ID:  # torchvision tries all formats, and for this one PIL runs Ghostscript
        Image.ID.remove("EPS")
    name, train_parts, test_part = TORCHVISION[args.dataset]
    train = _open_parts(name, train_parts, args)
    return train, None if args.val_fraction else _open_parts(name, [test_part], args)


def _open_parts(name, parts, args) -> ImageSet:
    dataset_class = getattr(torchvision.datasets, name)
    try:
        with local_rank_zero_first():  # it downloads the files that the other ranks read
            datasets = [dataset_class(args.data, download=args.download, **part) for part in parts]
    except ImportError as error:
        raise UsageError(
            f"--dataset {args.dataset} needs scipy to read its labels: pip install scipy"
        ) from error
    except (RuntimeError, OSError) as error:
        if args.download:
            message = f"{name} cannot be downloaded to {args.data}: {first_line(error)}"
        else:
            message = (
                f"no complete {name} in {args.data}: put torchvision's files there, "
                "or add --download"
            )
        raise UsageError(message) from error
    labels = np.concatenate([_labels(dataset) for dataset in datasets]).astype(np.int64)
    classes = list(getattr(datasets[0], "classes", range(labels.max() + 1)))
    if not hasattr(datasets[0], "data"):
        return TorchvisionImages(ConcatDataset(datasets), labels, classes, IMAGENET)
    images = datasets[0].data
    if len(datasets) > 1:
        images = np.concatenate([dataset.data for dataset in datasets])
    if images.shape[-1] == 3:  # CIFAR's; STL-10 and SVHN have the channels first
        images = images.transpose(0, 3, 1, 2).copy()
    return ResidentImages(images, labels, classes, IMAGENET)


def _image_paths(dataset) -> Sequence[str]:
    for name in ("_image_files", "_images"):  # torchvision has no common name here either
        if hasattr(dataset, name):
            return getattr(dataset, name)
    raise AttributeError(f"{type(dataset).__name__} does not say where its images are")


def _labels(dataset) -> Sequence[int]:
    for name in ("targets", "labels", "_labels"):  # torchvision has no common name
        if hasattr(dataset, name):
            return getattr(dataset, name)
    return [label for _, label in dataset]  # slow: decodes every image
