"""Helpers of the fault tests: start a small run of two ranks, find its processes, compare runs."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = (
    "--arch resnet8 --width 8 --img-size 32 --snclr-dim 16 --snclr-mlp-dim 32 --bank-size 30 "
    "--topk 3 --lr 0.01 -b 8 --print-freq 1 --eval-freq 1 --epochs 2"
)  # 5 steps an epoch on the images of test_ranks.write_images
FLAGS = SMALL.split()
LAST = "checkpoint_last.pth.tar"
CLOCK = ("images_per_s", "data_wait", "slowest_step_s")  # metrics that differ between equal runs
IN_RANKS = os.pathsep.join([str(ROOT / "tests/faults/in_ranks"), str(ROOT)])
PATIENCE = 600  # seconds for what takes seconds: a machine may be slow and busy
FOREIGN = ("SLURM", "NNODES", "NODE_RANK", "MASTER", "WORLD", "TORCHELASTIC", "SNCLR")


def numbers(description, defaults):
    """Parse integer flags. defaults: from each flag to its default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, default in defaults.items():
        parser.add_argument(flag, type=int, default=default, help=f"default: {default}")
    return parser.parse_args()


def start(*flags, ranks=2, before=(), path=(), output=subprocess.PIPE, **environment):
    """Start start.sh with these flags; stdout and stderr are one stream.

    before: words to put before the command. path: folders to put before PATH.
    """
    keep = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    keep["PATH"] = os.pathsep.join(
        [*map(str, path), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    keep |= {
        "OMP_NUM_THREADS": "1",
        "NPROC_PER_NODE": str(ranks),
        "CUDA_VISIBLE_DEVICES": "",
    } | environment
    command = [*before, "bash", str(ROOT / "start.sh"), *map(str, flags)]
    return subprocess.Popen(
        command,
        env=keep,
        text=True,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def in_step(rank, step, number):
    """Variables with which a rank gets signal `number` within step `step` of the first start."""
    return {"PYTHONPATH": IN_RANKS, "IN_STEP": f"{rank} {step} {number:d}"}


def ended(process, within=PATIENCE):
    """Wait for a process; its exit code and output."""
    try:
        output, _ = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end within {within} s:\n{killed(process)}") from None
    return process.returncode, output


def killed(process):
    """Kill a process and its group; the end of its output."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0][-3000:]


def processes():
    """Pairs of a process id and the fields of /proc/PID/stat from the state on; no zombies."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[0] not in "ZX":
                yield int(folder.name), fields


def children_of(pid):
    """Process ids of the living children of a process, the oldest first."""
    children = [(int(fields[19]), child) for child, fields in processes() if int(fields[1]) == pid]
    return [child for _, child in sorted(children)]


def living_in(group):
    """Process ids in a process group, without zombies."""
    return [pid for pid, fields in processes() if int(fields[2]) == group]


def ranks_of(process):
    """Process ids of the ranks that a launcher started, in any order."""
    pids = []
    for pid in children_of(process.pid):
        with contextlib.suppress(OSError):
            environment, command = (
                Path(f"/proc/{pid}/{name}").read_bytes() for name in ("environ", "cmdline")
            )
            if b"RANK=" in environment and b"main_snclr" in command:
                pids.append(pid)
    return pids


def is_rank(pid, rank):
    """Whether a process is the rank of this number."""
    with contextlib.suppress(OSError):
        return f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def lives(pid):
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def lines_of(workdir):
    """The lines of metrics.jsonl, without an incomplete last line."""
    path = Path(workdir) / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []
    )


def wait_for(condition, process=None, within=PATIENCE):
    """Wait until condition() is true; fail if the process ends before."""
    end = time.monotonic() + within
    while not condition():
        has_ended = process is not None and process.poll() is not None
        if has_ended or time.monotonic() > end:
            raise AssertionError(f"no {condition}: {process and killed(process)}")
        time.sleep(0.02)


def wait_for_step(workdir, step, process):
    """Wait until metrics.jsonl has a training line of this step or a later one."""
    wait_for(
        lambda: any(line["step"] >= step for line in lines_of(workdir) if "loss" in line), process
    )


def differences(one, other):
    """Names of what differs after two runs: in checkpoint, encoder file and metrics."""
    names = []
    for name in (LAST, "encoder_last.pth.tar"):
        a, b = (torch.load(Path(workdir) / name, weights_only=True) for workdir in (one, other))
        names += [
            f"{name} {key}"
            for key in ("epoch", "step", "state_dict", "optimizer")
            if key in a and not same(a[key], b[key])
        ]
    logs = [
        [{k: v for k, v in line.items() if k not in CLOCK} for line in lines_of(workdir)]
        for workdir in (one, other)
    ]
    return names + ([] if logs[0] == logs[1] else ["metrics.jsonl"])


def same(a, b):
    """Whether nested dictionaries, lists and tensors are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
