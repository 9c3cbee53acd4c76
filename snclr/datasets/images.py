"""Sets of numbered images, and how views and whole images are cut out of them.

ResidentImages are held decoded in memory and cropped on the device. EncodedImages are decoded each
time, and cropped, by worker processes. Both have the methods `views` and `whole`, which take arrays
of indices, so the loaders treat both alike. sources.py opens the sets.
"""

import copy
import hashlib
import os
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import augment
from ..augment import Recipe, ViewParameters
from ..running.errors import RunError
from ..running.workers import Answers, WorkerBatches
from .crops import crop_and_resize, crop_one, evaluation_box, select, shared_empty

# bytes of decoded pixels up to which a set of equal-sized images is held in memory
RESIDENT_LIMIT = 2**30
# most bytes that a worker decodes at a time, of images to be held in memory
PART = 2**20


class Views(NamedTuple):
    """Views of B images, cropped but not yet augmented on the device.

    Views of one size form a group (augment.by_size); crops and parameters have an entry per group.

    ids         (B,)
    crops       (V * B, C, S, S) uint8, V views of size S, the first view of all images first
    parameters  what was drawn for these V * B views
    """

    ids: Tensor
    crops: list[Tensor]
    parameters: list[ViewParameters]


class ImageSet:
    """n = len(self) images, numbered 0 .. n - 1 in a fixed order.

    labels      (n,) int64, -1 for an image without a label; None if no image has one
    classes     names of the labels
    mean, std   (C,) of the channels, in [0, 1]
    names       (n,) names of the files; None if the images are not in files of their own
    paths       (n,) the path of each image, or its number in the whole set if it has no path
    per_image   names of the attributes with one entry per image
    skip_bad    whether an unreadable image is replaced: in training by another, in evaluation by
                grey
    """

    per_image: tuple[str, ...] = ("labels", "names", "paths")
    names: np.ndarray | None = None
    paths: np.ndarray | None = None
    skip_bad = False

    def __init__(self, labels: np.ndarray | None, classes: list[str], mean_std: tuple):
        self.labels = None if labels is None else torch.as_tensor(labels)
        self.classes = classes
        self.mean, self.std = map(torch.as_tensor, mean_std)

    def select(self, indices: np.ndarray) -> "ImageSet":
        """A set of only the images `indices`, numbered in that order."""
        chosen = copy.copy(self)
        for name in self.per_image:
            values = getattr(self, name)
            setattr(chosen, name, None if values is None else values[indices])
        assert len(chosen) == len(indices), "per_image must name what __len__ and image() read"
        return chosen

    def fingerprint(self) -> str:
        """Hash of the names, or without names of the sizes in bytes, in order; reads no image."""
        other = getattr(self, "size", np.arange(len(self)))
        identity = other if self.names is None else self.names
        return hashlib.sha256(np.ascontiguousarray(identity)).hexdigest()

    def labelled(self) -> "ImageSet":
        """The images that have a label."""
        has_label = self.labels >= 0
        return self if has_label.all() else self.select(np.flatnonzero(has_label.numpy()))

    def to(self, device: torch.device) -> "ImageSet":
        """Move the images that are held in memory to the device that trains."""
        return self

    def image(self, index: int) -> Tensor:
        """One image, (C, H, W) uint8. Raises RunError, with its name, if it cannot be read."""
        raise NotImplementedError

    def readable(self, index: int, seed: int) -> tuple[int, Tensor]:
        """The number of an image and the image: `index` itself, or a substitute.

        With skip_bad, a substitute replaces an unreadable image. It depends only on (seed, index),
        so that every rank and worker draws the same one.
        """
        for attempt in range(20):
            try:
                return index, self.image(index)
            except RunError:
                if not self.skip_bad or attempt == 19:
                    raise
                index = int(augment.keyed_bits(seed, index, attempt) % np.uint64(len(self)))

    def views(
        self,
        recipe: Recipe,
        epoch: int,
        indices: np.ndarray,
        view_numbers: tuple[int, ...] | None = None,
    ) -> Views:
        """Views of the images `indices` (B,), drawn by (recipe.seed, epoch, index, view number).

        view_numbers: which views of recipe.views; None: all of them.
        """
        numbers = range(len(recipe.views)) if view_numbers is None else view_numbers
        return self._views(recipe, epoch, indices, augment.by_size(recipe, numbers))

    def _views(self, recipe, epoch, indices, groups):
        """`views`, of groups of view numbers (augment.by_size)."""
        raise NotImplementedError

    def whole(self, indices: np.ndarray, size: int) -> Tensor:
        """Images for evaluation, (B, C, size, size) uint8.

        Images of that size do not change. Of others, a central square of 7/8 of the shorter side is
        resized, as in the usual 'resize to 256, centre crop 224'.
        """
        raise NotImplementedError


class ResidentImages(ImageSet):
    """Images (n, C, H, W) uint8 in memory.

    errors (n,): why an image could not be read, None for a readable one; None if all are readable.
    """

    per_image = ("labels", "names", "paths", "images", "errors")
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

    def _views(self, recipe, epoch, indices, groups):
        if self.errors is not None:
            indices = np.array([self.readable(int(index), recipe.seed)[0] for index in indices])
        images = select(self.images, indices)
        views = Views(torch.from_numpy(indices), [], [])
        for size, group in groups:
            sides = np.tile(np.array(images.shape[2:])[:, None], len(indices))
            boxes, parameters = _draw(recipe, epoch, indices, group, sides)
            views.crops.append(crop_and_resize(images, torch.from_numpy(boxes), size))
            views.parameters.append(parameters)
        return views

    def whole(self, indices: np.ndarray, size: int) -> Tensor:
        images = select(self.images, indices)
        if images.shape[2:] == (size, size):
            return images
        box = torch.tensor(evaluation_box(*images.shape[2:], size))
        return crop_and_resize(images, box.expand(len(images), 4), size)


class EncodedImages(ImageSet):
    """Images of C channels that are decoded each time they are used. A subclass defines `image` and
    `__len__`.
    """

    channels: int = 3
    grey_range: tuple[float, float] | None = None
    # most images whose views are cut at a time
    at_once = 32  # a decoded photograph of 12 megapixels has 36 MB

    def file_states(self) -> object:
        """What changes if the images do: their files (reading.file_states) and places in them.

        By default always another value, so that features in a file are never used again.
        """
        return os.urandom(16)

    def _views(self, recipe, epoch, indices, groups):
        crops = [
            shared_empty((len(group), len(indices), self.channels, size, size))
            for size, group in groups
        ]
        parts = [slice(n, n + self.at_once) for n in range(0, len(indices), self.at_once)]
        ids, sides = zip(
            *(
                self._cut(recipe, epoch, indices[part], groups, [x[:, part] for x in crops])
                for part in parts
            ),
            strict=True,
        )
        ids, sides = np.concatenate(ids), np.concatenate(sides, axis=1)
        parameters = [_draw(recipe, epoch, ids, group, sides)[1] for _, group in groups]
        return Views(torch.from_numpy(ids), [x.flatten(0, 1) for x in crops], parameters)

    def _cut(self, recipe, epoch, indices, groups, crops):
        """Write the views of images (B,) into the crops of each group, (V, B, C, size, size).

        Returns the numbers of the images (B,), and their heights and widths (2, B).
        """
        ids, images = zip(*(self.readable(int(i), recipe.seed) for i in indices), strict=True)
        ids, sides = np.array(ids), np.array([image.shape[1:] for image in images]).T
        for (size, group), views in zip(groups, crops, strict=True):
            boxes = _draw(recipe, epoch, ids, group, sides)[0].reshape(len(group), -1, 4)
            for view, of_view in zip(views, boxes, strict=True):
                for crop, image, box in zip(view.split(1), images, of_view, strict=True):
                    crop.copy_(crop_one(image, box, size))
        return ids, sides

    def whole(self, indices: np.ndarray, size: int) -> Tensor:
        shape = self.channels, size, size
        crops = [torch.empty(0, *shape, dtype=torch.uint8)]  # there may be no indices
        for index in indices:
            image, _ = self._image_or_grey(index, shape)
            crops.append(crop_one(image, evaluation_box(*image.shape[1:], size), size))
        return torch.cat(crops)

    def _image_or_grey(self, index, shape):
        """The image, and None; with skip_bad, for an unreadable image grey, and the reason."""
        try:
            return self.image(index), None
        except RunError as error:
            if not self.skip_bad:
                raise
            return torch.full(shape, 127, dtype=torch.uint8), str(error)

    def _decoded(self, indices, shape):
        """The images (n, C, H, W), and why some are grey; None if one has another shape."""
        images, errors = zip(*(self._image_or_grey(i, shape) for i in indices), strict=True)
        return (torch.stack(images), errors) if {x.shape for x in images} == {shape} else None

    def resident(self, workers: int) -> ImageSet:
        """This set in memory if all images have one size and fit into RESIDENT_LIMIT; else self.

        workers: at most so many processes decode them. Threads would take turns: of small images,
        most of the work is Python's.
        """
        shape = self.readable(0, seed=0)[1].shape
        if shape.numel() * len(self) > RESIDENT_LIMIT:
            return self
        images, errors = torch.empty(len(self), *shape, dtype=torch.uint8), np.full(len(self), None)
        count = min(256, max(1, PART // shape.numel()))
        parts = np.split(np.arange(len(self)), range(count, len(self), count))
        requests = [(part, shape) for part in parts]
        batches = WorkerBatches(Answers(self._decoded), requests, min(workers, len(parts) // 4))
        for part, decoded in zip(parts, batches, strict=True):
            if decoded is None:
                return self
            images[part[0] : part[-1] + 1], errors[part] = decoded
        resident = ResidentImages(images, self.labels, self.classes, (self.mean, self.std))
        resident.names, resident.paths = self.names, self.paths
        resident.skip_bad, resident.errors = self.skip_bad, errors if any(errors) else None
        return resident


def _draw(recipe, epoch, indices, group, sides):
    """augment.draw for the views of a group: the first view of all images, then the next; sides: of
    the images, (2, B).
    """
    return augment.draw(
        recipe,
        epoch,
        np.tile(indices, len(group)),
        np.repeat(group, len(indices)),
        *np.tile(sides, len(group)),
    )
