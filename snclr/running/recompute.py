"""Saves memory at the cost of time: forward keeps only its inputs, and backward repeats it."""

import contextlib
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *inputs, module: nn.Module) -> Tensor:
    """function(*inputs) with the same value and gradients, but its activations are not kept.

    Backward runs the function a second time, with the same random numbers and autocast. The batch
    norms in `module`, which the function uses, do not update their running statistics again.
    """
    norms = [
        layer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
    ]
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _without_updates(norms)),
    )


@contextlib.contextmanager
def _without_updates(norms):
    # by momentum 0: with track_running_stats = False a layer would save fewer tensors for backward
    # than in forward, which checkpoint() refuses
    momenta = [layer.momentum for layer in norms]
    counts = [layer.num_batches_tracked.clone() for layer in norms]
    for layer in norms:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum, count in zip(norms, momenta, counts, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(count)
