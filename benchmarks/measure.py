"""Shared code of the benchmarks: timing, peak memory, the name of the hardware, tables."""

import argparse
import contextlib
import ctypes
import os
import platform
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser that keeps the line breaks of the description and prints defaults."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    return argparse.ArgumentParser(description=description, formatter_class=Formatter)


def fastest(
    sides: dict[str, Callable[[], object]], steps: int, device: torch.device
) -> dict[str, float]:
    """Seconds of the fastest of `steps` calls of each function, after one call to warm up.

    The functions alternate: if the machine slows down, it slows all of them. The fastest call is
    the least disturbed one. With one thread on a CPU these are seconds of processor time, which
    other jobs on the machine do not lengthen.
    """
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


def device_seconds(
    sides: dict[str, Callable[[], object]], steps: int, device: torch.device
) -> dict[str, float]:
    """As `fastest`, but only the time in which a GPU works, without that in which it waits for the
    host. Nothing on a CPU.

    The GPU first sleeps until the host has issued the call. The call must not read values from it.
    """
    if device.type != "cuda":
        return {}
    seconds = {name: [] for name in sides}
    for step in range(steps + 1):
        for name, function in sides.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2 * 10**8)  # cycles, about 0.1 s
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            if step:
                seconds[name].append(start.elapsed_time(end) / 1000)
    return {name: min(values) for name, values in seconds.items()}


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """Most bytes that a second call holds at once, beyond those held before it.

    On a CPU the number comes from /proc/self/status, which only Linux has.
    """
    function()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    # return freed memory to the system, so that the second call has to allocate it again
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def wait(device: torch.device) -> None:
    """Wait for the device if it is a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def hardware(device: torch.device) -> str:
    """Name of the device, number of threads and version of torch, to print above a table."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    model = models[0] if models else platform.machine()
    bf16 = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
    return (
        f"{torch.get_num_threads()} threads of {model} ({bf16} native bfloat16), "
        f"torch {torch.__version__}"
    )


def table(head: list[str], rows: Iterable[list]) -> str:
    """Columns of text: the first is aligned to the left, the others to the right. In Markdown if
    the environment has SNCLR_MARKDOWN (benchmarks/gpu.sh sets it).
    """
    lines = [list(map(str, line)) for line in (head, *rows)]
    if os.environ.get("SNCLR_MARKDOWN"):
        lines.insert(1, ["---"] * len(head))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
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
    """Replace torch.distributed's collectives by those of `number` ranks that hold equal tensors.

    Yields a list to which each collective appends the bytes that one rank sends with the ring
    algorithm: in a gather, its part to all others; in a reduction, everything twice.
    """
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
    originals = {name: getattr(torch.distributed, name) for name in stand_ins}
    try:
        for name, function in stand_ins.items():
            setattr(torch.distributed, name, function)
        yield sent
    finally:
        for name, function in originals.items():
            setattr(torch.distributed, name, function)
