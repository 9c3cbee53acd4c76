"""Standard output and error that may be lost during a run: full disk, closed pipe, closed stream.

A run can outlive its terminal. Text that cannot be printed is dropped, and the reason is kept in
`lost`, so that the run can record it.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

lost: dict[str, str] = {}  # for each stream that was lost a line, until the log has it


class Console:
    """A text stream whose errors are recorded rather than raised.

    stream: None if it was closed before the program started.
    """

    def __init__(self, stream, name: str):
        if stream is None:
            lost[name] = f"{name} is lost (closed)"
            stream = open(os.devnull, "w")  # noqa: SIM115 - open as long as the process lives
        self.stream, self.name, self.failed = stream, name, False

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def _try(self, function, *args):
        try:
            function(*args)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            if not self.failed:
                reason = getattr(error, "strerror", None) or str(error)
                lost[self.name] = f"{self.name} is lost ({reason})"
            self.failed = True
            # a full disk may have room again later, but a broken pipe stays broken
            if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
                self.discard()

    def discard(self) -> None:
        """Drop the text in the stream's buffer, and all later text."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def console_may_vanish() -> Iterator[None]:
    """During the block sys.stdout and sys.stderr are Consoles."""
    # if descriptor 0, 1 or 2 is closed, the next file to be opened would get its number, and then
    # receive the messages of C++ code
    with contextlib.suppress(OSError):
        while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(opened)
    consoles = Console(sys.stdout, "stdout"), Console(sys.stderr, "stderr")
    with contextlib.redirect_stdout(consoles[0]), contextlib.redirect_stderr(consoles[1]):
        try:
            yield
        finally:
            for console in consoles:
                console.flush()
                if console.failed:
                    console.discard()
