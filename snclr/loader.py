"""From requests for images to batches of augmented views on the device that trains.

A request names an epoch and image numbers. The image sets (snclr/datasets/images.py) answer it with
crops. This file moves them to the device and augments them there, and divides an epoch among the
ranks.
"""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from . import augment
from .augment import Recipe
from .datasets.images import EncodedImages, ImageSet
from .running.distributed import rank, world_size
from .running.errors import RunError
from .running.workers import WorkerBatches, check_shared_memory, keep_freed_memory

EVALUATION_BATCH = 256  # images per rank
SAMPLE_EPOCH = -1  # keys the views of TwoViewLoader.sample


class ViewLoader:
    """Loads the views of requested images, in the order of the requests.

    A request is (epoch, indices), for all views, or (epoch, indices, view numbers). Worker
    processes decode and crop encoded images; they stay alive between calls. On a GPU everything
    else runs in a stream of its own: the host runs ahead of the GPU, so that a batch is copied and
    augmented while the previous one trains.
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
            self.loader = WorkerBatches(
                _RequestedViews(images, recipe),
                self.requests,
                workers,
                persistent=True,
                pin_memory=device.type == "cuda",
            )

    def stop_waiting_if(self, condition: Callable[[], bool]) -> None:
        """Raise Stalled if no batch comes for a few seconds and the condition holds."""
        if self.loader is not None:
            self.loader.stop_waiting = condition

    def load(self, requests: list[tuple]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """For each request the ids (B,) and the normalised views, (B, 3, S, S) each, on the device.

        Raises RunError if an image cannot be read and may not be replaced.
        """
        self.requests.list = requests
        if self.loader is None:
            batches = (self.images.views(self.recipe, *request) for request in requests)
        else:
            batches = iter(self.loader)
        for request in requests:
            with torch.cuda.stream(self.stream):  # does nothing if the stream is None
                views = next(batches)
                if isinstance(views, Exception):
                    raise views
                self.replaced.update(request[1][request[1] != views.ids.numpy()].tolist())
                groups = [
                    augment.apply(
                        crops.to(self.device, non_blocking=True),
                        parameters,
                        self.images.mean,
                        self.images.std,
                    )
                    for crops, parameters in zip(views.crops, views.parameters, strict=True)
                ]
                ids = views.ids.to(self.device, non_blocking=True)
            if self.stream is not None:
                training = torch.cuda.current_stream(self.device)
                training.wait_stream(self.stream)
                # their memory must not be reused before the step has read it
                for tensor in (ids, *groups):
                    tensor.record_stream(training)
            yield ids, [view for group in groups for view in group.split(len(ids))]


class Batch(NamedTuple):
    """This rank's part of a global batch, on the device.

    ids     (B,) numbers of the images in the data set
    views   (B, 3, S, S) each, normalised, in the order of the table of views
    """

    ids: Tensor
    views: list[Tensor]


class TwoViewLoader(ViewLoader):
    """Epochs of batches with all views of each image.

    Global batch b is the b-th slice of the epoch's permutation; an incomplete last one is dropped.
    Each rank gets a contiguous part of it, so gathering in rank order restores the batch.
    """

    def __init__(
        self,
        images: ImageSet,
        recipe: Recipe,
        global_batch_size: int,
        device: torch.device,
        workers: int,
    ):
        if isinstance(images, EncodedImages):
            image_bytes = sum(3 * view.size**2 for view in recipe.views)
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            check_shared_memory(global_batch_size // world_size() * image_bytes, workers, ranks)
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
        """Numbers of the images in the global batch of step `step` (from 1), in rank order."""
        epoch, step_in_epoch = divmod(step - 1, self.steps_per_epoch)
        order = augment.epoch_order(self.recipe.seed, epoch, len(self.images))
        return order[step_in_epoch * self.global_batch_size :][: self.global_batch_size]

    def sample(self, count: int) -> Iterator[Batch]:
        """This rank's part of `count` images in two views, always the same, which no epoch has.

        `count` is rounded down to a multiple of the number of ranks.
        """
        order = augment.epoch_order(self.recipe.seed, SAMPLE_EPOCH, len(self.images))
        own = share(order[: min(count, len(order)) // world_size() * world_size()])
        parts = np.split(own, range(EVALUATION_BATCH, len(own), EVALUATION_BATCH))
        return self._batches([(SAMPLE_EPOCH, part, (0, 1)) for part in parts])

    def _batches(self, requests):
        for ids, views in self.load(requests):
            yield Batch(ids, views)


def share(indices: np.ndarray) -> np.ndarray:
    """This rank's contiguous part of a global batch; its size is a multiple of the world size."""
    return np.split(indices, world_size())[rank()]


class _Requests(Sampler):
    """The requests that the workers answer next: a list that the loader replaces."""

    def __init__(self):
        self.list = []

    def __iter__(self):
        return iter(self.list)

    def __len__(self):
        return len(self.list)


class _RequestedViews(Dataset):
    """What a worker does: from a request to its views.

    A RunError is returned, not raised: torch would add the worker's traceback to its message.
    """

    def __init__(self, images: EncodedImages, recipe: Recipe):
        self.images, self.recipe = images, recipe

    def __getitem__(self, request):
        try:
            return self.images.views(self.recipe, *request)
        except RunError as error:
            return error


class _RequestedWholeImages(Dataset):
    """The same for evaluation: from indices to whole images."""

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
    """Images `indices` in order, for evaluation.

    Yields normalised float batches (<= chunk, 3, size, size) on the device. Raises RunError if an
    image cannot be read and may not be replaced.
    """
    chunks = np.split(indices, range(chunk, len(indices), chunk))
    if isinstance(images, EncodedImages):
        batches = WorkerBatches(_RequestedWholeImages(images, size), chunks, workers)
    else:
        batches = (images.whole(part, size) for part in chunks)
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        x = batch.to(device, non_blocking=True).to(torch.get_default_dtype()).div_(255)
        yield augment.normalize_(x, images.mean, images.std)
