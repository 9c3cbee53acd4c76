"""Worker processes that load data: starting them, waiting for their batches, and ending them.

A signal to a whole group of processes must not end the workers while their rank finishes its step.
A rank must notice that no batch will come: a worker that cannot send a batch ends with an exit code
that describes the reason, and a rank gives up after a time without a batch.
"""

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.queues import Queue

import numpy as np
from torch.utils.data import DataLoader, Dataset

from .errors import SENDING_FAILED, RunError, UsageError, describe_failure, kill_children

PREFETCH = 2  # requests that a worker has at a time
LIMIT = 30 * 60  # seconds without a batch after which a rank gives up
PATIENCE = 10  # the same after a signal that ends the run
POLL = 2  # seconds between two checks whether to give up
SHARED_MEMORY = "/dev/shm"
_END = object()
_NOT_STARTED: list[Exception] = []


class Stalled(RunError):
    """No batch came for so long that the rank gives up."""


class Answers(Dataset):
    """load(*request) of each request. A RunError is returned: torch would add a traceback to it."""

    def __init__(self, load: Callable):
        self.load = load

    def __getitem__(self, request):
        try:
            return self.load(*request)
        except RunError as error:
            return error


class WorkerBatches:
    """dataset[request] for each of the requests, in order, by worker processes (0: by this one).

    An iteration takes a request when it is needed, and ends when there is none. It raises RunError
    if a request failed or a worker was lost, and Stalled if no batch came for LIMIT seconds, or for
    PATIENCE seconds while `stop_waiting` returns true. persistent: keep the processes for the next.
    """

    def __init__(
        self,
        dataset: Dataset,
        requests: Iterable,
        workers: int,
        *,
        persistent: bool = False,
        pin_memory: bool = False,
    ):
        self.stop_waiting: Callable[[], bool] = lambda: False
        # since Python 3.14 the default on Linux is to start a new interpreter for each worker,
        # which takes seconds, and then the worker's parent is not the rank
        start_method = "fork" if workers and sys.platform == "linux" else None
        self.loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=requests,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=_start_worker,
            multiprocessing_context=start_method,
            persistent_workers=persistent and workers > 0,
            pin_memory=pin_memory,
        )

    def __iter__(self) -> Iterator:
        batches = self._call(iter, self.loader)
        while (batch := self._call(next, batches, _END)) is not _END:
            if isinstance(batch, RunError):
                raise RunError(str(batch))  # `batch` itself would hold this frame, and the workers
            yield batch

    def _call(self, function, *arguments):
        """function(*arguments), in the time limit; RunError if a worker was lost meanwhile."""
        try:
            with self._time_limit():
                return function(*arguments)
        except (OSError, EOFError, MemoryError, RuntimeError) as error:
            workers = getattr(arguments[0], "_workers", [])
            for worker in workers:
                worker.join(0.5)  # a worker with a broken connection ends soon
            message = describe_failure(error, [worker.exitcode for worker in workers])
            if message is None:  # such as Stalled
                raise
            if function is iter:
                # it holds what torch has begun to build, whose destructor would print a traceback
                _NOT_STARTED.append(error)
            raise RunError(message) from error

    @contextlib.contextmanager
    def _time_limit(self):
        """Raise Stalled in the block if it takes too long, and kill the workers.

        By a timer's signal: DataLoader's own time limit does not help if a worker hangs while it
        passes the memory of a batch, for which the rank waits in a system call.
        """
        start = time.monotonic()

        def give_up_if_late(number, frame):
            seconds = time.monotonic() - start
            if seconds > LIMIT or (seconds > PATIENCE and self.stop_waiting()):
                kill_children()
                raise Stalled(f"no batch of images for {seconds:.0f} s")

        if not self.loader.num_workers:
            yield
            return
        before = signal.signal(signal.SIGALRM, give_up_if_late)
        signal.setitimer(signal.ITIMER_REAL, POLL, POLL)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class LastingWorkers:
    """WorkerBatches for requests that come in several calls, with the same processes.

    No object refers back to this one: the processes end with its last reference. If only the
    garbage collector ended them, torch would wait 5 s for each.
    """

    def __init__(self, dataset: Dataset, workers: int, *, pin_memory: bool):
        self.queue = _Queue()
        self.workers = WorkerBatches(
            dataset, self.queue, workers, persistent=True, pin_memory=pin_memory
        )
        self.batches: Iterator = iter(())
        self.expected: deque[tuple] = deque()  # the requests that `batches` will answer

    def load(self, requests: Sequence[tuple], ahead: Sequence[tuple]) -> Iterator:
        """dataset[request] for each of the requests, in order.

        ahead: the requests of the next call if they are known. The processes go on with them while
        the last answers of this call are used.
        """
        if not _equal(requests, self.expected):
            self.queue.clear()
            deque(self.batches, maxlen=0)  # wait for what the processes have begun
            self.queue.extend(requests)
            self.expected = deque(requests)
            self.batches = iter(self.workers)
        self.queue.extend(ahead)
        self.expected.extend(ahead)
        for _ in requests:
            self.expected.popleft()
            yield next(self.batches)


class _Queue(deque):
    """Requests to answer. Iterating removes the first one each time, also one that came later."""

    def __iter__(self):
        return self

    def __next__(self):
        if not self:
            raise StopIteration
        return self.popleft()


def _equal(requests, others):
    """Whether the requests, tuples of numbers and arrays, are the same."""
    return len(requests) == len(others) and all(
        len(one) == len(other) and all(map(np.array_equal, one, other))
        for one, other in zip(requests, others, strict=True)
    )


def check_shared_memory(request_bytes: int, workers: int, ranks: int) -> None:
    """Raises UsageError if shared memory is too small for the images that the workers of this
    machine's ranks load ahead. The answer to a request has request_bytes.
    """
    if not workers or not os.path.isdir(SHARED_MEMORY):
        return
    available = shutil.disk_usage(SHARED_MEMORY).free
    needed = ranks * (workers * PREFETCH + 1) * request_bytes
    if needed > available:
        raise UsageError(
            f"{SHARED_MEMORY} has {available / 2**20:.1f} MiB free, and the images that {workers}"
            f" workers per rank load ahead need {needed / 2**20:.1f}: enlarge it (docker run"
            " --shm-size=8g), or choose fewer --workers"
        )


def _start_worker(worker: int) -> None:
    Queue._on_queue_feeder_error = staticmethod(_end_without_sending)
    sys.excepthook = _print_unless_disconnected
    # terminals and SLURM send their signals to the workers, too, but the rank needs batches until
    # its step is done: only a SIGTERM that the rank itself sends ends a worker
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which returns the sender; macOS does not have it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_rank, daemon=True).start()


def _print_unless_disconnected(kind, error, traceback):
    """The thread that shares memory with the rank prints an error when the rank has ended."""
    if not isinstance(error, OSError | EOFError):
        sys.__excepthook__(kind, error, traceback)


def _end_without_sending(error: Exception, batch: object) -> None:
    """End a worker whose sending thread failed; by default the rank would wait for it forever."""
    number = getattr(error, "errno", None)
    if "Too many open files" in str(error):
        number = errno.EMFILE
    elif "shared memory" in str(error):
        number = errno.ENOSPC
    os._exit(SENDING_FAILED + (number or 0) % 64)


def _end_with_the_rank():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks of up to 32 MB (256 MB at most) for the next allocation.

    By default glibc returns them to the system. The page faults of new blocks then take a third of
    the time that a large view needs. With another C library this function does nothing.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and values from malloc.h
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**28)
