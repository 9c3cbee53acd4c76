"""Optimisers and schedules.

A schedule is a pure function of the step, so that a resumed run has nothing to replay.
"""

import importlib
import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from .choices import OPTIMIZERS


def learning_rate(
    step: int, *, peak: float, steps_per_epoch: int, warmup_epochs: float, epochs: int
) -> float:
    """Linear warm-up from 0 to peak over warmup_epochs, then half a cosine to 0 at epochs."""
    epoch = step / steps_per_epoch
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def encoder_momentum(step: int, *, start: float, total_steps: int, cosine: bool) -> float:
    """Momentum of the momentum encoder: constant, or half a cosine from start to 1."""
    if not cosine:
        return start
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def neighbour_mass(
    step: int,
    *,
    full: float,
    steps_per_epoch: int,
    warmup_epochs: float,
    ramp_epochs: float,
) -> float:
    """The sum S(t) of the weights of an image's neighbours: 0 during warmup_epochs, then linear up
    to `full`, which the last step of ramp_epochs reaches.

        S(t) = full * min(1, (t + 1 - t_0) / t_ramp),    t_0: steps of warm-up, t_ramp: of the ramp

    So the first step after the warm-up has a ramp's first part, not 0: from here on the bank is
    searched. ReSSL (Zheng et al. 2022, journal version) starts with the plain contrastive loss and
    then switches; the ramp is ours.
    """
    since = step - warmup_epochs * steps_per_epoch
    if since < 0:
        return 0.0
    ramp = ramp_epochs * steps_per_epoch
    return full if since + 1 >= ramp else full * (since + 1) / ramp


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to biases and norm layers, which have one dimension."""
    return parameter.ndim > 1


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict]:
    """The trainable parameters in two groups, with and without weight decay.

    A group may also have 'lr_scale', which multiplies its learning rate (set_learning_rate).
    """
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
    return [
        {"params": [p for name, p in trainable if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if not decays(name, p)], "weight_decay": 0.0},
    ]


def build_optimizer(name: str, module: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """The optimiser `name` (choices.OPTIMIZERS) of the trainable parameters, with learning rate 0.

    Raises ValueError for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimiser {name!r}; known are {', '.join(OPTIMIZERS)}")
    path, arguments = OPTIMIZERS[name]
    package, _, kind = path.rpartition(".")
    groups = parameter_groups(module.named_parameters(), weight_decay)
    optimizer = getattr(importlib.import_module(package), kind)(groups, lr=0.0, **arguments)
    if isinstance(optimizer, torch.optim.SGD) and arguments.get("momentum"):
        # if torch's fused kernel skipped the first step, it would leave new buffers uninitialised
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group: lr times its 'lr_scale', if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def step_if_finite(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, grad_norm: torch.Tensor
) -> None:
    """Take a step if grad_norm () is finite; else neither weights nor optimiser state change.

    torch's fused optimisers and our LARS read their attribute found_inf, and skip on the device.
    For any other optimiser the host reads the norm, and so waits for the device at every step. In
    fp16 the scaler does the same.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~grad_norm.isfinite()).float()
        optimizer.step()
    elif grad_norm.isfinite():
        optimizer.step()


def gradient_norm(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Euclidean norm () of all gradients together."""
    gradients = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum (You et al. 2017, algorithm 1).

        g <- g + wd * w;   g <- g * trust * |w| / |g|   (ratio 1 where a norm is 0);
        v <- momentum * v + g;   w <- w - lr * v

    Parameters of one dimension have neither decay nor trust ratio. A step changes nothing if the
    attribute found_inf, a tensor (), is 1. All parameters are updated in multi-tensor operations.
    """

    _step_supports_amp_scaling = True  # torch's name for: step() reads found_inf

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
            # not a product with 0, which would keep nan
            updates = [torch.where(skipped > 0, 0, u) for u in updates]
            # of the same type, so that torch handles all parameters in one operation
            skipped = skipped.to(params[0].dtype)
            lr, momentum = lr * (1 - skipped), momentum + (1 - momentum) * skipped
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, updates)
        torch._foreach_sub_(params, torch._foreach_mul(velocities, lr))
