"""What a user reads when something is wrong: one line, and an exit code that scripts can rely on."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator


class UsageError(ValueError):
    """Wrong flags, paths, data or checkpoints: nothing has been trained or overwritten. Exit code 2."""


class RunError(RuntimeError):
    """A run that had started cannot go on (for instance a non-finite loss). Exit code 1."""


class Interrupted(BaseException):
    """A signal ended the run, and everything is saved. Exit code 75 (EX_TEMPFAIL: to be tried again).

    No Exception, as KeyboardInterrupt: raised anywhere, it must not be taken for an image that cannot be read.
    """


def one_line(error: Exception) -> str:
    """Its message without what a terminal would not print as it stands: names of files and flags may hold anything."""
    return "".join(
        c if c.isprintable() else "?" for c in str(error).encode(errors="replace").decode()
    )


def first_line(error: Exception) -> str:
    """Of its message, or its name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def first_few(names: list[str], limit: int = 3) -> str:
    """The first names, for a message."""
    return ", ".join(names[:limit]) + (" ..." if len(names) > limit else "")


def end_process(code: int) -> None:
    """End this process. A rank's ends at once: what is left of a process group that failed may wait for others forever."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "WORLD_SIZE" in os.environ:
        os._exit(code)
    sys.exit(code)


def _tell(text: str) -> None:
    # in one piece: print writes the end of a line by itself, and what several ranks say at once would share lines
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def one_clear_line(program: str) -> Iterator[None]:
    """Turn the project's own errors into one line on stderr and an exit code; let real bugs keep their traceback.

    All ranks meet the same usage error, so only rank 0 prints it; a run error belongs to a rank, which it names.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        yield
    except UsageError as error:
        if rank == 0:
            _tell(f"{program}: error: {one_line(error)}")
        end_process(2)
    except Interrupted as error:
        if rank == 0:
            _tell(f"{program}: {error}")
        end_process(75)
    except RuntimeError as error:
        told = one_line(error)
        if told.startswith(
            "DataLoader worker"
        ):  # torch's words for it, which its signal handler raises anywhere
            told = f"{told.partition('.')[0]}: out of memory? fewer --workers need less of it"
        elif not isinstance(error, RunError):
            raise
        _tell(f"{program}: stopped on rank {rank} ({socket.gethostname()}): {told}")
        end_process(1)
    except KeyboardInterrupt:
        if rank == 0:
            _tell(f"{program}: interrupted")
        end_process(130)
