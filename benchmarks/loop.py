#!/usr/bin/env python3
"""Steps of the CIFAR recipe in one process, with loading and augmentation.

    python benchmarks/loop.py                                             on a GPU
    python benchmarks/loop.py --rows eager --steps 2 --flags '-b 16'      on a CPU

The images are those of the embedded data set, repeated to as many as CIFAR-10 has, in memory. A row
is the fastest of 3 turns of --steps steps, each with one line of the log. The first turn, which is
not one of them, includes the capture of the graph and any compilation. Saves and evaluations are
not part of it.
"""

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks import measure
from benchmarks.training import CIFAR, Training
from snclr import options
from snclr.datasets import sources
from snclr.running import process_group

ROWS = {
    "eager": "--no-compile --no-step-graph",
    "graph": "--no-compile --step-graph",
    "compiled": "--compile on --step-graph",
}
IMAGES = 50_000


def main():
    parser = measure.argument_parser(__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="steps of a turn")
    parser.add_argument("--flags", default="", help="more flags of main_snclr.py, for all rows")
    args = parser.parse_args()
    device = process_group.own_device()
    print(measure.hardware(device), flush=True)
    rows = []
    for row in map(ROWS.get, args.rows):
        flags = [CIFAR, "--dataset", "embedded", "-j", "0", *row.split(), *args.flags.split()]
        flags += ["--print-freq", str(args.steps)]
        train = sources.open_data(options.parse(flags))[0]
        train = train.select([number % len(train) for number in range(IMAGES)]).to(device)
        training = Training(flags, train, device, turn=args.steps)
        seconds = []
        for _ in range(4):
            measure.wait(device)
            start = time.perf_counter()
            training()
            measure.wait(device)
            seconds.append(time.perf_counter() - start)
        first, fastest = seconds[0], min(seconds[1:])
        rate = training.images / fastest
        rows.append(
            [f"`{row}`", f"{1000 * fastest / args.steps:.1f}", f"{rate:.0f}", f"{first:.1f}"]
        )
        print(f"{row}: {rows[-1][1:]}", file=sys.stderr, flush=True)
        del training  # the next one needs the memory
    print(measure.table(["", "ms a step", "images/s", "first turn, s"], rows))


if __name__ == "__main__":
    main()
