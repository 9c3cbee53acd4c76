"""Worker processes that load data: how they start, how they are waited for, and which signals end
them; and glibc's malloc.

A signal to a whole group of processes must not end the workers while their rank finishes its step.
A rank that waits for a batch must notice that none will come: a worker that cannot send one ends
with an exit code that says why, and a rank gives up after a time without a batch.
"""

import ctypes
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sized
from multiprocessing.queues import Queue

from torch.utils.data import DataLoader, Dataset

from .errors import RunError, UsageError
from .worker_failures import SENDING_FAILED, not_started, reason

PREFETCH = 2  # batches that a worker loads ahead
LIMIT = 30 * 60  # seconds without a batch after which a rank gives up
PATIENCE = 10  # the same, if a signal asks for the end of the run
POLL = 2  # seconds between two looks at whether to go on waiting
SHARED_MEMORY = "/dev/shm"


class Stalled(RunError):
    """No batch came, and the rank is to wait no longer."""


class WorkerBatches:
    """dataset[request] for each of the requests, in order, by worker processes (0: by this one).

    persistent: keep the processes for the next iteration. A rank that waits for a batch raises
    RunError if the workers can send none. It raises Stalled after LIMIT, and if `stop_waiting`
    returns true already after PATIENCE.
    """

    def __init__(
        self,
        dataset: Dataset,
        requests: Sized,
        workers: int,
        *,
        persistent: bool = False,
        pin_memory: bool = False,
    ):
        self.requests = requests
        self.stop_waiting: Callable[[], bool] = lambda: False
        # since Python 3.14 Linux, too, starts a new interpreter for each worker by default: that
        # takes seconds, and the worker's parent is not the rank
        start_method = "fork" if workers and sys.platform == "linux" else None
        self.loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=requests,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            timeout=POLL if workers else 0,
            worker_init_fn=_start_worker,
            multiprocessing_context=start_method,
            persistent_workers=persistent and workers > 0,
            pin_memory=pin_memory,
        )

    def __iter__(self) -> Iterator:
        try:
            batches = iter(self.loader)
        except OSError as error:
            raise RunError(not_started(error)) from error
        for _ in range(len(self.requests)):
            yield self._next(batches)

    def _next(self, batches):
        start = time.monotonic()
        while True:
            try:
                return next(batches)
            except (OSError, EOFError, MemoryError, RuntimeError) as error:
                if not str(error).startswith("DataLoader timed out"):
                    workers = getattr(batches, "_workers", [])
                    for worker in workers:
                        worker.join(0.5)  # one whose connection broke is about to end
                    text = reason(error, [worker.exitcode for worker in workers])
                    if text is None:
                        raise
                    raise RunError(text) from error
                seconds = time.monotonic() - start
                if seconds > LIMIT or (seconds > PATIENCE and self.stop_waiting()):
                    self._kill(batches)
                    raise Stalled(f"no batch of images for {seconds:.0f} s") from error

    def _kill(self, batches):
        """End the workers, for which this process would wait when it ends."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise RuntimeError
        for worker in getattr(batches, "_workers", []):
            worker.kill()


def check_shared_memory(batch_bytes: int, workers: int, ranks: int) -> None:
    """Raises UsageError if the workers of this machine's ranks cannot hold the batches that they
    load ahead, of batch_bytes each, in shared memory.
    """
    if not workers or not os.path.isdir(SHARED_MEMORY):
        return
    system = os.statvfs(SHARED_MEMORY)
    available = system.f_bavail * system.f_frsize
    needed = ranks * (workers * PREFETCH + 1) * batch_bytes
    if needed > available:
        raise UsageError(
            f"{SHARED_MEMORY} has {available / 2**20:.1f} MiB free, and the batches that {workers}"
            f" workers per rank load ahead need {needed / 2**20:.1f}: enlarge it (docker run"
            " --shm-size=8g), or choose fewer --workers or a smaller --batch-size"
        )


def _start_worker(worker: int) -> None:
    Queue._on_queue_feeder_error = staticmethod(_end_without_sending)
    leave_signals_to_the_rank(worker)


def _end_without_sending(error: Exception, batch: object) -> None:
    """In place of printing an error of the thread that sends batches: the rank would wait on."""
    number = getattr(error, "errno", None)
    if "Too many open files" in str(error):
        number = errno.EMFILE
    elif "shared memory" in str(error):
        number = errno.ENOSPC
    os._exit(SENDING_FAILED + (number or 0) % 64)


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
