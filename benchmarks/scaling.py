#!/usr/bin/env python3
"""Growth of time, memory and communication with batch, neighbours, bank and ranks.

    # objective and bank with 1 to 64 simulated ranks, then training steps of 1, 2 and 4 processes
    python benchmarks/scaling.py --out scaling.png
    # only the simulated part
    python benchmarks/scaling.py --true-ranks

Simulated ranks: this process has the images of one rank; keys and picks of the others are inputs,
as in objective.py. Bytes are those that the collectives of a step send. True ranks are processes
(gloo on CPUs) that train a small network, with one thread and a fixed batch per rank.
"""

import os
import sys
import time
from argparse import Namespace
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from PIL import Image

from benchmarks import measure
from benchmarks.objective import Problem, Streamed
from benchmarks.step import Step
from snclr import objectives, streamed
from snclr.pictures.canvas import BLUE, FAINT, GREY, INK, MARGIN, ORANGE, font, page
from snclr.running import distributed, process_group
from snclr.running.batch_norm import synchronise_batch_norm
from snclr.running.devices import bank_products

BASE = dict(batch=128, topk=30, bank=128000, ranks=32, dim=256)
SWEEPS = {  # one value varies, the others are those of BASE
    "batch": (32, 64, 128, 256),
    "topk": (1, 10, 30, 100, 300),
    "bank": (16000, 32000, 64000, 128000, 256000),
    "ranks": (1, 4, 16, 32, 64),
}


def simulated(args: Namespace, products: str, device: torch.device) -> dict[str, list[list]]:
    """Lines of each sweep: value, loss ms, loss with all rows ms, search ms, peak MB, MB sent.

    The loss is timed forward and backward. On a CPU it skips bank rows that nobody picked; "all
    rows" multiplies them too, as a GPU does.
    """
    sweeps = {}
    for name, values in SWEEPS.items():
        sweeps[name] = []
        for value in values:
            sizes = Namespace(**{**BASE, name: value})
            side = Streamed(Problem(sizes, device), products)
            keys = torch.cat([key[: sizes.batch] for key in side.p.keys])
            steps = {
                "step": side.step,
                "all": mock.patch.object(streamed, "on_host", lambda _: False)(side.step),
                "search": lambda side=side, keys=keys: side.bank.search(keys, side.p.topk),
            }
            memory = measure.peak_memory(side.step, device)
            seconds = measure.fastest(steps, args.steps, device)
            with measure.simulated_ranks(sizes.ranks) as sent:
                for key, rows in zip(side.p.keys, side.p.rows, strict=True):
                    objectives.gather_candidates(
                        key[: sizes.batch], rows[: sizes.batch], sizes.bank
                    )
                distributed.all_gather(side.p.own_ids[: sizes.batch])
            loss, of_all = (1000 * (seconds[side] - seconds["search"]) for side in ("step", "all"))
            sweeps[name].append(
                [value, loss, of_all, 1000 * seconds["search"], memory / 2**20, sum(sent) / 1e6]
            )
    return sweeps


def true_rank(rank: int, world_size: int, port: int, batch: int, steps: int) -> None:
    """One process of `world_size`: time its training step; rank 0 prints it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(rank)
    device = process_group.start()
    step = Step("@configs/embedded.args --amp off", batch, device)
    step.model = synchronise_batch_norm(step.model, device)
    step.model = distributed.replicate(step.model, device)
    seconds = []
    for _ in range(steps + 1):
        distributed.barrier()
        start = time.perf_counter()
        step()
        measure.wait(device)
        seconds.append(time.perf_counter() - start)
    distributed.barrier()
    if rank == 0:
        fastest = min(seconds[1:])
        rate = world_size * batch / fastest
        print(f"{world_size:>5}  {1000 * fastest:>11.1f}  {rate:>8.0f}", flush=True)
    process_group.stop()


def plot(sweeps: dict[str, list[list]], title: str, subtitle: str) -> Image.Image:
    """Milliseconds of loss and search, a panel per sweep; values at even distances."""
    side, gap = 230, 70
    key = [
        (BLUE, "loss, forward and backward"),
        (GREY, "the same, all bank rows multiplied"),
        (ORANGE, "search"),
    ]
    image, draw, top = page(len(sweeps) * (side + gap), side + 50, title, subtitle, key)
    highest = 1.1 * max(max(line[1:4]) for lines in sweeps.values() for line in lines)
    step = next(
        s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if highest / s <= 6
    )

    def y_of(value):
        return top + side - side * value / highest

    for number, (name, lines) in enumerate(sweeps.items()):
        left = MARGIN + 40 + number * (side + gap)
        for tick in range(0, int(highest) + 1, step):
            draw.line((left, y_of(tick), left + side, y_of(tick)), fill=(225, 225, 225))
            draw.text((left - 6, y_of(tick)), str(tick), fill=FAINT, font=font(11), anchor="rm")
        xs = [left + side * (i + 0.5) / len(lines) for i in range(len(lines))]
        for column, colour in ((2, GREY), (1, BLUE), (3, ORANGE)):
            points = [(x, y_of(line[column])) for x, line in zip(xs, lines, strict=True)]
            draw.line(points, fill=colour, width=2)
            for x, y in points:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        for x, line in zip(xs, lines, strict=True):
            draw.text((x, top + side + 10), str(line[0]), fill=FAINT, font=font(11), anchor="mm")
        draw.text((left + side / 2, top + side + 30), name, fill=INK, font=font(), anchor="mm")
    return image


def main():
    parser = measure.argument_parser(__doc__)
    parser.add_argument("--out", metavar="PNG", help="file to write a plot to")
    parser.add_argument(
        "--float32", action="store_true", help="products in float32 instead of those of --amp bf16"
    )
    parser.add_argument(
        "--true-ranks",
        type=int,
        nargs="*",
        default=[1, 2, 4],
        metavar="N",
        help="numbers of processes to train with; none: skip this part",
    )
    parser.add_argument(
        "-b", "--batch", type=int, default=32, metavar="N", help="images per process"
    )
    parser.add_argument(
        "--steps", type=int, default=3, metavar="N", help="steps of each row; the fastest counts"
    )
    args = parser.parse_args()
    device = process_group.own_device()
    products = bank_products("off" if args.float32 else "bf16", device)
    base = ", ".join(f"{name} {value}" for name, value in BASE.items())
    print(
        f"{products} products; {measure.hardware(device)}; fastest of {args.steps}\n"
        f"values that do not vary: {base}"
    )
    sweeps = simulated(args, products, device)
    for name, lines in sweeps.items():
        rows = [
            [line[0], *(f"{value:.0f}" for value in line[1:5]), f"{line[5]:.2f}"] for line in lines
        ]
        head = [name, "loss, ms", "all rows, ms", "search, ms", "peak MB", "MB sent per rank"]
        print("\n" + measure.table(head, rows))
    if args.out:
        subtitle = (
            f"milliseconds per step of one rank, both directions, {products} products; "
            f"values that do not vary: {base}"
        )
        plot(sweeps, "Objective and bank as the work grows", subtitle).save(args.out, optimize=True)
    if args.true_ranks:
        print(
            f"\n{args.batch} images and one thread per rank, ResNet-8, {os.cpu_count()} cores\n"
            "ranks  ms per step  images/s"
        )
    for number, world_size in enumerate(args.true_ranks):
        settings = (world_size, 29600 + number, args.batch, args.steps)
        torch.multiprocessing.spawn(true_rank, settings, nprocs=world_size)


if __name__ == "__main__":
    main()
