#!/usr/bin/env python3
"""Memory of the bank and time of one search by number of rows, in float32 and with the rounded
products of --amp bf16: bfloat16 on a CPU, TF32 on a GPU.

    python benchmarks/search.py                     128,000 rows and 4,096,000 rows (7 GB)
    python benchmarks/search.py --rows 128000 --queries 1024

The queries are those of one rank in one step: two for each of its images. All features are random.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from benchmarks import measure
from snclr.memory_bank import MemoryBank
from snclr.running import process_group
from snclr.running.devices import bank_products


def filled_bank(rows: int, dim: int, products: str, device: torch.device) -> MemoryBank:
    """A full bank of random unit features, each of a different image."""
    bank = MemoryBank(rows, dim, products).to(device)
    for ids in torch.arange(rows, device=device).split(2**16):
        bank.enqueue(torch.randn(len(ids), dim, device=device), ids)
    return bank


def main():
    parser = measure.argument_parser(__doc__)
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[128_000, 4_096_000],
        metavar="M",
        help="rows of the bank; a search is timed for each",
    )
    parser.add_argument("--queries", type=int, default=256, metavar="N", help="queries per search")
    parser.add_argument(
        "-K", "--topk", type=int, default=30, metavar="K", help="neighbours per query"
    )
    parser.add_argument(
        "-D", "--dim", type=int, default=256, metavar="D", help="feature dimensions"
    )
    parser.add_argument(
        "--steps", type=int, default=3, metavar="N", help="searches of each row; the fastest counts"
    )
    args = parser.parse_args()
    device = process_group.own_device()
    torch.manual_seed(0)
    queries = torch.randn(args.queries, args.dim, device=device)
    lines = []
    for rows in args.rows:
        for products in ("float32", bank_products("bf16", device)):
            bank = filled_bank(rows, args.dim, products, device)
            copy = 0 if bank.features16 is None else bank.features16.nbytes
            memory = bank.features.nbytes + bank.ids.nbytes + copy
            search = {"search": lambda bank=bank: bank.search(queries, args.topk)}
            seconds = measure.fastest(search, args.steps, device)["search"]
            name = f"{rows:,} rows, {products}"
            cells = [f"{memory / 1e6:.1f}", f"{1000 * seconds:.1f}"]
            on_device = measure.device_seconds(search, args.steps, device).values()
            lines.append([name, *cells, *(f"{1000 * taken:.2f}" for taken in on_device)])
            del bank, search  # the next one may need the memory
    sizes = f"{args.queries} queries, K {args.topk}, D {args.dim}"
    print(f"{sizes}; {measure.hardware(device)}; fastest of {args.steps}")
    head = ["", "MB of the bank", "ms per search"] + ["ms on the GPU"] * (device.type == "cuda")
    print(measure.table(head, lines))


if __name__ == "__main__":
    main()
