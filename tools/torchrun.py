"""torchrun that ends with the exit code of the process that failed first and says which one that was, in a line instead of a
traceback; passes signals on and waits until the processes have saved; and starts again after a failure.

MAX_RESTARTS=n starts up to n times again, as a new process, so that machines that come back meet as at the first start.
`--port-is-free PORT` only says, by its exit code, whether this machine's port can be listened on.
"""

import os
import signal
import socket
import subprocess
import sys
import time

USAGE, SAVED = (
    2,
    75,
)  # exit codes of ours after which starting again would be of no use, or not what was asked for
GRACE = 120  # seconds for the processes to save after a signal


def port_is_free(port: int) -> bool:
    """Whether a server can listen on the port."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            server.bind(("", port))
        except OSError:
            return False
    return True


started = []  # the processes that torch starts


class Process(subprocess.Popen):
    """A process that is remembered."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        started.append(self)


def launch(arguments: list[str]) -> int:
    """Run torchrun; the exit code."""
    os.environ["SNCLR_LAUNCHER"] = str(
        os.getpid()
    )  # so that a rank knows whether it is still there
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # every lost connection would be told with a C++ stack
    subprocess.Popen = Process
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing import SignalException, api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    stop = (
        api._terminate_process_handler
    )  # raises SignalException, upon which the processes get the signal and time to save

    interrupts = []

    def stop_or_kill(number, frame):
        interrupts.extend([number] * (number == signal.SIGINT))
        if len(interrupts) > 1:
            for process in started:
                process.kill()
            os._exit(128 + number)
        stop(number, frame)

    api._terminate_process_handler = stop_or_kill  # for SIGTERM and SIGINT
    signal.signal(signal.SIGUSR1, stop_or_kill)
    try:
        run.run(run.parse_args(arguments))
        return 0
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:  # who ends by an exit code has told why
            name = signal.Signals(-failure.exitcode).name
            told = f"rank {number} (process {failure.pid} on {socket.gethostname()}) was ended by {name}"
            print(
                f"start.sh: {told}" + ": out of memory?" * (name == "SIGKILL"),
                file=sys.stderr,
                flush=True,
            )
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as error:
        codes = {process.wait(GRACE) for process in started if "-u" in process.args}
        return SAVED if codes == {SAVED} else 128 + error.sigval
    except (DistError, RuntimeError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        print(
            f"start.sh: error: the machines did not meet in time: {reason}",
            file=sys.stderr,
            flush=True,
        )
        return 1
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()


def main(arguments: list[str]) -> int:
    """Launch, and after a failure start again as often as MAX_RESTARTS says; the exit code."""
    if "--nnodes" in arguments:
        arguments = ["--rdzv_conf", f"timeout={os.environ.get('JOIN_SECONDS', 600)}", *arguments]
    code = launch(arguments)
    count, allowed = (
        int(os.environ.get(name, 0)) for name in ("SNCLR_RESTART_COUNT", "MAX_RESTARTS")
    )
    if code in (0, USAGE, SAVED) or code > 128 or count == allowed:
        return code
    print(f"start.sh: starting again, {count + 1} of {allowed} times", file=sys.stderr, flush=True)
    if "--node_rank" in arguments and arguments[arguments.index("--node_rank") + 1] != "0":
        time.sleep(
            10
        )  # else it might meet what is left of this start on the machine where all meet
    os.environ["SNCLR_RESTART_COUNT"] = str(count + 1)
    os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    if sys.argv[1] == "--port-is-free":
        sys.exit(not port_is_free(int(sys.argv[2])))
    sys.exit(main(sys.argv[1:]))
