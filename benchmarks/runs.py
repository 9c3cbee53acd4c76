#!/usr/bin/env python3
"""Whole runs of main_snclr.py, one after the other: images/s, data_wait, and the slowest step.

    python benchmarks/runs.py                             on a GPU, with images that are made here
    python benchmarks/runs.py --cifar /data/cifar10 --photos /data/imagenet
    python benchmarks/runs.py --rows embedded --steps 4   on a CPU

images/s and data_wait are those of all log lines after the first, which includes the start and any
compilation; the slowest step of all is that of the first line. Saves and evaluations are in no
line. A row that fails or exceeds --limit is reported, and the others go on, as long as --total
allows.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from PIL import Image

from benchmarks import measure
from benchmarks.training import ROOT
from snclr.running import process_group

CIFAR = "@configs/cifar10_resnet18.args {cifar} --dataset folder --img-size 32 -j 4"
VIT = "@configs/vit_small_imagenet.args {photos} --dataset tree -j 15"
LARGE = f"{VIT} -b 4096 --micro-batch 1024"
EAGER = "--no-compile --no-step-graph"
ROWS = {  # name: flags of main_snclr.py, and steps between two lines of its log
    "cifar": (CIFAR, 90),
    "cifar-eager": (f"{CIFAR} {EAGER}", 90),
    "cifar-graph": (f"{CIFAR} --no-compile", 90),
    "cifar-graphs": (f"{CIFAR} --no-step-graph --compile graphs", 90),
    "vit": (f"{VIT} -b 1024", 4),
    "vit-eager": (f"{VIT} -b 1024 --no-compile", 4),
    "vit-fused": (f"{VIT} -b 1024 --fused-augment", 4),
    "vit-4096": (LARGE, 1),
    "vit-4096-fused": (f"{LARGE} --fused-augment", 1),
    "vit-4096-eager": (f"{LARGE} --no-compile", 1),
    "cifar-256": (f"{CIFAR} -b 256", 180),
    "cifar-256-eager": (f"{CIFAR} -b 256 {EAGER}", 180),
    "embedded": ("@configs/embedded.args", 30),
    "embedded-graph": ("@configs/embedded.args --step-graph", 30),
}


def make_images(folder: Path, distinct: int, count: int, size: tuple[int, int]) -> str:
    """Write `distinct` JPEGs of (width, height) under `count` names in folder/train.

    They have grain: smooth ones would have a quarter of a photograph's bytes, and would be decoded
    in a third of the time.
    """
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / "train" / f"class{number % 2}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < distinct:
            coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            pixels = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
            pixels = (pixels + random.normal(0, 20, (*pixels.shape[:2], 1))).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)
        else:
            source = number % distinct
            os.link(folder / "train" / f"class{source % 2}" / f"{source:06d}.jpg", path)
    return str(folder)


def run(flags: str, workdir: Path, steps: int, every: int, limit: float) -> list[str]:
    """Cells of a row: images/s, data_wait, and the slowest step; or what went wrong."""
    command = [sys.executable, "main_snclr.py", *flags.split(), "--workdir", str(workdir)]
    command += f"--eval-freq 0 --viz-freq 0 --save-freq 0 --print-freq {every}".split()
    command += ["--stop-after-steps", str(steps * every)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        problem = f"longer than {limit:g} s"
    else:
        problem = (done.stderr.strip().splitlines() or ["failed"])[-1] if done.returncode else ""
        if not problem and "--step-graph has no effect" in done.stdout:
            problem = "without a graph"
    log = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    lines = [line for line in lines if "images_per_s" in line]
    if len(lines) < 2:
        return [problem or "too few lines in the log", "", ""]
    # a line ends an epoch, too, so they are not of equally many steps
    counts = [line["step"] - before["step"] for before, line in itertools.pairwise(lines)]
    seconds = [count / line["images_per_s"] for count, line in zip(counts, lines[1:], strict=True)]
    rate = sum(counts) / sum(seconds)
    waits = [taken * line["data_wait"] for taken, line in zip(seconds, lines[1:], strict=True)]
    wait = sum(waits) / sum(seconds)
    first = max(line["slowest_step_s"] for line in lines)
    return [f"{rate:.0f}" + f" ({problem})" * bool(problem), f"{wait:.1%}", f"{first:.1f}"]


def main():
    parser = measure.argument_parser(__doc__)
    parser.add_argument("--cifar", metavar="DIR", help="32 px images in DIR/train/<class>/")
    parser.add_argument("--photos", metavar="DIR", help="photographs in DIR/train/<class>/")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="log lines of each run")
    parser.add_argument(
        "--limit", type=float, default=100, metavar="S", help="seconds of one run at most"
    )
    parser.add_argument(
        "--total", type=float, default=math.inf, metavar="S", help="seconds of all runs at most"
    )
    args = parser.parse_args()
    end = time.monotonic() + args.total
    print(f"main_snclr.py, end to end; {measure.hardware(process_group.own_device())}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = {"cifar": args.cifar, "photos": args.photos}
        makers = {"cifar": (500, 50_000, (32, 32)), "photos": (256, 16_384, (500, 375))}
        rows = []
        for name in args.rows:
            flags, every = ROWS[name]
            for kind, sizes in makers.items():
                if f"{{{kind}}}" in flags and data[kind] is None:
                    data[kind] = make_images(Path(folder, kind), *sizes)
            limit = min(args.limit, end - time.monotonic())
            cells = ["no time left", "", ""]
            if limit > 10:
                cells = run(flags.format(**data), Path(folder, name), args.steps, every, limit)
            shown = flags.format(cifar="CIFAR", photos="PHOTOS").replace("--dataset tree ", "")
            rows.append([f"`{shown}`", *cells])
            print(f"{name}: {cells}", file=sys.stderr, flush=True)
    print(measure.table(["", "images/s", "data_wait", "slowest step, s"], rows))


if __name__ == "__main__":
    main()
