"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, section 3.4; the
DINO protocol).
"""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ..datasets.images import ImageSet
from ..running.distributed import all_gather, rank, world_size
from ..running.precision import full_precision, unit
from .features import CHUNK, encode_share


class Vote(NamedTuple):
    """The k nearest neighbours of an image vote for their classes, each with the weight
    exp(cosine / temperature), or 1 if temperature is None.
    """

    k: int
    temperature: float | None


# votes by their names in metrics.jsonl and results.json: that of DINO, and that of lightly's
# benchmarks
NAMED_VOTES = {"knn_top1": Vote(20, 0.07), "knn200_top1": Vote(200, 0.1)}


@torch.no_grad()
@full_precision
def nearest(
    queries: Tensor, features: Tensor, labels: Tensor, k: int, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Cosines (n, k), best first, and labels (n, k) of the nearest among the features of ALL ranks;
    the same on every rank.

    queries (n, F): unit rows, the same on every rank. features (m, F), unit rows, and labels (m,):
    this rank's share. Each rank sends only its own k best, so no rank needs the whole set. If there
    are fewer than k features, the remaining entries have cosine -2. Memory: chunk * m cosines.
    """
    chunks = []
    for part in queries.split(chunk):
        cosines, rows = (part @ features.T).topk(min(k, len(features)), dim=1)
        # the best of every rank side by side: (n, ranks * k)
        cosines = torch.cat(all_gather(_pad(cosines, k, -2.0)).chunk(world_size()), dim=1)
        neighbours = torch.cat(all_gather(_pad(labels[rows], k, 0)).chunk(world_size()), dim=1)
        best, order = cosines.topk(k, dim=1)
        chunks.append((best, neighbours.gather(1, order)))
    return tuple(map(torch.cat, zip(*chunks, strict=True)))


def vote(cosines: Tensor, labels: Tensor, num_classes: int, temperature: float | None) -> Tensor:
    """Class scores (n, num_classes) from cosines and labels (n, k) of the nearest neighbours.

    The score of a class is the sum of exp(cosine / temperature) over its neighbours, or their
    number if temperature is None. (Then classes are often equal, and argmax takes the first.)
    """
    weights = torch.ones_like(cosines) if temperature is None else (cosines / temperature).exp()
    weights = weights * (cosines > -1.5)  # -2 means that there was no such neighbour
    return cosines.new_zeros(len(cosines), num_classes).scatter_add_(1, labels, weights)


def _pad(x: Tensor, columns: int, value: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, columns - x.shape[1]), value=value)


def table(
    train: tuple[Tensor, Tensor],
    val_features: Tensor,
    val_labels: Tensor,
    num_classes: int,
    votes: dict[str, Vote],
    device: torch.device,
) -> dict[str, float]:
    """Top-1 in percent of each vote, by its name, from one search.

    train: features (m_r, F) and labels (m_r,) of this rank's share, from encode_share;
    val_features (n_r, F): of this rank's share; val_labels (n,): of all validation images.
    """
    longest = -(-len(val_labels) // world_size())
    share = unit(val_features).to(device)
    share = torch.cat([share, share.new_zeros(longest - len(share), share.shape[1])])
    # rank r has image r and every world_size-th image after it: bring them into order
    queries = all_gather(share).unflatten(0, (-1, longest)).transpose(0, 1).flatten(0, 1)
    queries, truth = queries[: len(val_labels)], val_labels.to(device)
    max_k = max(k for k, _ in votes.values())
    cosines, labels = nearest(queries, unit(train[0]).to(device), train[1].to(device), max_k)
    top1 = {}
    for name, (k, temperature) in votes.items():
        predicted = vote(cosines[:, :k], labels[:, :k], num_classes, temperature).argmax(dim=1)
        top1[name] = 100 * (predicted == truth).double().mean().item()
    return top1


def accuracy(
    embed: Callable[[Tensor], Tensor],
    train: ImageSet,
    val: ImageSet,
    load: Callable[..., Iterator[Tensor]],
    device: torch.device,
    votes: dict[str, Vote] = NAMED_VOTES,
) -> dict[str, float]:
    """Top-1 in percent on val of each vote, with the images of train as neighbours; the same on
    every rank. Images without a label are left out. embed, load: see features.encode_share.
    """
    train, val = train.labelled(), val.labelled()
    train_share = encode_share(embed, train, load)
    val_features, _ = encode_share(embed, val, load)
    return table(train_share, val_features, val.labels, len(train.classes), votes, device)


def calibrated_copy(
    encoder: nn.Module,
    images: ImageSet,
    load: Callable[..., Iterator[Tensor]],
    count: int = 1024,
) -> nn.Module:
    """A copy of an untrained encoder, in eval mode, whose batch norms hold the statistics of
    `count` images.

    New batch norms have running means of 0 and variances of 1, whatever the network computes. With
    these, the accuracy of an untrained encoder would mostly show how wrong they are.
    """
    encoder = copy.deepcopy(encoder)
    encoder.forward = encoder.embed  # which update_bn calls; a projector is not needed
    share = min(count, len(images)) // world_size()  # synchronised norms need equal batches
    # only full batches, since the average gives each batch the same weight
    share = share // CHUNK * CHUNK or share
    indices = np.arange(share) * world_size() + rank()
    update_bn(load(images, indices, chunk=CHUNK), encoder)
    del encoder.forward
    return encoder.eval()
