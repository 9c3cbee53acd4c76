"""What a training step is measured by: metrics over the global batch, and the time spent waiting."""

import time

import torch
from torch import Tensor

from ..builder import StepView
from ..objectives import loss_at_chance
from .distributed import all_sum, world_size
from .precision import unit


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
    """Metrics of one step over the global batch, from every rank's share: one all-reduce, the same on every rank.

    loss, and loss_ratio to the loss at chance (None if undefined); feature_std: standard deviation of the unit projections
    over the batch times sqrt(D), about 1 when spread over the sphere, 0 at collapse; bank_fill. With a search in the bank:
    neighbour_similarity (mean cosine), positiveness_entropy (share of the uniform weights' entropy), distinct_rows and
    largest_count of the picks, and neighbour_purity (of the neighbours where both have a label, the share with the query's).
    """
    projection = unit(shown.projection).double()
    valid = shown.neighbour_ids >= 0
    number = valid.sum(dim=1)
    weights = shown.weights.double()
    shares = weights / weights.sum(dim=1, keepdim=True).clamp(
        min=1e-12
    )  # a threshold leaves sums below 1
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
    """How long training waits for what happens in `with` blocks. On a GPU by its own clock: the host runs ahead, and while it
    is busy in a block the GPU still has work; between the two marks that the host leaves there it can but wait."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.marks = device.type == "cuda", []

    def _mark(self, *_):
        if self.on_gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append(mark)

    __enter__ = __exit__ = _mark

    def seconds(self) -> float:
        """Of all blocks since the last call. A GPU must have passed them, as it has where a value was read."""
        pairs, self.marks = list(zip(self.marks[::2], self.marks[1::2], strict=True)), []
        if self.on_gpu:
            return sum(start.elapsed_time(end) for start, end in pairs) / 1000
        return sum(end - start for start, end in pairs)
