#!/usr/bin/env python3
"""Time and memory of objective and bank at the paper's scale, compared with the dense design.

    # one rank's part of 32 x 128 images, K = 30, M = 128000: minutes on a CPU
    python benchmarks/objective.py
    # smaller
    python benchmarks/objective.py --ranks 4 -M 16000

A step is search, loss forward and backward of both directions, and enqueue. Streamed is this
project's form (snclr/objectives.py, snclr/memory_bank.py). Dense is the design of the released
code, written from its equations: it joins the neighbours' features of all ranks, builds masks and
labels over all candidates, and clones and normalises the bank at every step.

The other ranks are simulated: their keys and the rows that they picked are random inputs, so only
the network is missing. Random picks are the worst case for the streamed form, because in a real
bank many queries have the same neighbours.

The second table compares rounded products, as with --amp bf16, with float64: bfloat16 on a CPU,
TF32 on a GPU.
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from benchmarks import measure
from snclr import objectives
from snclr.memory_bank import MemoryBank
from snclr.objectives import Candidates, gather_neighbours, positiveness, restrict, snclr_loss
from snclr.running import process_group
from snclr.running.devices import bank_products

T = 0.2


class Problem:
    """Inputs of one rank with B of the N images of a step; lists hold one entry per direction.

    bank    (M, D) unit rows, and ids (M,)
    online  [(B, D)] projections of this rank, and query [(B, D)] near them
    keys    [(N, D)] of all ranks, this rank's first
    rows    (2, N, K) rows of the bank that the images of all ranks picked

    clustered: features are in clusters, in which two have a cosine of about 0.95.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, clustered: bool = False):
        generator = torch.Generator().manual_seed(0)
        centres, spread = None, (1 / 0.95 - 1) ** 0.5

        def draw(count: int) -> Tensor:
            return normalize(torch.randn(count, args.dim, generator=generator), dim=-1)

        def make(count: int) -> Tensor:
            if centres is None:
                return draw(count).to(device)
            picks = centres[torch.randint(len(centres), (count,), generator=generator)]
            return normalize(picks + spread * draw(count), dim=1).to(device)

        if clustered:
            centres = draw(max(1, args.bank // 500))
        total = args.batch * args.ranks
        self.batch, self.topk = args.batch, args.topk
        self.bank, self.ids = make(args.bank), torch.arange(args.bank, device=device)
        self.online = [make(args.batch) for _ in range(2)]
        self.query = [normalize(y + 0.05 * torch.randn_like(y), dim=1) for y in self.online]
        self.keys = [make(total) for _ in range(2)]
        self.rows = torch.randint(args.bank, (2, total, args.topk), generator=generator).to(device)
        self.own_ids = args.bank + torch.arange(total, device=device)

    def leaves(self):
        """Fresh leaves (query, online) of both directions."""
        return [
            (z.clone().requires_grad_(), y.clone().requires_grad_())
            for z, y in zip(self.query, self.online, strict=True)
        ]


class Dense:
    """The released design. Its bank (M, D) is cloned and normalised at every search."""

    def __init__(self, problem: Problem):
        self.p, self.bank, self.pointer = problem, problem.bank.clone(), 0
        # what a rank gathers from the other ranks: K + 1 features per image
        self.others = [
            torch.cat([key[:, None], problem.bank[rows]], dim=1)[problem.batch :].flatten(0, 1)
            for key, rows in zip(problem.keys, problem.rows, strict=True)
        ]

    def step(self):
        gradients = []
        for direction, (z, y) in enumerate(self.p.leaves()):
            key = self.p.keys[direction][: self.p.batch]
            bank = normalize(self.bank.clone(), dim=1)
            rows = (key @ bank.T).topk(self.p.topk, dim=1).indices
            loss = dense_loss(z, y, key, bank[rows], self.others[direction])
            gradients += [loss.detach(), *torch.autograd.grad(loss, (z, y))]
        total = len(self.p.keys[0])
        oldest = (self.pointer + torch.arange(total, device=key.device)) % len(self.bank)
        self.bank[oldest] = self.p.keys[0]
        self.pointer = (self.pointer + total) % len(self.bank)
        return gradients


def dense_loss(z: Tensor, y: Tensor, key: Tensor, neighbours: Tensor, others: Tensor) -> Tensor:
    """2T * mean_i of the sum-of-logs loss, with masks and labels (B, N(K+1)).

    z, y, key   (B, D) unit rows
    neighbours  (B, K, D)
    others      ((N-B)(K+1), D) candidates of the other ranks
    """
    batch, topk = neighbours.shape[:2]
    own = torch.cat([key[:, None], neighbours], dim=1)
    weights = torch.softmax(torch.einsum("bd,bkd->bk", y, neighbours), dim=1)
    weights = torch.cat([torch.ones_like(weights[:, :1]), weights], dim=1)
    candidates = torch.cat([own.flatten(0, 1), others])
    logits = z @ candidates.T / T
    mask = torch.zeros_like(logits)
    columns = torch.arange(batch * (topk + 1), device=z.device).view(batch, -1)
    mask.scatter_(1, columns, 1.0)
    labels = torch.zeros_like(logits).scatter(1, columns, weights)
    log_probability = logits - logits.logsumexp(dim=1, keepdim=True)
    return 2 * T * -(mask * labels * log_probability).sum(dim=1).mean()


class Streamed:
    """This project's form: a bank of unit rows, neighbours of other ranks as counts per row.

    products: in what those with the bank are computed. candidates: what of it is in the
    denominator, the value of --candidates.
    """

    def __init__(self, problem: Problem, products: str, candidates: str = "all"):
        self.p, self.kind = problem, candidates
        self.bank = MemoryBank(*problem.bank.shape, products).to(problem.bank.device)
        self.bank.enqueue(problem.bank, problem.ids)
        others = [rows[problem.batch :] for rows in problem.rows]
        self.others = [objectives.count_picks(rows, len(problem.bank)) for rows in others]

    def step(self):
        p, gradients = self.p, []
        keys = [key[: p.batch] for key in p.keys]
        _, nearest = self.bank.search(torch.cat(keys), p.topk, p.own_ids[: p.batch].repeat(2))
        for direction, ((z, y), rows) in enumerate(zip(p.leaves(), nearest.chunk(2), strict=True)):
            counts = objectives.count_picks(rows, len(self.bank)) + self.others[direction]
            neighbours = gather_neighbours(self.bank.features, rows)
            loss = snclr_loss(
                z,
                keys[direction],
                self.bank.products,
                rows,
                positiveness(y, self.bank.features, rows, neighbours=neighbours),
                temperature=T,
                candidates=restrict(Candidates(p.keys[direction], counts), self.kind),
                neighbours=neighbours,
                tf32=self.bank.tf32,
            )
            gradients += [loss.detach(), *torch.autograd.grad(loss, (z, y))]
        self.bank.enqueue(p.keys[0], p.own_ids)
        return gradients


def accuracy(args: argparse.Namespace, device: torch.device, products: str) -> list[list]:
    """Rows of a table that compares a step with rounded products with one in float64.

    Columns: features, largest relative error of the loss, least cosine of an image's gradients,
    share of the exact K neighbours that the search finds.
    """
    lines = []
    for clustered in (False, True):
        problem = Problem(args, device, clustered)
        streamed = Streamed(problem, products)
        keys = torch.cat([key[: problem.batch] for key in problem.keys])
        _, rows = streamed.bank.search(keys, args.topk)
        bank64 = problem.bank.double()
        exact_rows = torch.cat(
            [(part.double() @ bank64.T).topk(args.topk).indices for part in keys.split(32)]
        )
        shares = [
            torch.isin(exact, row).float().mean()
            for exact, row in zip(exact_rows, rows, strict=True)
        ]
        recall = torch.stack(shares).mean().item()
        errors, cosines = [], []
        for direction, own in enumerate(rows.chunk(2)):
            counts = objectives.count_picks(own, args.bank) + streamed.others[direction]
            results = []
            for dtype in (torch.float32, torch.float64):
                z, y = (
                    x[direction].to(dtype).requires_grad_() for x in (problem.query, problem.online)
                )
                key, bank = problem.keys[direction].to(dtype), problem.bank.to(dtype)
                neighbours = gather_neighbours(bank, own)
                loss = snclr_loss(
                    z,
                    key[: problem.batch],
                    streamed.bank.products if dtype == torch.float32 else bank,
                    own,
                    positiveness(y, bank, own, neighbours=neighbours),
                    temperature=T,
                    candidates=Candidates(key, counts),
                    neighbours=neighbours,
                    tf32=streamed.bank.tf32,
                )
                gradients = torch.autograd.grad(loss, (z, y))
                results.append((loss.item(), torch.cat([g.double() for g in gradients])))
            (loss, gradient), (exact_loss, exact_gradient) = results
            errors.append(abs(loss / exact_loss - 1))
            cosines.append(cosine_similarity(gradient, exact_gradient, dim=1).min().item())
        name = "clusters of cosine 0.95" if clustered else "random features"
        lines.append([name, f"{max(errors):.1e}", f"{min(cosines):.5f}", f"{recall:.4f}"])
    return lines


def main():
    parser = measure.argument_parser(__doc__)
    parser.add_argument("--batch", type=int, default=128, metavar="B", help="images per rank")
    parser.add_argument("--ranks", type=int, default=32, metavar="N", help="simulated ranks")
    parser.add_argument(
        "-K", "--topk", type=int, default=30, metavar="K", help="neighbours per image"
    )
    parser.add_argument(
        "-M", "--bank", type=int, default=128000, metavar="M", help="rows of the bank"
    )
    parser.add_argument(
        "-D", "--dim", type=int, default=256, metavar="D", help="feature dimensions"
    )
    parser.add_argument(
        "--steps", type=int, default=5, metavar="N", help="steps of each row; the fastest counts"
    )
    args = parser.parse_args()
    device = process_group.own_device()
    problem = Problem(args, device)
    rounded = bank_products("bf16", device)
    sides = {
        "dense, as released": Dense(problem),
        "streamed, float32": Streamed(problem, "float32"),
        f"streamed, {rounded} products": Streamed(problem, rounded),
        "streamed, float32, --candidates keys": Streamed(problem, "float32", "keys"),
    }
    memory = {name: measure.peak_memory(side.step, device) for name, side in sides.items()}
    calls = {name: side.step for name, side in sides.items()}
    seconds = measure.fastest(calls, args.steps, device)
    on_device = measure.device_seconds(calls, args.steps, device)
    sizes = f"B {args.batch}, {args.ranks} ranks, K {args.topk}, M {args.bank}, D {args.dim}"
    print(
        f"{sizes}: search, both directions forward and backward, enqueue\n"
        f"{measure.hardware(device)}; fastest of {args.steps}\n"
    )
    dense = next(iter(sides))
    rows = []
    for name, taken in seconds.items():
        cells = [f"{1000 * taken:.1f}", f"{seconds[dense] / taken:.1f}"]
        # a tiny problem may need no new memory at all
        less = memory[dense] / max(memory[name], 1)
        cells += [f"{memory[name] / 2**20:.0f}", f"{less:.1f}"]
        if on_device:
            own = on_device[name]
            cells += [f"{1000 * own:.2f}", f"{on_device[dense] / own:.1f}"]
        rows.append([name, *cells])
    head = ["", "ms per step", "times faster", "MB beyond the bank", "times less"]
    head += ["ms on the GPU", "times faster"] if on_device else []
    print(measure.table(head, rows))
    head = [f"{rounded} products against float64", "loss, relative error"]
    head += ["least gradient cosine", "recall of the top K"]
    print("\n" + measure.table(head, accuracy(args, device, rounded)))


if __name__ == "__main__":
    main()
