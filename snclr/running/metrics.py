"""Metrics of a training step over the global batch, and the time for which training waits."""

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives import loss_at_chance
from .distributed import all_sum, world_size
from .precision import unit


class StepView(NamedTuple):
    """What a step passes to its metrics and pictures, detached. It is of this rank's batch, except
    for counts and row_candidates, and of the direction from view 1 to view 2 (or to the weak view).

    projection      (B, D) online projection of view 1
    scores          (B, K) cosines of the searched vectors with their neighbours
    neighbour_ids   (B, K) data-set indices, -1 for none
    weights         (B, K) positiveness, before --normalise-positives
    counts          (M,) how often the global batch picked each bank row
    num_candidates  () how many candidates the denominator of an image has
    bank_fill       () share of the bank's rows that were written before this step; None: no bank
    terms           further terms of the loss by name, scalars (), this rank's mean; the model adds
                    them to the loss, and the log has them as term_NAME
    rows            (B, K) bank rows of the neighbours, -1 for none
    row_candidates  (M,) how often each bank row that the batch picked is in the denominator; (0,):
                    no row is; None: the denominator has other rows

    K and M are 0 for the methods without neighbours.
    """

    projection: Tensor
    scores: Tensor
    neighbour_ids: Tensor
    weights: Tensor
    counts: Tensor
    num_candidates: Tensor | int
    bank_fill: Tensor | None
    terms: Mapping[str, Tensor] = MappingProxyType({})
    rows: Tensor | None = None
    row_candidates: Tensor | None = None


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
    normalised: bool = False,
) -> dict:
    """Metrics of one step over the global batch, the same on every rank. Collective: one
    all-reduce.

    loss                    the mean over the images
    loss_ratio              loss over the loss at chance; None if that is undefined, or if there are
                            further terms
    term_NAME               each term of shown.terms
    feature_std             standard deviation of the unit projections over the batch, times
                            sqrt(D): about 1 if they are spread over the sphere, 0 at collapse
    bank_fill               as in StepView

    If the bank was searched:

    neighbour_similarity    mean cosine of the neighbours
    positiveness_entropy    entropy of the weights, as a share of that of uniform weights
    distinct_rows           how many bank rows were picked
    largest_count           how often the most popular bank row was picked

    With labels, of pairs in which both the image and the other one have a label:

    neighbour_purity        share of the neighbours that have the image's label
    weighted_purity         the same, by positiveness rather than by number
    same_label_negatives    share of the negatives that have the image's label. Negatives are the
                            candidates of the denominator that are neither the image's own key nor
                            one of its own neighbours (not for mocov2)

    normalised: whether the weights of an image's positives were divided by their sum.
    """
    projection = unit(shown.projection).double()
    valid = shown.neighbour_ids >= 0
    num_valid = valid.sum(dim=1)
    weights = shown.weights.double()
    # shares of their sum, which is below 1 if a threshold removed some
    shares = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-12)
    has_several = num_valid > 1
    entropy = torch.special.entr(shares).sum(dim=1)[has_several] / num_valid[has_several].log()
    known = same = valid.new_zeros(())
    if labels is not None:
        neighbour_labels, own_labels = labels[shown.neighbour_ids], labels[ids][:, None]
        known = valid & (neighbour_labels >= 0) & (own_labels >= 0)
        same = known & (neighbour_labels == own_labels)
    images_by_label = rows_by_label = weights.new_zeros(0)
    candidates = torch.zeros_like(weights)  # how often each neighbour is in the denominator
    if labels is not None and shown.row_candidates is not None:
        num_labels, rows = int(labels.max()) + 1, shown.rows.clamp(min=0)
        images_by_label = _by_label(own_labels, torch.ones_like(own_labels).double(), num_labels)
        if len(shown.row_candidates):
            candidates = shown.row_candidates[rows] * valid.double()
        # a row that c images of the global batch picked comes up c times
        rows_by_label = _by_label(
            neighbour_labels, candidates / shown.counts[rows].clamp(min=1), num_labels
        )
    terms = {f"term_{name}": term for name, term in shown.terms.items()}
    sums = {
        "loss": loss.detach(),
        "images": ids.new_tensor(len(ids)),
        "weights": weights.sum(),
        "picks": valid.sum(),
        "scores": shown.scores[valid].sum(),
        "entropy": entropy.sum(),
        "entropies": has_several.sum(),
        "known": known.sum(),
        "same": same.sum(),
        "known_weight": (weights * known).sum(),
        "same_weight": (weights * same).sum(),
        "known_own": (candidates * known).sum(),
        "same_own": (candidates * same).sum(),
        **terms,
    }
    scalars = torch.stack([x.double() for x in sums.values()])
    vectors = [
        projection.sum(dim=0),
        projection.square().sum(dim=0),
        images_by_label,
        rows_by_label,
    ]
    total = all_sum(torch.cat([scalars, *vectors]))
    scalars, first, second, *by_label = total.split([len(sums), *map(len, vectors)])
    total = dict(zip(sums, scalars.tolist(), strict=True))

    images, mean_loss = total["images"], total["loss"] / world_size()
    # 1 is that of the image's own key
    mean_weight = 1 if normalised else 1 + total["weights"] / images
    chance = loss_at_chance(method, form, temperature, int(shown.num_candidates), mean_weight)
    variance = (second / images - (first / images).square()).clamp(min=0)
    metrics = {
        "loss": mean_loss,
        "loss_ratio": mean_loss / chance if chance and not terms else None,
        **{name: total[name] / world_size() for name in terms},
        "feature_std": (variance.sqrt().mean() * projection.shape[1] ** 0.5).item(),
    }
    if shown.bank_fill is not None:
        metrics["bank_fill"] = shown.bank_fill.item()
    if total["picks"]:
        metrics |= {
            "neighbour_similarity": total["scores"] / total["picks"],
            "positiveness_entropy": (
                total["entropy"] / total["entropies"] if total["entropies"] else None
            ),
            "distinct_rows": int((shown.counts > 0).sum()),
            "largest_count": int(shown.counts.max()),
        }
        if total["known"]:
            metrics["neighbour_purity"] = total["same"] / total["known"]
        if total["known_weight"]:
            metrics["weighted_purity"] = total["same_weight"] / total["known_weight"]
    images_of, candidates_of = by_label[0], by_label[0] + by_label[1]
    labelled = images_of.sum().item()  # each has its own key among the candidates
    negatives = labelled * candidates_of.sum().item() - labelled - total["known_own"]
    if negatives > 0:
        same_negatives = (images_of @ candidates_of).item() - labelled - total["same_own"]
        metrics["same_label_negatives"] = same_negatives / negatives
    return metrics


def _by_label(labels, shares, num_labels):
    """The sum of the shares (...) with each label (...) of 0 .. num_labels - 1; -1 is no label."""
    sums = shares.new_zeros(num_labels + 1)
    return sums.index_add_(0, labels.flatten() + 1, shares.flatten())[1:]


class Waits:
    """Measures the time for which training waits for `with` blocks, such as that of the next batch.

    On a GPU this is the time between two events that the host records before and after the block,
    by the GPU's clock. The host runs ahead of the GPU: in a block, the GPU waits only from the end
    of its earlier work until the host leaves the block.
    """

    def __init__(self, device: torch.device):
        self.on_gpu, self.times = device.type == "cuda", []

    def _mark(self, *_):
        now = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            now.record()
        self.times.append(now)

    __enter__ = __exit__ = _mark

    def seconds(self) -> float:
        """The sum over all blocks since the last call. The GPU must have passed them: read a value
        from it first.
        """
        pairs, self.times = list(zip(self.times[::2], self.times[1::2], strict=True)), []
        if self.on_gpu:
            return sum(start.elapsed_time(end) for start, end in pairs) / 1000
        return sum(end - start for start, end in pairs)
