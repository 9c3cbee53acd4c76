"""One run in a workdir at a time: a lock of the kernel, which ends with its process in any case."""

import fcntl
import os
import socket
import stat

from .errors import UsageError
from .safe_files import writing

# locked files stay open for the life of the process: closing one would end its lock
locked_files = []


def hold(workdir: str, name: str) -> None:
    """Lock workdir/NAME.lock until this process ends; the file names this host and process.
    Raises UsageError where another process holds the lock.

    The file that a dead process left does not lock. POSIX locks work over NFS, and worker processes
    do not inherit them.
    """
    path = os.path.join(workdir, f"{name}.lock")
    with writing(path):
        os.makedirs(workdir, exist_ok=True)
        # a link is not followed: the file behind it would be overwritten
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"{path} is no regular file: remove it, or choose another --workdir")
    file = open(descriptor, "r+")  # noqa: SIM115 - kept open
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not isinstance(error, BlockingIOError | PermissionError):
            return  # a file system without locks: better than no run
        owner = file.read(200).strip() or "another process"
        raise UsageError(
            f"{workdir} is in use by {owner}: choose another --workdir, or end that run first"
        ) from error
    locked_files.append(file)
    with writing(path):
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
