"""How the forward pass of a backbone runs: compiled, or with less memory for its activations."""

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def compiled(function: Callable, choice: str) -> Callable:
    """The function as --compile asks: 'auto' and 'off' as it is, 'on' compiled by torch, 'graphs'
    also replayed as CUDA graphs.

    Every shape of the inputs is compiled once, and kept for the user's next runs in
    ~/.cache/snclr/inductor, or where TORCHINDUCTOR_CACHE_DIR says.
    """
    if choice in ("auto", "off"):
        return function
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(cache, "snclr", "inductor"))
    return torch.compile(
        function, dynamic=False, mode="reduce-overhead" if choice == "graphs" else None
    )


def begin_step(choice: str) -> None:
    """Tell torch's CUDA graphs that a step begins: what they returned before may be overwritten.

    Without this, torch guesses where a step begins. If a step calls the momentum encoder first,
    torch would take its second call for the next step.
    """
    if choice == "graphs":
        torch.compiler.cudagraph_mark_step_begin()


def recomputed(function: Callable[..., Tensor], *inputs, module: nn.Module) -> Tensor:
    """function(*inputs) with the same value and gradients, but its activations are not kept.

    Backward runs the function a second time, with the same random numbers and autocast. This time
    it leaves the buffers of `module`, such as the running statistics of batch norms, as they are.
    """
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _buffers_restored(module)),
    )


@contextlib.contextmanager
def _buffers_restored(module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, saved in before:
            buffer.copy_(saved)
