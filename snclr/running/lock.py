"""Lets one run at a time use a workdir. The kernel releases the lock when the process ends."""

import os
import socket
import stat

from .errors import UsageError
from .packages import check_posix
from .safe_files import open_regular, writing


def hold(workdir: str, name: str) -> None:
    """Lock workdir/NAME.lock until this process ends, and write its number and host into the file.
    Raises UsageError if another process holds the lock, and on a system that is not POSIX.

    A file left by a process that has ended is not locked. POSIX locks work over NFS, and worker
    processes do not inherit them. The file stays open: closing it would release the lock.
    """
    check_posix()
    path = os.path.join(workdir, f"{name}.lock")
    with writing(path):
        os.makedirs(workdir, exist_ok=True)
        # no link is followed, because the file behind it would be overwritten
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"{path} is not a regular file: remove it, or choose another --workdir")
    try:
        os.lockf(descriptor, os.F_TLOCK, 0)
    except OSError as error:
        if not isinstance(error, BlockingIOError | PermissionError):
            return  # the file system has no locks: run without one
        owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        raise UsageError(
            f"{workdir} is in use by {owner}: choose another --workdir, or end that run first"
        ) from error
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
