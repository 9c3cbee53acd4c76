"""Linear classifiers on frozen features: a whole grid of them, trained side by side as one batched operation."""

from collections.abc import Sequence

import timm.models.vision_transformer as timm_vit
import torch
from torch import Tensor, nn

from ..running.batch_norm import GlobalBatchNorm
from ..running.distributed import all_sum, world_size
from ..running.errors import UsageError
from ..running.precision import full_precision, widen

NORMS = ("plain", "batchnorm")


def kinds_of(encoder: nn.Module) -> dict[str, int]:
    """The kinds of features that a probe looks at: each is the first so many columns of what `features_of` returns."""
    width = encoder.num_features
    return {"token": width, "token+mean": 2 * width} if _has_tokens(encoder) else {"pooled": width}


def features_of(encoder: nn.Module, x: Tensor) -> Tensor:
    """(B, 3, S, S) -> the encoder's features; of a ViT the class token with the mean of its patch tokens beside it (B, 2C)."""
    if not _has_tokens(encoder):
        return encoder.embed(x)
    tokens = encoder.forward_features(x)
    mean = tokens[:, encoder.num_prefix_tokens :].mean(dim=1)
    return torch.cat([encoder.forward_head(tokens, pre_logits=True), mean], dim=1)


def _has_tokens(encoder):
    return isinstance(encoder, timm_vit.VisionTransformer) and encoder.global_pool == "token"


class LinearGrid(nn.Module):
    """Heads for every combination of features x {plain, batch norm without affine before the head} x learning rate.

    Heads of the same input share one product. Each is independent of the others: with learning rate s(t) * base the update
    of head h needs its gradient times base_h alone, so the sum of base_h * loss_h, minimised by one SGD with rate s(t), trains
    them all as if alone. All heads of one input start from the same draw, N(0, 0.01), so that a head's result
    does not depend on which others stand beside it.
    """

    def __init__(
        self, dims: dict[str, int], num_classes: int, rates: Sequence[float], seed: int = 0
    ):
        """dims: how many of the feature columns each kind takes; rates: base_h of the H heads of each input."""
        super().__init__()
        self.dims = dims
        self.register_buffer(
            "rates", torch.tensor(rates, dtype=torch.get_default_dtype()), persistent=False
        )
        self.norms = nn.ModuleDict(
            {name: GlobalBatchNorm(width, affine=False) for name, width in dims.items()}
        )
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        for name, width in dims.items():
            start = (
                torch.randn(num_classes, width, generator=torch.Generator().manual_seed(seed))
                * 0.01
            )
            for norm in NORMS:
                weight = start.to(self.rates.dtype).repeat(len(rates), 1, 1)
                self.weights[f"{name}/{norm}"] = nn.Parameter(weight)
                self.biases[f"{name}/{norm}"] = nn.Parameter(torch.zeros(len(rates), num_classes))

    def names(self) -> list[tuple[str, str, int]]:
        """(features, norm, index of the rate) of every head, in the order of `losses` and `logits`."""
        return [(*key.split("/"), rate) for key in self.weights for rate in range(len(self.rates))]

    @full_precision
    def logits(self, features: Tensor) -> Tensor:
        """Features (B, F) to logits (B, heads, classes)."""
        found = []
        for key, weight in self.weights.items():
            name, norm = key.split("/")
            x = widen(features)[:, : self.dims[name]]
            x = self.norms[name](x) if norm == "batchnorm" else x
            found.append(
                (x @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2]) + self.biases[key]
            )
        return torch.cat(found, dim=1)

    def losses(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy (heads,) of each head, the mean over this rank's batch."""
        logits = self.logits(features)
        targets = labels[:, None].expand(logits.shape[:2])
        return nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(
            dim=0
        )

    def train_step(
        self, optimizer: torch.optim.Optimizer, features: Tensor, labels: Tensor
    ) -> Tensor:
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

    def correct(self, features: Tensor, labels: Tensor, chunk: int = 1024) -> Tensor:
        """How many of this rank's images each head has right among its 1 and its 5 best classes: (2, heads)."""
        total = torch.zeros(2, len(self.names()), device=self.rates.device)
        for logits, y in self._answers(features, labels, chunk):
            best = logits.topk(min(5, logits.shape[2]), dim=2).indices == y[:, None, None]
            total += torch.stack([best[..., 0].sum(dim=0), best.any(dim=2).sum(dim=0)])
        return total

    def confusion(self, head: int, features: Tensor, labels: Tensor, chunk: int = 1024) -> Tensor:
        """(classes, classes) counts of this rank's images: row the true class, column what one head says."""
        classes = next(iter(self.biases.values())).shape[1]
        counts = torch.zeros(classes * classes, dtype=torch.long, device=self.rates.device)
        for logits, y in self._answers(features, labels, chunk):
            counts += torch.bincount(
                y * classes + logits[:, head].argmax(dim=1), minlength=classes * classes
            )
        return counts.view(classes, classes)

    def _answers(self, features, labels, chunk):
        """(logits, labels) of chunk after chunk, as an evaluation finds them."""
        self.eval()
        for x, y in zip(features.split(chunk), labels.split(chunk), strict=True):
            with torch.no_grad():
                logits = self.logits(x.to(self.rates.device))
            yield logits, y.to(self.rates.device)
        self.train()


def class_share(
    labels: Tensor, classes: list, share: float, keys: Tensor, both_sides: bool = False
) -> Tensor:
    """(n,) bool: of each class the same share of its images, those with the smallest keys, so that a smaller share is part
    of a larger one; both_sides: at least one image of a class inside, and one outside.

    labels (n,) int64 into classes, the names; keys (n,) any numbers, one an image. Raises UsageError where a class would be
    left without images.
    """
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        count = round(share * len(members))
        if both_sides:
            count = min(max(count, 1), len(members) - 1)
        if not count:
            found = f"class {classes[label]} with its {len(members)} images"
            raise UsageError(f"a share of {share:g} leaves {found} none: use a larger one")
        chosen[members[keys[members].argsort()[:count]]] = True
    return chosen
