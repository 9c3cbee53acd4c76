"""Optimisers and schedules.

A schedule is a pure function of the step, so that a resumed run has nothing to replay.
"""

import math
import pkgutil
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from timm.models import group_parameters
from torch import nn

from .choices import OPTIMIZERS
from .running.errors import UsageError


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


def move_averages(
    averages: list[torch.Tensor], new: list[torch.Tensor], momentum: float | torch.Tensor
) -> None:
    """averages <- momentum * averages + (1 - momentum) * new, in place, for all tensors at once."""
    if not isinstance(momentum, torch.Tensor):
        torch._foreach_lerp_(averages, new, 1 - momentum)
    else:  # torch's lerp of a list takes its weight from the host
        differences = torch._foreach_sub(new, averages)
        torch._foreach_mul_(differences, (1 - momentum).to(averages[0].dtype))
        torch._foreach_add_(averages, differences)


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


def layer_scales(encoder: nn.Module, factor: float, prefix: str, flag: str) -> dict[str, float]:
    """lr_scale of the encoder's parameters, by prefix + name: factor ** (layers above it).

    The layers are timm's: stem, blocks, head. So of n blocks, block i = 0 .. n-1 has factor^(n-i),
    the stem factor^(n+1) and the projector 1. Without a projector, each has one power less. A norm
    after the last block belongs to that block. Raises UsageError, which names the flag of the
    factor, if the encoder does not name its layers.
    """
    if factor == 1:
        return {}
    if not hasattr(encoder, "group_matcher"):
        raise UsageError(
            f"{flag} {factor:g} needs the layers of the backbone, which this one does not name:"
            " leave it out"
        )
    layers = group_parameters(encoder, encoder.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {prefix + name: factor ** (last - layer) for name, layer in layers.items()}


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    scales: Mapping[str, float] = MappingProxyType({}),
) -> list[dict]:
    """The trainable parameters in two groups, with and without weight decay, for each lr_scale.

    scales: lr_scale by name, 1 if a name is missing. A group whose lr_scale is not 1 has this key;
    it multiplies the learning rate (set_learning_rate). The largest scale comes first.
    """
    trainable = [
        (name, p, scales.get(name, 1.0)) for name, p in named_parameters if p.requires_grad
    ]
    groups = []
    for scale in sorted({1.0, *scales.values()}, reverse=True):
        layer = [(name, p) for name, p, own_scale in trainable if own_scale == scale]
        for decay in (True, False):
            params = [p for name, p in layer if decays(name, p) == decay]
            groups.append({"params": params, "weight_decay": weight_decay if decay else 0.0})
            if scale != 1:
                groups[-1]["lr_scale"] = scale
    return groups


def build_optimizer(
    name: str,
    module: nn.Module,
    weight_decay: float,
    scales: Mapping[str, float] = MappingProxyType({}),
) -> torch.optim.Optimizer:
    """The optimiser `name` of the trainable parameters, see of_groups. scales: of layer_scales."""
    return of_groups(name, parameter_groups(module.named_parameters(), weight_decay, scales))


def of_groups(name: str, groups: list[dict]) -> torch.optim.Optimizer:
    """The optimiser `name` (choices.OPTIMIZERS) of groups of parameters, with learning rate 0.

    Raises ValueError for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimiser {name!r}; known are {', '.join(OPTIMIZERS)}")
    path, arguments = OPTIMIZERS[name]
    optimizer = pkgutil.resolve_name(path)(groups, lr=0.0, **arguments)
    if isinstance(optimizer, torch.optim.SGD) and arguments.get("momentum"):
        # if torch's fused kernel skipped the first step, it would leave new buffers uninitialised
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float | torch.Tensor) -> None:
    """Set the learning rate of every group: lr times its 'lr_scale', if it has one.

    lr may be a tensor () on the device of the parameters, which a CUDA graph reads.
    """
    if isinstance(lr, torch.Tensor):
        lr = lr.to(torch.get_default_dtype())  # the only one that torch's fused optimisers read
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
        super().__init__(
            params,
            dict(
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                trust_coefficient=trust_coefficient,
            ),
        )

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for adapted in (True, False):
                params = [
                    p for p in group["params"] if p.grad is not None and (p.ndim > 1) == adapted
                ]
                if params:
                    self._update(params, group, adapted)

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
