"""Errors as a user sees them: one line, and an exit code that scripts can rely on. Imports nothing
slow.
"""

import contextlib
import difflib
import errno
import multiprocessing
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata

from .console import console_may_vanish

SENDING_FAILED = 64  # plus errno: exit code of a worker that could not send a batch
MORE_MEMORY = "out of memory? fewer --workers need less of it"


class UsageError(ValueError):
    """Wrong flags, paths, data or checkpoints: nothing was trained or overwritten. Exit code 2."""


class RunError(RuntimeError):
    """A run that had started cannot continue, as at a non-finite loss. Exit code 1."""


class Interrupted(BaseException):
    """A signal ended the run; the same command continues it. Exit code 75 (EX_TEMPFAIL: try again).

    Like KeyboardInterrupt it is no Exception, so that `except Exception` around the decoding of an
    image does not catch it.
    """


def one_line(message: object) -> str:
    """A text or the message of an error, with ? for characters that cannot be printed, as in file
    names.
    """
    text = str(message).encode(errors="replace").decode()
    return "".join(c if c.isprintable() else "?" for c in text)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's name if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def first_few(names: list[str], limit: int = 3) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:limit]) + (" ..." if len(names) > limit else "")


def close_names(name: str, known: list[str], cutoff: float = 0.5) -> str:
    """The end of a message about an unknown name: the known names that are close to it, if any."""
    close = difflib.get_close_matches(name, known, n=4, cutoff=cutoff)
    return f"; close names are {', '.join(close)}" if close else ""


@contextlib.contextmanager
def needed_by(user: str, *packages: str) -> Iterator[None]:
    """Turn an ImportError in the block into a UsageError that says what to install for a flag."""
    try:
        yield
    except ImportError as error:
        names = f"{' and '.join(packages)}: pip install {' '.join(packages)}"
        raise UsageError(f"{user} needs {names}") from error


def check_posix() -> None:
    """Raise UsageError on a system that is not POSIX: it lacks the locks and signals in use."""
    if not hasattr(os, "lockf"):
        raise UsageError(
            "this command needs POSIX: Linux, macOS, or WSL on Windows; loading and exporting"
            " weights does not"
        )


def check_packages() -> None:
    """Raise UsageError on a system that is not POSIX, and if torch, torchvision or timm cannot be
    imported, as builds that do not belong together: pip does not see it, since it only compares
    version numbers.
    """
    check_posix()
    try:
        import timm  # noqa: F401
        import torch  # noqa: F401
        import torchvision  # noqa: F401
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        found = {
            name: [package.version for package in metadata.distributions(name=name)]
            for name in ("torch", "torchvision", "timm")
        }
        versions = [f"{name} {(known or ['(missing)'])[0]}" for name, known in found.items()]
        raise UsageError(
            f"{', '.join(versions)} cannot be imported together: {first_line(error)}; install"
            " builds that belong together: pip install --force-reinstall torch torchvision timm"
        ) from error


def out_of_memory(error: Exception) -> str | None:
    """The line for the user if an error of torch or numpy means a lack of memory, else None."""
    text = first_line(error)
    words = ("out of memory", "can't allocate memory", "calculation overflowed")
    if not isinstance(error, MemoryError) and not any(word in text for word in words):
        return None
    sentence = re.sub(r"^\[.*?\] *|\. .*", "", text)
    return (
        f"not enough memory ({sentence}): smaller --batch-size, --micro-batch, --img-size or"
        " --bank-size need less"
    )


def describe_failure(error: Exception, exit_codes: Sequence[int | None] = ()) -> str | None:
    """The line for the user if an error means that a DataLoader worker was lost or cannot start;
    None if it means anything else, such as a bug in a worker.

    When a worker ends, torch raises RuntimeError at any point of the rank's code, also within its
    own functions that put other errors into a message of theirs, such as load_state_dict. When a
    batch cannot be received from a worker that has ended, it raises OSError or EOFError.
    exit_codes: of the workers, if they are known.
    """
    text, messages = str(error), ("DataLoader worker", "Too many open files")
    if "Caught MemoryError in DataLoader worker" in text:
        return f"a DataLoader worker has no memory left: {MORE_MEMORY}"
    if text.startswith("Caught "):
        return None
    text = text[max(0, text.find("DataLoader worker (pid")) :]
    if not isinstance(error, OSError | EOFError) and not text.startswith(messages):
        return None
    sentence = text.partition(".")[0] or type(error).__name__
    if not text.startswith("DataLoader worker"):
        sentence = f"a DataLoader worker was lost or cannot start ({sentence})"
    codes = [*map(int, re.findall(r"exit code (\d+)", text)), *filter(None, exit_codes)]
    numbers = [code - SENDING_FAILED for code in codes] + [getattr(error, "errno", None)]
    # with older torch, a worker that fills shared memory dies by this signal
    if "Bus error" in text or -getattr(signal, "SIGBUS", 0) in codes:
        numbers.append(errno.ENOSPC)
    return f"{sentence}: {_advice(numbers)}"


def _advice(numbers):
    """What the user can do about errors with these numbers."""
    if errno.ENOSPC in numbers:  # semaphores are in shared memory too
        return "/dev/shm is full: enlarge it (docker run --shm-size=8g), or choose fewer --workers"
    if errno.EMFILE in numbers or not _descriptors_left():
        return "the limit of open files is too low: raise it (ulimit -n 4096)"
    return MORE_MEMORY


def _descriptors_left() -> bool:
    """Whether this process can open ten more files, as it must to receive a batch."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
        for _ in range(10):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        return True
    return False


def kill_children() -> None:
    """Kill the processes that load images. Python would wait for them when it ends, and a process
    that is stopped (SIGSTOP) does not end by itself.
    """
    if hasattr(signal, "SIGCHLD"):  # not on Windows
        # otherwise torch's handler raises RuntimeError, anywhere, when a worker ends
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


@contextlib.contextmanager
def one_clear_line(program: str) -> Iterator[None]:
    """Turn the project's own errors into one line on stderr and an exit code; bugs keep their
    traceback.

    All ranks of a machine meet the same usage error, so only the first one prints it; a run error
    names its rank.
    """
    numbers = (
        os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))
    )
    rank, ranks = (int(x) if x.isascii() and x.isdecimal() else 0 for x in numbers)
    rank = rank if rank < ranks else 0  # a number that no launcher sets
    with console_may_vanish():
        try:
            yield
            return
        except UsageError as error:
            code, line = 2, f"error: {one_line(error)}"
        except Interrupted as error:
            code, line = 75, str(error)
        except KeyboardInterrupt:
            code, line = 130, "interrupted"
        except (RuntimeError, MemoryError) as error:
            kill_children()
            message = one_line(error) if isinstance(error, RunError) else describe_failure(error)
            message = message or out_of_memory(error)
            if message is None:
                raise
            code, line = 1, f"stopped on rank {rank} ({socket.gethostname()}): {message}"
        # a usage error can be that of one machine, which lacks a file
        if rank == 0 or code == 1 or (code == 2 and os.environ.get("LOCAL_RANK") == "0"):
            # in one write: print writes the end of the line separately, so lines of ranks could mix
            sys.stderr.write(f"{program}: {line}\n")
        kill_children()
        sys.stdout.flush()
        sys.stderr.flush()
        if "WORLD_SIZE" in os.environ:
            # without Python's clean-up, in which the rest of a failed process group might wait for
            # other ranks forever
            os._exit(code)
        sys.exit(code)
