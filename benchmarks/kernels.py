#!/usr/bin/env python3
"""The dearest kernels of a training step, from torch's profiler.

    python benchmarks/kernels.py                    both recipes, on a GPU
    python benchmarks/kernels.py --recipes resnet --flags '-b 8 --width 8'

One step of main_snclr.py after two to warm up, with augmentation, on images that are held in
memory. On a CPU these are torch's operations instead of kernels.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.training import CIFAR, VIT, Training
from snclr import options
from snclr.datasets import sources
from snclr.running import process_group

RECIPES = {
    "resnet": [CIFAR, "-b", "512", "--no-step-graph"],
    "vit": [VIT, "-b", "256", "--img-size", "224"],
}


def main():
    parser = measure.argument_parser(__doc__)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=[*RECIPES], metavar="NAME")
    parser.add_argument("--flags", default="", help="more flags of main_snclr.py, for all recipes")
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="kernels to print")
    args = parser.parse_args()
    device = process_group.own_device()
    on_gpu = device.type == "cuda"
    print(measure.hardware(device))
    for name in args.recipes:
        flags = [*RECIPES[name], "--dataset", "embedded", "-j", "0", *args.flags.split()]
        train = sources.open_data(options.parse(flags))[0].to(device)
        training = Training(flags, train, device, turn=1)
        training()
        training()
        measure.wait(device)
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as seen:
            training()
            measure.wait(device)
        kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
        kernels = [event for event in seen.key_averages() if event.device_type == kind]
        times = {
            event: event.self_device_time_total if on_gpu else event.self_cpu_time_total
            for event in kernels
        }
        total, calls = sum(times.values()), sum(event.count for event in kernels)
        rows = [
            [event.key[:80].replace("|", "/"), event.count, f"{us / 1000:.2f}", f"{us / total:.1%}"]
            for event, us in sorted(times.items(), key=lambda pair: -pair[1])[: args.rows]
        ]
        rows.append(["all", calls, f"{total / 1000:.2f}", ""])
        print(
            "\n" + measure.table([f"{name}: {' '.join(flags[1:])}", "calls", "ms", "share"], rows)
        )
        del training  # the next one needs the memory


if __name__ == "__main__":
    main()
