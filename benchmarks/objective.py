#!/usr/bin/env python3
"""Objective and bank at the paper's scale: search, loss forward and backward of both directions, enqueue.

    python benchmarks/objective.py                     a rank's part of 32 x 128 images, K = 30, M = 128000: minutes on a CPU
    python benchmarks/objective.py --ranks 4 -M 16000  smaller

Streamed (snclr/objectives.py, snclr/memory_bank.py) against the dense formulation of the released design, written anew: the
neighbours' features of all ranks joined, masks and labels over all candidates, the bank cloned and normalised at every step.
The other ranks are simulated: their keys and the rows they picked are given, so that nothing but the network is missing.
Random picks are the worst case for the streamed form: neighbours found in a real bank repeat each other.
Also: how exact the bfloat16 products are, against float64.
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import measure
from snclr import objectives
from snclr.memory_bank import MemoryBank
from snclr.objectives import Candidates, gather_neighbours, positiveness, snclr_loss
from snclr.running import process_group

T = 0.2


class Problem:
    """Projections of one rank's B images and what the other ranks have: keys (N, D), rows (N, K), each for two directions."""

    def __init__(self, args, device, clustered=False):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: normalize(torch.randn(*shape, args.dim, generator=generator), dim=-1)  # noqa: E731
        if clustered:  # features crowd: two of a cluster have a cosine of about .95
            centres, spread = draw(max(1, args.bank // 500)), (1 / 0.95 - 1) ** 0.5
            pick = lambda n: centres[torch.randint(len(centres), (n,), generator=generator)]  # noqa: E731
            make = lambda n: normalize(pick(n) + spread * draw(n), dim=1).to(device)  # noqa: E731
        else:
            make = lambda n: draw(n).to(device)  # noqa: E731
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
    """The released design. Its bank: features (M, D) that are cloned and normalised whenever they are searched."""

    def __init__(self, problem: Problem):
        self.p, self.bank, self.pointer = problem, problem.bank.clone(), 0
        # what the gather brings from the other ranks: K + 1 features an image
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
        where = (self.pointer + torch.arange(total, device=key.device)) % len(self.bank)
        self.bank[where] = self.p.keys[0]
        self.pointer = (self.pointer + total) % len(self.bank)
        return gradients


def dense_loss(z: Tensor, y: Tensor, key: Tensor, neighbours: Tensor, others: Tensor) -> Tensor:
    """2T * mean_i of the sum-of-logs loss, with masks and labels (B, N(K+1)).

    z, y, key (B, D) unit rows; neighbours (B, K, D); others ((N-B)(K+1), D) the candidates of the other ranks.
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
    """This project's: one bank of unit rows, neighbours as counts."""

    def __init__(self, problem: Problem, bfloat16: bool):
        self.p = problem
        self.bank = MemoryBank(*problem.bank.shape, bfloat16=bfloat16).to(problem.bank.device)
        self.bank.enqueue(problem.bank, problem.ids)
        others = [rows[problem.batch :] for rows in problem.rows]
        self.others = [objectives.count_picks(rows, len(problem.bank)) for rows in others]

    def step(self):
        p, gradients = self.p, []
        keys = [key[: p.batch] for key in p.keys]
        _, found = self.bank.search(torch.cat(keys), p.topk, p.own_ids[: p.batch].repeat(2))
        for direction, ((z, y), rows) in enumerate(zip(p.leaves(), found.chunk(2), strict=True)):
            counts = objectives.count_picks(rows, len(self.bank)) + self.others[direction]
            given = dict(candidates=Candidates(p.keys[direction], counts))
            given["neighbours"] = gather_neighbours(self.bank.features, rows)
            weights = positiveness(y, self.bank.features, rows, neighbours=given["neighbours"])
            loss = snclr_loss(
                z, keys[direction], self.bank.products, rows, weights, temperature=T, **given
            )
            gradients += [loss.detach(), *torch.autograd.grad(loss, (z, y))]
        self.bank.enqueue(p.keys[0], p.own_ids)
        return gradients


def exactness(args, device) -> list[list]:
    """Of one step with bfloat16 products against float64: relative error of the loss, cosine of the gradients, and the share of
    the true K neighbours that the search finds."""
    lines = []
    for clustered in (False, True):
        problem = Problem(args, device, clustered)
        found = Streamed(problem, bfloat16=True)
        keys = torch.cat([key[: problem.batch] for key in problem.keys])
        _, rows = found.bank.search(keys, args.topk)
        wide = problem.bank.double()
        true = torch.cat(
            [(part.double() @ wide.T).topk(args.topk).indices for part in keys.split(32)]
        )
        recall = (
            torch.stack([torch.isin(a, b).float().mean() for a, b in zip(true, rows, strict=True)])
            .mean()
            .item()
        )
        errors, cosines = [], []
        for direction, own in enumerate(rows.chunk(2)):
            counts = objectives.count_picks(own, args.bank) + found.others[direction]
            results = []
            for form in (torch.float32, torch.float64):
                z, y = (
                    x[direction].to(form).requires_grad_() for x in (problem.query, problem.online)
                )
                key, bank = problem.keys[direction].to(form), problem.bank.to(form)
                products = bank.bfloat16() if form == torch.float32 else bank
                given = dict(
                    candidates=Candidates(key, counts), neighbours=gather_neighbours(bank, own)
                )
                weights = positiveness(y, bank, own, neighbours=given["neighbours"])
                loss = snclr_loss(
                    z, key[: problem.batch], products, own, weights, temperature=T, **given
                )
                results.append(
                    (
                        loss.item(),
                        torch.cat([g.double() for g in torch.autograd.grad(loss, (z, y))]),
                    )
                )
            (loss, gradient), (true_loss, true_gradient) = results
            errors.append(abs(loss / true_loss - 1))
            cosines.append(
                torch.nn.functional.cosine_similarity(gradient, true_gradient, dim=1).min().item()
            )
        name = "clusters of cosine .95" if clustered else "random features"
        lines.append([name, f"{max(errors):.1e}", f"{min(cosines):.5f}", f"{recall:.4f}"])
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=128, help="images a rank (B)")
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("-K", "--topk", type=int, default=30)
    parser.add_argument("-M", "--bank", type=int, default=128000)
    parser.add_argument("-D", "--dim", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5, help="steps of each side, alternating")
    args = parser.parse_args()
    device = process_group.own_device()
    problem = Problem(args, device)
    sides = {
        "dense, as released": Dense(problem),
        "streamed, float32": Streamed(problem, bfloat16=False),
        "streamed, bfloat16 products": Streamed(problem, bfloat16=True),
    }
    memory = {name: measure.peak_memory(side.step, device) for name, side in sides.items()}
    seconds = measure.fastest({name: side.step for name, side in sides.items()}, args.steps, device)
    sizes = f"B {args.batch}, {args.ranks} ranks, K {args.topk}, M {args.bank}, D {args.dim}"
    print(
        f"{sizes}: search, both directions forward and backward, enqueue\n{measure.hardware(device)}; fastest of {args.steps}\n"
    )
    dense = next(iter(sides))
    rows = []
    for name, taken in seconds.items():
        less = [f"{memory[name] / 2**20:.0f}", f"{memory[dense] / memory[name]:.1f}"]
        rows.append([name, f"{1000 * taken:.0f}", f"{seconds[dense] / taken:.1f}", *less])
    print(
        measure.table(["", "ms a step", "times faster", "MB beyond the bank", "times less"], rows)
    )
    head = [
        "bfloat16 products against float64",
        "loss, relative error",
        "least gradient cosine",
        "recall of the top K",
    ]
    print("\n" + measure.table(head, exactness(args, device)))


if __name__ == "__main__":
    main()
