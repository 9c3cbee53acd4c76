"""What the benchmarks share: alternating timings, peak memory, the hardware's name, tables."""

import contextlib
import ctypes
import platform
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


def fastest(
    sides: dict[str, Callable[[], object]], steps: int, device: torch.device
) -> dict[str, float]:
    """Seconds of the fastest of `steps` calls of each function. They alternate, so that a machine that slows down slows all
    alike, and the fastest was disturbed least; a call of each goes before, to warm up. On one thread of a CPU they are that
    CPU's seconds, which other jobs on the machine do not lengthen."""
    clock = (
        time.process_time
        if device.type == "cpu" and torch.get_num_threads() == 1
        else time.perf_counter
    )
    seconds = {name: [] for name in sides}
    for step in range(steps + 1):
        for name, function in sides.items():
            wait(device)
            start = clock()
            function()
            wait(device)
            if step:
                seconds[name].append(clock() - start)
    return {name: min(values) for name, values in seconds.items()}


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """Bytes that a second call takes at most, beyond what was held before it; on a CPU by Linux's own account."""
    function()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(
        0
    )  # what the first call freed goes back to the system, and is counted when it is taken again
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def wait(device: torch.device) -> None:
    """Wait for the GPU, if there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def hardware(device: torch.device) -> str:
    """Name of the device, threads and torch's version, for the head of a table."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name()}, torch {torch.__version__}"
    models = (
        re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if Path("/proc/cpuinfo").exists()
        else []
    )
    model = models[0] if models else platform.machine()
    bf16 = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
    return f"{torch.get_num_threads()} threads of {model} ({bf16} native bfloat16), torch {torch.__version__}"


def table(head: list[str], rows: Iterable[list]) -> str:
    """Columns of text, the first to the left, the others to the right."""
    lines = [list(map(str, line)) for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, rest = widths[0], widths[1:]
    return "\n".join(
        "  ".join(
            [
                line[0].ljust(first),
                *(cell.rjust(width) for cell, width in zip(line[1:], rest, strict=True)),
            ]
        )
        for line in lines
    )


@contextlib.contextmanager
def simulated_ranks(number: int):
    """Let this process believe in `number` ranks that all hold what it holds; yields a list of the bytes that a rank sends in
    each collective of the block, by the ring algorithms: a gather passes a rank's part on to all others, a reduction sends
    everything twice."""
    sent = []

    def all_gather(parts, x):
        sent.append(x.nbytes * (number - 1))
        for part in parts:
            part.copy_(x)

    def all_reduce(x):
        sent.append(2 * x.nbytes * (number - 1) // number)
        x.mul_(number)

    stand_ins = {
        "is_initialized": lambda: True,
        "get_world_size": lambda: number,
        "get_rank": lambda: 0,
    }
    stand_ins |= {"all_gather": all_gather, "all_reduce": all_reduce}
    true = {name: getattr(torch.distributed, name) for name in stand_ins}
    try:
        for name, function in stand_ins.items():
            setattr(torch.distributed, name, function)
        yield sent
    finally:
        for name, function in true.items():
            setattr(torch.distributed, name, function)
