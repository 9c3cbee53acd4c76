"""Whole training steps of the model: MoCo v2's keys, and local views against an oracle."""

import copy
import math
from argparse import Namespace

import numpy as np
import oracles
import pytest
import torch
from torch import nn

from snclr import augment, builder, choices, heads, options
from snclr.builder import SNCLR
from snclr.memory_bank import MemoryBank
from snclr.running.errors import UsageError

BANK, DIM = 64, 16
FLAGS = "--width 4 --snclr-dim 8 --snclr-mlp-dim 16 --bank-size 20 --topk 3 --patch-size 8"


class Encoder(nn.Module):
    """Vectors (B, DIM) through a batch norm and a hidden layer."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm1d(DIM), nn.Linear(DIM, 32), nn.ReLU())
        self.projector = heads.plain_projector(32, 32, DIM)

    def embed(self, x):
        return self.body(x)


def mocov2():
    torch.manual_seed(0)
    args = options.parse(["--method", "mocov2", "--snclr-t", "0.2"])
    return SNCLR(Encoder(), None, MemoryBank(BANK, DIM), args).train()


# -- MoCo v2 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("leak", [True, False])
def test_batch_statistics_in_the_keys_would_make_mocov2_trivial_and_averaged_ones_do_not(leak):
    """Image 0 of each batch is bright; all others are noise, independent in both views. The noise
    carries the batch's statistics after a batch norm, and nothing else that its views share."""
    model = mocov2()
    if leak:
        model.momentum_encoder.train()
    optimizer, losses = torch.optim.Adam(model.base_encoder.parameters(), 3e-3), []
    for step in range(300):
        views = list(torch.randn(2, 16, DIM))
        views[0][0] = views[1][0] = 30 * (torch.randint(0, 2, (DIM,)) * 2 - 1)
        loss, shown = model(views, torch.arange(16) + 16 * step, 0.9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert shown.num_candidates == BANK + 1
    ratio = sum(losses[-60:]) / 60 / math.log(BANK + 1)
    # image 0 may be recognised: 15/16 of the chance level are left at best
    assert ratio < 0.6 if leak else ratio > 0.85


def test_a_key_of_mocov2_depends_on_its_own_image_only():
    model, x = mocov2(), 3 * torch.randn(8, DIM) + 1
    for step in range(5):
        model([x + step, x - step], torch.arange(8), 0.9)
    before = [buffer.clone() for buffer in model.momentum_encoder.buffers()]
    (keys,) = model._momentum_projections(1.0, [x])
    alone = [model._momentum_projections(1.0, [image[None]])[0] for image in x]
    torch.testing.assert_close(keys, torch.cat(alone))
    for buffer, old in zip(model.momentum_encoder.buffers(), before, strict=True):
        assert torch.equal(buffer, old)


def test_statistics_of_mocov2s_keys_are_averages_of_those_before_this_batch():
    model, x = mocov2(), 3 * torch.randn(8, DIM) + 1
    model([x, x], torch.arange(8), 0.9)
    online, average = model.base_encoder.body[0], model.momentum_encoder.body[0]
    assert not average.running_mean.any()  # the first batch was not yet known to its own keys
    known = online.running_mean.clone(), online.running_var.clone()
    model([x, x], torch.arange(8), 0.9)
    torch.testing.assert_close(average.running_mean, 0.1 * known[0])
    torch.testing.assert_close(average.running_var, 0.9 + 0.1 * known[1])


def test_mocov2_has_a_plain_projector_and_its_own_views():
    args = options.parse(["--method", "mocov2", "--snclr-mlp-dim", "24", "--snclr-dim", "8"])
    model = builder.build_model(args)
    width = model.base_encoder.num_features
    for encoder in (model.base_encoder, model.momentum_encoder):
        kinds = [type(layer) for layer in encoder.projector]
        assert kinds == [nn.Linear, nn.ReLU, nn.Linear]
        shapes = [tuple(p.shape) for p in encoder.projector.parameters()]
        assert shapes == [(24, width), (24,), (8, 24), (8,)]
        assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 8)
    assert not model.train().momentum_encoder.training and model.base_encoder.training


# -- flags without effect ------------------------------------------------------------------------


class Recorded(Namespace):
    """Settings that remember which of them were read."""

    def __getattribute__(self, name):
        object.__getattribute__(self, "__dict__").setdefault("read", set()).add(name)
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("method", choices.METHODS)
def test_a_flag_of_the_objective_is_read_or_listed_as_unused(method):
    (group,) = (g for g in options.build_parser()._action_groups if g.title == "objective")
    flags = {action.dest for action in group._group_actions} - {"method"}
    args = Recorded(**vars(options.parse([*FLAGS.split(), "-a", "resnet8", "--method", method])))

    def loss(**numbers):
        torch.manual_seed(0)
        model = builder.build_model(args).train()
        for step in range(2):  # in the second the bank has rows, and the encoders differ
            views, ids = list(torch.randn(2, B, 3, 16, 16)), torch.arange(B) + B * step
            value, _ = model(views, ids, **{"momentum": 0.5, "neighbour_mass": 1.0} | numbers)
            value.backward()
            with torch.no_grad():
                for parameter in model.base_encoder.parameters():
                    parameter -= parameter.grad
        return value.item()

    before, read = loss(), args.read
    # these are read by main_snclr, which passes numbers
    has_momentum, has_warmup = loss(momentum=0.9) != before, loss(neighbour_mass=0.0) != before
    read |= {"snclr_m", "snclr_m_cos"} if has_momentum else set()
    read |= {"nn_warmup_epochs"} if has_warmup else set()
    read |= {"nn_mass", "nn_ramp_epochs"} if loss(neighbour_mass=0.3) != before else set()
    assert flags - read == set(choices.UNUSED.get(method, ()))


# -- local views ---------------------------------------------------------------------------------

B, MOMENTUM, T = 6, 0.9, 0.3


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model_of(*flags):
    """A model in float64 with a full bank and momentum weights of their own, in training."""
    torch.manual_seed(0)
    model = builder.build_model(options.parse([*FLAGS.split(), "--snclr-t", str(T), *flags]))
    if model.momentum_encoder is not None:
        for parameter in model.momentum_encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if model.memory_bank is not None:
        model.memory_bank.enqueue(torch.randn(20, 8), torch.arange(20))
    return model.train()


def views_of(local, side=32, local_side=16):
    generator = torch.Generator().manual_seed(1)
    sides = [side, side] + [local_side] * local
    return [torch.randn(B, 3, s, s, generator=generator, dtype=torch.float64) for s in sides]


def oracle(model, views, ids):
    """The loss of a step, view after view and pair after pair."""
    online, momentum, predictor = (
        copy.deepcopy(x) for x in (model.base_encoder, model.momentum_encoder, model.predictor)
    )
    y = [online(view) for view in views]
    z = [predictor(projection) for projection in y]
    bank = model.memory_bank
    keys = y[:2]
    if momentum is not None:
        with torch.no_grad():
            for slow, fast in zip(momentum.parameters(), online.parameters(), strict=True):
                slow.copy_(MOMENTUM * slow + (1 - MOMENTUM) * fast)
            keys = [momentum(view) for view in views[:2]]
    if model.args.method == "mocov3":
        loss = oracles.mocov3_step(z, keys, T)
    else:
        k = 3 if model.args.method == "snclr" else 1
        rows = [
            oracles.neighbours(key.detach(), bank.features, bank.ids, 20, k, ids) for key in keys
        ]
        if model.args.method == "snclr":
            loss = oracles.snclr_step(y, z, keys, bank.features, rows, T)
        else:
            loss = oracles.nnclr_step(z, [bank.features[row[:, 0]] for row in rows], T)
    parts = {"base_encoder": online, "predictor": predictor}
    parameters = {
        f"{part}.{name}": parameter
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return loss.detach(), dict(zip(parameters, gradients, strict=True))


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("arch", ["resnet8", "vit_tiny"])
@pytest.mark.parametrize("method", ["snclr", "mocov3", "nnclr"])
@pytest.mark.parametrize("local", [0, 1, 3])
def test_a_step_with_local_views_equals_the_mean_over_pairs(double, method, arch, local):
    model = model_of("--method", method, "-a", arch, "--local-views", str(local))
    views, ids = views_of(local), torch.arange(B) + 17  # of the first three an older copy is known
    loss, gradients = oracle(model, views, ids)
    actual, _ = model(views, ids, MOMENTUM)
    actual.backward()
    torch.testing.assert_close(actual.detach(), loss, rtol=1e-10, atol=1e-12)
    parameters = dict(model.named_parameters())
    for name, expected in gradients.items():
        difference = (parameters[name].grad - expected).norm()
        assert difference < 1e-8 * expected.norm() + 1e-11, name


@pytest.mark.parametrize(
    "flags, arguments",
    [
        ("", {}),
        ("--weights key --candidates unique --local-views 1", {"candidates": "unique"}),
        ("--candidates keys --mix-neighbours --form log_of_sum", {"candidates": "keys"}),
        ("--normalise-positives --mix-neighbours --weights key", {"normalise": True}),
        (
            "--weights projected --threshold --positiveness-t 0.5 --normalise-positives "
            "--mix-neighbours --form log_of_sum --local-views 2 --micro-batch 6",
            {"normalise": True},
        ),
    ],
)
def test_a_step_with_a_weak_key_view_and_the_other_levers_equals_the_oracle(
    double, flags, arguments
):
    model = model_of("-a", "resnet8", "--key-view", "weak", *flags.split())
    args, bank = model.args, model.memory_bank
    size = [view.size for view in augment.build_views(args)]
    views, ids = [torch.randn(B, 3, s, s) for s in size], torch.arange(B) + 17
    online, momentum, predictor, projections = map(
        copy.deepcopy,
        (model.base_encoder, model.momentum_encoder, model.predictor, model.attention),
    )
    y = [online(view) for view in views[:-1]]
    z = [predictor(projection) for projection in y]
    with torch.no_grad():
        for slow, fast in zip(momentum.parameters(), online.parameters(), strict=True):
            slow.copy_(MOMENTUM * slow + (1 - MOMENTUM) * fast)
        key = momentum(views[-1])
    rows = oracles.neighbours(key, bank.features, bank.ids, 20, 3, ids)
    features, shares = bank.features.clone(), None
    if args.mix_neighbours:
        shares = [augment.keyed_uniforms(3, args.seed, 8, i, -2) for i in range(B)]
        shares = torch.from_numpy(np.stack(shares))
    loss = oracles.weak_step(
        y,
        z,
        key,
        features,
        rows,
        T,
        mass=0.3,
        weights=args.weights,
        attention={
            "temperature": args.positiveness_t,
            "threshold": args.threshold,
            "projections": projections and [*projections.parameters()],
        },
        shares=shares,
        form=args.form,
        **arguments,
    )
    trained = [list(x.parameters()) for x in (online, model.base_encoder)]
    if projections:
        trained[0] += projections.parameters()
        trained[1] += model.attention.parameters()
    gradients = torch.autograd.grad(loss, trained[0])
    actual, shown = model(views, ids, MOMENTUM, 0.3, 8)
    actual.backward()
    torch.testing.assert_close(actual, loss, rtol=1e-10, atol=1e-12)
    for parameter, expected in zip(trained[1], gradients, strict=True):
        assert (parameter.grad - expected).norm() < 1e-8 * expected.norm() + 1e-11
    # the weak key is searched and enqueued, and is what the log shows
    assert torch.equal(shown.rows, rows)
    torch.testing.assert_close(bank.features[:B], torch.nn.functional.normalize(key, dim=1))
    assert all(p.grad is None for p in model.momentum_encoder.parameters())


@pytest.mark.parametrize("method", ["mocov3", "mocov2"])
def test_the_weak_view_is_the_key_of_the_relatives_too(double, method):
    """With the weak view in the place of view 2, and no other pair, the losses are the same."""
    flags = ("--method", method, "-a", "resnet8")
    views, ids = views_of(1, local_side=32), torch.arange(B) + 30
    weak = model_of(*flags, "--key-view", "weak")(views, ids, MOMENTUM)[0]
    strong = model_of(*flags)([views[0], views[2]], ids, MOMENTUM)[0]
    if method == "mocov2":
        torch.testing.assert_close(weak, strong, rtol=1e-12, atol=0)
    else:
        y = model_of(*flags).base_encoder
        model = model_of(*flags, "--key-view", "weak")
        z = [model.predictor(y(view)) for view in views[:2]]
        (key,) = model._momentum_projections(MOMENTUM, views[2:])
        expected = sum(oracles.mocov3_one(q, key, T) for q in z)
        torch.testing.assert_close(weak, expected, rtol=1e-10, atol=0)


def test_shares_of_mixed_neighbours_depend_on_step_image_neighbour_and_key(double):
    model = model_of("-a", "resnet8", "--mix-neighbours")
    neighbours, key = torch.randn(B, 3, 8), torch.zeros(B, 8)
    key[:, 0] = 1
    neighbours = torch.nn.functional.one_hot(torch.ones(B, 3).long(), 8).double()

    def shares(step, number):
        first, second = model._positives(neighbours, key, step, number)[..., :2].unbind(-1)
        return second / (first + second)

    assert torch.equal(shares(3, 0), shares(3, 0))
    drawn = torch.cat([shares(3, 0), shares(3, 1), shares(4, 0)])
    assert len(drawn.unique()) == drawn.numel() and drawn.min() > 0 and drawn.max() < 1
    many = torch.cat([shares(step, 0) for step in range(100)])
    assert abs(many.mean() - 1 / 2) < 0.03 and abs(many.var() - 1 / 12) < 0.01


def test_local_views_reach_neither_the_momentum_encoder_nor_the_bank(double):
    plain, local = model_of("-a", "resnet8"), model_of("-a", "resnet8", "--local-views", "2")
    views, ids = views_of(2), torch.arange(B) + 30
    for model, inputs in ((plain, views[:2]), (local, views)):
        model(inputs, ids, MOMENTUM)
    for name in ("momentum_encoder", "memory_bank"):
        states = [getattr(model, name).state_dict() for model in (plain, local)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    norms = [model.base_encoder.bn1.num_batches_tracked.item() for model in (plain, local)]
    assert norms == [2, 4]


@pytest.mark.parametrize("arch", ["vit_tiny", "vit_conv_small"])
def test_a_vit_encodes_local_views_with_its_position_embedding_interpolated(arch):
    size = "16" if arch == "vit_tiny" else "32"
    flags = ["--patch-size", "8"] if arch == "vit_tiny" else ["--patch-size", "16"]
    args = options.parse(["-a", arch, "--img-size", "64", "--local-size", size, *flags])
    encoder = builder.build_model(args).base_encoder.eval()
    with torch.no_grad():
        x = torch.randn(2, 3, int(size), int(size))
        features = encoder.embed(x)
        encoder.pos_embed.zero_()
        assert features.shape == (2, encoder.num_features)
        assert not torch.allclose(features, encoder.embed(x))


def test_a_backbone_of_one_size_is_refused_with_what_to_do():
    flags = ["--img-size", "32", "--local-views", "1", "-a", "timm:vit_tiny_patch16_224"]
    flags += ["--timm-kwargs", "depth=1"]
    with pytest.raises(UsageError, match=r"local views of 16 px.*dynamic_img_size=True"):
        model_of(*flags)
    model_of(*flags, "dynamic_img_size=True")
