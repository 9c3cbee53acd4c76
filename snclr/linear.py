"""Linear classifiers on frozen features: a whole grid of them, trained side by side as one batched operation."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .distributed import all_sum, synchronise_batch_norm, world_size
from .precision import full_precision, widen

NORMS = ("plain", "batchnorm")


class LinearGrid(nn.Module):
    """Heads for every combination of features x {plain, batch norm without affine before the head} x learning rate.

    Heads of the same input share one product. Each is independent of the others: with learning rate s(t) * base the update
    of head h needs its gradient times base_h alone, so the sum of base_h * loss_h, minimised by one SGD with rate s(t), trains
    them all as if alone. All heads of one input start from the same draw, N(0, 0.01), so that a head's result
    does not depend on which others stand beside it.
    """

    def __init__(self, dims: dict[str, int], num_classes: int, rates: Sequence[float], seed: int = 0):
        """dims: width F of each kind of features; rates: base_h of the H heads of each input."""
        super().__init__()
        self.register_buffer("rates", torch.tensor(rates, dtype=torch.get_default_dtype()), persistent=False)
        self.norms = nn.ModuleDict({name: nn.BatchNorm1d(width, affine=False) for name, width in dims.items()})
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        for name, width in dims.items():
            start = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(seed)) * 0.01
            for norm in NORMS:
                weight = start.to(self.rates.dtype).repeat(len(rates), 1, 1)
                self.weights[f"{name}/{norm}"] = nn.Parameter(weight)
                self.biases[f"{name}/{norm}"] = nn.Parameter(torch.zeros(len(rates), num_classes))

    def names(self) -> list[tuple[str, str, int]]:
        """(features, norm, index of the rate) of every head, in the order of `losses` and `logits`."""
        return [(*key.split("/"), rate) for key in self.weights for rate in range(len(self.rates))]

    @full_precision
    def logits(self, features: dict[str, Tensor]) -> Tensor:
        """Features (B, F) of each kind to logits (B, heads, classes)."""
        found = []
        for key, weight in self.weights.items():
            name, norm = key.split("/")
            x = widen(features[name])
            x = self.norms[name](x) if norm == "batchnorm" else x
            found.append((x @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2]) + self.biases[key])
        return torch.cat(found, dim=1)

    def losses(self, features: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Cross-entropy (heads,) of each head, the mean over this rank's batch."""
        logits = self.logits(features)
        targets = labels[:, None].expand(logits.shape[:2])
        return nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(dim=0)

    def train_step(self, optimizer: torch.optim.Optimizer, features: dict[str, Tensor], labels: Tensor) -> Tensor:
        """One step of all heads on this rank's part of the batch; returns the losses (heads,) before it, detached.

        optimizer: torch.optim.SGD over these parameters, without decay, its lr the schedule's factor s(t).
        """
        losses = self.losses(features, labels)
        optimizer.zero_grad(set_to_none=True)
        (losses * self.rates.repeat(len(self.weights))).sum().backward()
        if world_size() > 1:
            for parameter in self.parameters():
                parameter.grad = all_sum(parameter.grad) / world_size()
        optimizer.step()
        return losses.detach()

    def synchronised(self, device: torch.device) -> "LinearGrid":
        """On the device, its batch norms over the batches of all ranks."""
        return synchronise_batch_norm(self.to(device), device)


def held_out(labels: Tensor, share: float, keys: Tensor) -> Tensor:
    """(n,) bool: about `share` of the images of each class, at least one and not all, those with the smallest keys.

    labels (n,) int64; keys (n,) any numbers, one an image.
    """
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        chosen[members[keys[members].argsort()[:count]]] = True
    return chosen
