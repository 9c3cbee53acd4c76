import functools
import math
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from torch.nn.functional import normalize

from benchmarks import measure
from benchmarks.objective import dense_loss
from snclr import objectives, options, streamed
from snclr.builder import SNCLR
from snclr.memory_bank import MemoryBank
from snclr.objectives import (
    log_sum_exp,
    mix_with_keys,
    mocov2_loss,
    mocov3_loss,
    nnclr_loss,
    positiveness,
    restrict,
    snclr_loss,
)

TIGHT = dict(rtol=1e-11, atol=1e-12)


def problem(batch=6, k=4, bank_size=50, dim=8, seed=0, filled=None):
    """Query, online, key (with gradient where the method has one), bank of unit rows and random
    neighbour rows.
    """
    generator = torch.Generator().manual_seed(seed)
    rand = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    query, online, key = (
        rand(batch, dim).requires_grad_(),
        rand(batch, dim).requires_grad_(),
        rand(batch, dim),
    )
    bank = normalize(rand(bank_size, dim), dim=1)
    rows = torch.randint(0, filled or bank_size, (batch, k), generator=generator)
    return query, online, key, bank, rows


def check_against_oracle(
    query, online, key, bank, rows, *, form="sum_of_logs", temperature=0.2, **attention
):
    """Loss and both gradients of the fast functions equal the oracle's; returns the gradients
    (query, online).
    """
    results = []
    for attend, contrast in ((positiveness, fast_loss), (oracles.positiveness, slow_loss)):
        query.grad = online.grad = None
        weights = attend(online, bank, rows, **attention)
        loss = contrast(query, key, bank, rows, weights, temperature, form)
        loss.backward()
        results.append(
            (
                loss.detach(),
                query.grad,
                torch.zeros_like(online) if online.grad is None else online.grad,
            )
        )
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, **TIGHT)
    return results[0][1:]


def fast_loss(query, key, bank, rows, weights, temperature, form):
    return snclr_loss(query, key, bank, rows, weights, temperature=temperature, form=form)


def slow_loss(query, key, bank, rows, weights, temperature, form):
    return oracles.snclr(query, key, bank, rows, weights, temperature, form).mean()


@pytest.mark.parametrize("form", objectives.FORMS)
@pytest.mark.parametrize(
    "attention",
    [{}, {"threshold": True}, {"temperature": 0.07}, {"temperature": 0.1, "threshold": True}],
)
@pytest.mark.parametrize("batch, k", [(6, 4), (1, 3), (5, 1), (6, 0)])
def test_loss_and_gradients_equal_the_dense_oracle(form, attention, batch, k):
    check_against_oracle(*problem(batch, k), form=form, **attention)


def test_the_benchmarks_dense_formulation_is_the_same_loss():
    query, online, key, bank, rows = problem()
    key = normalize(key, dim=1)
    others = torch.cat([key[4:, None], bank[rows[4:]]], dim=1).flatten(0, 1)  # of images 4 and 5
    dense = dense_loss(
        normalize(query[:4], dim=1), normalize(online[:4], dim=1), key[:4], bank[rows[:4]], others
    )
    candidates = objectives.Candidates(key, objectives.count_picks(rows, len(bank)))
    weights = positiveness(online[:4], bank, rows[:4])
    streamed = snclr_loss(
        query[:4], key[:4], bank, rows[:4], weights, temperature=0.2, candidates=candidates
    )
    torch.testing.assert_close(streamed, dense, **TIGHT)
    gradients = [torch.autograd.grad(loss, (query, online)) for loss in (streamed, dense)]
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, **TIGHT)


@pytest.mark.parametrize("form", objectives.FORMS)
def test_gradient_flows_through_the_weights_unless_detached(form):
    query, online, key, bank, rows = problem()
    _, through_weights = check_against_oracle(query, online, key, bank, rows, form=form)
    assert through_weights.abs().max() > 1e-4
    online.grad = None
    weights = positiveness(online, bank, rows).detach()
    snclr_loss(query, key, bank, rows, weights, temperature=0.2, form=form).backward()
    assert online.grad is None


@pytest.mark.parametrize("form", objectives.FORMS)
@pytest.mark.parametrize("attention", [{}, {"threshold": True}, {"temperature": 0.1}])
def test_projected_attention_equals_the_oracle_and_its_layers_get_a_gradient_in_both_forms(
    form, attention
):
    query, online, key, bank, rows = problem()
    rows[0, 2:] = -1
    generator = torch.Generator().manual_seed(3)
    layers = [
        torch.randn(5, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    ]
    check_against_oracle(query, online, key, bank, rows, form=form, projections=layers, **attention)
    gradients = []
    for attend, contrast in ((positiveness, fast_loss), (oracles.positiveness, slow_loss)):
        weights = attend(online, bank, rows, projections=layers, **attention)
        gradients.append(
            torch.autograd.grad(contrast(query, key, bank, rows, weights, 0.2, form), layers)
        )
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, **TIGHT)
        assert fast.abs().max() > 1e-5


def test_identity_projections_are_the_plain_attention():
    _, online, _, bank, rows = problem()
    eye = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(
        positiveness(online, bank, rows, projections=(eye, eye)), positiveness(online, bank, rows)
    )


@pytest.mark.parametrize("form", objectives.FORMS)
def test_rows_picked_by_many_images_and_twice_by_one_count_each_time(form):
    query, online, key, bank, rows = problem()
    rows[:] = 7
    rows[0] = torch.tensor([3, 3, 7, 9])
    check_against_oracle(query, online, key, bank, rows, form=form)


@pytest.mark.parametrize("form", objectives.FORMS)
@pytest.mark.parametrize("threshold", [False, True])
def test_partly_and_not_filled_banks(form, threshold):
    query, online, key, bank, rows = problem()
    rows[0, 2:] = -1
    rows[1, 1:] = -1
    rows[2] = -1
    _, online_grad = check_against_oracle(
        query, online, key, bank, rows, form=form, threshold=threshold
    )
    assert torch.equal(online_grad[2], torch.zeros_like(online_grad[2]))
    rows[:] = -1
    check_against_oracle(query, online, key, bank, rows, form=form, threshold=threshold)


@pytest.mark.parametrize("attention", [{}, {"threshold": True}, {"temperature": 0.07}])
def test_positiveness_is_a_softmax_over_the_valid_rows_and_zero_elsewhere(attention):
    _, online, _, bank, rows = problem()
    rows[0, 2:] = -1
    rows[1, :3] = -1
    rows[2] = -1
    weights = positiveness(online, bank, rows, **attention)
    torch.testing.assert_close(
        weights, oracles.positiveness(online, bank, rows, **attention), **TIGHT
    )
    assert (weights[rows < 0] == 0).all()
    if "threshold" not in attention:
        torch.testing.assert_close(weights.sum(dim=1), (rows >= 0).any(dim=1).double(), **TIGHT)


@pytest.mark.parametrize("form", objectives.FORMS)
@pytest.mark.parametrize("attention", [{}, {"threshold": True}])
def test_neighbours_that_the_caller_gathered_change_nothing(form, attention):
    query, online, key, bank, rows = problem()
    rows[0, 2:] = -1
    results = []
    for kwargs in ({}, {"neighbours": objectives.gather_neighbours(bank, rows)}):
        weights = positiveness(online, bank, rows, **attention, **kwargs)
        loss = snclr_loss(query, key, bank, rows, weights, temperature=0.2, form=form, **kwargs)
        results.append(
            torch.stack([loss.expand_as(query), *torch.autograd.grad(loss, (query, online))])
        )
    assert torch.equal(*results)


@pytest.mark.parametrize("form", objectives.FORMS)
def test_weights_of_invalid_rows_are_ignored(form):
    query, _, key, bank, rows = problem()
    rows[:, -1] = -1
    weights = torch.rand(rows.shape, dtype=torch.float64)
    spoiled = weights.clone()
    spoiled[:, -1] = 99.0
    losses = [
        snclr_loss(query, key, bank, rows, w, temperature=0.2, form=form)
        for w in (weights, spoiled)
    ]
    assert torch.equal(*losses)


def test_zero_weights_under_the_log_have_finite_gradients_at_low_temperature():
    query, _, key, bank, rows = problem()
    weights = torch.zeros(rows.shape, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        bank[rows[:, 0]] = normalize(query, dim=1)  # the largest score belongs to a weight of zero
    loss = snclr_loss(query.float(), key, bank, rows, weights, temperature=0.005, form="log_of_sum")
    loss.backward()
    assert (
        torch.isfinite(loss)
        and torch.isfinite(query.grad).all()
        and torch.isfinite(weights.grad).all()
    )


@pytest.mark.parametrize(
    "device_path, temperature",
    [
        ("picked rows only", 0.2),
        ("whole bank with a bias", 0.2),
        ("whole bank with a bias", 0.025),  # the lowest without a running maximum
        ("whole bank with a bias", 0.01),
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 7, 50, 1000])
def test_streamed_log_sum_exp_equals_the_dense_one_for_any_chunk(
    chunk, device_path, temperature, monkeypatch
):
    monkeypatch.setattr(streamed, "on_host", lambda _: device_path == "picked rows only")
    query, _, key, bank, _ = problem(dim=8)
    counts = torch.zeros(50, dtype=torch.int32)
    counts[20:30] = torch.arange(10)  # chunks before and after it are without any candidate
    query = query.detach()
    fast, slow = query.clone().requires_grad_(), query.clone().requires_grad_()
    result = log_sum_exp(fast, key, bank, counts, temperature, chunk=chunk)
    dense = torch.cat([slow @ key.T, slow @ bank.repeat_interleave(counts, dim=0).T], dim=1)
    dense = (dense / temperature).logsumexp(dim=1)
    torch.testing.assert_close(result, dense, **TIGHT)
    direction = torch.randn(len(query), dtype=torch.float64)
    (result @ direction).backward()
    (dense @ direction).backward()
    torch.testing.assert_close(fast.grad, slow.grad, **TIGHT)


@pytest.mark.parametrize("form", objectives.FORMS)
@pytest.mark.parametrize(
    "crowd", [0.0, 3.0]
)  # features that share a direction, with cosines of about 0.9
def test_bfloat16_products_stay_near_the_float64_loss_and_gradient(form, crowd):
    query, online, key, bank, rows = problem(batch=32, k=10, bank_size=4000, dim=64)
    with torch.no_grad():
        for x in (query, online, key, bank):
            x += crowd
        bank = normalize(bank, dim=1)
    results = []
    for products in (bank, bank.bfloat16()):
        wide = torch.float64 if products is bank else torch.float32
        z, y, own = (x.detach().to(wide).requires_grad_() for x in (query, online, key))
        weights = positiveness(y, bank.to(wide), rows)
        loss = snclr_loss(z, own, products, rows, weights, temperature=0.2, form=form)
        assert loss.dtype == wide
        results.append(
            (loss.item(), torch.cat([g.double() for g in torch.autograd.grad(loss, (z, y))]))
        )
    (exact, exact_gradient), (loss, gradient) = results
    assert loss == pytest.approx(exact, rel=1e-3)
    assert (
        torch.nn.functional.cosine_similarity(gradient.flatten(), exact_gradient.flatten(), dim=0)
        > 0.999
    )


@pytest.mark.parametrize("cosine", [-1.0, 1.0])
def test_a_gpus_sums_hold_in_float32_at_the_lowest_temperature(cosine, monkeypatch):
    monkeypatch.setattr(streamed, "on_host", lambda _: False)
    bank = torch.nn.functional.one_hot(torch.zeros(128, dtype=torch.long), 4).float()
    query, counts = cosine * bank[:2], torch.full((128,), 50, dtype=torch.int32)
    query.requires_grad_()
    result = log_sum_exp(query, bank[:0], bank, counts, streamed.LOWEST_TEMPERATURE)
    exact = cosine / streamed.LOWEST_TEMPERATURE + math.log(128 * 50)
    torch.testing.assert_close(result, torch.full((2,), exact))
    result.sum().backward()
    torch.testing.assert_close(query.grad, bank[:2] / streamed.LOWEST_TEMPERATURE)


@pytest.mark.parametrize("device_path", ["picked rows only", "whole bank with a bias"])
def test_without_any_candidate_the_log_sum_exp_is_minus_infinity_and_its_gradient_zero(
    device_path, monkeypatch
):
    monkeypatch.setattr(streamed, "on_host", lambda _: device_path == "picked rows only")
    query, _, key, bank, _ = problem()
    result = log_sum_exp(
        query, key[:0], bank, torch.zeros(len(bank), dtype=torch.int32), 0.2, chunk=16
    )
    assert torch.equal(result, torch.full_like(result, -math.inf))
    torch.logaddexp(result, torch.zeros_like(result)).sum().backward()
    assert torch.equal(query.grad, torch.zeros_like(query))


def test_snclr_without_neighbours_is_mocov3_to_the_last_digit():
    query, _, key, bank, _ = problem()
    query, key = query.detach().float().requires_grad_(), key.float()
    no_rows, no_weights = torch.empty(len(key), 0, dtype=torch.long), torch.empty(len(key), 0)
    losses, grads = [], []
    for loss in (
        snclr_loss(query, key, bank, no_rows, no_weights, temperature=0.2),
        mocov3_loss(query, key, temperature=0.2),
    ):
        grads += torch.autograd.grad(loss, query)
        losses.append(loss)
    assert torch.equal(*losses) and torch.equal(*grads)


def test_mocov3_equals_the_textbook_cross_entropy():
    query, _, key, _, _ = problem()
    logits = normalize(query, dim=1) @ normalize(key, dim=1).T / 0.2
    expected = 0.4 * torch.nn.functional.cross_entropy(logits, torch.arange(len(key)))
    torch.testing.assert_close(mocov3_loss(query, key, temperature=0.2), expected, **TIGHT)


def test_nnclr_equals_its_oracle_and_trains_the_candidates():
    query, _, key, _, _ = problem()
    loss, oracle = nnclr_loss(key, query, temperature=0.1), oracles.nnclr(key, query, 0.1).mean()
    torch.testing.assert_close(loss, oracle, **TIGHT)
    torch.testing.assert_close(*(torch.autograd.grad(x, query)[0] for x in (loss, oracle)), **TIGHT)


@pytest.mark.parametrize("filled", [0, 1, 13, 50])
def test_mocov2_equals_its_oracle_with_any_fill(filled):
    query, _, key, bank, _ = problem()
    valid = torch.arange(len(bank)) < filled
    loss, oracle = (
        mocov2_loss(query, key, bank, valid, temperature=0.2),
        oracles.mocov2(query, key, bank, filled, 0.2).mean(),
    )
    torch.testing.assert_close(loss, oracle, **TIGHT)
    torch.testing.assert_close(*(torch.autograd.grad(x, query)[0] for x in (loss, oracle)), **TIGHT)


def test_inputs_need_no_normalisation_and_keep_their_precision():
    query, online, key, bank, rows = problem()
    weights = positiveness(online, bank, rows)
    loss = snclr_loss(query, key, bank, rows, weights, temperature=0.2)
    assert weights.dtype == loss.dtype == torch.float64
    scaled = snclr_loss(
        7 * query, 3 * key, bank, rows, positiveness(5 * online, bank, rows), temperature=0.2
    )
    torch.testing.assert_close(scaled, loss, **TIGHT)
    half = [x.detach().bfloat16() for x in (query, online, key)]
    with torch.autocast("cpu", torch.bfloat16):
        weights = positiveness(half[1], bank.float(), rows)
        loss16 = snclr_loss(half[0], half[2], bank.float(), rows, weights, temperature=0.2)
    assert weights.dtype == loss16.dtype == torch.float32
    exact = [x.double() for x in half]
    reference = oracles.snclr(
        exact[0], exact[2], bank, rows, oracles.positiveness(exact[1], bank, rows), 0.2
    ).mean()
    torch.testing.assert_close(
        loss16.double(), reference, rtol=1e-5, atol=0
    )  # only the inputs were rounded


# -- levers beyond the paper -----------------------------------------------------------------------


@pytest.mark.parametrize("form", objectives.FORMS)
@pytest.mark.parametrize("kind", objectives.CANDIDATES)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("mixes", [False, True])
def test_candidates_mixing_and_normalising_equal_the_oracle(form, kind, normalise, mixes):
    query, online, key, bank, rows = problem()
    rows[0] = torch.tensor([3, 7, 9, -1])
    rows[1:, 0], rows[5] = 7, -1  # a row that many images picked, and an image without neighbours
    shares, positives = torch.rand(rows.shape, dtype=torch.float64), None
    neighbours = objectives.gather_neighbours(bank, rows)
    if mixes:
        positives = oracles.mixed(neighbours, key, shares)
        neighbours = mix_with_keys(neighbours, 3 * key, shares)
        torch.testing.assert_close(neighbours, positives, **TIGHT)
    weights = positiveness(online, bank, rows, temperature=0.1)
    candidates = restrict(objectives.gather_candidates(key, rows, len(bank)), kind)
    fast = snclr_loss(
        query,
        key,
        bank,
        rows,
        weights,
        temperature=0.2,
        form=form,
        candidates=candidates,
        neighbours=neighbours,
        normalise=normalise,
    )
    slow = oracles.snclr(
        query,
        key,
        bank,
        rows,
        oracles.positiveness(online, bank, rows, temperature=0.1),
        0.2,
        form,
        kind,
        positives,
        normalise,
    ).mean()
    torch.testing.assert_close(fast, slow, **TIGHT)
    gradients = [torch.autograd.grad(loss, (query, online)) for loss in (fast, slow)]
    for quick, obvious in zip(*gradients, strict=True):
        torch.testing.assert_close(quick, obvious, **TIGHT)


@pytest.mark.parametrize("form", objectives.FORMS)
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_without_neighbours_among_the_candidates_loss_and_gradient_stay_bounded(form, temperature):
    """The neighbours are far more similar to the query than any key: the loss is negative."""
    query, _, key, bank, rows = problem(batch=4, k=3)
    with torch.no_grad():
        query.copy_(normalize(torch.eye(8)[0] + 0.1 * query, dim=1))
        bank = query.repeat_interleave(3, dim=0)
    rows, key = torch.arange(12).view(4, 3), normalize(-query.detach() + 0.1 * key, dim=1)
    candidates = restrict(objectives.gather_candidates(key, rows, len(bank)), "keys")
    weights = torch.full(rows.shape, 1 / 3, dtype=torch.float64, requires_grad=True)
    loss = snclr_loss(
        query, key, bank, rows, weights, temperature=temperature, form=form, candidates=candidates
    )
    loss.backward()
    # 2T * W * (log Z - s) with W = 2, both within log N + 1/T; without the mean over 4 images
    assert -2 * 2 * 2 < loss < 0
    assert (4 * query.grad).norm(dim=1).max() <= 2 * 2 * 2
    assert weights.grad.isfinite().all()


def test_the_fresh_keys_alone_need_no_product_with_the_bank(monkeypatch):
    _, _, key, bank, rows = problem()
    candidates = restrict(objectives.gather_candidates(key, rows, len(bank)), "keys")
    monkeypatch.setattr(streamed, "on_host", lambda _: False)  # as on a GPU
    blocks = streamed._blocks(candidates.keys, bank[: len(candidates.counts)], *candidates[1:], 8)
    assert [len(features) for features, _ in blocks] == [len(key)]


def test_unknown_candidates_are_named():
    candidates = objectives.Candidates(torch.zeros(2, 3), torch.zeros(4).int())
    with pytest.raises(ValueError, match=r"kind must be one of .* found 'none'"):
        restrict(candidates, "none")


def test_unknown_form_is_named():
    with pytest.raises(ValueError, match=r"form must be one of .* found 'typo'"):
        snclr_loss(*problem()[:1], *problem()[2:], None, temperature=0.2, form="typo")


@pytest.mark.parametrize("threshold", [0, 1])
def test_golden_figures_of_the_released_computation(threshold, monkeypatch):
    """Two ranks' inputs and outputs of the released code; here each rank's view of the gathered
    batch is put together.
    """
    golden = {
        k: torch.from_numpy(np.asarray(v))
        for k, v in np.load(Path(__file__).parent / "golden/released_loss.npz").items()
    }
    keys = normalize(torch.cat([golden["key_0"], golden["key_1"]]), dim=1)
    counts = torch.bincount(
        torch.cat([golden["rows_0"], golden["rows_1"]]).flatten(), minlength=len(golden["bank"])
    ).int()
    for rank in (0, 1):
        query, online = (
            golden[f"{name}_{rank}"].clone().requires_grad_() for name in ("query", "online")
        )
        bank = normalize(golden["bank"], dim=1)
        rows = golden[f"rows_{rank}"]
        weights = positiveness(online, bank, rows, threshold=bool(threshold))
        candidates = objectives.Candidates(keys, counts)
        loss = snclr_loss(
            query,
            golden[f"key_{rank}"],
            bank,
            rows,
            weights,
            temperature=0.2,
            candidates=candidates,
        )
        loss.backward()
        for name, actual in (
            ("loss", loss),
            ("grad_query", query.grad),
            ("grad_online", online.grad),
        ):
            expected = golden[f"{name}_{rank}_{threshold}"]
            torch.testing.assert_close(
                actual.detach(), expected, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_a_step_sends_less_than_a_45th_of_what_the_released_gathers_do():
    batch, ranks, topk, dim, size = 128, 32, 30, 256, 128_000  # the paper's
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, dim))
    encoder.embed, encoder.projector = encoder[0], encoder[1]
    args = options.parse(["--topk", str(topk), "--bank-size", str(size)])
    model = SNCLR(encoder, torch.nn.Linear(dim, dim), MemoryBank(size, dim), args)
    model.memory_bank.enqueue(torch.randn(8192, dim), torch.arange(8192))
    with measure.simulated_ranks(ranks) as sent:
        loss, _ = model(list(torch.randn(2, batch, 3, 2, 2)), torch.arange(batch) + 10_000, 0.99)
        loss.backward()
    assert len(sent) == 5  # of each direction keys and counts; ids
    released = (
        2 * batch * (2 * topk + 1) * dim * 4 * (ranks - 1)
    )  # K and again K + 1 features an image, in each direction
    assert released > 45 * sum(sent)
