"""The model: two encoders, predictor and bank, and the forward of one training step in the order of the paper's algorithm."""

import copy
from argparse import Namespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import heads
from .backbones import build_encoder, has_batch_norm
from .memory_bank import MemoryBank
from .objectives import (
    count_picks,
    gather_candidates,
    gather_neighbours,
    mocov2_loss,
    mocov3_loss,
    nnclr_loss,
    positiveness,
    snclr_loss,
)
from .running.distributed import all_gather, world_size
from .running.precision import unit
from .running.recompute import recomputed


class StepView(NamedTuple):
    """What a step shows to the monitor, detached; of this rank unless said otherwise, and of the first direction.

    projection (B, D) online projection of view 1; scores (B, K) cosines of the searched vectors with their neighbours;
    neighbour_ids (B, K) data-set indices, -1 for none; weights (B, K) positiveness; counts (M,) picks of each bank row by
    the global batch; num_candidates () of one sample; bank_fill () share of the bank's rows that were written before this
    step, None without a bank. K and M are 0 for the methods without neighbours.
    """

    projection: Tensor
    scores: Tensor
    neighbour_ids: Tensor
    weights: Tensor
    counts: Tensor
    num_candidates: Tensor
    bank_fill: Tensor | None


class SNCLR(nn.Module):
    """Contrastive learner with soft neighbours, or one of its relatives (method: snclr, mocov3, nnclr, mocov2).

    A step: online projections and predictions; the momentum encoder moves, then projects; the bank is searched as it was
    before this step; the loss; the projections of view 2 of all ranks are enqueued. nnclr has no momentum encoder, mocov2
    no predictor, mocov3 no bank.
    """

    def __init__(
        self,
        base_encoder: nn.Module,
        predictor: nn.Module | None,
        memory_bank: MemoryBank | None,
        *,
        method: str = "snclr",
        topk: int = 30,
        temperature: float = 0.2,
        form: str = "sum_of_logs",
        weights: str = "attention",
        gamma: float = 1.0,
        detach_weights: bool = False,
        positiveness_temperature: float = 1.0,
        threshold: bool = False,
        exclude_own_image: bool = True,
        micro_batch: int | None = None,
        compiled: bool = False,
    ):
        super().__init__()
        self.base_encoder = base_encoder
        self.momentum_encoder = (
            None if method == "nnclr" else copy.deepcopy(base_encoder).requires_grad_(False)
        )
        self.predictor = predictor
        self.memory_bank = memory_bank
        self.method = method
        self.topk = topk
        self.temperature = temperature
        self.form = form
        self.weights = weights
        self.gamma = gamma
        self.detach_weights = detach_weights
        self.positiveness_temperature = positiveness_temperature
        self.threshold = threshold
        self.exclude_own_image = exclude_own_image
        self.micro_batch = micro_batch
        self.embed = (
            torch.compile(_embed) if compiled else _embed
        )  # a function, so that no key of the state changes
        self.joins_views = micro_batch is None and not has_batch_norm(
            base_encoder, besides=base_encoder.projector
        )
        self.attention = None
        if method == "snclr" and weights == "projected":
            self.attention = heads.AttentionProjections(memory_bank.features.shape[1])

    def forward(
        self,
        view1: Tensor,
        view2: Tensor,
        ids: Tensor,
        momentum: float,
        use_neighbours: bool = True,
    ) -> tuple[Tensor, StepView]:
        """One step's loss (), this rank's mean, and what it shows. Changes the momentum encoder and the bank.

        view1, view2 (B, 3, S, S); ids (B,) data-set indices; momentum m of the average, 0 .. 1; use_neighbours False:
        the bank fills, but none of its rows is a neighbour yet.
        """
        step = {
            "snclr": self._snclr,
            "mocov3": self._mocov3,
            "nnclr": self._nnclr,
            "mocov2": self._mocov2,
        }[self.method]
        loss, keys, shown = step(view1, view2, ids, momentum, use_neighbours)
        if self.memory_bank is not None:
            self.memory_bank.enqueue(keys, all_gather(ids))
        return loss, shown

    def _snclr(self, view1, view2, ids, momentum, use_neighbours):
        y1, y2 = self._project(self.base_encoder, view1, view2)
        z1, z2 = self.predictor(y1), self.predictor(y2)
        k1, k2 = self._momentum_projections(momentum, view1, view2)
        scores, rows = self._search(torch.cat([k2, k1]), ids.repeat(2), use_neighbours)
        (scores, _), (rows2, rows1) = scores.chunk(2), rows.chunk(2)
        loss1, weights, candidates = self._soft_neighbour_direction(z1, y1, k2, rows2)
        loss2, _, _ = self._soft_neighbour_direction(z2, y2, k1, rows1)
        num_candidates = len(candidates.keys) + candidates.counts.sum()
        return (
            loss1 + loss2,
            candidates.keys,
            self._show(y1, num_candidates, scores, rows2, weights, candidates.counts),
        )

    def _soft_neighbour_direction(self, z, y, key, rows):
        bank = self.memory_bank
        neighbours = gather_neighbours(bank.features, rows)
        if self.weights == "uniform":
            valid = rows >= 0
            weights = valid.to(neighbours.dtype) / valid.sum(dim=1, keepdim=True).clamp(min=1)
        else:
            weights = positiveness(
                y,
                bank.features,
                rows,
                temperature=self.positiveness_temperature,
                threshold=self.threshold,
                # their gradient is zero while nobody has a neighbour, but there is one: DDP waits for it
                projections=self.attention and (self.attention.f1.weight, self.attention.f2.weight),
                neighbours=neighbours,
            )
        weights = weights / self.gamma
        if self.detach_weights:
            weights = weights.detach()
        candidates = gather_candidates(key, rows, len(bank))
        given = dict(candidates=candidates, neighbours=neighbours)
        loss = snclr_loss(
            z,
            key,
            bank.products,
            rows,
            weights,
            temperature=self.temperature,
            form=self.form,
            **given,
        )
        return loss, weights, candidates

    def _mocov3(self, view1, view2, ids, momentum, use_neighbours):
        y1, y2 = self._project(self.base_encoder, view1, view2)
        z1, z2 = self.predictor(y1), self.predictor(y2)
        k1, k2 = self._momentum_projections(momentum, view1, view2)
        loss = mocov3_loss(z1, k2, temperature=self.temperature) + mocov3_loss(
            z2, k1, temperature=self.temperature
        )
        return loss, None, self._show(y1, len(y1) * world_size())

    def _nnclr(self, view1, view2, ids, momentum, use_neighbours):
        y1, y2 = self._project(self.base_encoder, view1, view2)
        z1, z2 = self.predictor(y1), self.predictor(y2)
        y = unit(torch.cat([y1, y2])).detach()
        scores, rows = self._search(y, ids.repeat(2), use_neighbours)
        # an image without an eligible row in the bank is its own neighbour
        neighbours = torch.where(
            rows >= 0, self.memory_bank.features[rows[:, 0].clamp(min=0)].to(y.dtype), y
        )
        neighbours1, neighbours2 = neighbours.chunk(2)
        loss1 = nnclr_loss(neighbours1, z2, temperature=self.temperature)
        loss2 = nnclr_loss(neighbours2, z1, temperature=self.temperature)
        (scores, _), (rows, _) = scores.chunk(2), rows.chunk(2)
        counts, weights = count_picks(rows, len(self.memory_bank)), (rows >= 0).to(y.dtype)
        shown = self._show(y1, len(y1) * world_size(), scores, rows, weights, counts)
        return (loss1 + loss2) / 2, all_gather(y.chunk(2)[1]), shown

    def _mocov2(self, view1, view2, ids, momentum, use_neighbours):
        (y1,) = self._project(self.base_encoder, view1)
        (k2,) = self._momentum_projections(momentum, view2)
        bank = self.memory_bank
        loss = mocov2_loss(y1, k2, bank.products, bank.valid(), temperature=self.temperature)
        return loss, all_gather(unit(k2)), self._show(y1, 1 + bank.filled)

    @torch.no_grad()
    def _momentum_projections(self, momentum, *views):
        online = list(self.base_encoder.parameters())
        torch._foreach_lerp_(list(self.momentum_encoder.parameters()), online, 1 - momentum)
        return self._project(self.momentum_encoder, *views)

    def _project(self, encoder, *views):
        # without batch norm an image's features do not depend on its company: one call for all views
        parts = [torch.cat(views)] if self.joins_views else views
        features = torch.cat([self._features(encoder, part) for part in parts])
        return [encoder.projector(part) for part in features.chunk(len(views))]

    def _features(self, encoder, x):
        if self.micro_batch is None:
            return self.embed(encoder, x)
        parts = x.tensor_split(-(-len(x) // self.micro_batch))  # as equal as can be
        if not torch.is_grad_enabled():
            return torch.cat([self.embed(encoder, part) for part in parts])
        return torch.cat([recomputed(self.embed, encoder, part, module=encoder) for part in parts])

    def _search(self, queries, ids, use_neighbours):
        if not use_neighbours:
            rows = torch.full((len(queries), self.topk), -1, device=queries.device)
            return torch.full(rows.shape, float("-inf"), device=queries.device), rows
        return self.memory_bank.search(queries, self.topk, ids if self.exclude_own_image else None)

    def _show(self, projection, num_candidates, scores=None, rows=None, weights=None, counts=None):
        if rows is None:
            scores = weights = projection.new_zeros(len(projection), 0)
            rows = counts = torch.zeros(
                len(projection), 0, dtype=torch.long, device=projection.device
            )
            neighbour_ids = rows
        else:
            neighbour_ids = torch.where(rows >= 0, self.memory_bank.ids[rows.clamp(min=0)], -1)
        num_candidates = num_candidates + torch.zeros(
            (), dtype=torch.long, device=projection.device
        )
        bank_fill = (
            None if self.memory_bank is None else self.memory_bank.filled / len(self.memory_bank)
        )
        return StepView(
            projection.detach(),
            scores,
            neighbour_ids,
            weights.detach(),
            counts,
            num_candidates,
            bank_fill,
        )


def _embed(encoder: nn.Module, x: Tensor) -> Tensor:
    return encoder.embed(x)


def build_model(args: Namespace, *, bfloat16: bool = False) -> SNCLR:
    """The model that the flags describe (snclr/options.py), on the CPU, in torch's default dtype.

    bfloat16: take the large products with the bank in that format. Raises UsageError for flags that do not fit the backbone.
    """
    encoder = build_encoder(
        args.arch,
        img_size=args.img_size,
        patch_size=args.patch_size,
        width=args.width,
        small_stem=args.small_stem,
        stop_grad_conv1=args.stop_grad_conv1,
        timm_kwargs=dict(args.timm_kwargs or []),
        num_heads=args.num_heads,
        hidden_dim=args.snclr_mlp_dim,
        out_dim=args.snclr_dim,
    )
    has_predictor, has_bank = args.method != "mocov2", args.method != "mocov3"
    model = SNCLR(
        encoder,
        heads.predictor(encoder.kind, args.snclr_dim, args.snclr_mlp_dim)
        if has_predictor
        else None,
        MemoryBank(args.bank_size, args.snclr_dim, bfloat16) if has_bank else None,
        method=args.method,
        topk=1 if args.method == "nnclr" else args.topk,
        temperature=args.snclr_t,
        form=args.form,
        weights=args.weights,
        gamma=args.gamma,
        detach_weights=args.detach_weights,
        positiveness_temperature=args.positiveness_t,
        threshold=args.threshold,
        exclude_own_image=args.exclude_own_image,
        micro_batch=args.micro_batch,
        compiled=args.compile,
    )
    if args.grad_checkpointing:
        model.base_encoder.set_grad_checkpointing()
    return model
