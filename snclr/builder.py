"""The model: encoders, predictor and bank, and a training step in the order of the algorithm."""

import copy
import itertools
from argparse import Namespace

import numpy as np
import torch
from torch import Tensor, nn

from . import heads
from .augment import keyed_uniforms
from .backbones import build_encoder, has_batch_norm, projector_name
from .memory_bank import MemoryBank
from .objectives import (
    count_picks,
    gather_candidates,
    gather_neighbours,
    mix_with_keys,
    mocov2_loss,
    mocov3_loss,
    nnclr_loss,
    positiveness,
    restrict,
    snclr_loss,
)
from .optim import move_averages
from .running.devices import send
from .running.distributed import all_gather, rank, world_size
from .running.errors import UsageError, first_line
from .running.forward import begin_step, compiled, recomputed
from .running.metrics import StepView
from .running.precision import unit


def pairs(num_views: int, num_keys: int = 2) -> list[tuple[int, int]]:
    """(number of the query view, number of the key) of each term of the loss.

    The first views, the two global ones, have keys: each is compared with all other views. With a
    weak key view there is a single key, which no query view has: it is compared with all of them.
    """
    if num_keys == 1:
        return [(query, 0) for query in range(num_views)]
    return [(q, k) for k in range(num_keys)[::-1] for q in range(num_views) if q != k]


class SNCLR(nn.Module):
    """Contrastive learner with soft neighbours (snclr), or a relative: mocov3, nnclr, mocov2.

    One step: the online encoder projects and predicts; the momentum encoder moves, then projects;
    the bank is searched as it was before this step; the loss is computed; the projections of view 2
    of all ranks are enqueued. nnclr has no momentum encoder, mocov2 no predictor, mocov3 no bank.

    n local views (small crops, as in DINO and SwAV) may follow the two global ones. They go through
    the online encoder only, and are compared with the keys of both global views (for nnclr: with
    the neighbours of both). Over the 2 + 2n `pairs` of a query view q and a key view k,

        loss = S * mean of L(q -> k),    S = 2 for snclr and mocov3, S = 1 for nnclr

    where L is the objective's loss of one direction: without local views, the loss of snclr and
    mocov3 is L(1 -> 2) + L(2 -> 1). The neighbours of a key are searched once; each query view
    weighs them by its own online projection.

    With --key-view weak, the last view is a weak one, of crop and flip only. It is the only view of
    the momentum encoder: one forward instead of two. Its key is the target of all other views, is
    searched and enqueued. So there are 2 + n pairs, and without local views the loss is
    L(1 -> weak) + L(2 -> weak). In MSF, ReSSL and SCE a single strong view has the weak target.

    args: the settings of a run (snclr/options.py).
    """

    def __init__(
        self,
        base_encoder: nn.Module,
        predictor: nn.Module | None,
        memory_bank: MemoryBank | None,
        args: Namespace,
    ):
        super().__init__()
        self.args = args
        self.base_encoder = base_encoder
        self.momentum_encoder = (
            None if args.method == "nnclr" else copy.deepcopy(base_encoder).requires_grad_(False)
        )
        self.predictor = predictor
        self.memory_bank = memory_bank
        # compiling this function, not the encoder, keeps the names of the state dict
        self.embed = compiled(lambda encoder, x: encoder.embed(x), args.compile)
        self.joins_views = args.micro_batch is None and not has_batch_norm(
            base_encoder, besides=base_encoder.projector
        )
        # a frozen patch embedding or position embedding stays frozen
        head = f"{projector_name(base_encoder)}."
        self.trained_backbone = [
            name
            for name, parameter in base_encoder.named_parameters()
            if parameter.requires_grad and not name.startswith(head)
        ]
        self.backbone_is_frozen = False
        self.attention = None
        if args.method == "snclr" and args.weights == "projected":
            self.attention = heads.AttentionProjections(memory_bank.features.shape[1])

    def freeze_backbone(self, frozen: bool) -> None:
        """Let the backbone's weights and batch norm statistics stay as they are, or change again.

        The momentum encoder's stay as well, as long as its backbone equals the online one. Its
        batch norms use their running statistics then, as the online encoder's do. DDP must be built
        after this call: it waits for the gradient of each parameter that had one at its start.
        """
        self.backbone_is_frozen = frozen
        for name in self.trained_backbone:
            self.base_encoder.get_parameter(name).requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "SNCLR":
        """As nn.Module's; but a frozen backbone stays in eval mode, and mocov2's momentum encoder
        always uses its averaged statistics.
        """
        super().train(mode)
        if self.backbone_is_frozen:
            for encoder in filter(None, (self.base_encoder, self.momentum_encoder)):
                encoder.eval().projector.train(mode)
        if self.args.method == "mocov2":
            self.momentum_encoder.eval()
        return self

    def forward(
        self,
        views: list[Tensor],
        ids: Tensor,
        momentum: float | Tensor,
        neighbour_mass: float | Tensor = 1.0,
        step: int = 0,
    ) -> tuple[Tensor, StepView]:
        """The loss () of a step, this rank's mean, and what the log and the pictures show of it.

        Changes the momentum encoder and the bank.

        views           those of augment.build_views, (B, C, S, S) each
        ids (B,)        data-set indices
        momentum        m of the momentum encoder's average, 0 .. 1
        neighbour_mass  sum of the weights of an image's neighbours (optim.neighbour_mass); 0: the
                        bank is filled, but not searched
        step            number of completed steps, a part of the key of random numbers

        In a CUDA graph, momentum and neighbour_mass are float64 tensors () on the device, and the
        mass is above 0.
        """
        begin_step(self.args.compile)
        compute = {
            "snclr": self._snclr,
            "mocov3": self._mocov3,
            "nnclr": self._nnclr,
            "mocov2": self._mocov2,
        }[self.args.method]
        key_views = views[:2]
        if self.args.key_view == "weak":
            views, key_views = views[:-1], views[-1:]
        loss, keys, shown = compute(views, key_views, ids, momentum, neighbour_mass, step)
        if self.memory_bank is not None:
            self.memory_bank.enqueue(keys, all_gather(ids))
        loss = loss + sum(shown.terms.values())
        return loss, shown._replace(terms={name: x.detach() for name, x in shown.terms.items()})

    def _snclr(self, views, key_views, ids, momentum, mass, step):
        args, bank = self.args, self.memory_bank
        y = self._project(self.base_encoder, views)
        z = [self.predictor(projection) for projection in y]
        keys = self._momentum_projections(momentum, key_views)
        num = len(keys)
        scores, rows = self._search(torch.cat(keys), ids.repeat(num), args.topk, mass)
        scores, rows = scores.chunk(num), rows.chunk(num)
        neighbours = [gather_neighbours(bank.features, rows[k]) for k in range(num)]
        positives = [self._positives(neighbours[k], keys[k], step, k) for k in range(num)]
        picked = [gather_candidates(keys[k], rows[k], len(bank)) for k in range(num)]
        candidates = [restrict(each, args.candidates) for each in picked]
        losses, weights = [], []
        for query, k in pairs(len(views), num):
            source = keys[k] if args.weights == "key" else y[query]
            weights.append(self._weights(source, rows[k], neighbours[k]) * mass)
            losses.append(
                snclr_loss(
                    z[query],
                    keys[k],
                    bank.products,
                    rows[k],
                    weights[-1],
                    temperature=args.snclr_t,
                    form=args.form,
                    candidates=candidates[k],
                    neighbours=positives[k],
                    normalise=args.normalise_positives,
                    tf32=bank.tf32,
                )
            )
        fresh, counts = candidates[-1]
        num_candidates = len(fresh) + counts.sum()
        shown = self._show(
            y[0], num_candidates, scores[-1], rows[-1], weights[0], picked[-1].counts, counts
        )
        return sum(losses) * (2 / len(losses)), fresh, shown

    def _positives(self, neighbours, key, step, number):
        """neighbours (B, K, D), with --mix-neighbours mixed with their key, number 0 or 1.

        The shares are a function of seed, step, the image's position in the global batch, the
        neighbour's position and the key's number. They are computed without reading a GPU.
        """
        if not self.args.mix_neighbours:
            return neighbours
        batch, k = neighbours.shape[:2]
        positions = rank() * batch + np.arange(batch)
        # other keys with negative numbers: -1 in augment.epoch_order
        shares = keyed_uniforms(k, self.args.seed, step, positions, -2 - number)
        return mix_with_keys(neighbours, key, send(torch.from_numpy(shares), key.device))

    def _weights(self, source, rows, neighbours):
        """Weights (B, K) of the neighbours: their sum is 1 / gamma, or less with --threshold.

        source (B, D): the query view's online projection, or the key (--weights key).
        """
        args = self.args
        if args.weights == "uniform":
            valid = rows >= 0
            weights = valid.to(neighbours.dtype) / valid.sum(dim=1, keepdim=True).clamp(min=1)
        else:
            weights = positiveness(
                source,
                self.memory_bank.features,
                rows,
                temperature=args.positiveness_t,
                threshold=args.threshold,
                # used also without any neighbour: DDP waits for their gradient, which is then 0
                projections=self.attention and (self.attention.f1.weight, self.attention.f2.weight),
                neighbours=neighbours,
            )
        weights = weights / args.gamma
        return weights.detach() if args.detach_weights else weights

    def _mocov3(self, views, key_views, ids, momentum, mass, step):
        y = self._project(self.base_encoder, views)
        z = [self.predictor(projection) for projection in y]
        keys = self._momentum_projections(momentum, key_views)
        losses = [
            mocov3_loss(z[query], keys[k], temperature=self.args.snclr_t)
            for query, k in pairs(len(views), len(keys))
        ]
        shown = self._show(y[0], len(y[0]) * world_size(), row_candidates=ids.new_zeros(0))
        return sum(losses) * (2 / len(losses)), None, shown

    def _nnclr(self, views, key_views, ids, momentum, mass, step):
        y = self._project(self.base_encoder, views)
        z = [self.predictor(projection) for projection in y]
        searched = unit(torch.cat(y[:2])).detach()
        scores, rows = self._search(searched, ids.repeat(2), 1, mass)
        # an image without an eligible row in the bank is its own neighbour
        nearest = self.memory_bank.features[rows[:, 0].clamp(min=0)].to(searched.dtype)
        neighbours = torch.where(rows >= 0, nearest, searched).chunk(2)
        losses = [
            nnclr_loss(neighbours[k], z[query], temperature=self.args.snclr_t)
            for query, k in pairs(len(views))
        ]
        scores, rows = scores.chunk(2)[0], rows.chunk(2)[0]
        counts, weights = count_picks(rows, len(self.memory_bank)), (rows >= 0).to(searched.dtype)
        num_candidates = len(y[0]) * world_size()
        shown = self._show(y[0], num_candidates, scores, rows, weights, counts, counts[:0])
        return sum(losses) / len(losses), all_gather(searched.chunk(2)[1]), shown

    def _mocov2(self, views, key_views, ids, momentum, mass, step):
        """MoCo v2 (He et al. 2020, Chen et al. 2020). Deviations from its published code:

        - In place of ShuffleBN, the key encoder's batch norms use moving averages of the online
          encoder's running statistics, with the momentum of the weights, as EMAN does (Cai et al.
          2021). A key then depends on its own image only, so the query cannot recognise it by
          statistics of a common batch. This works on one GPU as on many. Dropout and drop-path are
          off in the key encoder.
        - The online encoder's batch norms take their statistics over all ranks, not per GPU.
        - The bank starts empty: until it is full there are fewer negatives. MoCo's starts with
          random vectors. As in MoCo, it holds keys of all ranks, and an older key of the same image
          is a negative.
        - The hidden width of the projector is --snclr-mlp-dim; MoCo v2's is that of the features.
        - Bottleneck ResNets start with zeros in the last norm of each branch, as MoCo v3's.
        - Optimiser, schedule, temperature, momentum and sizes are those of the flags.

        With --key-view weak the weak view is the key, and view 2 is not used.
        """
        # keys first, so that the averaged statistics of their batch norms do not contain this batch
        (k2,) = self._momentum_projections(momentum, key_views[-1:])
        (y1,) = self._project(self.base_encoder, views[:1])
        bank = self.memory_bank
        loss = mocov2_loss(y1, k2, bank.products, bank.valid(), temperature=self.args.snclr_t)
        return loss, all_gather(unit(k2)), self._show(y1, 1 + bank.filled)

    @torch.no_grad()
    def _momentum_projections(self, momentum, views):
        """Move the momentum encoder, then project each view with it: a list of (B, D)."""
        averages, new = (
            list(encoder.parameters()) for encoder in (self.momentum_encoder, self.base_encoder)
        )
        if self.args.method == "mocov2":
            for tensors, encoder in ((averages, self.momentum_encoder), (new, self.base_encoder)):
                tensors += [x for x in encoder.buffers() if x.is_floating_point()]
        move_averages(averages, new, momentum)
        return self._project(self.momentum_encoder, views)

    def _project(self, encoder, views):
        """The encoder's projections of each view, a list of (B, D)."""
        parts, micro_batch = views, self.args.micro_batch
        if self.joins_views:
            # without batch norm an image's features do not depend on the others: one call a size
            by_size = itertools.groupby(views, key=lambda view: view.shape[-1])
            parts = [torch.cat(list(group)) for _, group in by_size]
        elif micro_batch is not None:  # parts of nearly equal size
            parts = [x for view in views for x in view.tensor_split(-(-len(view) // micro_batch))]
        # backward begins with the last part, and then frees its activations: it keeps them
        is_repeated = micro_batch is not None and torch.is_grad_enabled()
        repeated = parts[:-1] if is_repeated else []
        features = [recomputed(self.embed, encoder, part, module=encoder) for part in repeated]
        features += [self.embed(encoder, part) for part in parts[len(repeated) :]]
        return [encoder.projector(part) for part in torch.cat(features).chunk(len(views))]

    def _search(self, queries, ids, k, mass):
        """Scores and rows (B, k) from the bank; all -inf and -1 if the mass is 0."""
        if not isinstance(mass, Tensor) and mass == 0:
            rows = torch.full((len(queries), k), -1, device=queries.device)
            return torch.full(rows.shape, float("-inf"), device=queries.device), rows
        return self.memory_bank.search(queries, k, ids if self.args.exclude_own_image else None)

    def _show(
        self,
        projection,
        num_candidates,
        scores=None,
        rows=None,
        weights=None,
        counts=None,
        row_candidates=None,
    ):
        """What a step shows (StepView); without rows it has no neighbours."""
        bank = self.memory_bank
        if rows is None:
            scores = weights = projection.new_zeros(len(projection), 0)
            rows, counts = scores.long(), scores.new_zeros(0).long()
        ids = rows if bank is None else bank.ids[rows.clamp(min=0)]
        return StepView(
            projection=projection.detach(),
            scores=scores,
            neighbour_ids=ids.masked_fill(rows < 0, -1),
            weights=weights.detach(),
            counts=counts,
            num_candidates=num_candidates,
            bank_fill=None if bank is None else bank.filled / len(bank),
            terms={},
            rows=rows,
            row_candidates=row_candidates,
        )


def check_local_size(encoder: nn.Module, args: Namespace) -> None:
    """Raise UsageError if the encoder cannot take local views."""
    try:
        with torch.no_grad():
            encoder.eval().embed(torch.zeros(1, args.channels, args.local_size, args.local_size))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"--arch {args.arch} cannot take local views of {args.local_size} px beside views of "
            f"{args.img_size} px: {first_line(error)}; timm's ViTs can with --timm-kwargs "
            "dynamic_img_size=True"
        ) from error
    encoder.train()


def build_model(args: Namespace, *, products: str = "float32") -> SNCLR:
    """The model that the flags describe (snclr/options.py), on the CPU, in torch's default dtype.

    products: in what those with the bank are computed (running.devices.bank_products). Raises
    UsageError for flags that do not fit the backbone.
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
        channels=args.channels,
        hidden_dim=args.snclr_mlp_dim,
        out_dim=args.snclr_dim,
    )
    if args.micro_batch == 1 and world_size() == 1 and has_batch_norm(encoder, encoder.projector):
        raise UsageError(
            f"--micro-batch 1 lets the batch norms of --arch {args.arch} see a single image: take "
            "more"
        )
    bank = MemoryBank(args.bank_size, args.snclr_dim, products) if args.method != "mocov3" else None
    predictor = None
    if args.method == "mocov2":
        projector = heads.plain_projector(encoder.num_features, args.snclr_mlp_dim, args.snclr_dim)
        encoder.set_submodule(projector_name(encoder), projector)
    else:
        predictor = heads.predictor(encoder.kind, args.snclr_dim, args.snclr_mlp_dim)
    model = SNCLR(encoder, predictor, bank, args)
    if args.local_views:
        check_local_size(encoder, args)
    if args.grad_checkpointing:
        model.base_encoder.set_grad_checkpointing()
    return model
