import copy
import math

import pytest
import timm.optim
import torch
from torch import nn

from snclr import optim, options
from snclr.builder import SNCLR
from snclr.running import tensor_files
from snclr.running.errors import UsageError

# -- schedules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step, warmup, expected",
    [
        (0, 4, 0.0),
        (10, 4, 0.25),  # an epoch of 10 steps: a quarter of the warm-up
        (25, 4, 0.625),  # by the step, not by the epoch
        (40, 4, 1.0),  # the warm-up ends
        (120, 4, 0.5),  # half way from there to the end
        (80, 4, 0.5 * (1 + math.sqrt(0.5))),  # a quarter
        (200, 4, 0.0),
        (0, 0, 1.0),
        (100, 0, 0.5),
        (200, 0, 0.0),
        (5, 0.5, 1.0),
        (3, 0.5, 0.6),
        (100, 20, 0.5),  # only warm-up
        (199, 20, 0.995),
    ],
)
def test_learning_rate_has_its_closed_form(step, warmup, expected):
    actual = optim.learning_rate(
        step, peak=3.0, steps_per_epoch=10, warmup_epochs=warmup, epochs=20
    )
    assert actual == pytest.approx(3.0 * expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 2.5, 7])
def test_learning_rate_rises_then_falls_and_never_exceeds_the_peak(warmup):
    rates = [
        optim.learning_rate(s, peak=1.0, steps_per_epoch=13, warmup_epochs=warmup, epochs=7)
        for s in range(7 * 13)
    ]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(
        rates[top:], reverse=True
    )
    assert min(rates) >= 0 and max(rates) <= 1


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.9),
        (25, 1 - 0.05 * (1 + math.sqrt(0.5))),
        (50, 0.95),
        (75, 1 - 0.05 * (1 - math.sqrt(0.5))),
        (100, 1),
    ],
)
def test_encoder_momentum_rises_to_one_by_half_a_cosine(step, expected):
    assert optim.encoder_momentum(step, start=0.9, total_steps=100, cosine=True) == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize("step", [0, 50, 100])
def test_encoder_momentum_without_cosine_is_constant(step):
    assert optim.encoder_momentum(step, start=0.9, total_steps=100, cosine=False) == 0.9


# -- optimisers ------------------------------------------------------------------------------------


def network():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model.frozen = nn.Linear(2, 2).requires_grad_(False)
    model.scale = nn.Parameter(torch.ones(()))
    return model


@pytest.mark.parametrize(
    "warmup, ramp, expected",
    [
        (0, 0, [2, 2, 2, 2, 2, 2, 2, 2]),
        (1, 0, [0, 0, 0, 0, 2, 2, 2, 2]),
        (0, 1, [0.5, 1, 1.5, 2, 2, 2, 2, 2]),
        (0.5, 1, [0, 0, 0.5, 1, 1.5, 2, 2, 2]),
        (0.4, 0.25, [0, 0, 2, 2, 2, 2, 2, 2]),  # between two steps
    ],
)
def test_the_mass_of_the_neighbours_rises_linearly_after_the_warm_up(warmup, ramp, expected):
    schedule = dict(full=2.0, steps_per_epoch=4, warmup_epochs=warmup, ramp_epochs=ramp)
    assert [optim.neighbour_mass(step, **schedule) for step in range(8)] == expected


def test_only_parameters_of_several_dimensions_decay_and_frozen_ones_are_left_out():
    model = network()
    decaying, others = optim.parameter_groups(model.named_parameters(), 0.1)
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0
    assert {id(p) for p in decaying["params"]} == {id(model[0].weight), id(model[3].weight)}
    expected = {
        id(model[0].bias),
        id(model[1].weight),
        id(model[1].bias),
        id(model[3].bias),
        id(model.scale),
    }
    assert {id(p) for p in others["params"]} == expected


def test_the_grouping_sees_names(monkeypatch):
    """A fork may group by name; here the layer named 3 has no weight decay."""
    monkeypatch.setattr(optim, "decays", lambda name, p: p.ndim > 1 and not name.startswith("3."))
    model = network()
    decaying, others = optim.parameter_groups(model.named_parameters(), 0.1)
    assert [id(p) for p in decaying["params"]] == [id(model[0].weight)]
    assert id(model[3].weight) in {id(p) for p in others["params"]}


def test_a_group_may_scale_its_learning_rate():
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    scales = [{}, {"lr_scale": 0.5}, {"lr_scale": 0.0}]
    groups = [{"params": [p], **scale} for p, scale in zip(parameters, scales, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for p in parameters:
        p.grad = torch.ones(3)
    optim.set_learning_rate(optimizer, 0.2)
    optimizer.step()
    for p, expected in zip(parameters, [0.8, 0.9, 1.0], strict=True):
        torch.testing.assert_close(p.detach(), torch.full((3,), expected))


@pytest.mark.parametrize(
    "name, kind", [("adamw", torch.optim.AdamW), ("lars", optim.LARS), ("sgd", torch.optim.SGD)]
)
def test_optimiser_stands_still_until_its_rate_is_set(name, kind):
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = optim.build_optimizer(name, model, 0.1)
    assert type(optimizer) is kind
    for rate, moves in ((None, False), (0.1, True)):
        if rate is not None:
            optim.set_learning_rate(optimizer, rate)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == (
            {name for name, p in model.named_parameters() if p.requires_grad} if moves else set()
        )


def test_unknown_optimiser_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match=r"adam'.*adamw, lars, sgd"):
        optim.build_optimizer("adam", nn.Linear(2, 2), 0.1)


def numbers(*shape):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))
    )


PARAMETERS = {
    "matrix": numbers(3, 4),
    "filter": numbers(2, 3, 2, 2),
    "vector": numbers(5),
    "scalar": numbers(1)[0],
    "zero matrix": torch.zeros(2, 3, dtype=torch.float64),
    "without gradient": numbers(2, 2),
    "with zero gradient": numbers(2, 2),
}


def gradient(name, value, step):
    if name == "without gradient":
        return None
    if name == "with zero gradient":
        return torch.zeros_like(value)
    return torch.sin(value * 3 + step + len(name))


def lars_by_loops(values, steps, rates, weight_decay, momentum, trust):
    values = {name: value.clone() for name, value in values.items()}
    velocity = {name: torch.zeros_like(value) for name, value in values.items()}
    for step in range(steps):
        for name, value in values.items():
            update = gradient(name, value, step)
            if update is None:
                continue
            if value.ndim > 1:
                update = update + weight_decay * value
                norms = math.sqrt((value**2).sum()), math.sqrt((update**2).sum())
                if norms[0] > 0 and norms[1] > 0:
                    update = update * trust * norms[0] / norms[1]
            velocity[name] = momentum * velocity[name] + update
            values[name] = value - rates[step] * velocity[name]
    return values


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("momentum, trust", [(0.9, 0.001), (0.0, 1.0), (0.5, 0.02)])
def test_lars_equals_the_loop_over_parameters(weight_decay, momentum, trust):
    parameters = {name: nn.Parameter(value.clone()) for name, value in PARAMETERS.items()}
    optimizer = optim.LARS(
        parameters.values(), weight_decay=weight_decay, momentum=momentum, trust_coefficient=trust
    )
    rates = [0.5, 0.2, 2.0, 0.0, 1.0]
    for step, rate in enumerate(rates):
        for name, parameter in parameters.items():
            parameter.grad = gradient(name, parameter.detach(), step)
        optim.set_learning_rate(optimizer, rate)
        optimizer.step()
    expected = lars_by_loops(PARAMETERS, len(rates), rates, weight_decay, momentum, trust)
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            parameter.detach(), expected[name], rtol=1e-12, atol=1e-14, msg=name
        )


def test_lars_does_not_change_the_gradients():
    parameter = nn.Parameter(torch.randn(3, 3))
    parameter.grad = torch.randn(3, 3)
    before = parameter.grad.clone()
    optim.LARS([parameter], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(parameter.grad, before)


def test_lars_resumed_from_its_state_equals_the_uninterrupted_one():
    ends = []
    for stops in (False, True):
        parameter = nn.Parameter(PARAMETERS["matrix"].clone())
        optimizer = optim.LARS([parameter], lr=0.1, weight_decay=0.1)
        for step in range(4):
            if stops and step == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = optim.LARS([parameter], lr=0.7)
                optimizer.load_state_dict(state)
            parameter.grad = gradient("matrix", parameter.detach(), step)
            optimizer.step()
        ends.append(parameter.detach())
    assert torch.equal(*ends)


def test_gradient_norm_is_that_of_all_gradients_in_a_row():
    model = network()
    optimizer = optim.build_optimizer("adamw", model, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model[3].bias.grad = None
    trained = [
        p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None
    ]
    torch.testing.assert_close(optim.gradient_norm(optimizer), torch.cat(trained).norm())


# -- any optimiser: an entry, skipped steps, resume ------------------------------------------------

OPTIMISERS = {
    **options.OPTIMIZERS,
    "plain sgd": ("torch.optim.SGD", {}),
    "unfused adamw": ("torch.optim.AdamW", {"fused": False}),
    "timm nadamw": ("timm.optim.NAdamW", {}),
    "timm muon": ("timm.optim.Muon", {}),
    "timm adafactor": ("timm.optim.Adafactor", {}),
}
OPTIMISERS = {
    name: (path, arguments)
    for name, (path, arguments) in OPTIMISERS.items()
    if hasattr(timm.optim, path.rpartition(".")[2]) or not path.startswith("timm")
}


class Trained:
    """A small network, an optimiser and a scaler; step(number) takes a step whose gradient depends
    on the number.
    """

    def __init__(self, name, fp16=False):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(20, 24), nn.LayerNorm(24), nn.Unflatten(1, (24, 1, 1)), nn.Conv2d(24, 3, 1)
        )
        self.optimizer = optim.build_optimizer(name, self.model, 0.1)
        self.scaler = torch.amp.GradScaler("cpu", enabled=fp16)

    def gradient(self, number, parameter):
        generator = torch.Generator().manual_seed(number)
        return torch.randn(parameter.shape, generator=generator)

    def step(self, number, factor=1.0):
        parameters = list(self.model.parameters())
        loss = sum((p * self.gradient(number, p)).sum() for p in parameters) * factor
        optim.set_learning_rate(self.optimizer, 0.01 * (1 + number))
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = optim.gradient_norm(self.optimizer)
        optim.step_if_finite(self.optimizer, self.scaler, norm)
        self.scaler.update()
        return self

    def state(self):
        return copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict()["state"]])


def flat(state):
    """Names and tensors of a nested state."""
    if isinstance(state, dict):
        pairs = state.items()
    elif isinstance(state, list):
        pairs = enumerate(state)
    else:
        return {(): torch.as_tensor(state)}
    return {(key, *rest): x for key, part in pairs for rest, x in flat(part).items()}


def assert_same(one, other):
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.fixture(params=OPTIMISERS)
def name(request, monkeypatch):
    """The name of an optimiser that a fork added with one entry."""
    monkeypatch.setitem(options.OPTIMIZERS, request.param, OPTIMISERS[request.param])
    return request.param


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_non_finite_step_changes_neither_weights_nor_state(name, factor, fp16):
    run = Trained(name, fp16).step(0).step(1)
    before = run.state()
    run.step(2, factor)
    assert_same(run.state(), before)
    assert not torch.equal(run.step(2).state()[0]["0.weight"], before[0]["0.weight"])


@pytest.mark.parametrize("fp16", [False, True])
def test_a_run_with_non_finite_steps_ends_as_one_without_them(name, fp16):
    """The first step is one of them: some optimisers make their state in it. The other run is a
    loop without any guard.
    """
    run = Trained(name, fp16).step(7, math.nan).step(0).step(1).step(7, math.inf).step(2)
    other = Trained(name)
    for number in range(3):
        optim.set_learning_rate(other.optimizer, 0.01 * (1 + number))
        for p in other.model.parameters():
            p.grad = other.gradient(number, p)
        other.optimizer.step()
    assert_same(run.state(), other.state())


def test_sgd_has_momentum_from_the_first_step():
    run, weight, velocity = Trained("sgd"), None, 0
    for number in range(3):
        weight = run.model[0].weight.detach().clone()
        run.step(number)
        velocity = 0.9 * velocity + run.gradient(number, weight) + 0.1 * weight
        expected = weight - 0.01 * (1 + number) * velocity
        # the gradient of a parameter depends on its shape and the step alone
        torch.testing.assert_close(run.model[0].weight.detach(), expected)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_resumed_optimiser_equals_the_uninterrupted_one(name, steps, tmp_path):
    run, resumed = Trained(name), Trained(name).step(5)
    for number in range(steps):
        run.step(number)
    torch.save(run.optimizer.state_dict(), tmp_path / "state")
    resumed = Trained(name)
    resumed.model.load_state_dict(run.model.state_dict())
    state = torch.load(tmp_path / "state", weights_only=True)
    tensor_files.load_optimizer("file", state, resumed.optimizer)
    assert_same(resumed.state(), run.state())
    assert_same(resumed.step(2).step(3).state(), run.step(2).step(3).state())


def test_a_state_of_another_shape_or_type_is_refused(name):
    state = Trained(name).step(0).optimizer.state_dict()
    entries = [(number, key) for number, values in state["state"].items() for key in values]
    for number, key in entries:
        value = state["state"][number][key]
        if not isinstance(value, torch.Tensor):
            wrong = [torch.zeros(3), "text"]
        else:
            wrong = [value[None], value.new_zeros(7), value.to_sparse(), value.to("meta"), 1, None]
        for other in wrong:
            changed = copy.deepcopy(state)
            changed["state"][number][key] = other
            with pytest.raises(UsageError, match="file does not fit the optimiser"):
                tensor_files.load_optimizer("file", changed, Trained(name).optimizer)
    if entries:
        del state["state"][number][key]
        with pytest.raises(UsageError, match=f"parameter {number} has another state"):
            tensor_files.load_optimizer("file", state, Trained(name).optimizer)


# -- the momentum encoder --------------------------------------------------------------------------


class Encoder(nn.Sequential):
    """A linear layer and a batch norm as backbone, a linear layer as projector."""

    def embed(self, x):
        return self[1](self[0](x))

    @property
    def projector(self):
        return self[2]


@pytest.fixture
def pair():
    """A model whose encoders differ in every parameter."""
    torch.manual_seed(0)
    encoder = Encoder(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
    model = SNCLR(encoder, None, None, options.parse(["--method", "mocov3"]))
    for parameter in model.base_encoder.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.99, 0.9999, 1.0])
def test_momentum_encoder_is_the_average_of_old_and_new(pair, momentum):
    old = [p.clone() for p in pair.momentum_encoder.parameters()]
    new = [p.detach().clone() for p in pair.base_encoder.parameters()]
    pair._momentum_projections(momentum, [torch.randn(3, 6, dtype=torch.float64)])
    for before, online, p, actual in zip(
        old, new, pair.base_encoder.parameters(), pair.momentum_encoder.parameters(), strict=True
    ):
        assert torch.equal(p, online)
        torch.testing.assert_close(
            actual, momentum * before + (1 - momentum) * online, rtol=1e-12, atol=1e-14
        )
        if momentum == 1:
            assert torch.equal(actual, before)


def test_momentum_encoder_moves_before_it_projects(pair):
    view = torch.randn(3, 6, dtype=torch.float64)
    (actual,) = pair._momentum_projections(0.0, [view])
    torch.testing.assert_close(actual, pair.base_encoder(view).detach())


def test_momentum_encoder_moves_once_a_step_for_both_views(pair):
    old = [p.clone() for p in pair.momentum_encoder.parameters()]
    pair._momentum_projections(0.5, list(torch.randn(2, 3, 6, dtype=torch.float64)))
    triples = zip(
        old, pair.base_encoder.parameters(), pair.momentum_encoder.parameters(), strict=True
    )
    for before, online, actual in triples:
        torch.testing.assert_close(actual, (before + online.detach()) / 2)


def test_momentum_norms_see_their_own_batches_in_training(pair):
    view = torch.randn(64, 6, dtype=torch.float64) * 5 + 2
    pair.train()
    pair._momentum_projections(1.0, [view])
    norm = pair.momentum_encoder[1]
    expected = 0.1 * pair.momentum_encoder[0](view).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, expected.detach())
    assert not pair.base_encoder[1].running_mean.any()
