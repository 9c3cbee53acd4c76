"""The ranks of a test, as forks of one process, which imports torch once.

    python ranks.py OUT JOB... -- JOB...

Each rank runs the jobs and saves into OUT. After `--` new ranks run further jobs. A job is 'pieces'
(collectives, batch norm, objectives, bank, kNN on fixed data) or a command line of main_snclr.py.
Prefixes, in this order:

main_lincls:  the command line is one of main_lincls.py
embed:        the command line is one of snclr.embed, with parts of 8 images in two batches
term:         the loss has a further term, in this job and all later ones
shallow:      vit_tiny has 2 blocks, in this job and all later ones
float64:      the run is in double precision
"""

import itertools
import os
import shlex
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import normalize

import main_lincls
import main_snclr
from snclr import backbones, embed
from snclr.builder import SNCLR
from snclr.evaluation import embedding, knn
from snclr.memory_bank import MemoryBank
from snclr.objectives import (
    gather_candidates,
    mocov2_loss,
    mocov3_loss,
    nnclr_loss,
    positiveness,
    restrict,
    snclr_loss,
)
from snclr.running import distributed, process_group
from snclr.running.batch_norm import synchronise_batch_norm

N, D, M, K = 8, 6, 20, 3  # global batch, dimensions, bank, neighbours


def share_of(x):
    """This rank's contiguous share of a global tensor."""
    return x.chunk(distributed.world_size())[distributed.rank()].clone()


def objectives():
    """Global loss (mean of the ranks' losses) and the gradients that DDP's averaging would give,
    joined in rank order.
    """
    torch.manual_seed(0)
    query, online, key = (torch.randn(N, D) for _ in range(3))
    bank, rows = normalize(torch.randn(M, D), dim=1), torch.randint(-1, M // 2, (N, K))
    valid = torch.arange(M) < 7
    losses = {
        "mocov3": lambda q, y, k, r: mocov3_loss(q, k, temperature=0.2),
        "nnclr": lambda q, y, k, r: nnclr_loss(k, q, temperature=0.1),
        "mocov2": lambda q, y, k, r: mocov2_loss(q, k, bank, valid, temperature=0.2),
    }
    for form in ("sum_of_logs", "log_of_sum"):
        for threshold in (False, True):
            losses[f"snclr {form} {threshold}"] = (
                lambda q, y, k, r, form=form, threshold=threshold: snclr_loss(
                    q,
                    k,
                    bank,
                    r,
                    positiveness(y, bank, r, threshold=threshold),
                    temperature=0.2,
                    form=form,
                )
            )
    for kind in ("unique", "keys"):
        losses[f"snclr {kind}"] = lambda q, y, k, r, kind=kind: snclr_loss(
            q,
            k,
            bank,
            r,
            positiveness(k, bank, r, temperature=0.05),
            temperature=0.2,
            candidates=restrict(gather_candidates(k, r, M), kind),
            normalise=True,
        )
    results = {}
    for name, loss in losses.items():
        q, y = share_of(query).requires_grad_(), share_of(online).requires_grad_()
        value = loss(q, y, share_of(key), share_of(rows)) / distributed.world_size()
        value.backward()
        grads = [
            distributed.all_gather(torch.zeros_like(x) if x.grad is None else x.grad)
            for x in (q, y)
        ]
        results[name] = [distributed.all_sum(value), *grads]
    return results


def batch_norm(shape):
    """Outputs, gradients and running statistics of a batch norm that sees the whole batch, with a
    cumulative one beside.
    """
    torch.manual_seed(1)
    x, target = torch.randn(shape) * 3 + 100, torch.randn(shape)
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    norms = nn.Sequential(kind(shape[1]), kind(shape[1], affine=False, momentum=None))
    nn.init.uniform_(norms[0].weight)
    norms = synchronise_batch_norm(norms, torch.device("cpu"))
    share = share_of(x).requires_grad_()
    for _ in range(2):
        out = norms(share)
    (out * share_of(target)).sum().backward()
    parameters = [distributed.all_sum(p.grad) for p in norms.parameters()]
    evaluated = norms.eval()(share)
    return [
        *map(distributed.all_gather, (out, share.grad, evaluated)),
        *parameters,
        *norms.state_dict().values(),
    ]


def bank():
    """The bank after three batches, and what a search in it finds."""
    torch.manual_seed(2)
    bank = MemoryBank(M, D)
    for step in range(3):
        keys, ids = torch.randn(N, D), torch.arange(N) + step
        bank.enqueue(distributed.all_gather(share_of(keys)), distributed.all_gather(share_of(ids)))
    scores, rows = bank.search(share_of(torch.randn(N, D)), K, share_of(torch.arange(N)))
    return [
        *bank.state_dict().values(),
        distributed.all_gather(scores),
        distributed.all_gather(rows),
    ]


def nearest():
    """kNN scores with the training features spread over the ranks unevenly."""
    torch.manual_seed(3)
    features, labels, queries = (
        normalize(torch.randn(21, D), dim=1),
        torch.arange(21) % 4,
        normalize(torch.randn(9, D), dim=1),
    )
    share = slice(distributed.rank(), None, distributed.world_size())
    return [knn.vote(*knn.nearest(queries, features[share], labels[share], 6, chunk=4), 4, 0.07)]


def add_term(patch=setattr):
    """Add a further term, 'size', to the loss, as a fork would in one line."""
    show = SNCLR._show

    def _show(self, projection, *arguments, **names):
        shown = show(self, projection, *arguments, **names)
        shown.terms["size"] = 0.1 * projection.square().mean()
        return shown

    patch(SNCLR, "_show", _show)


def pieces(out):
    torch.set_default_dtype(torch.float64)
    process_group.start()
    results = {
        "objectives": objectives(),
        "batch_norm": {"1d": batch_norm((N, 5)), "2d": batch_norm((N, 5, 3, 2))},
        "bank": bank(),
        "knn": nearest(),
    }
    torch.save(results, out / f"pieces_{distributed.rank()}.pt")
    process_group.stop()


def run(job, out):
    """Run a job as the rank that the environment describes."""
    script = main_lincls if job.startswith("main_lincls:") else main_snclr
    job = job.removeprefix("main_lincls:")
    if job.startswith("embed:"):
        embedding.EVALUATION_BATCH, embedding.PART_BATCHES = 4, 2
        script, job = embed, job.removeprefix("embed:")
    if job.startswith("term:"):
        add_term()
        job = job.removeprefix("term:")
    if job.startswith("shallow:"):
        width, _, *others = backbones.VITS["vit_tiny"]
        backbones.VITS["vit_tiny"] = (width, 2, *others)
        job = job.removeprefix("shallow:")
    torch.set_default_dtype(torch.float64 if job.startswith("float64:") else torch.float32)
    if job == "pieces":
        pieces(out)
    else:
        script.main(shlex.split(job.removeprefix("float64:")))


def fork(rank, jobs):
    """Start a rank that runs numbered jobs, then ends as any Python process; its process id."""
    if pid := os.fork():
        return pid
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    for number, job in jobs:
        # jobs share a store, as the starts of a run that torchrun starts again
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        run(job, Path(sys.argv[1]))
    sys.exit()


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = enumerate(sys.argv[2:])
    for is_end, start in itertools.groupby(jobs, lambda numbered: numbered[1] == "--"):
        start = [] if is_end else [*start]
        pids = {fork(rank, start) for rank in range(int(os.environ.get("WORLD_SIZE", 1)))}
        while pids:
            pid, status = os.wait()
            pids.remove(pid)
            if status:  # the others would wait for this one
                for other in pids:
                    os.kill(other, signal.SIGKILL)
                sys.exit(f"process {pid} failed, status {status}")
