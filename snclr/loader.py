"""From requests for images to batches of augmented views on the device that trains.

A request names an epoch and image numbers. The image sets (snclr/datasets/images.py) answer it with
crops. This file moves them to the device and augments them there, and divides an epoch among the
ranks. Workers answer small requests, so their memory, and the time to the first batch, do not grow
with the batch.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import augment, operations
from .augment import Recipe
from .datasets.images import EncodedImages, ImageSet
from .running.distributed import share, world_size
from .running.errors import UsageError
from .running.workers import (
    Answers,
    LastingWorkers,
    WorkerBatches,
    check_shared_memory,
    keep_freed_memory,
)

EVALUATION_BATCH = 256  # images per rank
REQUEST = 256  # most images that a worker loads at a time
SAMPLE_EPOCH = -1  # keys the views of EpochLoader.sample


class Batch(NamedTuple):
    """Images on the device; in training this rank's part of a global batch.

    ids     (B,) numbers of the images in the data set
    views   (B, C, S, S) each, normalised, in the order of the table of views
    """

    ids: Tensor
    views: list[Tensor]


class ViewLoader:
    """Loads the views of requested images, in the order of the requests.

    A request is (epoch, indices), for all views, or (epoch, indices, view numbers). Worker
    processes decode and crop encoded images; they stay alive between calls. They get requests of at
    most REQUEST images, of which a larger batch is put together on the device. On a GPU everything
    else runs in a stream of its own: the host runs ahead of the GPU, so that a batch is copied and
    augmented while the previous one trains.

    augment_crops: operations.apply, or another function of the same arguments and result.
    """

    def __init__(
        self,
        images: ImageSet,
        recipe: Recipe,
        device: torch.device,
        workers: int,
        augment_crops: Callable[..., Tensor] = operations.apply,
    ):
        self.images, self.recipe, self.device = images, recipe, device
        self.augment_crops = augment_crops
        self.replaced: set[int] = set()  # images that could not be read
        self.loader = None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if device.type == "cpu":
            keep_freed_memory()
        if isinstance(images, EncodedImages):
            self.loader = LastingWorkers(
                Answers(partial(images.views, recipe)), workers, pin_memory=device.type == "cuda"
            )

    def stop_waiting_if(self, condition: Callable[[], bool]) -> None:
        """Raise Stalled if no batch comes for a few seconds and the condition holds."""
        if self.loader is not None:
            self.loader.workers.stop_waiting = condition

    def load(self, requests: Sequence[tuple], ahead: Sequence[tuple] = ()) -> Iterator[Batch]:
        """For each request its batch.

        ahead: the requests of the next call, if they are known. The workers go on with them without
        a gap. Raises RunError if an image cannot be read and may not be replaced.
        """
        answers = self._answers(requests, ahead)
        for request in requests:
            with torch.cuda.stream(self.stream):  # does nothing if the stream is None
                ids, groups = self._batch(request, answers)
            if self.stream is not None:
                training = torch.cuda.current_stream(self.device)
                training.wait_stream(self.stream)
                # their memory must not be reused before the step has read it
                for tensor in (ids, *groups):
                    tensor.record_stream(training)
            yield Batch(ids, [view for group in groups for view in group])

    def _answers(self, requests, ahead):
        """The answers to all parts of the requests, in order."""
        if self.loader is None:
            return (self.images.views(self.recipe, *request) for request in requests)
        return self.loader.load(self._parts(requests), self._parts(ahead))

    def _parts(self, requests):
        """The requests, divided into some of at most REQUEST images if workers answer them."""
        parts = []
        for epoch, indices, *view_numbers in requests:
            count = 1 if self.loader is None else -(-len(indices) // REQUEST)
            parts += [(epoch, part, *view_numbers) for part in np.array_split(indices, count)]
        return parts

    def _batch(self, request, answers):
        """The ids (B,) of a request, and for each group of V views of one size (V, B, C, S, S)."""
        parts, ids, groups, start = self._parts([request]), [], [], 0
        for _, indices, *_ in parts:
            views = next(answers)
            self.replaced.update(indices[indices != views.ids.numpy()].tolist())
            ids.append(views.ids.to(self.device, non_blocking=True))
            augmented = [
                self.augment_crops(
                    crops.to(self.device, non_blocking=True),
                    parameters,
                    self.images.mean,
                    self.images.std,
                ).unflatten(0, (-1, len(indices)))
                for crops, parameters in zip(views.crops, views.parameters, strict=True)
            ]
            if len(parts) == 1:
                return ids[0], augmented
            groups = groups or [
                x.new_empty(len(x), len(request[1]), *x.shape[2:]) for x in augmented
            ]
            for group, x in zip(groups, augmented, strict=True):
                group[:, start : start + len(indices)] = x
            start += len(indices)
        return torch.cat(ids), groups


class EpochLoader(ViewLoader):
    """Epochs of batches with all views of each image.

    Global batch b is the b-th slice of the epoch's permutation; an incomplete last one is dropped.
    Each rank gets a contiguous part of it, so gathering in rank order restores the batch. Raises
    UsageError if there is no whole batch.
    """

    def __init__(
        self,
        images: ImageSet,
        recipe: Recipe,
        global_batch_size: int,
        device: torch.device,
        workers: int,
        augment_crops: Callable[..., Tensor] = operations.apply,
    ):
        if global_batch_size > len(images):
            raise UsageError(
                f"--batch-size {global_batch_size} exceeds the {len(images)} training images: "
                "choose a smaller one; to pretrain on few images, @configs/photos_small.args has "
                "settings"
            )
        if isinstance(images, EncodedImages):
            image_bytes = sum(images.channels * view.size**2 for view in recipe.views)
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            request = min(REQUEST, global_batch_size // world_size())
            check_shared_memory(request * image_bytes, workers, ranks)
        super().__init__(images, recipe, device, workers, augment_crops)
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = len(images) // global_batch_size

    def epoch(self, epoch: int, first: int = 0, *, go_on: bool = False) -> Iterator[Batch]:
        """This rank's batches first .. steps_per_epoch - 1 of an epoch.

        go_on: the next call is for the next epoch, so the workers may begin it.
        """
        return self.load(self.requests(epoch, first), self.requests(epoch + 1) if go_on else [])

    def requests(self, epoch: int, first: int = 0) -> list[tuple[int, np.ndarray]]:
        """What `epoch` requests: for each batch the epoch and the numbers of this rank's images."""
        order = augment.epoch_order(self.recipe.seed, epoch, len(self.images))
        starts = [step * self.global_batch_size for step in range(first, self.steps_per_epoch)]
        return [(epoch, share(order[start : start + self.global_batch_size])) for start in starts]

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
        return self.load([(SAMPLE_EPOCH, part, (0, 1)) for part in parts])


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

    Yields normalised float batches (<= chunk, C, size, size) on the device. Raises RunError if an
    image cannot be read and may not be replaced.
    """
    chunks = np.split(indices, range(chunk, len(indices), chunk))
    if isinstance(images, EncodedImages):
        batches = WorkerBatches(Answers(images.whole), [(part, size) for part in chunks], workers)
    else:
        batches = (images.whole(part, size) for part in chunks)
    for batch in batches:
        x = batch.to(device, non_blocking=True).to(torch.get_default_dtype()).div_(255)
        yield operations.normalize_(x, images.mean, images.std)
