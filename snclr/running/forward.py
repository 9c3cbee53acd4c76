"""How the forward pass of a backbone runs: compiled, or with less memory for its activations."""

import contextlib
import importlib.util
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import checkpoint

from .distributed import rank, world_size
from .errors import first_line


def resolve_compile(args: Namespace, device: torch.device) -> str:
    """--compile, with the meaning of 'auto': 'on' where it has been measured, else 'off'.

    That is one GPU, a ResNet or ViT of this project, and more images than the embedded ones; and
    torch must find what it compiles with: triton and a C compiler.
    """
    if args.compile != "auto":
        return args.compile
    is_measured = device.type == "cuda" and world_size() == 1
    is_measured &= args.dataset != "embedded" and not args.arch.startswith("timm:")
    return "on" if is_measured and can_compile() else "off"


def can_compile() -> bool:
    """Whether kernels can be compiled for a GPU here: with triton and a C compiler."""
    compilers = map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))
    return any(compilers) and importlib.util.find_spec("triton") is not None


def compiled(function: Callable, choice: str) -> Callable:
    """The function as --compile asks: 'auto' (resolve_compile) and 'off' as it is, 'on' compiled by
    torch, 'graphs' also replayed as CUDA graphs.

    Every shape of the inputs is compiled once, and kept for the user's next runs in
    ~/.cache/snclr/inductor, or where TORCHINDUCTOR_CACHE_DIR says. If torch cannot compile it, it
    runs as it is from then on, after a line that says why.
    """
    if choice in ("auto", "off"):
        return function
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(cache, "snclr", "inductor"))
    fast = torch.compile(
        function, dynamic=False, mode="reduce-overhead" if choice == "graphs" else None
    )

    def call(*inputs):
        nonlocal fast
        try:
            return fast(*inputs)
        except TorchDynamoException as error:
            cause = first_line(getattr(error, "inner_exception", error))
            if rank() == 0:
                print(f"note: the backbones are not compiled: {cause}", flush=True)
            fast = function
            return function(*inputs)

    return call


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
