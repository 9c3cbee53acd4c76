"""What a training step is measured by: metrics over the global batch, and the time spent waiting."""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives import loss_at_chance
from .distributed import all_sum, world_size
from .precision import unit


class StepView(NamedTuple):
    """What a step shows to the monitor, detached; of this rank unless said otherwise, and of the
    first direction.

    projection (B, D) online projection of view 1; scores (B, K) cosines of the searched vectors
    with their neighbours; neighbour_ids (B, K) data-set indices, -1 for none; weights (B, K)
    positiveness; counts (M,) picks of each bank row by the global batch; num_candidates () of one
    sample; bank_fill () share of the bank's rows that were written before this step, None without a
    bank. K and M are 0 for the methods without neighbours.
    """

    projection: Tensor
    scores: Tensor
    neighbour_ids: Tensor
    weights: Tensor
    counts: Tensor
    num_candidates: Tensor
    bank_fill: Tensor | None


@torch.no_grad()
def step_metrics(
    loss: Tensor,
    shown: StepView,
    ids: Tensor,
    labels: Tensor | None,
    *,
    method: str,
    form: str,
    temperature: float,
) -> dict:
    """Metrics of one step over the global batch, the same on every rank. Collective: one
    all-reduce.

    loss, and loss_ratio to the loss at chance (None if undefined); feature_std: standard deviation
    of the unit projections over the batch times sqrt(D), about 1 when they are spread over the
    sphere, 0 at collapse; bank_fill. After a search in the bank: neighbour_similarity (mean
    cosine), positiveness_entropy (relative to uniform weights), distinct_rows and largest_count of
    the picks, and neighbour_purity (share of the neighbours that have the query's label, among
    those where both have one).
    """
    projection = unit(shown.projection).double()
    valid = shown.neighbour_ids >= 0
    number = valid.sum(dim=1)
    weights = shown.weights.double()
    # with a threshold the sums are below 1
    shares = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-12)
    several = number > 1
    entropy = torch.special.entr(shares).sum(dim=1)[several] / number[several].log()
    known = same = valid.new_zeros(())
    if labels is not None:
        theirs, own = labels[shown.neighbour_ids], labels[ids][:, None]
        known = valid & (theirs >= 0) & (own >= 0)
        same = known & (theirs == own)
    sums = (
        loss.detach(),
        ids.new_tensor(len(ids)),
        weights.sum(),
        valid.sum(),
        shown.scores[valid].sum(),
        entropy.sum(),
        several.sum(),
        known.sum(),
        same.sum(),
    )
    mine = torch.cat(
        [
            torch.stack([x.double() for x in sums]),
            projection.sum(dim=0),
            projection.square().sum(dim=0),
        ]
    )
    total, first, second = all_sum(mine).split(
        [len(sums), projection.shape[1], projection.shape[1]]
    )
    loss_sum, images, weight_sum, picks, score_sum, entropy_sum, entropies, known_sum, same_sum = (
        total.tolist()
    )
    mean_loss = loss_sum / world_size()
    chance = loss_at_chance(
        method, form, temperature, int(shown.num_candidates), 1 + weight_sum / images
    )
    variance = second / images - (first / images).square()
    metrics = {
        "loss": mean_loss,
        "loss_ratio": mean_loss / chance if chance else None,
        "feature_std": (variance.clamp(min=0).sqrt().mean() * projection.shape[1] ** 0.5).item(),
    }
    if shown.bank_fill is not None:
        metrics["bank_fill"] = shown.bank_fill.item()
    if picks:
        metrics["neighbour_similarity"] = score_sum / picks
        metrics["positiveness_entropy"] = entropy_sum / entropies if entropies else None
        metrics["distinct_rows"] = int((shown.counts > 0).sum())
        metrics["largest_count"] = int(shown.counts.max())
        if known_sum:
            metrics["neighbour_purity"] = same_sum / known_sum
    return metrics


class Waits:
    """The time for which training waits for what happens in `with` blocks.

    On a GPU it is measured by the GPU's clock: the host runs ahead, and while it is busy in a block
    the GPU still has work. Between the two events that the host records there, the GPU has to wait.
    """

    def __init__(self, device: torch.device):
        self.on_gpu, self.times = device.type == "cuda", []

    def _mark(self, *_):
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.times.append(now)

    __enter__ = __exit__ = _mark

    def seconds(self) -> float:
        """Of all blocks since the last call. A GPU must have passed them, as it has once a value
        was read.
        """
        pairs, self.times = list(zip(self.times[::2], self.times[1::2], strict=True)), []
        if self.on_gpu:
            return sum(start.elapsed_time(end) for start, end in pairs) / 1000
        return sum(end - start for start, end in pairs)
