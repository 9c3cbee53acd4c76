"""Less memory for more computation: forwards that keep nothing but their inputs, and are computed
again in backward.
"""

import contextlib
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *inputs, module: nn.Module) -> Tensor:
    """function(*inputs), whose activations live only while its own backward runs; same value, same
    gradients.

    module: what function computes with. The second forward repeats the first one's random numbers
    and autocast, and its batch norms leave their running statistics alone, which have seen this
    batch already.
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
        context_fn=lambda: (contextlib.nullcontext(), _at_rest(norms)),
    )


@contextlib.contextmanager
def _at_rest(norms):
    # not track_running_stats: without their running statistics the layers would save fewer tensors
    # than the first time
    momenta, counts = (
        [layer.momentum for layer in norms],
        [layer.num_batches_tracked.clone() for layer in norms],
    )
    for layer in norms:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum, count in zip(norms, momenta, counts, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(count)
