#!/usr/bin/env python3
"""Time and peak memory of a step with --micro-batch, compared with the undivided step.

    # ViT-S/16 at 64 px, batch 256, float32: some minutes on a CPU
    python benchmarks/micro_batch.py
    # the paper's batch on one H100 or H200
    python benchmarks/micro_batch.py -b 4096 --micro-batch 512 1024 --img-size 224 \\
        --flags '--amp bf16 --compile' --undivided 512 --peak-tflops 989

If the undivided step does not fit into memory, give it a smaller batch with --undivided; ratios
compare images per second. With --peak-tflops, the share of the chip's peak that the undivided step
reaches is also printed (products repeated in backward do not count as work).
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from benchmarks.step import VIT, Step
from snclr.running import process_group


def main():
    parser = measure.argument_parser(__doc__)
    parser.add_argument("-b", "--batch", type=int, default=256, metavar="N", help="images per step")
    parser.add_argument(
        "--undivided",
        type=int,
        metavar="N",
        help="images of the undivided step; None: --batch",
    )
    parser.add_argument(
        "--micro-batch",
        type=int,
        nargs="+",
        default=[32, 128],
        metavar="N",
        help="views encoded at a time; a row for each",
    )
    parser.add_argument("--img-size", type=int, default=64, metavar="PX", help="image size")
    parser.add_argument("--flags", default="", help="more flags of main_snclr.py, for all rows")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        metavar="TFLOPS",
        help="peak of the chip in the number format of the products",
    )
    parser.add_argument(
        "--steps", type=int, default=3, metavar="N", help="steps of each row; the fastest counts"
    )
    args = parser.parse_args()
    device = process_group.own_device()
    flags = f"{VIT} --img-size {args.img_size} {args.flags}"
    undivided, batch = f"undivided, batch {args.undivided or args.batch}", args.batch
    sides = {undivided: Step(flags, args.undivided or batch, device)}
    for micro_batch in args.micro_batch:
        sides[f"batch {batch}, --micro-batch {micro_batch}"] = Step(
            f"{flags} --micro-batch {micro_batch}", batch, device
        )
    sides[f"batch {batch}, --grad-checkpointing"] = Step(
        f"{flags} --grad-checkpointing", batch, device
    )
    memory = {name: measure.peak_memory(side, device) for name, side in sides.items()}
    seconds = measure.fastest(sides, args.steps, device)
    rates = {name: side.images / seconds[name] for name, side in sides.items()}
    print(
        f"ViT-S/16, {args.img_size} px {args.flags}; {measure.hardware(device)}; "
        f"fastest of {args.steps}\n"
    )
    rows = []
    for name, rate in rates.items():
        cells = [f"{1000 * seconds[name]:.0f}", f"{rate:.1f}", f"{rate / rates[undivided]:.2f}"]
        rows.append(
            [name, *cells, f"{memory[name] / 2**20:.0f}", f"{memory[name] / memory[undivided]:.2f}"]
        )
    print(
        measure.table(
            ["", "ms per step", "images/s", "of undivided", "MB of activations", "of undivided"],
            rows,
        )
    )
    if args.peak_tflops:
        # the counter cannot see into compiled code, so --flags are not used here
        plain = Step(f"{VIT} --img-size {args.img_size}", 2, device)
        with FlopCounterMode(display=False) as counter:
            plain()
        reached = counter.get_total_flops() / plain.images * rates[undivided] / 1e12
        peak = args.peak_tflops
        print(f"\nundivided: {reached:.1f} TFLOP/s, {reached / peak:.0%} of {peak:g}")


if __name__ == "__main__":
    main()
