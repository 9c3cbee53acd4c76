"""The process group of a run: joining it, leaving it, and naming the ranks that were lost."""

import contextlib
import ctypes
import datetime
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from .distributed import rank, shared_store, world_size
from .errors import RunError, first_line
from .preemption import interrupt_like_other_ranks

# seconds in which every living rank notices that another one is lost
GRACE = 5


def own_device() -> torch.device:
    """The GPU of this process, if the machine has one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def start(timeout_minutes: float = 30) -> torch.device:
    """Join the process group that torchrun's environment describes, if there is one; returns this
    rank's device.

    The group uses NCCL on CUDA and gloo on a CPU. A collective that takes longer than
    timeout_minutes fails. Raises RunError if the ranks do not meet.
    """
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # PR_SET_PDEATHSIG: this rank gets a SIGTERM when its launcher ends, even if that is killed
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        parent = str(os.getppid())
        if os.environ.get("SNCLR_LAUNCHER", parent) != parent:  # ended before prctl
            raise RunError(f"the launcher has ended (process {os.environ['SNCLR_LAUNCHER']})")
    if "WORLD_SIZE" in os.environ:
        timeout, on_gpu = datetime.timedelta(minutes=timeout_minutes), device.type == "cuda"
        try:
            store, number, count = next(dist.rendezvous("env://", timeout=timeout))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # after a restart, torchrun's store still holds the addresses of the dead ranks
                store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                device_id=device if on_gpu else None,
                store=store,
                rank=number,
                world_size=count,
                timeout=timeout,
            )
        except (RuntimeError, ValueError) as error:
            raise RunError(
                f"the ranks did not meet within {timeout_minutes:g} minutes: {_sentence(error)}"
            ) from error
        shared_store().set(f"host/{rank()}", socket.gethostname())
    return device


def stop() -> None:
    """Wait for all ranks and leave the process group, if there is one."""
    if dist.is_initialized():
        dist.barrier()
        # gloo's thread needs Python's lock to release the last exchange. Destroying the group holds
        # that lock while it waits for the thread (torch 2.6), forever if the thread is not done.
        time.sleep(0.2)
        dist.destroy_process_group()


@contextlib.contextmanager
def failures_named() -> Iterator[None]:
    """Turn a failed collective into a RunError that names the ranks that no longer answer, and
    their machines; or into Interrupted, if a rank has left because of a signal.
    """
    try:
        yield
    except RuntimeError as error:
        known = any(word in str(error) for word in ("gloo", "NCCL", "Connection"))
        if world_size() == 1 or isinstance(error, RunError) or not known:
            raise
        interrupt_like_other_ranks()
        raise RunError(f"{_silent_ranks()}: {_sentence(error)}") from error


def _silent_ranks() -> str:
    store, number, count = shared_store(), rank(), world_size()
    try:
        store.set(f"lost/{number}", "")
        # closes the connections, so that ranks that wait for this one also notice
        dist.destroy_process_group()
        time.sleep(GRACE)
        silent = [other for other in range(count) if not store.check([f"lost/{other}"])]
        names = ", ".join(
            f"rank {other} on {store.get(f'host/{other}').decode()}" for other in silent[:8]
        )
        return f"lost contact with {names or 'another rank for a time'}"
    except RuntimeError:
        address = os.environ.get("MASTER_ADDR")
        return f"lost contact with the launcher on {address}, where the ranks meet"


def _sentence(error) -> str:
    """The first sentence of a message of torch's, without its source line and advice."""
    return re.sub(r"^\[\S*\] ", "", first_line(error)).partition(". ")[0]
