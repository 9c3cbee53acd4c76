"""torchrun for start.sh.

Names the first process that failed in one line and ends with its exit code; passes signals on and
waits until the processes have saved; restarts after a failure.

MAX_RESTARTS=n restarts up to n times, as a new process, so that the machines of a run join again as
at the first start. `--port-is-free PORT` only checks whether this machine can listen on a port: the
exit code is 0 if it can.
"""

import os
import signal
import socket
import subprocess
import sys
import time

# no restart after these exit codes: wrong flags would fail again, and a signal is to stop the run
USAGE, SAVED = 2, 75
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
ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup


class Process(subprocess.Popen):
    """A process that is added to `started`."""

    def __init__(self, *args, **kwargs):
        if ignores_hangup:  # until torch handled it; the process inherits this
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        super().__init__(*args, **kwargs)
        started.append(self)


def print_line(text: str) -> None:
    print(f"start.sh: {text}", file=sys.stderr, flush=True)


def launch(arguments: list[str]) -> int:
    """Run torchrun; returns the exit code."""
    # a rank ends if its parent is another process than this one
    os.environ["SNCLR_LAUNCHER"] = str(os.getpid())
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    # by default torch prints a C++ stack for every lost connection
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    subprocess.Popen = Process
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing import SignalException, api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # raises SignalException; then torch signals the processes and waits until they have saved
    stop = api._terminate_process_handler
    interrupts = []

    def stop_or_kill(number, frame):
        interrupts.append(number == signal.SIGINT)
        if sum(interrupts) > 1:
            for process in started:
                process.kill()
            os._exit(128 + number)
        stop(number, frame)

    api._terminate_process_handler = stop_or_kill  # for SIGTERM, SIGINT and SIGHUP
    signal.signal(signal.SIGUSR1, stop_or_kill)
    try:
        run.run(run.parse_args(arguments))
        return 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # by a signal; otherwise the process has printed the reason
            name = signal.Signals(-failure.exitcode).name
            reason = ": out of memory?" if name == "SIGKILL" else ""
            process = f"process {failure.pid} on {socket.gethostname()}"
            print_line(f"rank {rank} ({process}) was ended by {name}{reason}")
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as error:
        codes = {process.wait(GRACE) for process in started if "-u" in process.args}
        return SAVED if codes == {SAVED} else 128 + error.sigval
    except (DistError, RuntimeError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        print_line(f"error: the machines did not meet in time: {reason}")
        return 1
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()


def main(arguments: list[str]) -> int:
    """Launch, and restart after failures up to MAX_RESTARTS times; returns the exit code."""
    if "--nnodes" in arguments:
        arguments = ["--rdzv_conf", f"timeout={os.environ.get('JOIN_SECONDS', 600)}", *arguments]
    code = launch(arguments)
    names = ("SNCLR_RESTART_COUNT", "MAX_RESTARTS")
    count, allowed = (int(os.environ.get(name, 0)) for name in names)
    if code in (0, USAGE, SAVED) or code > 128 or count == allowed:
        return code
    print_line(f"starting again, {count + 1} of {allowed} times")
    if "--node_rank" in arguments and arguments[arguments.index("--node_rank") + 1] != "0":
        time.sleep(10)  # so that it does not join the old store on the machine of rank 0
    os.environ["SNCLR_RESTART_COUNT"] = str(count + 1)
    os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    if sys.argv[1] == "--port-is-free":
        sys.exit(not port_is_free(int(sys.argv[2])))
    sys.exit(main(sys.argv[1:]))
