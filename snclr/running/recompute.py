"""Saves memory at the cost of time: forward keeps only its inputs, and backward repeats it."""

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
