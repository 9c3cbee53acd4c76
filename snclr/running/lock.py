"""One run in a workdir at a time: a lock of the kernel's, which ends with its process however that dies."""

import fcntl
import os
import socket

from .errors import UsageError
from .safe_files import writing

held = []  # open for the life of the process: closing the file would end the lock


def hold(workdir: str, name: str) -> None:
    """Lock workdir/NAME.lock, which says host and pid, until this process ends. UsageError where another process holds it.

    A file that a dead process left behind is no lock. POSIX locks reach over NFS, and worker processes do not inherit them.
    """
    path = os.path.join(workdir, f"{name}.lock")
    with writing(path):
        os.makedirs(workdir, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 - open for the life of the process
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        if not isinstance(
            error, BlockingIOError | PermissionError
        ):  # a file system without locks: better than no run
            return
        raise UsageError(
            f"{workdir} is in use by {owner}: choose another --workdir, or end that run first"
        ) from error
    held.append(file)
    with writing(path):
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
