"""Ranks and the collectives between them.

Every function also works without a process group, as rank 0 of 1: nothing else in the project asks
whether there is one.
"""

import contextlib
import datetime
import os
import warnings
from collections.abc import Callable, Iterator

import numpy as np
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


def shared_store() -> dist.Store:
    """The key-value store by which the ranks met; it runs in the launcher on rank 0's machine."""
    return dist.distributed_c10d._get_default_store()


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


class LaggedMaximum:
    """Each call returns the largest number that any rank passed to the previous call; the first
    call returns 0. Collective. With one rank a call returns its own number.

    The exchange runs in the background, on the CPU: neither the host nor a GPU waits for it.
    """

    def __init__(self, timeout_minutes: float):
        timeout = datetime.timedelta(minutes=timeout_minutes)
        self.group = dist.new_group(backend="gloo", timeout=timeout) if world_size() > 1 else None
        self.work, self.largest = None, torch.tensor(0)

    def __call__(self, number: int) -> int:
        if self.group is None:
            return number
        self.finish()
        previous = int(self.largest)
        self.largest = torch.tensor(number)
        self.work = dist.all_reduce(
            self.largest, dist.ReduceOp.MAX, group=self.group, async_op=True
        )
        return previous

    def finish(self) -> None:
        """Wait for the last exchange, as must happen before the group is destroyed: otherwise its
        destructor and its thread can wait for each other.
        """
        if self.work is not None:
            self.work.wait()

    def forget(self) -> None:
        """Let the next call return 0, as the first one does."""
        self.finish()
        self.work, self.largest = None, torch.tensor(0)


def on_rank_zero(function: Callable) -> object:
    """Call function() on rank 0 only; every rank returns its result, or raises its UsageError."""
    outcome = [None, None]  # the result, the message of the error
    if rank() == 0:
        try:
            outcome[0] = function()
        except UsageError as error:
            outcome[1] = str(error)
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UsageError(outcome[1])
    return outcome[0]


def union(items: set) -> set:
    """The union of every rank's set."""
    parts = [items] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, items)
    return set().union(*parts)


@contextlib.contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Let one process of each machine run the block first; the others then read what it wrote."""
    first = local_rank_zero()
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:
            barrier()


def share(indices: np.ndarray) -> np.ndarray:
    """This rank's contiguous part of a global batch, whose size all ranks divide."""
    return np.split(indices, world_size())[rank()]


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
    """all_gather with a gradient: each row gets the sum of its gradients over all ranks' losses."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.batch_size_per_rank = len(x)
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_sum(grad).split(ctx.batch_size_per_rank)[rank()]


def all_gather_with_grad(x: Tensor) -> Tensor:
    """As all_gather, with a gradient. If each rank's loss is a mean over its part of the batch,
    DDP's averaging then gives the gradient of the global mean.
    """
    return x if world_size() == 1 else _GatherOverRanks.apply(x)


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """The module in DistributedDataParallel, which averages the gradients over the ranks; with one
    rank the module itself.

    Buffers are not exchanged: the bank is large, and already the same on all ranks.
    """
    if world_size() == 1:
        return module
    # torch 2.14 warns that broadcast_buffers will get another name, but that one differs in meaning
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return nn.parallel.DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
        )
