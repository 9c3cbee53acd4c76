"""Frozen features of whole image sets: encoded once, then held in memory, or in a memory-mapped
file if they are large.

`embed` maps normalised images (B, 3, S, S) to features (B, F) in at least float32, and records no
gradient.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from ..loader import EVALUATION_BATCH, ImageSet, ViewLoader, whole_images
from ..running.distributed import all_gather, barrier, local_rank_zero, rank, world_size
from ..running.errors import RunError


class Pixels(nn.Module):
    """The flattened pixels as features: a baseline for every encoder."""

    def __init__(self, img_size: int):
        super().__init__()
        self.num_features = 3 * img_size**2

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 3 * S * S)."""
        return x.flatten(1)


def digest(module: nn.Module) -> str:
    """SHA-256 of names, shapes and bytes of all parameters and buffers: equal before and after
    means unchanged.
    """
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


@torch.no_grad()
def encode_share(
    embed: Callable[[Tensor], Tensor],
    images: ImageSet,
    *,
    size: int,
    device: torch.device,
    workers: int,
) -> tuple[Tensor, Tensor]:
    """Features (n_r, F) and labels (n_r,), on the CPU, of this rank's share of a labelled set:
    every world_size-th image.
    """
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
    """Features (copies, n, width) float32 of all images of a loader, the same on every rank.

    One copy: the view that evaluation uses; more: that many random crops of each image, those of
    epochs 0 .. copies - 1 of `loader`. Above `limit` bytes the array is a memory-mapped file in
    `folder`, one for all ranks of a machine. The file gets its name only when it is complete. The
    name holds a hash of `key` (everything else that the features depend on) and of the images'
    labels and names, so that a later start finds the file, and never takes a file of other features
    for it. Raises RunError if the file cannot be written.
    """
    images = loader.images
    shape = (copies, len(images), width)
    views = range(copies) if copies > 1 else [None]
    chunks = (chunk for copy in views for chunk in _in_order(embed, loader, copy, workers))
    bytes_needed = 4 * math.prod(shape)
    if bytes_needed <= limit:
        array, done = torch.empty(copies * len(images), width), 0
        for chunk in chunks:
            array[done : done + len(chunk)] = chunk
            done += len(chunk)
        return array.view(shape)
    sha = hashlib.sha256(f"{key} {shape}".encode() + images.labels.numpy().tobytes())
    sha.update(b"" if images.names is None else images.names.tobytes())
    path = os.path.join(folder, f"features_{sha.hexdigest()[:16]}.f32")
    if not os.path.exists(path) or os.path.getsize(path) != bytes_needed:
        if local_rank_zero():
            _write(path, chunks)
        else:
            for _ in chunks:
                pass  # sends this rank's part to the rank that writes
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
    # all ranks must send equal numbers of features: image 0 fills up the last chunk
    parts = [np.arange(start, start + chunk).reshape(world_size(), -1)[rank()] for start in starts]
    parts = [np.where(part < len(images), part, 0) for part in parts]
    if copy is None:
        indices, size = np.concatenate(parts), loader.recipe.size
        batches = whole_images(images, indices, size=size, device=loader.device, workers=workers)
    else:
        batches = (x for _, x in loader.load([(copy, part, (0,)) for part in parts]))
    for start, batch in zip(starts, batches, strict=True):
        yield all_gather(embed(batch))[: len(images) - start].cpu()
