"""Batch norm over the batches of all ranks."""

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .distributed import all_gather_with_grad, world_size
from .precision import widen


class GlobalBatchNorm(_BatchNorm):
    """Batch norm with the statistics of all ranks' batches, on any device. Heads and probes use it.

    torch's SyncBatchNorm refuses CPU tensors, and it makes the host wait for its GPU; this one does
    neither. All ranks need the same batch size. In forward the ranks exchange the means and
    variances of their parts of the batch, and in backward the gradients of these. The variance of
    the whole batch is the mean of the variances plus the variance of the means. No large sums are
    subtracted, so 1 and 4 ranks agree to rounding.
    """

    _check_input_dim = nn.SyncBatchNorm._check_input_dim  # at least (B, C)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        wide = widen(x).movedim(1, -1)  # (B, ..., C)
        count = x.numel() // x.shape[1] * world_size()
        variances, means = torch.var_mean(wide, tuple(range(x.dim() - 1)), correction=0)
        means, variances = all_gather_with_grad(torch.stack([means, variances])[None]).unbind(1)
        mean, variance = means.mean(0), variances.mean(0) + torch.var(means, 0, correction=0)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                # momentum None: the cumulative average, as in torch's own layers
                factor = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                self.running_mean += factor * (mean.to(self.running_mean.dtype) - self.running_mean)
                unbiased = variance * (count / max(count - 1, 1))
                self.running_var += factor * (
                    unbiased.to(self.running_var.dtype) - self.running_var
                )
        out = (wide - mean) * torch.rsqrt(variance + self.eps)
        if self.affine:
            out = out * self.weight + self.bias
        return out.movedim(-1, 1).to(x.dtype)


class GlobalBatchNormAct(GlobalBatchNorm):
    """GlobalBatchNorm in place of timm's batch norm with an activation, as EfficientNets, RegNets
    and others have it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Make every batch norm in module use the statistics of the global batch; with one rank it
    already does. Names and buffers stay the same.

    On CUDA the batch norms of backbones become torch's SyncBatchNorm, which is fused and takes less
    memory, but makes the host wait.
    """
    if world_size() == 1:
        return module
    for name, layer in list(module.named_modules()):
        if isinstance(layer, _BatchNorm) and not isinstance(layer, GlobalBatchNorm):
            if device.type == "cuda":
                # timm's function, because torch's drops the activation of a BatchNormAct2d
                module.set_submodule(name, convert_sync_batchnorm(layer))
            else:  # same parameters, buffers and settings; only forward differs
                layer.__class__ = (
                    GlobalBatchNormAct if isinstance(layer, BatchNormAct2d) else GlobalBatchNorm
                )
    return module
