#!/usr/bin/env python3
"""A large batch in the memory of a small one: --micro-batch against the undivided step, in time and peak memory.

    python benchmarks/micro_batch.py                    ViT-S/16 at 64 px, batch 256, float32: some minutes on a CPU
    python benchmarks/micro_batch.py -b 4096 --micro-batch 512 1024 --img-size 224 --flags '--amp bf16 --compile' \\
        --undivided 512 --peak-tflops 989               the paper's batch on one H100 or H200

The undivided step may need a smaller batch to fit (--undivided); the ratio is one of images a second. With --peak-tflops, also
the share of the chip's peak that the undivided step's own products are (those repeated in backward do not count as work).
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from benchmarks.step import VIT, Step
from snclr.running import process_group


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-b", "--batch", type=int, default=256)
    parser.add_argument(
        "--undivided",
        type=int,
        metavar="N",
        help="images of the undivided step (default: the batch)",
    )
    parser.add_argument(
        "--micro-batch", type=int, nargs="+", default=[32, 128], help="views encoded at a time"
    )
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--flags", default="", help="more flags of main_snclr.py, of all sides")
    parser.add_argument(
        "--peak-tflops", type=float, metavar="TFLOPS", help="of the chip, in the products' format"
    )
    parser.add_argument("--steps", type=int, default=3, help="steps of each side, alternating")
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
        f"ViT-S/16, {args.img_size} px {args.flags}; {measure.hardware(device)}; fastest of {args.steps}\n"
    )
    rows = []
    for name, rate in rates.items():
        cells = [f"{1000 * seconds[name]:.0f}", f"{rate:.1f}", f"{rate / rates[undivided]:.2f}"]
        rows.append(
            [name, *cells, f"{memory[name] / 2**20:.0f}", f"{memory[name] / memory[undivided]:.2f}"]
        )
    print(
        measure.table(
            ["", "ms a step", "images/s", "of undivided", "MB of activations", "of undivided"], rows
        )
    )
    if args.peak_tflops:
        plain = Step(
            f"{VIT} --img-size {args.img_size}", 2, device
        )  # not compiled, so that its products can be counted
        with FlopCounterMode(display=False) as counter:
            plain()
        done = counter.get_total_flops() / plain.images * rates[undivided] / 1e12
        print(
            f"\nundivided: {done:.1f} TFLOP/s, {done / args.peak_tflops:.0%} of {args.peak_tflops:g}"
        )


if __name__ == "__main__":
    main()
