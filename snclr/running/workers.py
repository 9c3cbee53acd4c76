"""Worker processes that load data: how they start and which signals end them; and glibc's malloc.

A signal to a whole group of processes must not end the workers while their rank finishes its step.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Sized

from torch.utils.data import DataLoader, Dataset


def load_by_workers(
    dataset: Dataset,
    requests: Sized,
    workers: int,
    *,
    persistent: bool = False,
    pin_memory: bool = False,
) -> DataLoader:
    """dataset[request] for each of the requests, in order, by worker processes (0: by this one).

    persistent: keep the processes for the next iteration.
    """
    # since Python 3.14 Linux, too, starts a new interpreter for each worker by default: that takes
    # seconds, and the worker's parent is not the rank
    start_method = "fork" if workers and sys.platform == "linux" else None
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        worker_init_fn=leave_signals_to_the_rank,
        multiprocessing_context=start_method,
        persistent_workers=persistent and workers > 0,
        pin_memory=pin_memory,
    )


def leave_signals_to_the_rank(worker: int) -> None:
    """Ignore all signals that end a run, except for a SIGTERM from this worker's rank."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # it reports the sender; macOS does not have it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_rank, daemon=True).start()


def _end_with_the_rank():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks of up to 32 MB (256 MB at most) for the next allocation.

    By default it returns them to the system, and the page faults of the next blocks take a third
    of the time of a large view. With another C library this does nothing.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and values from malloc.h
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**28)
