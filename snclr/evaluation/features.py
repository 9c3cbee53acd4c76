"""Frozen features of whole image sets: encoded once, kept in memory or, where they are large, in a file mapped into it.

`embed` is a function from normalised images (B, 3, S, S) to features (B, F) in at least float32 that records no gradient.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from ..datasets.images import ImageSet
from ..loader import EVALUATION_BATCH, ViewLoader, whole_images
from ..running.distributed import all_gather, barrier, local_rank_zero, rank, world_size
from ..running.errors import RunError


def digest(module: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all parameters and buffers: equal before and after means unchanged."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


@torch.no_grad()
def encode_share(
    embed: Callable[[Tensor], Tensor],
    images: ImageSet,
    *,
    size: int,
    device: torch.device,
    workers: int,
) -> tuple[Tensor, Tensor]:
    """Features (n_r, F) and labels (n_r,), on the CPU, of this rank's share (every world_size-th image) of a labelled set."""
    indices = np.arange(rank(), len(images), world_size())
    batches = whole_images(images, indices, size=size, device=device, workers=workers)
    return torch.cat([embed(batch).cpu() for batch in batches]), images.labels[indices]


def cache(
    embed: Callable[[Tensor], Tensor],
    width: int,
    loader: ViewLoader,
    copies: int,
    *,
    workers: int,
    limit: float,
    folder: str,
    key: str,
) -> Tensor:
    """Features (copies, n, width) float32 of all of a loader's images, the same on every rank.

    One copy: the view that evaluation sees; more: so many random crops of each image, those of epochs 0 .. copies - 1 of
    `loader`. Above `limit` bytes the array is a file in `folder`, mapped into memory, one for the ranks of a machine. It gets
    its name only when it is whole, and the name holds a hash of `key` and of the images' labels and names (whatever the
    features depend on), so that nothing half-written or foreign is taken for it, and a later start finds it. Raises RunError
    where the file cannot be written.
    """
    images = loader.images
    shape = (copies, len(images), width)
    views = range(copies) if copies > 1 else [None]
    encoded = (features for copy in views for features in _in_order(embed, loader, copy, workers))
    bytes_needed = 4 * math.prod(shape)
    if bytes_needed <= limit:
        array, done = torch.empty(copies * len(images), width), 0
        for features in encoded:
            array[done : done + len(features)] = features
            done += len(features)
        return array.view(shape)
    depends = hashlib.sha256(f"{key} {shape}".encode() + images.labels.numpy().tobytes())
    depends.update(b"" if images.names is None else images.names.tobytes())
    path = os.path.join(folder, f"features_{depends.hexdigest()[:16]}.f32")
    if not os.path.exists(path) or os.path.getsize(path) != bytes_needed:
        if local_rank_zero():
            _write(path, encoded)
        else:
            for _ in encoded:
                pass  # this rank's part goes to the one that writes
        barrier()
    return torch.from_file(path, shared=True, size=math.prod(shape), dtype=torch.float32).view(
        shape
    )


def _write(path: str, chunks: Iterable[Tensor]) -> None:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.tmp", "wb") as file:
            for chunk in chunks:
                file.write(chunk.float().numpy())
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        raise RunError(
            f"cannot write the features to {path}: {error.strerror}; choose another --workdir"
        ) from error


def _in_order(embed, loader, copy, workers) -> Iterable[Tensor]:
    """Features (c, F) on the CPU, chunk by chunk; every rank encodes its part of each."""
    images, chunk = loader.images, EVALUATION_BATCH * world_size()
    starts = range(0, len(images), chunk)
    # the last chunk is filled up with image 0, since all ranks must send the same number
    parts = [np.arange(start, start + chunk).reshape(world_size(), -1)[rank()] for start in starts]
    parts = [np.where(part < len(images), part, 0) for part in parts]
    if copy is None:
        every = np.concatenate(parts)
        batches = whole_images(
            images, every, size=loader.recipe.views[0].size, device=loader.device, workers=workers
        )
    else:
        batches = (x for _, (x,) in loader.load([(copy, part, (0,)) for part in parts]))
    for start, batch in zip(starts, batches, strict=True):
        yield all_gather(embed(batch))[: len(images) - start].cpu()
