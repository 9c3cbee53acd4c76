"""Batch norm over the batches of all ranks."""

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn

from .distributed import all_gather_with_grad, world_size
from .precision import widen


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with the statistics of all ranks' batches, on any device. Heads and probes use it.

    torch's SyncBatchNorm refuses CPU tensors and makes the host wait for its GPU; this one does
    not. All ranks need the same batch size. The ranks exchange the means and variances of their
    parts of the batch in forward, and the gradients of these in backward. The variance of the whole
    batch is the mean of the variances plus the variance of the means. No large sums are subtracted,
    so 1 and 4 ranks agree to rounding.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected an input of (B, C, ...), found {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        axes = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1] * world_size()
        wide = widen(x)
        variances, means = torch.var_mean(wide, axes, correction=0)
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
        out = (wide - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


class GlobalBatchNormAct(GlobalBatchNorm):
    """The same for timm's batch norm that contains an activation (in EfficientNets, RegNets and
    others).
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Let every batch norm in module see the whole global batch; with one rank it already does.
    Names and buffers stay the same.

    On CUDA the batch norms of backbones become torch's SyncBatchNorm, which is fused and takes less
    memory, but makes the host wait.
    """
    if world_size() == 1:
        return module
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, GlobalBatchNorm) or not isinstance(
                child, nn.modules.batchnorm._BatchNorm
            ):
                continue
            if device.type == "cuda":
                # timm's function, because torch's drops the activation of a BatchNormAct2d
                setattr(parent, name, convert_sync_batchnorm(child))
            else:  # same parameters, buffers and settings; only forward differs
                child.__class__ = (
                    GlobalBatchNormAct if isinstance(child, BatchNormAct2d) else GlobalBatchNorm
                )
    return module
