"""Linear classifiers on frozen features: many are trained at once, in batched operations."""

from collections.abc import Callable, Sequence

import timm.models.vision_transformer as timm_vit
import torch
from torch import Tensor, nn

from ..running.batch_norm import GlobalBatchNorm
from ..running.distributed import all_sum, world_size
from ..running.precision import autocast, full_precision, widen

NORMS = ("plain", "batchnorm")


def kinds_of(encoder: nn.Module) -> dict[str, int]:
    """The kinds of features that a probe uses, and their widths. A kind of width w is the first w
    columns of `features_of`.
    """
    width = encoder.num_features
    return {"token": width, "token+mean": 2 * width} if _has_tokens(encoder) else {"pooled": width}


def features_of(encoder: nn.Module, x: Tensor) -> Tensor:
    """(B, C, S, S) -> the encoder's features (B, F); for a ViT with a class token, this token and
    the mean of the patch tokens, side by side (B, 2C).
    """
    if not _has_tokens(encoder):
        return encoder.embed(x)
    tokens = encoder.forward_features(x)
    mean = tokens[:, encoder.num_prefix_tokens :].mean(dim=1)
    return torch.cat([encoder.forward_head(tokens, pre_logits=True), mean], dim=1)


def embedder(encoder: nn.Module, amp: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that computes `features_of` images without gradient, in at least float32. amp:
    precision of the encoder.
    """

    @torch.no_grad()
    def embed(x):
        with autocast(amp, device):
            return widen(features_of(encoder, x))

    return embed


def _has_tokens(encoder):
    return isinstance(encoder, timm_vit.VisionTransformer) and encoder.global_pool == "token"


class LinearGrid(nn.Module):
    """A head for each combination of features, input norm (none, or batch norm without affine) and
    learning rate.

    Heads with the same input share one matrix product. One SGD with rate s(t) minimises the sum of
    rate_h * loss_h, so head h gets its own gradient times s(t) * rate_h, as if it were trained
    alone at this rate. All heads with the same input start from the same draw of N(0, 0.01), so
    that the result of a head does not depend on the other heads.
    """

    def __init__(
        self,
        dims: dict[str, int],
        num_classes: int,
        rates: Sequence[float],
        seed: int = 0,
        norms: Sequence[str] = NORMS,
    ):
        """dims: number of feature columns of each kind; rates: of the heads of each input; norms: a
        selection of NORMS.
        """
        super().__init__()
        self.dims = dims
        rates = torch.tensor(rates, dtype=torch.get_default_dtype())
        self.register_buffer("rates", rates, persistent=False)
        self.norms, self.weights, self.biases = (
            nn.ModuleDict(),
            nn.ParameterDict(),
            nn.ParameterDict(),
        )
        for name, width in dims.items():
            if "batchnorm" in norms:
                self.norms[name] = GlobalBatchNorm(width, affine=False)
            generator = torch.Generator().manual_seed(seed)
            start = torch.randn(num_classes, width, generator=generator) * 0.01
            for norm in norms:
                weight = start.to(self.rates.dtype).repeat(len(rates), 1, 1)
                self.weights[f"{name}/{norm}"] = nn.Parameter(weight)
                self.biases[f"{name}/{norm}"] = nn.Parameter(torch.zeros(len(rates), num_classes))

    def names(self) -> list[tuple[str, str, int]]:
        """(features, norm, index of the rate) of each head, in the order of `logits`."""
        return [(*key.split("/"), rate) for key in self.weights for rate in range(len(self.rates))]

    @full_precision
    def logits(self, features: Tensor) -> Tensor:
        """Features (B, F) to logits (B, heads, classes)."""
        columns = []
        for key, weight in self.weights.items():
            name, norm = key.split("/")
            x = widen(features)[:, : self.dims[name]]
            x = self.norms[name](x) if norm == "batchnorm" else x
            product = (x @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2])
            columns.append(product + self.biases[key])
        return torch.cat(columns, dim=1)

    def train_step(
        self, optimizer: torch.optim.Optimizer, features: Tensor, labels: Tensor
    ) -> Tensor:
        """One step of all heads on this rank's part of the batch; returns the detached losses
        (heads,) before the step.

        optimizer: torch.optim.SGD of these parameters, without weight decay and with s(t) as lr.
        """
        logits = self.logits(features).transpose(1, 2)  # (B, classes, heads)
        targets = labels[:, None].expand(len(labels), logits.shape[2])
        losses = nn.functional.cross_entropy(logits, targets, reduction="none").mean(dim=0)
        optimizer.zero_grad(set_to_none=True)
        (losses * self.rates.repeat(len(self.weights))).sum().backward()
        if world_size() > 1:
            for parameter in self.parameters():
                parameter.grad = all_sum(parameter.grad) / world_size()
        optimizer.step()
        return losses.detach()

    def correct(self, features: Tensor, labels: Tensor, chunk: int = 1024) -> Tensor:
        """For each head the number of this rank's images whose class is its best, and among its 5
        best: (2, heads).
        """
        total = torch.zeros(2, len(self.names()), device=self.rates.device)
        for logits, y in self._evaluate(features, labels, chunk):
            best = logits.topk(min(5, logits.shape[2]), dim=2).indices == y[:, None, None]
            total += torch.stack([best[..., 0].sum(dim=0), best.any(dim=2).sum(dim=0)])
        return total

    def confusion(self, head: int, features: Tensor, labels: Tensor, chunk: int = 1024) -> Tensor:
        """(classes, classes) counts of this rank's images: rows are true classes, columns those
        that one head predicts.
        """
        classes = next(iter(self.biases.values())).shape[1]
        counts = torch.zeros(classes**2, dtype=torch.long, device=self.rates.device)
        for logits, y in self._evaluate(features, labels, chunk):
            cells = y * classes + logits[:, head].argmax(dim=1)
            counts += torch.bincount(cells, minlength=classes**2)
        return counts.view(classes, classes)

    @torch.no_grad()
    def _evaluate(self, features, labels, chunk):
        """(logits, labels) of one chunk after another, in eval mode."""
        self.eval()
        for x, y in zip(features.split(chunk), labels.split(chunk), strict=True):
            yield self.logits(x.to(self.rates.device)), y.to(self.rates.device)
        self.train()
