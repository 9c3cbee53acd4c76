"""Ranks and the collectives between them.

Every function also works without a process group, as rank 0 of 1: nothing else in the project asks
whether there is one.
"""

import contextlib
import datetime
import os
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UsageError


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


class LaggedMaximum:
    """The largest number that any rank gave in the previous call; 0 in the first call. Collective.

    The exchange runs in the background, on the CPU: neither the host nor a GPU waits for it.
    """

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
            before = int(self.largest)
        self.largest = torch.tensor(number)
        self.work = dist.all_reduce(
            self.largest, dist.ReduceOp.MAX, group=self.group, async_op=True
        )
        return before

    def finish(self) -> None:
        """Wait for the last exchange. While one runs, the group's destructor and its thread may
        wait for each other.
        """
        if self.work is not None:
            self.work.wait()


def on_rank_zero(function: Callable) -> object:
    """Call function() on rank 0 only; every rank returns its result, or raises its UsageError."""
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


def union(items: set) -> set:
    """The union of every rank's set."""
    parts = [items] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, items)
    return set().union(*parts)


@contextlib.contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Let one process per machine run the block first: it may write what the others read."""
    first = local_rank_zero()
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:
            barrier()


def all_gather(x: Tensor) -> Tensor:
    """x (B, ...) of every rank, joined in rank order: (B * world_size, ...).

    All ranks need the same shape; no gradient.
    """
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
    """all_gather with a gradient: that of a rank's rows is the sum over the losses of all ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.batch_size_per_rank = len(x)
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_sum(grad).split(ctx.batch_size_per_rank)[rank()]


def all_gather_with_grad(x: Tensor) -> Tensor:
    """As all_gather, with a gradient. If losses are means over a rank, DDP's averaging then gives
    the global gradient.
    """
    return x if world_size() == 1 else _GatherOverRanks.apply(x)


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """module, with the gradients of its trained parameters averaged over the ranks; itself with one
    rank.

    Its buffers are not exchanged: the bank is the same on all ranks already, and it is large.
    """
    if world_size() == 1:
        return module
    device_ids = [device] if device.type == "cuda" else None
    # torch 2.14 announces another name for broadcast_buffers, which does not mean the same yet
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return nn.parallel.DistributedDataParallel(
            module, device_ids=device_ids, broadcast_buffers=False
        )
