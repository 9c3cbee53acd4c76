"""Number formats: which parts of a step may be computed in 16 bits and which may not."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """float64 stays float64 (the tests' oracles need it); every other format becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """Rows of x (..., D) on the unit sphere, in at least float32."""
    return torch.nn.functional.normalize(widen(x), dim=-1)


def full_precision(function: Callable) -> Callable:
    """Decorator: run a function outside autocast, so that nothing in it is computed in 16 bits."""
    return torch.autocast("cpu", enabled=False)(torch.autocast("cuda", enabled=False)(function))


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """If allowed, a GPU computes the block's float32 products in TF32: their factors are rounded to
    11 bits, their sums are float32. Nothing changes on a CPU.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed or before
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def resolve_amp(amp: str, device: torch.device) -> str:
    """The number format of an --amp flag. 'auto' is bf16 if the hardware has bfloat16; otherwise
    fp16 on a GPU, and off on a CPU, which would emulate bfloat16 slowly.
    """
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, probe, bool)() for probe in probes) else "off"


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """The autocast region of encoders and heads; amp: 'off', 'bf16' or 'fp16' (resolve_amp)."""
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
