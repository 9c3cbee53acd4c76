"""Lets one run at a time use a workdir. The kernel releases the lock when the process ends."""

import os
import socket

from .errors import UsageError, check_posix
from .safe_files import descriptor_of, open_regular, writing


def hold(workdir: str, name: str) -> None:
    """Lock workdir/NAME.lock until this process ends, and write its number and host into the file.

    A file left by a process that has ended is not locked. POSIX locks work over NFS, and worker
    processes do not inherit them. The file stays open: closing it would release the lock. Raises
    UsageError if another process holds the lock, and on a system that is not POSIX; RunError if the
    file cannot be written.
    """
    check_posix()
    path = os.path.join(workdir, f"{name}.lock")
    with writing(path):
        os.makedirs(workdir, exist_ok=True)
        descriptor = descriptor_of(path, os.O_RDWR | os.O_CREAT, follow=False)
    try:
        os.lockf(descriptor, os.F_TLOCK, 0)
    except (BlockingIOError, PermissionError) as error:
        owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        raise UsageError(
            f"{workdir} is in use by {owner}: choose another --workdir, or end that run first"
        ) from error
    except OSError:
        return  # the file system has no locks: run without one
    with writing(path):
        os.truncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())


def is_held(workdir: str, name: str) -> bool:
    """Whether another process holds the lock workdir/NAME.lock."""
    try:
        with open_regular(os.path.join(workdir, f"{name}.lock"), follow=False) as file:
            os.lockf(file.fileno(), os.F_TEST, 0)
    except (UsageError, OSError) as error:
        return isinstance(error, BlockingIOError | PermissionError)
    return False
