"""Whole runs of main_snclr.py in this process, on a few small images."""

import argparse
import copy
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import add_term
from test_ranks import SMALL, write_images

import main_snclr
from snclr import augment, backbones, builder, objectives, options
from snclr.running import distributed, preemption
from snclr.running.errors import RunError

BANK = {"bank_fill"}
NEIGHBOURS = {
    "neighbour_similarity",
    "positiveness_entropy",
    "distinct_rows",
    "largest_count",
    "neighbour_purity",
    "weighted_purity",
}


def train(images, workdir, *flags):
    """Run and return the lines of metrics.jsonl: of the evaluations and of the training steps."""
    main_snclr.main([str(images), *SMALL.split(), "--workdir", str(workdir), *flags])
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "knn_top1" in line], [
        line for line in lines if "loss" in line
    ]


def test_a_single_gpu_saves_epochs_of_seconds_in_a_twentieth_of_the_time(monkeypatch):
    gpu, now = torch.device("cuda"), 0.0
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now)
    interruptions = preemption.Interruptions(0, 1)
    interruptions.saved("saved", seconds=0.5)

    def is_due(step, device=gpu, ending=0, **flags):
        args = argparse.Namespace(**{"save_freq": 0, "eval_freq": 0, "epochs": 90, **flags})
        interruptions.ending = ending
        run = SimpleNamespace(
            args=args,
            loader=SimpleNamespace(steps_per_epoch=10, device=device),
            last_step=900,
            interruptions=interruptions,
        )
        return main_snclr.is_save_due(run, step)

    now = 9.9
    assert not is_due(20)
    assert is_due(23)  # --save-every-minutes
    assert is_due(20, ending=15) and is_due(900)
    assert is_due(20, save_freq=2) and not is_due(30, save_freq=2)
    assert is_due(20, eval_freq=2) and not is_due(30, eval_freq=2)
    assert is_due(20, device=torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(main_snclr.distributed, "world_size", lambda: 2)
        assert is_due(20)
    now = 10.1
    assert is_due(20)


def test_ranks_save_once_after_so_many_minutes(monkeypatch):
    """The exchange that was under way at a save asks for no second one; a signal asks again."""
    now = 0.0
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now)
    interruptions = preemption.Interruptions(1, 1)
    interruptions.maximum.group = "two ranks"
    done = SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda *_, **__: done)
    assert not interruptions.due()
    now = 61.0
    assert [interruptions.due(), interruptions.due()] == [False, True]
    interruptions.saved()
    assert [interruptions.due(), interruptions.due()] == [False, False]
    now, interruptions.signal = 122.0, 15
    assert [interruptions.due(), interruptions.due()] == [False, True]
    interruptions.saved()
    assert [interruptions.due(), interruptions.due()] == [False, True]
    assert interruptions.ending == 15


@pytest.mark.parametrize("method", ["snclr", "mocov3", "nnclr", "mocov2"])
def test_every_method_trains_and_logs_what_it_has(images, tmp_path, method):
    evaluations, steps = train(images, tmp_path, "--method", method)
    assert [line["epoch"] for line in evaluations] == [
        0,
        1,
        2,
    ] and "raw_pixels_knn_top1" in evaluations[0]
    assert len(steps) == 10 and all(math.isfinite(line["loss"]) for line in steps)
    common = "epoch step loss loss_ratio lr momentum images_per_s data_wait grad_norm feature_std"
    assert set(common.split()) <= set(steps[-1])
    logged = {name for name in BANK | NEIGHBOURS if name in steps[-1]}
    assert (
        logged
        == {
            "snclr": BANK | NEIGHBOURS,
            "nnclr": BANK | NEIGHBOURS,
            "mocov2": BANK,
            "mocov3": set(),
        }[method]
    )
    assert ("same_label_negatives" in steps[-1]) == (method != "mocov2")
    state = torch.load(tmp_path / "checkpoint_last.pth.tar", weights_only=True)["state_dict"]
    parts = {name.split(".")[1] for name in state}
    absent = {
        "snclr": set(),
        "mocov3": {"memory_bank"},
        "nnclr": {"momentum_encoder"},
        "mocov2": {"predictor"},
    }[method]
    assert parts == {"base_encoder", "momentum_encoder", "predictor", "memory_bank"} - absent
    assert any(name.startswith("events.out") for name in os.listdir(tmp_path / "tensorboard"))


@pytest.mark.parametrize(
    "flags",
    [
        "--amp bf16",
        "--amp fp16",
        "--form log_of_sum --positiveness-t 0.1 --optimizer lars --lr 0.5",
        "--weights uniform --no-exclude-own-image",
        "--weights projected --gamma 2",
        "--threshold --detach-weights",
        "--topk 0",
        "--nn-warmup-epochs 1",
        "--blur --crop-min 1",
        "--eval-encoder momentum --snclr-m-cos --save-freq 1",
        "--arch resnet18 --small-stem --width 4",
        "--arch vit_tiny --patch-size 8 --stop-grad-conv1",
        "-b 40 --bank-size 7 --topk 3",
        "--img-size 24",
        "--key-view weak --candidates keys --weights key --positiveness-t 0.05 --viz-freq 1",
        "--key-view weak --method mocov3 --local-views 1",
        "--key-view weak --method mocov2",
        "--candidates unique --mix-neighbours --nn-ramp-epochs 1.5 --normalise-positives",
    ],
)
def test_every_option_trains(images, tmp_path, flags):
    evaluations, steps = train(images, tmp_path, *flags.split())
    assert all(math.isfinite(line["loss"]) for line in steps)
    assert all(line["feature_std"] > 0.1 for line in steps)
    if "--save-freq" in flags:
        assert {"checkpoint_0001.pth.tar", "checkpoint_0002.pth.tar"} <= set(os.listdir(tmp_path))
        assert (
            steps[-1]["momentum"] > steps[0]["momentum"]
            and evaluations[-1]["encoder"] == "momentum"
        )
    if "--nn-warmup" in flags:
        assert ["neighbour_purity" in line for line in steps] == [False] * 5 + [True] * 5


def test_topk_zero_is_mocov3_to_the_last_digit(images, tmp_path):
    losses = [
        [line["loss"] for line in train(images, tmp_path / name, *flags.split())[1]]
        for name, flags in (("a", "--topk 0"), ("b", "--method mocov3"))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("form", objectives.FORMS)
def test_the_layers_of_the_projected_attention_train(images, tmp_path, form):
    train(
        images,
        tmp_path,
        "--weights",
        "projected",
        "--form",
        form,
        "--wd",
        "0",
        "--nn-warmup-epochs",
        "1",
    )
    state = torch.load(tmp_path / "checkpoint_last.pth.tar", weights_only=True)["state_dict"]
    for name in ("f1", "f2"):
        assert (state[f"module.attention.{name}.weight"] - torch.eye(16)).abs().max() > 1e-4


def test_the_mass_of_the_neighbours_follows_its_schedule(images, tmp_path, monkeypatch):
    masses, forward = [], builder.SNCLR.forward

    def record(self, views, ids, momentum, mass=None, step=None):
        if step is None:  # the trial before a checkpoint
            return forward(self, views, ids, momentum)
        loss, shown = forward(self, views, ids, momentum, mass, step)
        masses.append((step, mass, shown.weights.sum(dim=1).max().item()))
        return loss, shown

    monkeypatch.setattr(builder.SNCLR, "forward", record)
    flags = ["--nn-mass", "3", "--nn-warmup-epochs", "0.4", "--nn-ramp-epochs", "1"]
    flags += ["--eval-freq", "0"]
    train(images, tmp_path, *flags, "--stop-after-steps", "6")
    train(images, tmp_path, *flags, "--resume", "auto")
    steps, expected, actual = zip(*masses, strict=True)
    assert list(steps) == list(range(10))
    ramp = [0, 0, 0.6, 1.2, 1.8, 2.4, 3, 3, 3, 3]
    assert expected == pytest.approx(ramp) and actual == pytest.approx(ramp)


def test_gamma_divides_the_neighbours_weights(images, tmp_path):
    flags = [
        "--weights",
        "uniform",
        "--bank-size",
        "40",
        "--stop-after-steps",
        "2",
        "--eval-freq",
        "0",
    ]
    (_, one), (_, two) = (
        train(images, tmp_path / gamma, *flags, "--gamma", gamma) for gamma in ("1", "2")
    )
    assert one[0]["loss"] == two[0]["loss"]  # nobody has a neighbour yet
    # at step 2 all weigh W = 1 + 1 / gamma: the ratio to chance hides it, the loss does not
    assert one[1]["loss"] > 1.2 * two[1]["loss"]


def test_frozen_patch_embedding_stays(images, tmp_path):
    flags = ["--arch", "vit_tiny", "--stop-grad-conv1", "--eval-freq", "0"]
    name = "module.base_encoder.patch_embed.proj.weight"
    weights = []
    for steps in ("1", "4"):
        train(images, tmp_path / steps, *flags, "--stop-after-steps", steps)
        weights.append(
            torch.load(tmp_path / steps / "checkpoint_last.pth.tar", weights_only=True)[
                "state_dict"
            ]
        )
    assert torch.equal(weights[0][name], weights[1][name])
    other = "module.base_encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(weights[0][other], weights[1][other])


@pytest.mark.parametrize("method", options.METHODS)
def test_a_further_term_adds_its_value_and_its_gradient_to_the_loss(monkeypatch, method):
    """By linearity: from the same start, the gradient grows by that of the term."""
    torch.manual_seed(0)
    flags = "--img-size 16 --arch resnet8 --width 2 --snclr-dim 4 --snclr-mlp-dim 4 -b 6"
    model = builder.build_model(options.parse([*flags.split(), "--method", method])).double()
    views, ids = list(torch.randn(2, 6, 3, 16, 16, dtype=torch.float64)), torch.arange(6)

    def loss_and_gradient(copy):
        loss, shown = copy(views, ids, 0.9)
        loss.backward()
        parts = [p.grad.flatten() for p in copy.base_encoder.parameters()]
        return loss.detach(), torch.cat(parts), shown

    loss, gradient, shown = loss_and_gradient(copy.deepcopy(model))
    assert not shown.terms
    alone = copy.deepcopy(model)
    term = 0.1 * alone._project(alone.base_encoder, views)[0].square().mean()
    term.backward()
    term_gradient = torch.cat([p.grad.flatten() for p in alone.base_encoder.parameters()])
    add_term(monkeypatch.setattr)
    with_term, with_gradient, shown = loss_and_gradient(model)
    torch.testing.assert_close(shown.terms, {"size": term.detach()}, rtol=1e-12, atol=0)
    torch.testing.assert_close(with_term, loss + term.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(with_gradient, gradient + term_gradient, rtol=1e-9, atol=1e-12)
    assert term_gradient.norm() > 1e-6


@pytest.fixture
def poison(monkeypatch):
    """Let the loss of the batches of some steps be nan, in forward and backward, whenever it is
    computed: a resumed run meets it again.
    """

    def poison(*steps):
        batches = np.concatenate([augment.epoch_order(0, epoch, 40) for epoch in (0, 1)])
        batches = batches.reshape(-1, 8)[np.array(steps) - 1].tolist()
        forward = builder.SNCLR.forward

        def poisoned(self, views, ids, *arguments):
            loss, shown = forward(self, views, ids, *arguments)
            return loss * (math.nan if ids.tolist() in batches else 1), shown

        monkeypatch.setattr(builder.SNCLR, "forward", poisoned)

    return poison


def state_of(workdir):
    return torch.load(workdir / "checkpoint_last.pth.tar", weights_only=True)


def test_repeated_non_finite_steps_stop_the_run_name_step_and_images_and_keep_the_checkpoint(
    images, tmp_path, poison
):
    train(images, tmp_path, "--stop-after-steps", "5")
    kept = (tmp_path / "checkpoint_last.pth.tar").read_bytes()
    poison(8, 9, 10)
    with pytest.raises(
        RunError, match=r"step 8: the loss is not finite \(on rank 0\); 3 .*non_finite.json"
    ):
        train(images, tmp_path, "--resume", "auto", "--print-freq", "10", "--skip-non-finite", "2")
    assert (tmp_path / "checkpoint_last.pth.tar").read_bytes() == kept
    record = json.loads((tmp_path / "non_finite.json").read_text())
    order = augment.epoch_order(0, 1, 40)
    assert (
        record["step"] == 8 and record["ranks"] == [0] and record["images"] == order[16:24].tolist()
    )


@pytest.mark.parametrize("optimizer", ["adamw", "lars", "sgd", "timm.optim.NAdamW"])
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_non_finite_step_is_skipped_and_leaves_no_trace_in_the_state(
    images, tmp_path, poison, capsys, monkeypatch, optimizer, amp
):
    if "." in optimizer:  # one that cannot skip on the device, as the one entry that it takes
        monkeypatch.setitem(options.OPTIMIZERS, optimizer, (optimizer, {}))
    flags = ["--optimizer", optimizer, "--amp", amp, "--eval-freq", "0", "--print-freq", "2"]
    train(images, tmp_path / "before", *flags, "--stop-after-steps", "3")
    poison(4)
    train(images, tmp_path / "after", *flags, "--stop-after-steps", "4")
    assert (
        "step 4: the loss is not finite (on rank 0); 1 such steps were skipped"
        in capsys.readouterr().out
    )
    before = state_of(tmp_path / "before")
    after = state_of(tmp_path / "after")  # its last step was skipped, and the run ended as usual
    assert after["step"] == 4
    online = [
        name for name in before["state_dict"] if "base_encoder" in name or "predictor" in name
    ]
    for name in online:
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(before["state_dict"][name], after["state_dict"][name])
    moments = zip(
        before["optimizer"]["state"].values(), after["optimizer"]["state"].values(), strict=True
    )
    assert all(torch.equal(a[name], b[name]) for a, b in moments for name in a)
    assert all(tensor.isfinite().all() for tensor in after["state_dict"].values())
    lines = [
        json.loads(line) for line in (tmp_path / "after/metrics.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["step"] == 4 and lines[-1]["loss"] is None


def test_a_network_that_gives_nan_poisons_neither_bank_nor_running_statistics(
    images, tmp_path, monkeypatch
):
    """The worst case: the encoders themselves give nan in one forward."""
    steps, step, embed = [], builder.SNCLR.forward, backbones.ResNet.embed

    def counted(self, *arguments):
        steps.append(1)
        return step(self, *arguments)

    monkeypatch.setattr(builder.SNCLR, "forward", counted)
    monkeypatch.setattr(
        backbones.ResNet,
        "embed",
        lambda self, x: embed(self, x * (math.nan if len(steps) == 4 else 1)),
    )
    _, lines = train(images, tmp_path, "--eval-freq", "0", "--print-freq", "1")
    assert [line["step"] for line in lines if line["loss"] is None] == [4]
    state = state_of(tmp_path)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert (state["module.memory_bank.ids"] >= 0).sum() == 30


def test_collapse_is_reported_once(images, tmp_path, monkeypatch, capsys):
    project = builder.SNCLR._project
    monkeypatch.setattr(
        builder.SNCLR, "_project", lambda *arguments: [y * 1e-9 + 1 for y in project(*arguments)]
    )
    train(images, tmp_path, "--eval-freq", "0", "--epochs", "5")
    assert capsys.readouterr().out.count("note: collapse: feature_std is below") == 1


def test_an_image_that_cannot_be_read_ends_a_run_in_one_line_naming_it(
    images, tmp_path, monkeypatch
):
    monkeypatch.setattr("snclr.datasets.images.RESIDENT_LIMIT", 0)
    root = write_images(tmp_path / "images")
    (root / "train/a/07.png").write_bytes(b"no image")
    with pytest.raises(RunError, match=r"cannot read image .*07\.png"):
        train(root, tmp_path / "run", "-j", "2", "--img-size", "32")
