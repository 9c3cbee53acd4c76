"""Describes for the user why a worker process was lost. Imports nothing slow.

When a worker ends, torch raises RuntimeError at any point of the rank's code. When a batch cannot
be received from a worker that has ended, it raises OSError or EOFError.
"""

import contextlib
import errno
import os
import re
from collections.abc import Sequence

SENDING_FAILED = 64  # plus errno: exit code of a worker that could not send a batch
MORE_MEMORY = "out of memory? fewer --workers need less of it"


def describe_failure(error: Exception, exit_codes: Sequence[int | None] = ()) -> str | None:
    """The line for the user; None if no process was lost (but a worker has a bug, for example).

    exit_codes: of the workers, if they are known.
    """
    text = str(error)
    if "Caught MemoryError in DataLoader worker" in text:
        return f"a DataLoader worker has no memory left: {MORE_MEMORY}"
    if text.startswith("Caught "):
        return None
    if not isinstance(error, OSError | EOFError) and not text.startswith(
        ("DataLoader worker", "Too many open files")
    ):
        return None
    sentence = text.partition(".")[0] or type(error).__name__
    if not text.startswith("DataLoader worker"):
        sentence = f"a DataLoader worker was lost ({sentence})"
    codes = [*map(int, re.findall(r"exit code (\d+)", text)), *filter(None, exit_codes)]
    numbers = [code - SENDING_FAILED for code in codes] + [getattr(error, "errno", None)]
    if "Bus error" in text:
        numbers.append(errno.ENOSPC)
    return f"{sentence}: {_advice(numbers)}"


def not_started(error: OSError) -> str:
    """The line for the user if the workers cannot be started."""
    return f"cannot start the DataLoader workers ({error.strerror}): {_advice([error.errno])}"


def _advice(numbers):
    """What the user can do about errors with these numbers."""
    if errno.ENOSPC in numbers:  # semaphores are in shared memory too
        return "/dev/shm is full: enlarge it (docker run --shm-size=8g), or choose fewer --workers"
    if errno.EMFILE in numbers or not _descriptors_left():
        return "the limit of open files is too low: raise it (ulimit -n 4096)"
    return MORE_MEMORY


def _descriptors_left() -> bool:
    """Whether this process can open ten more files, as it must to receive a batch."""
    with contextlib.ExitStack() as opened:
        try:
            for _ in range(10):
                opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        except OSError:
            return False
    return True
