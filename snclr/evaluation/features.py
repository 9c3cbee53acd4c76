"""Frozen features of an image set, raw pixels as features, and a digest of an encoder."""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ..datasets.images import ImageSet
from ..loader import whole_images
from ..running.distributed import rank, world_size


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
    """SHA-256 of the facts on which features depend, and of the number, labels and names of images.

    The contents of the images are not part of it: replacing a file under the same name is not
    noticed.
    """
    sha = hashlib.sha256(repr((*facts, len(images))).encode())
    sha.update(b"" if images.labels is None else images.labels.numpy().tobytes())
    sha.update(b"" if images.names is None else images.names.tobytes())
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
    """Features (n_r, F) and labels (n_r,) of this rank's share of a labelled set, on the CPU.

    The share of rank r is image r and every world_size-th image after it. embed: normalised images
    (B, C, size, size) to features (B, F).
    """
    indices = np.arange(rank(), len(images), world_size())
    batches = whole_images(images, indices, size=size, device=device, workers=workers)
    return torch.cat([embed(batch).cpu() for batch in batches]), images.labels[indices]
