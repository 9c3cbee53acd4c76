#!/usr/bin/env python3
"""Batches that worker processes load: time to the first one, memory, speed, processor time.

    OMP_NUM_THREADS=1 python benchmarks/loading.py /data/imagenet -j 2

Workers get requests of at most 256 images (REQUEST in snclr/loader.py). A larger batch has a second
row, in which one worker prepares all of it. Each row has a process of its own. Its memory is the
most that it and its workers held beyond what it held before, with shared pages counted once; read
from /proc, which only Linux has. Processor time is that of all of them; other jobs on the machine
hardly lengthen it.
"""

import multiprocessing
import os
import re
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

import snclr.loader
from benchmarks import measure
from snclr import augment, mean_std
from snclr.datasets import sources
from snclr.running import process_group


def main():
    parser = measure.argument_parser(__doc__)
    parser.add_argument("data", metavar="DATA", help="folder with train/<class>/<photograph>")
    parser.add_argument(
        "-b", "--batch-sizes", type=int, nargs="+", default=[128, 512, 4096], metavar="N"
    )
    parser.add_argument("-j", "--workers", type=int, default=2, metavar="N")
    parser.add_argument("-n", "--images", type=int, default=8192, metavar="N", help="in each row")
    parser.add_argument("--img-size", type=int, default=64, metavar="PX", help="of both views")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="turns; the best counts")
    args = parser.parse_args()
    images, *_ = sources.open_data(mean_std.parse([args.data, "--dataset", "folder"]))
    images = images.select(np.resize(np.arange(len(images)), args.images))
    recipe = augment.Recipe(0, augment.moco_v3_views(args.img_size, crop_min=0.08, blur=True))
    usual = snclr.loader.REQUEST
    cases = [
        (batch, request)
        for batch in args.batch_sizes
        for request in sorted({min(batch, usual), batch})
    ]
    results = {case: [] for case in cases}
    for _ in range(args.steps):
        for case, seen in results.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
                seen.append(process.submit(load, images, recipe, args.workers, *case).result())
    lines = []
    for case, seen in results.items():
        first, memory, seconds, processor = map(min, zip(*seen, strict=True))
        speed = f"{1 / seconds:.0f}"
        lines.append(
            [*case, f"{first:.1f}", f"{memory / 2**20:.0f}", speed, f"{1000 * processor:.2f}"]
        )
    print(f"photographs to 2 x {args.img_size} px, {args.workers} workers, best of {args.steps}")
    print(f"{measure.hardware(process_group.own_device())}, load {os.getloadavg()[0]:.1f}\n")
    head = ["batch", "images a request", "s to first batch", "MB", "images/s", "CPU ms/image"]
    print(measure.table(head, lines))


def load(images, recipe, workers, batch, request):
    """Seconds to the first batch, most bytes held, and for each image seconds and processor time,
    for one epoch.
    """
    snclr.loader.REQUEST = request
    device, ended = process_group.own_device(), threading.Event()
    before = held_bytes(os.getppid())  # with the starting process: they share pages
    peak = [before]

    def watch():
        while not ended.wait(0.1):
            peak[0] = max(peak[0], held_bytes(os.getppid()))

    watching = threading.Thread(target=watch)
    watching.start()
    start, used = time.perf_counter(), sum(os.times()[:4])
    loader = snclr.loader.EpochLoader(images, recipe, batch, device, workers)
    batches = loader.epoch(0)
    next(batches)
    first = time.perf_counter() - start
    for _ in batches:
        measure.wait(device)
    seconds = time.perf_counter() - start
    ended.set()
    watching.join()
    count = loader.steps_per_epoch * batch
    del loader, batches  # the workers end, and their processor time is known
    return first, peak[0] - before, seconds / count, (sum(os.times()[:4]) - used) / count


def held_bytes(root: int) -> int:
    """Bytes that process `root` and all that it started hold, with shared pages counted once."""
    held, pids = 0, [root]
    for pid in pids:
        try:
            sizes = Path(f"/proc/{pid}/smaps_rollup").read_text()
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except OSError:  # it has just ended
            continue
        held += 1024 * int(re.search(r"Pss:\s+(\d+)", sizes)[1])
    return held


if __name__ == "__main__":
    main()
