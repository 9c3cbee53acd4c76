"""The processes of a run: joining them from torchrun's environment, leaving, and naming ranks that were lost."""

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

from .distributed import rank, world_size
from .errors import RunError, first_line

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
