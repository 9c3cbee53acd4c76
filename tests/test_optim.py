import copy
import math

import pytest
import torch
from torch import nn

from snclr import optim, options
from snclr.builder import SNCLR

# -- schedules -------------------------------------------------------------------------------------------------------------


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
        (100, 20, 0.5),  # nothing but warm-up
        (199, 20, 0.995),
    ],
)
def test_learning_rate_has_its_closed_form(step, warmup, expected):
    found = optim.learning_rate(step, peak=3.0, steps_per_epoch=10, warmup_epochs=warmup, epochs=20)
    assert found == pytest.approx(3.0 * expected, abs=1e-12)


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


# -- optimisers ------------------------------------------------------------------------------------------------------------


def network():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model.frozen = nn.Linear(2, 2).requires_grad_(False)
    model.scale = nn.Parameter(torch.ones(()))
    return model


def test_only_parameters_of_several_dimensions_decay_and_frozen_ones_are_left_out():
    model = network()
    decaying, others = optim.parameter_groups(model, 0.1)
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


def test_flags_and_optimisers_know_the_same_names():
    assert options.OPTIMIZERS == optim.OPTIMIZERS


@pytest.mark.parametrize("name, kind", [("adamw", torch.optim.AdamW), ("lars", optim.LARS)])
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
    with pytest.raises(ValueError, match=r"sgd.*adamw, lars"):
        optim.build_optimizer("sgd", nn.Linear(2, 2), 0.1)


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


def test_lars_leaves_the_gradients_as_they_are():
    parameter = nn.Parameter(torch.randn(3, 3))
    parameter.grad = torch.randn(3, 3)
    before = parameter.grad.clone()
    optim.LARS([parameter], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(parameter.grad, before)


def test_lars_goes_on_from_its_state_as_if_it_had_never_stopped():
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


# -- the momentum encoder --------------------------------------------------------------------------------------------------


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
    for before, online, p, found in zip(
        old, new, pair.base_encoder.parameters(), pair.momentum_encoder.parameters(), strict=True
    ):
        assert torch.equal(p, online)
        torch.testing.assert_close(
            found, momentum * before + (1 - momentum) * online, rtol=1e-12, atol=1e-14
        )
        if momentum == 1:
            assert torch.equal(found, before)


def test_momentum_encoder_moves_before_it_projects(pair):
    view = torch.randn(3, 6, dtype=torch.float64)
    (found,) = pair._momentum_projections(0.0, [view])
    torch.testing.assert_close(found, pair.base_encoder(view).detach())


def test_momentum_encoder_moves_once_a_step_for_both_views(pair):
    old = [p.clone() for p in pair.momentum_encoder.parameters()]
    pair._momentum_projections(0.5, list(torch.randn(2, 3, 6, dtype=torch.float64)))
    triples = zip(
        old, pair.base_encoder.parameters(), pair.momentum_encoder.parameters(), strict=True
    )
    for before, online, found in triples:
        torch.testing.assert_close(found, (before + online.detach()) / 2)


def test_momentum_norms_see_their_own_batches_in_training(pair):
    view = torch.randn(64, 6, dtype=torch.float64) * 5 + 2
    pair.train()
    pair._momentum_projections(1.0, [view])
    norm = pair.momentum_encoder[1]
    expected = 0.1 * pair.momentum_encoder[0](view).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, expected.detach())
    assert not pair.base_encoder[1].running_mean.any()
