"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, section 3.4; the DINO protocol)."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..datasets.images import ImageSet
from ..loader import EVALUATION_BATCH, whole_images
from ..running.distributed import all_gather, rank, world_size
from ..running.precision import full_precision, unit
from .features import encode_share


@torch.no_grad()
@full_precision
def nearest(
    queries: Tensor, features: Tensor, labels: Tensor, k: int, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Cosines (n, k), best first, and labels (n, k) of the nearest of ALL ranks' features; alike on every rank.

    queries (n, F), the same on every rank; features (m, F) and labels (m,) are this rank's share: each rank finds its own k
    best and only these travel, so that no rank ever holds the whole set. Where there are fewer than k features, the
    rest has cosine -2. Memory: chunk * m cosines.
    """
    found = []
    for part in queries.split(chunk):
        cosines, where = (part @ features.T).topk(min(k, len(features)), dim=1)
        # every rank's best side by side: (n, ranks * k)
        cosines = torch.cat(all_gather(_pad(cosines, k, -2.0)).chunk(world_size()), dim=1)
        votes = torch.cat(all_gather(_pad(labels[where], k, 0)).chunk(world_size()), dim=1)
        best, order = cosines.topk(k, dim=1)
        found.append((best, votes.gather(1, order)))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def vote(cosines: Tensor, votes: Tensor, num_classes: int, temperature: float | None) -> Tensor:
    """Class scores (n, num_classes) from the nearest (n, k): sum of exp(cosine / temperature), None: of ones, over those
    that have the class. Of equally many plain votes the first class wins."""
    weights = torch.ones_like(cosines) if temperature is None else (cosines / temperature).exp()
    weights = weights * (cosines > -1.5)  # below every cosine: there was no such neighbour
    return cosines.new_zeros(len(cosines), num_classes).scatter_add_(1, votes, weights)


def _pad(x: Tensor, columns: int, value: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, columns - x.shape[1]), value=value)


def table(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    num_val: int,
    num_classes: int,
    ks: Sequence[int],
    temperature: float,
    device: torch.device,
) -> dict[str, float]:
    """Top-1 in percent for each k, weighted and by plain votes, from one search: 'k=20 weighted' and so on.

    train, val: this rank's shares, features (n_r, F) and labels (n_r,) as encode_share returns them; num_val: images of all
    shares of val.
    """
    queries, truth = (join_shares(x.to(device), num_val) for x in (unit(val[0]), val[1]))
    cosines, votes = nearest(queries, unit(train[0]).to(device), train[1].to(device), max(ks))
    found = {}
    for k in ks:
        for name, weighting in (("weighted", temperature), ("plain", None)):
            said = vote(cosines[:, :k], votes[:, :k], num_classes, weighting).argmax(dim=1)
            found[f"k={k} {name}"] = 100 * (said == truth).double().mean().item()
    return found


def accuracy(
    embed: Callable[[Tensor], Tensor],
    train: ImageSet,
    val: ImageSet,
    *,
    size: int,
    device: torch.device,
    workers: int,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Top-1 accuracy in percent on val, with the labelled features of train as neighbours; the same on every rank.

    embed: normalised images (B, 3, size, size) to features (B, F).
    """
    train, val = train.labelled(), val.labelled()
    where = dict(size=size, device=device, workers=workers)
    shares = [encode_share(embed, images, **where) for images in (train, val)]
    return table(*shares, len(val), len(train.classes), (k,), temperature, device)[
        f"k={k} weighted"
    ]


def join_shares(x: Tensor, total: int) -> Tensor:
    """All rows, rank after rank, from each rank's share (every world_size-th row) of `total`; alike on every rank."""
    longest = -(-total // world_size())
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    shares = all_gather(padded).chunk(world_size())
    return torch.cat(
        [share[: len(range(number, total, world_size()))] for number, share in enumerate(shares)]
    )


@torch.no_grad()
def calibrated_copy(
    encoder: nn.Module,
    images: ImageSet,
    *,
    size: int,
    device: torch.device,
    workers: int,
    count: int = 1024,
) -> nn.Module:
    """A copy of an untrained encoder, in eval mode, whose batch norms hold the statistics of `count` images.

    At initialisation running means and variances are 0 and 1, which says nothing of the network: without this the
    'untrained' accuracy would measure the missing statistics.
    """
    encoder = copy.deepcopy(encoder).train()
    norms = [
        module
        for module in encoder.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    share = min(count, len(images)) // world_size()  # synchronised norms need equal batches
    share = (
        share // EVALUATION_BATCH * EVALUATION_BATCH or share
    )  # and an average over batches, full ones
    indices = np.arange(share) * world_size() + rank()
    if norms:
        for batch in whole_images(images, indices, size=size, device=device, workers=workers):
            encoder.embed(batch)
    return encoder.eval()
