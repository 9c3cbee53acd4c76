"""Processes: start-up from torchrun's environment, the collectives, and batch norm over all ranks.

Every function also works without a process group, as rank 0 of 1; nothing else in the project asks whether there is one.
"""

import contextlib
import ctypes
import datetime
import os
import re
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn

from .errors import RunError, UsageError, first_line
from .precision import widen

GRACE = 5  # seconds in which every rank that still lives has noticed that another one does not


def own_device() -> torch.device:
    """The GPU of this process, if the machine has one, else the CPU."""
    cuda = torch.cuda.is_available()
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    )


def start(timeout_minutes: float = 30) -> torch.device:
    """Join the process group that torchrun describes, if it started us, and return this rank's device.

    NCCL on CUDA, gloo on CPU. A collective that is not complete after timeout_minutes fails.
    """
    here = own_device()
    cuda = here.type == "cuda"
    if cuda:
        torch.cuda.set_device(here)
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            1, signal.SIGTERM
        )  # PR_SET_PDEATHSIG: a rank does not outlive a launcher that was killed
        if (
            os.environ.get("SNCLR_LAUNCHER", parent := str(os.getppid())) != parent
        ):  # before this line
            raise RunError(f"the launcher has ended (process {os.environ['SNCLR_LAUNCHER']})")
    if "WORLD_SIZE" in os.environ:
        timeout = datetime.timedelta(minutes=timeout_minutes)
        try:
            store, number, count = next(dist.rendezvous("env://", timeout=timeout))
            if (
                os.environ.get("GROUP_WORLD_SIZE") == "1"
            ):  # torchrun's restarts leave the addresses of dead ranks in its store
                store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            which = dict(store=store, rank=number, world_size=count, timeout=timeout)
            dist.init_process_group(
                "nccl" if cuda else "gloo", device_id=here if cuda else None, **which
            )
        except (RuntimeError, ValueError) as error:
            raise RunError(
                f"the ranks did not meet within {timeout_minutes:g} minutes: {_sentence(error)}"
            ) from error
        _store().set(f"host/{rank()}", socket.gethostname())
    return here


def stop() -> None:
    """Wait for all ranks, and leave the process group, if any.

    gloo's thread needs the interpreter to let go of the last exchange, and a group that is destroyed waits for that thread
    without giving the interpreter away (torch 2.6): forever, unless it had a moment before.
    """
    if dist.is_initialized():
        dist.barrier()
        time.sleep(0.2)
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 .. world_size - 1."""
    return dist.get_rank() if world_size() > 1 else 0


def local_rank_zero() -> bool:
    """Whether this is the first process of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def failures_named() -> Iterator[None]:
    """Turn a failed collective into a RunError that says which ranks, on which machines, no longer answer."""
    try:
        yield
    except RuntimeError as error:
        known = any(word in str(error) for word in ("gloo", "NCCL", "Connection"))
        if world_size() == 1 or isinstance(error, RunError) or not known:
            raise
        told = _sentence(error)
        raise RunError(f"{_silent_ranks()}: {told}") from error


def _silent_ranks() -> str:
    store, number, count = _store(), rank(), world_size()
    try:
        store.set(f"lost/{number}", "")
        dist.destroy_process_group()  # closes our connections, by which those who wait for us notice, too
        time.sleep(GRACE)
        silent = [other for other in range(count) if not store.check([f"lost/{other}"])]
        told = ", ".join(
            f"rank {other} on {store.get(f'host/{other}').decode()}" for other in silent[:8]
        )
        return f"lost contact with {told}" if told else "lost contact for a while with another rank"
    except RuntimeError:
        return f"lost contact with the launcher on {os.environ.get('MASTER_ADDR')}, where the ranks meet"


def _store():
    return dist.distributed_c10d._get_default_store()


def _sentence(error) -> str:
    """Of torch's message the sentence that says what happened, without the place in its source and the advice."""
    return re.sub(r"^\[\S*\] ", "", first_line(error)).partition(". ")[0]


class LaggedMaximum:
    """The largest number of all ranks, as of the call before: exchanged in the background, on the CPU, so that neither the
    host nor a GPU waits. 0 at the first call. Collective."""

    def __init__(self, timeout_minutes: float):
        timeout = datetime.timedelta(minutes=timeout_minutes)
        self.group = dist.new_group(backend="gloo", timeout=timeout) if world_size() > 1 else None
        self.work = None

    def __call__(self, number: int) -> int:
        if self.group is None:
            return number
        before = 0
        if self.work is not None:
            self.work.wait()
            before = int(self.found)
        self.found = torch.tensor(number)
        self.work = dist.all_reduce(self.found, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return before

    def finish(self) -> None:
        """Wait for the last exchange: with one under way the group's destructor and its thread may wait for each other."""
        if self.work is not None:
            self.work.wait()


def on_rank_zero(function: Callable) -> object:
    """What function() returns, or the UsageError that it raises, on rank 0 alone, for every rank."""
    answer = [None, None]
    if rank() == 0:
        try:
            answer[0] = function()
        except UsageError as error:
            answer[1] = str(error)
    if world_size() > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UsageError(answer[1])
    return answer[0]


def union(found: set) -> set:
    """What any rank has found."""
    parts = [found] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, found)
    return set().union(*parts)


@contextlib.contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Let one process of each machine do the block before the others do: it may write what they then find."""
    first = local_rank_zero()
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:
            barrier()


def all_gather(x: Tensor) -> Tensor:
    """x (B, ...) of every rank joined in rank order: (B * world_size, ...). Same shape on all ranks; no gradient."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def all_sum(x: Tensor) -> Tensor:
    """Sum of x over the ranks, as a new tensor; no gradient."""
    total = x.detach().clone()
    if world_size() > 1 and total.numel():
        dist.all_reduce(total)
    return total


class _GatherOverRanks(torch.autograd.Function):
    """all_gather with a gradient: a rank's rows collect what all ranks' losses say of them."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.batch_size_per_rank = len(x)
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_sum(grad).split(ctx.batch_size_per_rank)[rank()]


def all_gather_with_grad(x: Tensor) -> Tensor:
    """As all_gather, and differentiable. With losses that are rank means, DDP's averaging then gives the global gradient."""
    return x if world_size() == 1 else _GatherOverRanks.apply(x)


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with the statistics of all ranks' batches, on any device; no host waits for its GPU (torch's does, and refuses
    CPU tensors). Heads and probes are made of it.

    Needs the same batch size on all ranks. They exchange mean and variance of their parts, once each way; the whole's variance
    is the mean of the variances and the variance of the means (no difference of large sums: 1 and 4 ranks agree to rounding).
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
    """The same for timm's batch norm with an activation of its own (EfficientNets, RegNets and others)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """module with the gradients of its trained parameters averaged over the ranks; itself with one rank.

    Its buffers stay as they are: the bank is already the same on all ranks, and it is large.
    """
    if world_size() == 1:
        return module
    with (
        warnings.catch_warnings()
    ):  # torch 2.14 announces another name, which does not mean the same yet
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        where = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            module, device_ids=where, broadcast_buffers=False
        )


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Let every batch norm in module see the whole global batch. A no-op with one rank; names and buffers stay the same.

    On CUDA those of backbones become torch's SyncBatchNorm, which is fused and takes less memory, but makes the host wait.
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
                setattr(
                    parent, name, convert_sync_batchnorm(child)
                )  # timm's: torch's own drops a BatchNormAct2d's activation
            else:  # same parameters, buffers and settings; only forward differs
                child.__class__ = (
                    GlobalBatchNormAct if isinstance(child, BatchNormAct2d) else GlobalBatchNorm
                )
    return module
