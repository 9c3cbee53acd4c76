"""The objectives: soft neighbours (SNCLR) and its relatives, each a function without state.

Notation, as in the paper (Ge et al., ICLR 2023): B images on this rank, N in the global batch, D
dimensions, K neighbours, M bank rows, T temperature. z is the prediction of one view (query), y its
online projection, k the momentum projection of the other view (key), C the bank, NN_1..K its rows
nearest to k, NN_0 = k itself.

All functions normalise query, online and key themselves, and compute in at least float32. They need
the same B on every rank, gather what they need from all ranks, and return this rank's mean: DDP
averages the gradients, which gives the gradient of the global mean.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .choices import CANDIDATES, FORMS
from .memory_bank import gather
from .running.distributed import all_gather, all_gather_with_grad, all_sum, rank
from .running.precision import full_precision, unit
from .streamed import log_sum_exp


class Candidates(NamedTuple):
    """What every query of the global batch is compared with.

    keys (N, D)     unit momentum keys of all ranks, in rank order; each counts once
    counts (M,)     int32, how often each bank row counts in the denominator: as often as the global
                    batch picked it, 0 if it is no candidate; (0,) if no row is one (see restrict)

    The ranks exchange counts, not the picked features: M integers, whatever N, K and D are.
    """

    keys: Tensor
    counts: Tensor


def count_picks(rows: Tensor, bank_size: int) -> Tensor:
    """How often the global batch picked each bank row, (M,) int32.

    rows (B, K): the neighbours of this rank's images, -1 for none.
    """
    picks = rows.flatten() + 1  # entry 0 counts the -1s
    counts = torch.zeros(bank_size + 1, dtype=torch.int32, device=rows.device)
    counts.scatter_add_(0, picks, torch.ones_like(picks, dtype=torch.int32))
    return all_sum(counts[1:])


@full_precision
def gather_candidates(key: Tensor, rows: Tensor, bank_size: int) -> Candidates:
    """Candidates from this rank's keys (B, D) and neighbour rows (B, K).

    Costs one all-gather of the keys and one all-reduce of integers.
    """
    return Candidates(all_gather(unit(key)), count_picks(rows, bank_size))


def restrict(candidates: Candidates, kind: str) -> Candidates:
    """The candidates that --candidates leaves, of those that the global batch picked.

        all      Z_i = sum_n exp(z_i . k_n / T) + sum_m count_m exp(z_i . C_m / T)  (as released)
        unique   Z_i = sum_n exp(z_i . k_n / T) + sum_m [count_m > 0] exp(z_i . C_m / T)
        keys     Z_i = sum_n exp(z_i . k_n / T)

    With keys, the neighbours only attract, and no product with the bank is left: this is between
    SNCLR and MNN (Long et al. 2023), which has no negatives at all. Raises ValueError for an
    unknown kind.
    """
    if kind not in CANDIDATES:
        raise ValueError(f"kind must be one of {CANDIDATES}, found {kind!r}")
    keys, counts = candidates
    if kind == "unique":
        counts = counts.clamp(max=1)
    return Candidates(keys, counts[:0] if kind == "keys" else counts)


def mix_with_keys(neighbours: Tensor, key: Tensor, shares: Tensor) -> Tensor:
    """Positives between each neighbour and the image's own key (MNN, Long et al. 2023), (B, K, D):

        unit( share_ik NN_ik + (1 - share_ik) k_i )

    neighbours (B, K, D) unit vectors; key (B, D); shares (B, K) in 0 .. 1. MNN draws one share a
    step and direction for the whole batch; here each neighbour of each image has its own.
    """
    shares = shares.to(neighbours)[:, :, None]
    return unit(torch.lerp(unit(key).to(neighbours.dtype)[:, None], neighbours, shares))


def gather_neighbours(bank: Tensor, rows: Tensor) -> Tensor:
    """bank[rows] (B, K, D) of bank (M, D) and rows (B, K); any bank row where rows has -1.

    positiveness and snclr_loss share it.
    """
    return gather(bank, rows.clamp(min=0))


@full_precision
def positiveness(
    online: Tensor,
    bank: Tensor,
    rows: Tensor,
    *,
    temperature: float = 1.0,
    threshold: bool = False,
    projections: tuple[Tensor, Tensor] | None = None,
    neighbours: Tensor | None = None,
) -> Tensor:
    """Soft weights of the neighbours. The softmax runs over the valid rows:

        w_ik = softmax_k( y_i . C[rows_ik] / temperature )

    With projections, the paper's cross-attention (Ge et al., eq. 2); the projected vectors are not
    normalised again:

        w_ik = softmax_k( f1 y_i . f2 C[rows_ik] / temperature )

    online (B, D)       online projections, with gradient
    bank (M, D)         unit rows
    rows (B, K)         neighbours, -1 for none
    temperature         1 in the released code
    threshold           a weight that is not strictly above 1/(number of valid rows) becomes 0; the
                        others are not renormalised
    projections         (f1, f2), two (D', D) matrices with gradient
    neighbours          from gather_neighbours, if the caller has them already

    Returns (B, K); the weights of invalid rows are 0.
    """
    valid = rows >= 0
    attending = unit(online)
    if projections is not None:
        f1, f2 = (matrix.to(attending.dtype) for matrix in projections)
        # f1 y . f2 c = (f2' f1 y) . c: no neighbour needs to be projected
        attending = attending @ f1.T @ f2
    cosines = _cosines_with_rows(attending, bank, rows, neighbours)
    # finite, not -inf, which would give an image without any neighbour 0/0, also in the gradient
    logits = (cosines / temperature).masked_fill(~valid, torch.finfo(cosines.dtype).min)
    weights = torch.softmax(logits, dim=1) * valid
    if threshold:
        uniform = 1 / valid.sum(dim=1, keepdim=True).clamp(min=1).to(weights.dtype)
        weights = weights * (weights > uniform)
    return weights


@full_precision
def snclr_loss(
    query: Tensor,
    key: Tensor,
    bank: Tensor,
    rows: Tensor,
    weights: Tensor,
    *,
    temperature: float,
    form: str = "sum_of_logs",
    candidates: Candidates | None = None,
    neighbours: Tensor | None = None,
    normalise: bool = False,
    tf32: bool = False,
) -> Tensor:
    """Contrast with the own key and its soft neighbours, one direction (Ge et al., eq. 3).

    With s_ik = z_i . NN_ik / T, w_i0 = 1 and Z_i over all candidates of the global batch:

        Z_i = sum_n sum_k exp(z_i . NN_nk / T)
            = sum_n exp(z_i . k_n / T) + sum_m count_m exp(z_i . C_m / T)

        sum_of_logs   L_i = sum_k w_ik * (log Z_i - s_ik)            as released
        log_of_sum    L_i = log Z_i - log sum_k w_ik exp(s_ik)       as printed in the paper
        loss = 2T * mean_i L_i

    A bank row that five images picked counts five times in Z_i. With normalise, w_ik is divided by
    sum_j w_ij, so that the weights of an image's positives sum to 1 (--normalise-positives).

    If the neighbours are not among the candidates (restrict, or mix_with_keys), the exponential of
    a positive may exceed Z_i, so the loss can fall below 0. It stays bounded: all s lie within
    1/T of 0, and so does the gradient by unit(z_i), which is W (mean candidate - mean positive) / T
    with W = sum_k w_ik in sum_of_logs, and without W in log_of_sum.

    query (B, D)            predictions, with gradient
    key (B, D)              momentum projections of the other view
    bank (M, D)             unit rows
    rows (B, K)             neighbours of the keys, -1 for none
    weights (B, K)          with or without gradient
    candidates              from gather_candidates (and restrict), if the caller has them
    neighbours (B, K, D)    the positives: from gather_neighbours, if the caller has them, or others
                            in their place (mix_with_keys)
    tf32                    whether a GPU may compare with all candidates in TF32

    Returns a scalar. Raises ValueError for an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, found {form!r}")
    if candidates is None:
        candidates = gather_candidates(key, rows, len(bank))
    query, key = unit(query), unit(key)
    weights = weights.to(query.dtype) * (rows >= 0)
    keys, counts = candidates
    log_z = log_sum_exp(query, keys, bank[: len(counts)], counts, temperature, tf32_products=tf32)
    own = (query * key.detach()).sum(dim=1) / temperature
    soft = _cosines_with_rows(query, bank, rows, neighbours) / temperature
    if form == "sum_of_logs":
        per_image = log_z - own + (weights * (log_z[:, None] - soft)).sum(dim=1)
        if normalise:
            per_image = per_image / (1 + weights.sum(dim=1))
    else:
        scores = torch.cat([own[:, None], soft], dim=1)
        weights = torch.cat([torch.ones_like(own[:, None]), weights], dim=1)
        if normalise:
            weights = weights / weights.sum(dim=1, keepdim=True)
        # not log w + s: the gradient of log w is infinite where a weight is 0
        largest = scores.detach().masked_fill(weights <= 0, -math.inf).amax(dim=1, keepdim=True)
        # the clamp only changes entries of weight 0
        exponentials = (scores - largest).clamp(max=50).exp()
        per_image = log_z - largest[:, 0] - (weights * exponentials).sum(dim=1).log()
    return 2 * temperature * per_image.mean()


def mocov3_loss(query: Tensor, key: Tensor, *, temperature: float) -> Tensor:
    """Contrast with the own key among the N fresh keys, one direction (Chen et al. 2021, alg. 1).

        loss = 2T * mean_i ( log sum_n exp(z_i . k_n / T) - z_i . k_i / T )

    query (B, D) with gradient, key (B, D). This is snclr_loss without neighbours (K = 0).
    """
    no_weights = key.new_empty(len(key), 0)
    return snclr_loss(query, key, key[:0], no_weights.long(), no_weights, temperature=temperature)


@full_precision
def nnclr_loss(neighbour: Tensor, prediction: Tensor, *, temperature: float) -> Tensor:
    """Nearest neighbours as queries, predictions as candidates (Dwibedi et al. 2021, eq. 3).

    One direction, with j over the global batch:

        loss = mean_i ( log sum_j exp(NN(y1_i) . z2_j / T) - NN(y1_i) . z2_i / T )

    neighbour (B, D)    nearest bank row of each online projection, no gradient
    prediction (B, D)   of the other view, gathered from all ranks with gradient
    """
    neighbour, prediction = unit(neighbour).detach(), all_gather_with_grad(unit(prediction))
    labels = torch.arange(len(neighbour), device=neighbour.device) + rank() * len(neighbour)
    return cross_entropy(neighbour @ prediction.T / temperature, labels)


@full_precision
def mocov2_loss(
    query: Tensor, key: Tensor, bank: Tensor, valid: Tensor, *, temperature: float
) -> Tensor:
    """Contrast with the own key against the bank (He et al. 2020, eq. 1).

    With m over the valid rows:

        loss = mean_i ( log( exp(z_i . k_i / T) + sum_m exp(z_i . C_m / T) ) - z_i . k_i / T )

    query (B, D) with gradient, key (B, D), bank (M, D) unit rows, valid (M,) bool. The bank is the
    global one: its rows are keys of all ranks.
    """
    query, key = unit(query), unit(key).detach()
    own = (query * key).sum(dim=1) / temperature
    negatives = log_sum_exp(query, key[:0], bank, valid.int(), temperature)
    return (torch.logaddexp(own, negatives) - own).mean()


def loss_at_chance(
    method: str, form: str, temperature: float, num_candidates: float, weight_sum: float
) -> float | None:
    """The loss of a step if all candidates look the same to the encoder.

    num_candidates  C, the candidates of one image, with its own key
    weight_sum      W, the mean of sum_k w_ik in this step, with w_i0 = 1; 1 if they are normalised

        mocov2, nnclr           log C
        mocov3, sum_of_logs     4T * W log C
        log_of_sum              4T * (log C - log W)

    This also holds for positives that are not among the candidates: all cosines are equal. None if
    the value is not above 0, as for a single candidate.
    """
    if num_candidates <= 1:
        return None
    if method in ("mocov2", "nnclr"):
        return math.log(num_candidates)
    per_image = weight_sum * math.log(num_candidates)
    if form == "log_of_sum":
        per_image = math.log(num_candidates) - math.log(weight_sum)
    return 2 * (2 * temperature * per_image) if per_image > 0 else None


def _cosines_with_rows(
    query: Tensor, bank: Tensor, rows: Tensor, neighbours: Tensor | None
) -> Tensor:
    """query (B, D), with gradient, times bank[rows] (B, K, D): (B, K).

    Where rows has -1, the values are finite and mean nothing.
    """
    if not rows.numel():
        return query.new_zeros(rows.shape)
    neighbours = gather_neighbours(bank, rows) if neighbours is None else neighbours
    return torch.einsum("bd,bkd->bk", query, neighbours.to(query.dtype))
