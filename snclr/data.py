"""Data sets and loaders: from an image's stable number to batches of two augmented views on the training device.

A data set is either held decoded in memory (ResidentImages: cropped on the device) or read from files (ImageFiles: decoded
and cropped by worker processes). Both answer `views` and `whole` for arrays of indices, so the loaders know no difference.
"""

import os
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, Sampler

from . import augment, embedded
from .augment import Recipe, ViewParameters
from .distributed import rank, world_size
from .errors import RunError, UsageError

try:  # torchvision 0.29 announces that its decoders will go; PIL takes half as long again
    from torchvision.io import ImageReadMode, decode_image, read_file
except ImportError:
    decode_image = None
warnings.filterwarnings("ignore", message=".*capabilities of TorchVision are deprecated", category=DeprecationWarning)

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".tif", ".tiff")
EVALUATION_BATCH = 256  # images a rank
RESIDENT_LIMIT = 2**30  # bytes of decoded pixels up to which a folder of equal-sized images is held in memory


class Views(NamedTuple):
    """Two views of B images before the device's half of the augmentation: ids (B,), crops (2B, 3, S, S) uint8, view 1 first."""

    ids: Tensor
    crops: Tensor
    parameters: ViewParameters


class ImageSet:
    """n images with a stable number each. labels (n,) int64 or None; classes: their names; mean, std of the channels."""

    def __init__(self, labels: np.ndarray | None, classes: list[str], mean_std: tuple):
        self.labels = None if labels is None else torch.as_tensor(labels)
        self.classes = classes
        self.mean, self.std = map(torch.tensor, mean_std)

    def __len__(self) -> int:
        raise NotImplementedError

    def to(self, device: torch.device) -> "ImageSet":
        """Bring what is held in memory to the device that trains."""
        return self

    def views(self, recipe: Recipe, epoch: int, indices: np.ndarray) -> Views:
        """Crops and parameters of both views of images `indices` (B,), keyed by (recipe.seed, epoch, index, view)."""
        raise NotImplementedError

    def whole(self, indices: np.ndarray, size: int) -> Tensor:
        """Images for evaluation, (B, 3, size, size) uint8: as they are if they have that size, else the central 7/8 of the
        shorter side, resized (the field's 'resize 256, centre crop 224')."""
        raise NotImplementedError


class ResidentImages(ImageSet):
    """Images (n, 3, H, W) uint8 in memory."""

    def __init__(self, images: np.ndarray | Tensor, labels: np.ndarray | None, classes: list[str], mean_std: tuple):
        super().__init__(labels, classes, mean_std)
        self.images = torch.as_tensor(images)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "ResidentImages":
        self.images = self.images.to(device)
        return self

    def views(self, recipe: Recipe, epoch: int, indices: np.ndarray) -> Views:
        images = self.images[torch.from_numpy(indices).to(self.images.device)]
        heights, widths = (np.full(len(indices), side) for side in images.shape[2:])
        boxes, parameters = _draw_both(recipe, epoch, indices, heights, widths)
        crops = augment.crop_and_resize(images.repeat(2, 1, 1, 1), torch.from_numpy(boxes), recipe.size)
        return Views(torch.from_numpy(indices), crops, parameters)

    def whole(self, indices: np.ndarray, size: int) -> Tensor:
        images = self.images[torch.from_numpy(indices).to(self.images.device)]
        box = torch.tensor(_evaluation_box(*images.shape[2:], size))
        return images if images.shape[2:] == (size, size) else augment.crop_and_resize(images, box.expand(len(images), 4), size)


class ImageFiles(ImageSet):
    """Images in files, decoded whenever they are needed."""

    def __init__(self, paths: list[str], labels: np.ndarray | None, classes: list[str], mean_std: tuple):
        super().__init__(labels, classes, mean_std)
        self.paths = np.array(paths)  # one block of memory: a list would be copied page by page into every worker

    def __len__(self) -> int:
        return len(self.paths)

    def views(self, recipe: Recipe, epoch: int, indices: np.ndarray) -> Views:
        images = [decode(self.paths[index]) for index in indices]
        heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (1, 2))
        boxes, parameters = _draw_both(recipe, epoch, indices, heights, widths)
        crops = torch.cat([_cut(image, box, recipe.size) for image, box in zip(images * 2, boxes, strict=True)])
        return Views(torch.from_numpy(indices), crops, parameters)

    def whole(self, indices: np.ndarray, size: int) -> Tensor:
        images = [decode(self.paths[index]) for index in indices]
        none = torch.empty(0, 3, size, size, dtype=torch.uint8)
        return torch.cat([none, *(_cut(image, _evaluation_box(*image.shape[1:], size), size) for image in images)])

    def resident(self) -> ImageSet:
        """The same set held in memory, if all images are of one size and fit into RESIDENT_LIMIT; else this one."""
        first = decode(self.paths[0])
        if first.numel() * len(self) > RESIDENT_LIMIT:
            return self
        images = torch.empty(len(self), *first.shape, dtype=torch.uint8)
        for index, path in enumerate(self.paths):
            image = decode(path)
            if image.shape != first.shape:
                return self
            images[index] = image
        return ResidentImages(images, self.labels, self.classes, (self.mean.tolist(), self.std.tolist()))


def decode(path: str) -> Tensor:
    """An image file as (3, H, W) uint8, upright: grey, palette, CMYK and alpha become RGB, EXIF orientation is applied."""
    path = str(path)
    try:
        with open(path, "rb") as file:
            is_jpeg = file.read(3) == b"\xff\xd8\xff"
        if is_jpeg and decode_image:  # only these: torchvision's PNG decoder crashes on damaged files
            return decode_image(read_file(path), ImageReadMode.RGB, apply_exif_orientation=True)
    except (OSError, RuntimeError):
        pass  # PIL reads it, or names the reason
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I"):  # 16 bits of grey, which PIL's convert would clip at 255
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RunError(f"cannot read image {path}: {error}; remove or replace the file") from error


def _draw_both(recipe, epoch, indices, heights, widths):
    boxes, parameters = zip(*(augment.draw(recipe, epoch, indices, view, heights, widths) for view in (0, 1)), strict=True)
    return np.concatenate(boxes), ViewParameters(*map(torch.cat, zip(*parameters, strict=True)))


def _cut(image, box, size):
    """Crop box of a (3, H, W) uint8 image, resized with antialias: (1, 3, size, size) uint8."""
    top, left, height, width = (int(side) for side in box)
    crop = image[None, :, top : top + height, left : left + width]
    if height == width == size:
        return crop.contiguous()
    return interpolate(crop, (size, size), mode="bilinear", antialias=True).contiguous()


def _evaluation_box(height, width, size):
    if height == width == size:
        return 0, 0, size, size
    side = round(min(height, width) * 7 / 8)
    return (height - side) // 2, (width - side) // 2, side, side


# -- opening -------------------------------------------------------------------------------------------------------------


def open_data(dataset: str, root: str | None) -> tuple[ImageSet, ImageSet | None]:
    """Training and validation set of 'embedded', 'cifar10' (torchvision's files below root) or 'folder' (root/train, root/val).

    Validation is None where a folder has no val/. Raises UsageError where nothing readable is there.
    """
    if dataset == "embedded":
        moments = embedded.MEAN, embedded.STD
        return tuple(ResidentImages(*embedded.draw(split), list(embedded.CLASSES), moments) for split in ("train", "val"))
    if dataset == "cifar10":
        return _open_cifar10(root, True), _open_cifar10(root, False)
    if not os.path.isdir(os.path.join(root, "train")):
        raise UsageError(f"{root} has no folder train/; expected {root}/train/<class>/<image> and {root}/val/<class>/<image>")
    train = _open_folder(os.path.join(root, "train"))
    if not os.path.isdir(os.path.join(root, "val")):
        return train, None
    val = _open_folder(os.path.join(root, "val"))
    if val.classes != train.classes:
        odd = sorted(set(val.classes) ^ set(train.classes))
        raise UsageError(f"train/ and val/ of {root} must hold the same classes; only one of them has {', '.join(odd[:5])}")
    return train, val


def _open_cifar10(root, train):
    try:
        files = torchvision.datasets.CIFAR10(root, train=train, download=False)
    except RuntimeError as error:
        raise UsageError(
            f"no CIFAR-10 in {root}: expected torchvision's folder cifar-10-batches-py there, whole and unpacked"
        ) from error
    return ResidentImages(files.data.transpose(0, 3, 1, 2).copy(), np.array(files.targets), files.classes, CIFAR10)


def _open_folder(split):
    classes = sorted(entry.name for entry in os.scandir(split) if entry.is_dir() and not entry.name.startswith("."))
    paths, labels = [], []
    for label, name in enumerate(classes):
        for folder, subfolders, files in os.walk(os.path.join(split, name), followlinks=True):
            subfolders.sort()
            found = [os.path.join(folder, file) for file in sorted(files) if file.lower().endswith(EXTENSIONS)]
            paths += found
            labels += [label] * len(found)
    if not paths:
        raise UsageError(f"no image in {split}; expected {split}/<class>/<image> with one of {' '.join(EXTENSIONS)}")
    images = ImageFiles(paths, np.array(labels), classes, IMAGENET)
    try:
        return images.resident()
    except RunError as error:
        raise UsageError(str(error)) from error


# -- loading -------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """This rank's part of a global batch, on the device: ids (B,) data-set indices; view1, view2 (B, 3, S, S) normalised."""

    ids: Tensor
    view1: Tensor
    view2: Tensor


class TwoViewLoader:
    """Epochs of two-view batches. Global batch b is the b-th slice of the epoch's permutation (the incomplete last one is
    left out); this rank's part is the rank-th contiguous share of it, so that gathering in rank order restores the batch."""

    def __init__(self, images: ImageSet, recipe: Recipe, global_batch_size: int, device: torch.device, workers: int):
        self.images, self.recipe, self.device = images, recipe, device
        self.batch_size_per_rank = global_batch_size // world_size()
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = len(images) // global_batch_size
        self.requests = _Requests()
        self.loader = None
        if isinstance(images, ImageFiles):
            self.loader = DataLoader(
                _ViewsOnRequest(images, recipe),
                batch_size=None,
                sampler=self.requests,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=device.type == "cuda",
            )

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This rank's batches first .. steps_per_epoch - 1 of an epoch."""
        order = augment.epoch_order(self.recipe.seed, epoch, len(self.images))
        self.requests.list = []
        for step in range(first, self.steps_per_epoch):
            start = step * self.global_batch_size + rank() * self.batch_size_per_rank
            self.requests.list.append((epoch, order[start : start + self.batch_size_per_rank]))
        if self.loader is not None:
            for views in self.loader:
                if isinstance(views, Exception):
                    raise views
                yield self._finish(views)
        else:
            for request in self.requests:
                yield self._finish(self.images.views(self.recipe, *request))

    def _finish(self, views: Views) -> Batch:
        crops = views.crops.to(self.device, non_blocking=True)
        view1, view2 = augment.apply(crops, views.parameters, self.images.mean, self.images.std).chunk(2)
        return Batch(views.ids.to(self.device, non_blocking=True), view1, view2)


class _Requests(Sampler):
    """What the workers are asked for next: a list of (epoch, indices) that the loader exchanges between epochs."""

    def __init__(self):
        self.list = []

    def __iter__(self):
        return iter(self.list)

    def __len__(self):
        return len(self.list)


class _ViewsOnRequest(Dataset):
    """The worker's side: a request (epoch, indices) to the views of that batch. An error is returned, since one raised in
    a worker reaches the main process wrapped in the worker's traceback."""

    def __init__(self, images: ImageFiles, recipe: Recipe):
        self.images, self.recipe = images, recipe

    def __getitem__(self, request):
        try:
            return self.images.views(self.recipe, *request)
        except RunError as error:
            return error


class _WholeOnRequest(Dataset):
    """As _ViewsOnRequest, for evaluation: indices to whole images."""

    def __init__(self, images: ImageFiles, size: int):
        self.images, self.size = images, size

    def __getitem__(self, indices):
        try:
            return self.images.whole(indices, self.size)
        except RunError as error:
            return error


def whole_images(
    images: ImageSet,
    indices: np.ndarray,
    *,
    size: int,
    device: torch.device,
    workers: int,
    chunk: int = EVALUATION_BATCH,
) -> Iterator[Tensor]:
    """Images `indices` in order, for evaluation: normalised float batches (<= chunk, 3, size, size) on the device."""
    chunks = np.split(indices, range(chunk, len(indices), chunk))
    batches = (images.whole(part, size) for part in chunks)
    if isinstance(images, ImageFiles):
        batches = DataLoader(_WholeOnRequest(images, size), batch_size=None, sampler=chunks, num_workers=workers)
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        x = batch.to(device, torch.get_default_dtype()).div_(255)
        yield augment.normalize_(x, images.mean, images.std)
