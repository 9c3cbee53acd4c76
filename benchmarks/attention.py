#!/usr/bin/env python3
"""Attention of one ViT block, forward and backward, by each of torch's implementations.

    python benchmarks/attention.py                       ViT-S/16 at 224 px with 12 heads, on a GPU
    python benchmarks/attention.py --views 4 --steps 1   on a CPU

The factors are random, in bfloat16. The error is that of output and gradients, relative to the
largest value, against the same in float64.
"""

import contextlib
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import measure
from snclr.running import process_group

# None: torch chooses one
KINDS = {
    "torch's choice": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attend(factors: torch.Tensor, kind: SDPBackend | None) -> list[torch.Tensor]:
    """Output (B, H, N, D) and gradients of queries, keys and values, stacked in factors."""
    leaves = [factor.detach().requires_grad_() for factor in factors]
    with contextlib.nullcontext() if kind is None else sdpa_kernel(kind):
        output = scaled_dot_product_attention(*leaves)
        gradients = torch.autograd.grad(output.square().sum(), leaves)
    return [output.detach(), *gradients]


def main():
    parser = measure.argument_parser(__doc__)
    parser.add_argument("--views", type=int, default=512, metavar="B", help="views in a call")
    parser.add_argument("--heads", type=int, default=12, metavar="H", help="attention heads")
    parser.add_argument("--width", type=int, default=384, metavar="W", help="width of the block")
    parser.add_argument("--tokens", type=int, default=197, metavar="N", help="tokens of a view")
    parser.add_argument(
        "--steps", type=int, default=5, metavar="N", help="calls of each row; the fastest counts"
    )
    args = parser.parse_args()
    device = process_group.own_device()
    torch.manual_seed(0)
    shape = args.views, args.heads, args.tokens, args.width // args.heads
    factors = torch.randn(3, *shape, device=device, dtype=torch.bfloat16)
    few = factors[:, :2]
    exact = attend(few.double(), SDPBackend.MATH)
    rows = []
    for name, kind in KINDS.items():
        try:
            actual = attend(few, kind)
        except RuntimeError:  # not for this device, or not built
            rows.append([name, "not available", "", ""])
            continue
        error = max((x - y).abs().max() / y.abs().max() for x, y in zip(actual, exact, strict=True))
        call = {name: lambda kind=kind: attend(factors, kind)}
        taken = measure.fastest(call, args.steps, device)
        on_device = measure.device_seconds(call, args.steps, device) or taken
        cells = [f"{1000 * seconds[name]:.2f}" for seconds in (taken, on_device)]
        rows.append([name, *cells, f"{error.item():.0e}"])
    print(f"{' x '.join(map(str, shape))}; {measure.hardware(device)}; fastest of {args.steps}")
    print(measure.table(["", "ms", "ms on the device", "error"], rows))


if __name__ == "__main__":
    main()
