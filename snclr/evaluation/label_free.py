"""Metrics of frozen features that need no labels: how many dimensions they use, and how well two
views of an image agree.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..loader import EpochLoader
from ..running.distributed import all_gather
from ..running.precision import full_precision, unit, widen

SAMPLE = 2048  # images
NEIGHBOURS = 10


@torch.no_grad()
def signals(embed: Callable[[Tensor], Tensor], loader: EpochLoader) -> dict[str, float] | None:
    """effective_rank and view_agreement of the same sample of training images in every epoch and on
    every rank; None if the features are not finite.

    embed: normalised images (B, C, S, S) to features (B, F).
    """
    pairs = [tuple(map(embed, batch.views)) for batch in loader.sample(SAMPLE)]
    first, second = (all_gather(widen(torch.cat(views))) for views in zip(*pairs, strict=True))
    if not (first.isfinite().all() and second.isfinite().all()):
        return None
    return {
        "effective_rank": effective_rank(first),
        "view_agreement": view_agreement(first, second, NEIGHBOURS),
    }


@full_precision
def effective_rank(features: Tensor) -> float:
    """RankMe (Garrido et al. 2023, eq. 1): exp of the entropy of the normalised singular values.

    features (n, F) -> between 1 (full collapse) and F. It counts the dimensions that are used,
    whether they are useful or not.
    """
    values = torch.linalg.svdvals(features)
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum().exp().item()


@full_precision
def view_agreement(first: Tensor, second: Tensor, k: int) -> float:
    """The share of an image's k nearest other images that are the same in both views: the mean over
    images.

    first, second (n, F): row i of both is image i. Chance is k / (n - 1). After a collapse all
    cosines are nearly equal and the value means nothing: compare with effective_rank.
    """
    k = min(k, len(first) - 1)
    is_neighbour = []
    for features in (unit(first), unit(second)):
        cosines = (features @ features.T).fill_diagonal_(-2)
        nearest = cosines.topk(k, dim=1).indices
        is_neighbour.append(torch.zeros_like(cosines).scatter_(1, nearest, 1))
    return ((is_neighbour[0] * is_neighbour[1]).sum(dim=1) / k).mean().item()
