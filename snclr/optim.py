"""Optimisers and schedules. A schedule is a pure function of the step, so that a resumed run has nothing to replay."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

OPTIMIZERS = ("adamw", "lars")


def learning_rate(
    step: int, *, peak: float, steps_per_epoch: int, warmup_epochs: float, epochs: int
) -> float:
    """Linear warm-up from 0 to peak over warmup_epochs, then half a cosine down to 0 at the end of epochs."""
    epoch = step / steps_per_epoch
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def encoder_momentum(step: int, *, start: float, total_steps: int, cosine: bool) -> float:
    """Momentum of the encoder average: constant, or by half a cosine from start to 1 over total_steps."""
    if not cosine:
        return start
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices and filters decay; biases and norms (one dimension) do not."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(name: str, module: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """'adamw' or 'lars' over the trainable parameters; the learning rate is set at every step.

    With an attribute found_inf, a tensor () on the parameters' device, a step changes nothing where that is 1.
    """
    groups = parameter_groups(module, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(
            groups, lr=0.0, fused=True
        )  # fused: the kernel that heeds found_inf
    if name == "lars":
        return LARS(groups, lr=0.0)
    raise ValueError(f"unknown optimiser {name!r}; known are {', '.join(OPTIMIZERS)}")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same learning rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradient_norm(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Euclidean norm () of all gradients together."""
    gradients = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum (You et al. 2017, algorithm 1), as multi-tensor operations.

        g <- g + wd * w;   g <- g * trust * |w| / |g|  (matrices and filters only; 1 where a norm is 0);
        v <- momentum * v + g;   w <- w - lr * v

    Parameters of one dimension get neither decay nor trust ratio.
    """

    _step_supports_amp_scaling = True  # a GradScaler sets found_inf and leaves the decision to us

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ):
        defaults = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, trust_coefficient=trust_coefficient
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> torch.Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for adapted in (True, False):
                params = [
                    p for p in group["params"] if p.grad is not None and (p.ndim > 1) == adapted
                ]
                if params:
                    self._update(params, group, adapted)
        return loss

    def _update(self, params, group, adapted):
        updates = [p.grad for p in params]
        if adapted:
            updates = torch._foreach_add(updates, params, alpha=group["weight_decay"])
            weight_norms, update_norms = torch._foreach_norm(params), torch._foreach_norm(updates)
            ratios = [
                torch.where(
                    (w > 0) & (u > 0), group["trust_coefficient"] * w / u, torch.ones_like(w)
                )
                for w, u in zip(weight_norms, update_norms, strict=True)
            ]
            torch._foreach_mul_(updates, ratios)
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        velocities = [self.state[p]["momentum_buffer"] for p in params]
        lr, momentum = group["lr"], group["momentum"]
        if (skipped := getattr(self, "found_inf", None)) is not None:
            updates = [
                torch.where(skipped > 0, 0, u) for u in updates
            ]  # a product with 0 would leave what is not finite
            skipped = skipped.to(
                params[0].dtype
            )  # else torch would take one parameter after the other
            lr, momentum = lr * (1 - skipped), momentum + (1 - momentum) * skipped
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, updates)
        torch._foreach_sub_(params, torch._foreach_mul(velocities, lr))
