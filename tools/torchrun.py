"""torchrun with the exit code of the process that failed first, and without a traceback of its own below that one's words.

`--port-is-free PORT` only says, by its exit code, whether this machine's port can be listened on.
"""

import socket
import sys


def port_is_free(port: int) -> bool:
    """Whether a server can listen on the port."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            server.bind(("", port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    if sys.argv[1] == "--port-is-free":
        sys.exit(not port_is_free(int(sys.argv[2])))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
