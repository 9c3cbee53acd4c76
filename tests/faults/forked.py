"""Start programs without their five seconds of imports: a server forks a process per case.

Each case is a process with its own arguments, environment, folder, console and limits. It ends as
the interpreter ends, so exit codes and last lines are those of a user's process. `Programs` is the
client.
"""

import contextlib
import faulthandler
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 300  # seconds for what takes seconds: a machine may be slow and busy


class Case:
    """A process of the server; its console is the file `log`, unless it was given another one."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def pid(self) -> int:
        """Of the program."""
        return int(self._wait_for("pid", PATIENCE))

    @property
    def output(self) -> str:
        """What it printed so far, both streams."""
        log = self.folder / "log"
        return log.read_text(errors="replace") if log.exists() else ""

    def running(self) -> bool:
        return not (self.folder / "code").exists()

    def ended(self, within: float = PATIENCE) -> tuple[int, str]:
        """Its exit code (negative: a signal) and output. It is killed after `within` seconds."""
        try:
            return int(self._wait_for("code", within)), self.output
        except TimeoutError:
            self.signal(signal.SIGQUIT)  # prints where it hangs
            time.sleep(0.5)
            self.kill()
            raise TimeoutError(f"no end within {within} s:\n{self.output[-3000:]}") from None

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """With all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait_for(self, text: str, within: float = PATIENCE) -> None:
        """Until it has printed this, or ended."""
        end = time.monotonic() + within
        while text not in self.output:
            if not self.running() or time.monotonic() > end:
                raise AssertionError(f"no {text!r} in:\n{self.output[-3000:]}")
            time.sleep(0.02)

    def _wait_for(self, name, within):
        end = time.monotonic() + within
        while not (self.folder / name).exists():
            if time.monotonic() > end:
                raise TimeoutError(name)
            time.sleep(0.01)
        return (self.folder / name).read_text()


class Programs:
    """The client. folder: for the files of the cases."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.server.stdout.readline()  # it has imported everything

    def start(
        self,
        program: str,
        *flags,
        cwd: Path | None = None,
        stdout: str | None = None,
        stderr: str | None = None,
        shared_memory: int | None = None,
        limits: dict[str, int] | None = None,
        blocked_by: Path | None = None,
        **environment: str,
    ) -> Case:
        """Start a program: 'main_snclr.py', or a module such as 'snclr.report'.

        stdout, stderr  a path, or '-' for a closed one
        shared_memory   bytes of /dev/shm (root only)
        limits          by the names of RLIMIT_*
        blocked_by      while this file exists, no image can be read; after a signal the program
                        waits 2 s for images, not 10
        """
        self.count += 1
        case = self.folder / f"case{self.count}"
        case.mkdir(parents=True)
        job = dict(
            case=str(case),
            program=program,
            flags=list(map(os.fsdecode, map(os.fspath, map(_path_or_text, flags)))),
            cwd=str(cwd or case),
            stdout=stdout or str(case / "log"),
            stderr=stderr or str(case / "log"),
            shared_memory=shared_memory,
            limits=limits or {},
            blocked_by=blocked_by and str(blocked_by),
            environment=environment,
        )
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return Case(case)

    def run(self, program: str, *flags, within: float = PATIENCE, **how) -> tuple[int, str]:
        """Start a program and wait: its exit code and output."""
        return self.start(program, *flags, **how).ended(within)

    def close(self) -> None:
        self.server.kill()
        self.server.wait()


@functools.cache
def may_mount() -> bool:
    """Whether this process may mount; root in a container may lack the capability."""
    command = "unshare --mount mount -t tmpfs none /tmp"
    return subprocess.run(["sh", "-c", command], capture_output=True).returncode == 0


def _path_or_text(flag):
    return flag if isinstance(flag, (str, bytes, Path)) else str(flag)


# -- the server ------------------------------------------------------------------------------------


def serve() -> dict:
    """Fork a process for each job on stdin; returns only in those."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            job = json.loads(line)
            pid = os.fork()
            if pid == 0:
                os.setsid()
                return job
            _write(job, "pid", pid)
            _, status = os.waitpid(pid, 0)
            _write(job, "code", os.waitstatus_to_exitcode(status))
            os._exit(0)
    os._exit(0)


def _write(job, name, number):
    path = os.path.join(job["case"], name)
    with open(f"{path}.part", "w") as file:
        file.write(str(number))
    os.replace(f"{path}.part", path)


def become(job: dict) -> None:
    """Turn this process into one that a user has started."""
    import resource

    open(os.path.join(job["case"], "log"), "a").close()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    if job["shared_memory"] is not None:
        _small_shared_memory(job["shared_memory"])
    if job["blocked_by"]:
        from snclr.datasets import files
        from snclr.running import workers

        decode = files.decode

        def when_free(*args):
            while os.path.exists(job["blocked_by"]):
                time.sleep(0.1)
            return decode(*args)

        files.decode = when_free
        workers.PATIENCE = 2
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.close(number)
        stream = None
        if job[name] != "-":
            file = os.open(job[name], os.O_WRONLY | os.O_APPEND | os.O_NOCTTY)
            if file != number:
                os.dup2(file, number)
                os.close(file)
            stream = open(  # noqa: SIM115 - open as long as the process lives
                number,
                "w",
                errors="surrogateescape" if number == 1 else "backslashreplace",
                closefd=False,
            )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if sys.stderr is not None:
        faulthandler.register(signal.SIGQUIT)
    for name, number in job["limits"].items():
        if name == "AS":  # beyond what the imports before the fork have taken
            number += resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
        _, hard = resource.getrlimit(kind := getattr(resource, f"RLIMIT_{name}"))
        resource.setrlimit(kind, (number, hard))


def _small_shared_memory(size):
    import ctypes

    libc, new_mounts, private = ctypes.CDLL(None, use_errno=True), 0x20000, 1 << 18 | 1 << 14
    done = libc.unshare(new_mounts) == 0 and libc.mount(None, b"/", None, private, None) == 0
    if not done or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode()) != 0:
        raise OSError(ctypes.get_errno(), "no /dev/shm of its own")


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    # imported once, before the programs are forked
    import torch

    import main_lincls  # noqa: F401
    import main_snclr  # noqa: F401
    import snclr.embed
    import snclr.export
    import snclr.mean_std
    import snclr.report
    import snclr.visualize  # noqa: F401

    torch.set_num_threads(1)
    job = serve()
    become(job)
    sys.argv = [job["program"], *job["flags"]]
    warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
    if job["program"].endswith(".py"):
        sys.argv[0] = str(ROOT / job["program"])
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(job["program"], run_name="__main__", alter_sys=True)
