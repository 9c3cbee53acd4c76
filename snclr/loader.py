"""Image sets and loaders: from an image's stable number to batches of two augmented views on the training device.

A set is either held decoded in memory (ResidentImages: cropped on the device) or decoded image by image (EncodedImages:
decoded and cropped by worker processes). Both answer `views` and `whole` for arrays of indices, so the loaders know no
difference. Where sets come from is the business of sources.py.
"""

import contextlib
import copy
import ctypes
import hashlib
import io
import itertools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, Sampler

from . import augment
from .augment import Recipe, ViewParameters
from .running.distributed import rank, world_size
from .running.errors import RunError, first_line

try:  # torchvision 0.29 announces that its decoders will go; PIL takes half as long again
    from torchvision.io import ImageReadMode, decode_image
except ImportError:
    decode_image = None
warnings.filterwarnings(
    "ignore", message=".*capabilities of TorchVision are deprecated", category=DeprecationWarning
)

EVALUATION_BATCH = 256  # images a rank
SAMPLE_EPOCH = -1  # keys the views of TwoViewLoader.sample
RESIDENT_LIMIT = (
    2**30
)  # bytes of decoded pixels up to which a set of equal-sized images is held in memory


class Views(NamedTuple):
    """Views of B images before the device's half of the augmentation.

    ids (B,). The views come in groups of one size (augment.by_size): crops holds for each group of V
    views (V * B, 3, S, S) uint8, all images' first view first; parameters what was drawn for them.
    """

    ids: Tensor
    crops: list[Tensor]
    parameters: list[ViewParameters]


class ImageSet:
    """n images with a stable number each.

    labels (n,) int64, -1 for an image without one, or None where no image has one; classes: the labels' names; mean, std
    (3,) of the channels, in [0, 1]; names (n,) of the files, or None where they have none. per_image names the attributes
    with one entry an image. skip_bad: an image that cannot be read is no error; another takes its place in training, grey in
    evaluation.
    """

    per_image: tuple[str, ...] = ("labels", "names")
    names: np.ndarray | None = None
    skip_bad = False

    def __init__(self, labels: np.ndarray | None, classes: list[str], mean_std: tuple):
        self.labels = None if labels is None else torch.as_tensor(labels)
        self.classes = classes
        self.mean, self.std = map(torch.tensor, mean_std)

    def __len__(self) -> int:
        raise NotImplementedError

    def select(self, indices: np.ndarray) -> "ImageSet":
        """Images `indices` alone, numbered anew in that order."""
        chosen = copy.copy(self)
        for name in self.per_image:
            values = getattr(self, name)
            setattr(chosen, name, None if values is None else values[indices])
        return chosen

    def fingerprint(self) -> str:
        """Hash of which images these are, in order, by the names of their files or their sizes in bytes; nothing is read."""
        told = self.names if self.names is not None else getattr(self, "size", np.arange(len(self)))
        return hashlib.sha256(np.ascontiguousarray(told)).hexdigest()

    def labelled(self) -> "ImageSet":
        """The images that have a label."""
        return (
            self
            if (self.labels >= 0).all()
            else self.select(np.flatnonzero(self.labels.numpy() >= 0))
        )

    def to(self, device: torch.device) -> "ImageSet":
        """Bring what is held in memory to the device that trains."""
        return self

    def image(self, index: int) -> Tensor:
        """One image, (3, H, W) uint8. Raises RunError, naming it, where it cannot be read."""
        raise NotImplementedError

    def readable(self, index: int, seed: int) -> tuple[int, Tensor]:
        """An image and its number: `index`, or where that cannot be read and skip_bad allows it, a substitute that depends on
        (seed, index) alone, so that every rank and worker would draw the same."""
        for attempt in range(20):
            try:
                return index, self.image(index)
            except RunError:
                if not self.skip_bad or attempt == 19:
                    raise
                index = int(augment.keyed_bits(seed, index, attempt) % np.uint64(len(self)))

    def views(
        self, recipe: Recipe, epoch: int, indices: np.ndarray, which: tuple[int, ...] | None = None
    ) -> Views:
        """Crops and parameters of the views `which` (numbers in recipe.views; None: all of them) of
        images `indices` (B,), keyed by (recipe.seed, epoch, index, view)."""
        raise NotImplementedError

    def whole(self, indices: np.ndarray, size: int) -> Tensor:
        """Images for evaluation, (B, 3, size, size) uint8: as they are if they have that size, else the central 7/8 of the
        shorter side, resized (the field's 'resize 256, centre crop 224')."""
        raise NotImplementedError


class ResidentImages(ImageSet):
    """Images (n, 3, H, W) uint8 in memory; errors (n,): why an image could not be read and is grey here, or None for all."""

    per_image = ("labels", "names", "images", "errors")
    errors: np.ndarray | None = None

    def __init__(
        self,
        images: np.ndarray | Tensor,
        labels: np.ndarray | None,
        classes: list[str],
        mean_std: tuple,
    ):
        super().__init__(labels, classes, mean_std)
        self.images = torch.as_tensor(images)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "ResidentImages":
        self.images = self.images.to(device)
        return self

    def image(self, index: int) -> Tensor:
        if self.errors is not None and self.errors[index]:
            raise RunError(self.errors[index])
        return self.images[index]

    def views(
        self, recipe: Recipe, epoch: int, indices: np.ndarray, which: tuple[int, ...] | None = None
    ) -> Views:
        if self.errors is not None:
            indices = np.array([self.readable(int(index), recipe.seed)[0] for index in indices])
        images = augment.select(self.images, indices)
        heights, widths = (np.full(len(indices), side) for side in images.shape[2:])

        def cut(boxes, size):
            return augment.crop_and_resize(images, torch.from_numpy(boxes), size)

        return _views(recipe, epoch, indices, which, heights, widths, cut)

    def whole(self, indices: np.ndarray, size: int) -> Tensor:
        images = augment.select(self.images, indices)
        box = torch.tensor(_evaluation_box(*images.shape[2:], size))
        return (
            images
            if images.shape[2:] == (size, size)
            else augment.crop_and_resize(images, box.expand(len(images), 4), size)
        )


class EncodedImages(ImageSet):
    """Images that are decoded whenever they are needed: a subclass says how one of them is read."""

    def views(
        self, recipe: Recipe, epoch: int, indices: np.ndarray, which: tuple[int, ...] | None = None
    ) -> Views:
        numbers, images = zip(
            *(self.readable(int(index), recipe.seed) for index in indices), strict=True
        )
        indices = np.array(numbers)
        heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (1, 2))

        def cut(boxes, size):
            again = itertools.cycle(images)  # the boxes of view after view
            return torch.cat([_cut(image, box, size) for box, image in zip(boxes, again)])  # noqa: B905

        return _views(recipe, epoch, indices, which, heights, widths, cut)

    def whole(self, indices: np.ndarray, size: int) -> Tensor:
        images = [self._image_or_grey(index, (3, size, size))[0] for index in indices]
        none = torch.empty(0, 3, size, size, dtype=torch.uint8)
        return torch.cat(
            [
                none,
                *(_cut(image, _evaluation_box(*image.shape[1:], size), size) for image in images),
            ]
        )

    def _image_or_grey(self, index, shape):
        try:
            return self.image(index), None
        except RunError as error:
            if not self.skip_bad:
                raise
            return torch.full(shape, 127, dtype=torch.uint8), str(error)

    def resident(self) -> ImageSet:
        """The same set held in memory, if all images are of one size and fit into RESIDENT_LIMIT; else this one."""
        shape = self.readable(0, seed=0)[1].shape
        if shape.numel() * len(self) > RESIDENT_LIMIT:
            return self
        images, errors = torch.empty(len(self), *shape, dtype=torch.uint8), np.full(len(self), None)
        with ThreadPool() as threads:
            read = threads.imap(
                lambda index: self._image_or_grey(index, shape), range(len(self)), chunksize=16
            )
            for index, (image, errors[index]) in enumerate(read):
                if image.shape != shape:
                    return self
                images[index] = image
        labels = None if self.labels is None else self.labels.numpy()
        resident = ResidentImages(
            images, labels, self.classes, (self.mean.tolist(), self.std.tolist())
        )
        resident.names, resident.skip_bad = self.names, self.skip_bad
        resident.errors = errors if any(errors) else None
        return resident


class ImageFiles(EncodedImages):
    """Images in files of their own."""

    per_image = ("labels", "paths")

    def __init__(
        self, paths: list[str], labels: np.ndarray | None, classes: list[str], mean_std: tuple
    ):
        super().__init__(labels, classes, mean_std)
        self.paths = np.array(
            paths
        )  # one block of memory: a list would be copied page by page into every worker

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def names(self) -> np.ndarray:
        return np.array([os.path.basename(path) for path in self.paths])

    def image(self, index: int) -> Tensor:
        path = str(self.paths[index])
        if not os.path.isfile(path) and os.path.exists(path):
            raise unreadable(path, "it is no file")  # a pipe would be waited for
        try:
            encoded = np.fromfile(path, np.uint8)
        except OSError as error:
            raise unreadable(path, error.strerror) from error
        return decode(encoded, path)


def decode(encoded: np.ndarray, name: str) -> Tensor:
    """The bytes (n,) uint8 of an image file as (3, H, W) uint8, upright. Raises RunError with the name of a damaged one."""
    try:
        with Image.open(
            io.BytesIO(encoded)
        ) as picture:  # reads the head alone, and refuses what would fill the memory
            if (
                encoded[:3].tobytes() == b"\xff\xd8\xff" and decode_image
            ):  # JPEG only: its PNG decoder crashes on damaged files
                with contextlib.suppress(RuntimeError):  # PIL reads it, or names the reason
                    return decode_image(
                        torch.from_numpy(encoded), ImageReadMode.RGB, apply_exif_orientation=True
                    )
            return to_rgb(picture)
    except UnidentifiedImageError as error:
        raise unreadable(name, "it is no image of a known format") from error
    except Exception as error:  # decoders raise whatever the bytes lead to
        raise unreadable(name, error) from error


def to_rgb(picture: Image.Image) -> Tensor:
    """(3, H, W) uint8, upright: grey, palette, CMYK and alpha become RGB, EXIF orientation is applied."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I"):  # 16 bits of grey, which PIL's convert would clip at 255
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)


def unreadable(name: str, reason: object) -> RunError:
    """The error of an image that cannot be read."""
    return RunError(f"cannot read image {name}: {first_line(reason)}; remove or replace the file")


def _views(recipe, epoch, indices, which, heights, widths, cut):
    """The Views `which` of images `indices`; cut(boxes, size) cuts the boxes of view after view."""
    crops, parameters = [], []
    for size, numbers in augment.by_size(recipe, which or range(len(recipe.views))):
        boxes, drawn = augment.draw(
            recipe,
            epoch,
            np.tile(indices, len(numbers)),
            np.repeat(numbers, len(indices)),
            np.tile(heights, len(numbers)),
            np.tile(widths, len(numbers)),
        )
        crops.append(cut(boxes, size))
        parameters.append(drawn)
    return Views(torch.from_numpy(indices), crops, parameters)


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


# -- loading -------------------------------------------------------------------------------------------------------------


class ViewLoader:
    """Loads what it is asked for: requests (epoch, indices) or (epoch, indices, which views) to Views, in order.

    Encoded images are decoded and cropped by worker processes, which stay from one call to the next. On a GPU the rest has a
    stream of its own: the host runs ahead of the GPU, so that a batch is copied and augmented while the one before trains.
    """

    def __init__(self, images: ImageSet, recipe: Recipe, device: torch.device, workers: int):
        self.images, self.recipe, self.device = images, recipe, device
        self.requests = _Requests()
        self.replaced: set[int] = set()  # images that could not be read
        self.loader = None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if device.type == "cpu":
            keep_freed_memory()
        if isinstance(images, EncodedImages):
            stays = dict(persistent_workers=workers > 0, pin_memory=device.type == "cuda")
            self.loader = _by_workers(
                _ViewsOnRequest(images, recipe), self.requests, workers, **stays
            )

    def load(self, requests: list[tuple]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """For each request the ids (B,) and the augmented, normalised views, (B, 3, S, S) each, on
        the device."""
        self.requests.list = requests
        direct = (self.images.views(self.recipe, *request) for request in requests)
        batches = iter(direct if self.loader is None else self.loader)
        for request in requests:
            with torch.cuda.stream(self.stream):  # without one, nothing
                views = next(batches)
                if isinstance(views, Exception):
                    raise views
                self.replaced.update(request[1][request[1] != views.ids.numpy()].tolist())
                groups = []
                for crops, parameters in zip(views.crops, views.parameters, strict=True):
                    crops = crops.to(self.device, non_blocking=True)
                    groups.append(
                        augment.apply(crops, parameters, self.images.mean, self.images.std)
                    )
                ids = views.ids.to(self.device, non_blocking=True)
            if self.stream is not None:
                training = torch.cuda.current_stream(self.device)
                training.wait_stream(self.stream)
                for tensor in (ids, *groups):
                    # so that its memory is not used again before the step has read it
                    tensor.record_stream(training)
            yield ids, [view for group in groups for view in group.split(len(ids))]


def _by_workers(dataset, requests, workers, **more):
    """What dataset answers to each of the requests, in order."""
    # since Python 3.14 Linux, too, would start each worker from nothing: seconds, and another parent than the rank
    start = "fork" if workers and sys.platform == "linux" else None
    how = dict(
        num_workers=workers, worker_init_fn=leave_signals_to_the_rank, multiprocessing_context=start
    )
    return DataLoader(dataset, batch_size=None, sampler=requests, **how, **more)


def keep_freed_memory() -> None:
    """Have glibc keep blocks of up to 32 MB when they are freed (256 MB at most): by default it gives them back, and the page
    faults of the next ones are a third of the time that a large view takes. Elsewhere nothing happens."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and values of malloc.h
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**28)


def leave_signals_to_the_rank(worker: int) -> None:
    """A signal that reaches a whole group of processes must not take the images from a rank that finishes its step: a worker
    heeds its rank's SIGTERM alone."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which says who sent it; macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_rank, daemon=True).start()


def _end_with_the_rank():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class Batch(NamedTuple):
    """This rank's part of a global batch, on the device: ids (B,) data-set indices; views, in the
    order of the table of views, (B, 3, S, S) each, normalised."""

    ids: Tensor
    views: list[Tensor]


class TwoViewLoader(ViewLoader):
    """Epochs of two-view batches. Global batch b is the b-th slice of the epoch's permutation (the incomplete last one is
    left out); this rank's part is the rank-th contiguous share of it, so that gathering in rank order restores the batch."""

    def __init__(
        self,
        images: ImageSet,
        recipe: Recipe,
        global_batch_size: int,
        device: torch.device,
        workers: int,
    ):
        super().__init__(images, recipe, device, workers)
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = len(images) // global_batch_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This rank's batches first .. steps_per_epoch - 1 of an epoch."""
        order = augment.epoch_order(self.recipe.seed, epoch, len(self.images))
        starts = [step * self.global_batch_size for step in range(first, self.steps_per_epoch)]
        parts = [share(order[start : start + self.global_batch_size]) for start in starts]
        return self._batches([(epoch, part) for part in parts])

    def indices(self, step: int) -> np.ndarray:
        """The images of the global batch that step `step` (from 1) trained on, in rank order."""
        epoch, inside = divmod(step - 1, self.steps_per_epoch)
        order = augment.epoch_order(self.recipe.seed, epoch, len(self.images))
        return order[inside * self.global_batch_size :][: self.global_batch_size]

    def sample(self, count: int) -> Iterator[Batch]:
        """This rank's part of `count` images (rounded down to the ranks) in two views that no epoch
        shows; the same each time."""
        order = augment.epoch_order(self.recipe.seed, SAMPLE_EPOCH, len(self.images))
        mine = share(order[: min(count, len(order)) // world_size() * world_size()])
        parts = np.split(mine, range(EVALUATION_BATCH, len(mine), EVALUATION_BATCH))
        return self._batches([(SAMPLE_EPOCH, part, (0, 1)) for part in parts])

    def _batches(self, requests):
        for ids, views in self.load(requests):
            yield Batch(ids, views)


def share(indices: np.ndarray) -> np.ndarray:
    """This rank's contiguous part of a global batch, whose size the ranks divide."""
    return np.split(indices, world_size())[rank()]


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

    def __init__(self, images: EncodedImages, recipe: Recipe):
        self.images, self.recipe = images, recipe

    def __getitem__(self, request):
        try:
            return self.images.views(self.recipe, *request)
        except RunError as error:
            return error


class _WholeOnRequest(Dataset):
    """As _ViewsOnRequest, for evaluation: indices to whole images."""

    def __init__(self, images: EncodedImages, size: int):
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
    if isinstance(images, EncodedImages):
        batches = _by_workers(_WholeOnRequest(images, size), chunks, workers)
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        x = batch.to(device, non_blocking=True).to(torch.get_default_dtype()).div_(255)
        yield augment.normalize_(x, images.mean, images.std)
