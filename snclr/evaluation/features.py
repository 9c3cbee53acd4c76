"""Frozen features of an image set, raw pixels as features, and a digest of an encoder."""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ..datasets.images import ImageSet, ResidentImages
from ..running.distributed import all_gather, on_rank_zero, rank, share, world_size
from ..running.provenance import versions_and_commit

CHUNK = 256  # images that a rank encodes at a time, where that matters


class Pixels(nn.Module):
    """The flattened pixels as features: the baseline of every encoder."""

    def __init__(self, channels: int, img_size: int):
        super().__init__()
        self.num_features = channels * img_size**2

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, C * S * S)."""
        return x.flatten(1)


def digest(module: nn.Module) -> str:
    """SHA-256 of the names, shapes and bytes of all parameters and buffers. It changes when one of
    them does.
    """
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def key_of(images: ImageSet, *facts: object) -> str:
    """SHA-256 of all that features depend on: the given facts, the images, and the versions of the
    code and of libraries; the same on every rank.

    Of images in memory the pixels are hashed; of files path, size and time of the last change,
    since reading all of them takes as long as encoding them.
    """

    def key():
        if isinstance(images, ResidentImages):
            pixels = images.images.cpu().contiguous().numpy()
            content = pixels.shape, hashlib.sha256(pixels).hexdigest()
        else:
            content = images.channels, images.grey_range, images.skip_bad, images.file_states()
        parts = facts, content, images.mean.tolist(), images.std.tolist(), versions_and_commit()
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    return on_rank_zero(key)


@torch.no_grad()
def encode_share(
    embed: Callable[[Tensor], Tensor],
    images: ImageSet,
    load: Callable[[ImageSet, np.ndarray], Iterator[Tensor]],
) -> tuple[Tensor, Tensor]:
    """Features (n_r, F) and labels (n_r,) of this rank's share of a labelled set, on the CPU.

    The share of rank r is image r and every world_size-th image after it. load: from images and
    their indices to batches (B, C, S, S), see loader.whole_images; embed: from a batch to features
    (B, F).
    """
    indices = np.arange(rank(), len(images), world_size())
    return torch.cat([embed(x).cpu() for x in load(images, indices)]), images.labels[indices]


def encode_in_order(
    embed: Callable[[Tensor], Tensor],
    num_images: int,
    load_parts: Callable[[list[np.ndarray]], Iterator[Tensor]],
) -> Iterator[Tensor]:
    """Features (c, F) on the CPU of all images in order, chunk by chunk, the same on every rank.

    Every rank encodes its part of each chunk. load_parts: from parts, CHUNK indices each, to a
    batch for each.
    """
    chunk = CHUNK * world_size()
    starts = range(0, num_images, chunk)
    parts = [share(np.arange(start, start + chunk)) for start in starts]
    # all ranks must send equal numbers of features: image 0 completes the last chunk
    parts = [np.where(part < num_images, part, 0) for part in parts]
    for start, x in zip(starts, load_parts(parts), strict=True):
        yield all_gather(embed(x))[: num_images - start].cpu()
