"""Encodes the training images once for all epochs of a probe. Their features stay in memory or, if
they are large, in a memory-mapped file.
"""

import math
import os
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ..loader import EVALUATION_BATCH, ViewLoader, whole_images
from ..running.distributed import all_gather, barrier, local_rank_zero, rank, world_size
from ..running.errors import RunError
from ..running.safe_files import new_file
from .features import key_of
from .linear import kinds_of
from .options import NOT_IN_FEATURES
from .task import Task


def cached_features(task: Task, loader: ViewLoader) -> Tensor:
    """Features (copies, n, F) float32 of all images of a loader, the same on every rank.

    --cache-copies 1: the view that evaluation uses; more: that many random crops of each image,
    those of epochs 0 .. copies - 1 of `loader`. Above --cache-limit-gb the array is a memory-mapped
    file in --workdir, one for all ranks of a machine. The file gets its name only when it is
    complete. Its name has a hash of everything that the features depend on: a later start uses the
    file only if its features are the same. Raises RunError if the file cannot be written.
    """
    args, copies = task.args, task.args.cache_copies
    shape = (copies, len(loader.images), max(kinds_of(task.encoder).values()))
    views = range(copies) if copies > 1 else [None]
    chunks = (chunk for copy in views for chunk in _in_order(task, loader, copy))
    bytes_needed = 4 * math.prod(shape)
    if bytes_needed <= args.cache_limit_gb * 2**30:
        array, done = torch.empty(shape), 0
        for chunk in chunks:
            array.flatten(0, 1)[done : done + len(chunk)] = chunk
            done += len(chunk)
        return array
    path = os.path.join(args.workdir, f"features_{cache_key(task, loader)[:16]}.f32")
    if not os.path.exists(path) or os.path.getsize(path) != bytes_needed:
        if local_rank_zero():
            _write(path, chunks)
        else:
            for _ in chunks:
                pass  # sends this rank's part to the rank that writes the file
        barrier()
    array = torch.from_file(path, shared=True, size=math.prod(shape), dtype=torch.float32)
    return array.view(shape)


def cache_key(task: Task, loader: ViewLoader) -> str:
    """SHA-256 of everything that cached features depend on, see features.key_of.

    A new flag is part of the key unless its definition has changes_features=False.
    """
    return key_of(
        loader.images,
        sorted((name, x) for name, x in vars(task.args).items() if name not in NOT_IN_FEATURES),
        sorted((name, x) for name, x in task.info.items() if name not in ("epoch", "notes")),
        task.encoder_digest,
        (task.amp, task.device.type, torch.__version__),
    )


def _write(path: str, chunks: Iterable[Tensor]) -> None:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with new_file(path) as file:
            for chunk in chunks:
                file.write(chunk.float().numpy())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(
            f"cannot write the features to {path}: {error.strerror or error};"
            " choose another --workdir"
        ) from error


def _in_order(task, loader, copy) -> Iterable[Tensor]:
    """Features (c, F) on the CPU, chunk by chunk; every rank encodes its part of each chunk."""
    images, chunk = loader.images, EVALUATION_BATCH * world_size()
    starts = range(0, len(images), chunk)
    # all ranks must send equal numbers of features: image 0 completes the last chunk
    parts = [np.arange(start, start + chunk).reshape(world_size(), -1)[rank()] for start in starts]
    parts = [np.where(part < len(images), part, 0) for part in parts]
    if copy is None:
        indices, size = np.concatenate(parts), loader.recipe.views[0].size
        batches = whole_images(
            images, indices, size=size, device=task.device, workers=task.args.workers
        )
    else:
        batches = (x for _, (x,) in loader.load([(copy, part, (0,)) for part in parts]))
    for start, batch in zip(starts, batches, strict=True):
        yield all_gather(task.embed(batch))[: len(images) - start].cpu()
