"""Numbers that go wrong: only a sound state becomes a checkpoint; pictures and evaluations of an
unsound one end no run; files of NaNs are refused.
"""

import copy
import json
from types import SimpleNamespace

import attack
import pytest
import torch
from conftest import one_line

from snclr import options
from snclr.builder import build_model
from snclr.loader import Batch
from snclr.optim import build_optimizer
from snclr.running.guard import Guard

LAST, UNSOUND = "checkpoint_last.pth.tar", "checkpoint_unsound.pth.tar"


def load(path):
    return torch.load(path, weights_only=True)


def tensors(state):
    return [x for x in state["state_dict"].values() if x.is_floating_point()]


@pytest.mark.parametrize("rate", ["1e300", "1e30"])
def test_a_run_that_diverges_leaves_no_unsound_checkpoint_under_the_name_of_a_sound_one(
    train, tmp_path, rate
):
    case = train("--lr", rate, "--epochs", "4")
    one_line(case, 1, "there is no sound checkpoint yet: start again with a lower --lr")
    files = {path.name for path in (tmp_path / "run").glob("*.pth.tar")}
    assert files == {UNSOUND}
    code, _ = train("--resume", "auto").ended()  # with the rate of `train`: from the start
    assert code == 0 and load(tmp_path / "run" / LAST)["step"] == 5


def test_a_sound_checkpoint_stays_and_the_last_line_says_of_which_step_it_is(train, tmp_path):
    assert train("--epochs", 2, "--stop-after-steps", 5).ended()[0] == 0
    before = (tmp_path / "run" / LAST).read_bytes()
    case = train("--epochs", 2, "--resume", "auto", "--lr", "1e300", "--warmup-epochs", 0)
    one_line(case, 1, "the last sound checkpoint is of step 5")
    assert (tmp_path / "run" / LAST).read_bytes() == before
    code, output = train("--epochs", 2, "--resume", "auto").ended()
    assert code == 0 and "after step 5" in output
    assert all(x.isfinite().all() for x in tensors(load(tmp_path / "run" / LAST)))


def test_finite_weights_with_which_the_loss_is_not_finite_are_no_sound_checkpoint(train, tmp_path):
    case = train("--lr", "1e30", "--stop-after-steps", 2, "--save-every-minutes", "1e-9")
    one_line(case, 1, "with the weights after step 2 the loss is not", "checkpoint is of step 1")
    assert all(x.isfinite().all() for x in tensors(load(tmp_path / "run" / UNSOUND)))
    assert load(tmp_path / "run" / LAST)["step"] == 1
    assert train("--resume", "auto").ended()[0] == 0


@pytest.mark.parametrize("method", ["snclr", "mocov3", "nnclr", "mocov2"])
def test_the_forward_pass_that_vouches_for_a_checkpoint_changes_nothing(method, tmp_path):
    flags = "--arch resnet8 --width 8 --snclr-dim 8 --snclr-mlp-dim 8 --bank-size 6 --topk 2"
    args = options.parse([*flags.split(), "--method", method, "--eval-encoder", "online"])
    model = build_model(args, products="bfloat16")
    batch = Batch(torch.arange(4), list(torch.randn(2, 4, 3, 32, 32)))
    model(batch.views, batch.ids, 0.9)
    before = copy.deepcopy(model)
    loader = SimpleNamespace(device=batch.ids.device)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    guard = Guard(model, loader, str(tmp_path), limit=0, scaler=scaler)
    optimizer = build_optimizer("sgd", model, 0.0)
    assert guard.try_forward(model, batch, 0.9, "off")
    assert guard.what_is_unsound(1, model, optimizer, True) is None
    assert attack.same(dict(before.state_dict()), dict(model.state_dict()))
    assert method == "mocov3" or torch.equal(*(x.memory_bank.features16 for x in (before, model)))
    with torch.no_grad():
        for parameter in model.base_encoder.parameters():
            parameter.add_(1e30)
    assert not guard.try_forward(model, batch, 0.9, "off")
    assert "loss is not finite" in guard.what_is_unsound(2, model, optimizer, False)


@pytest.mark.parametrize("scale, is_reported", [(2.0**16, False), (0.5, True)])
def test_a_gradient_that_overflows_without_a_scale_is_not_finite(tmp_path, scale, is_reported):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    guard = Guard(torch.nn.Linear(1, 1), None, str(tmp_path), limit=1, scaler=scaler)
    guard.watch(torch.tensor(1.0), torch.tensor(float("nan")), 1)
    assert (guard.check() is not None) == is_reported


def test_a_signal_after_a_bad_step_says_what_is_sound(train, tmp_path):
    case = train("--lr", "1e300", "--epochs", 500, "--skip-non-finite", 10**6)
    case.wait_for("note: step 3:")
    case.signal(15)
    code, output = case.ended()
    assert code == 75 and "there is no sound checkpoint yet" in output.splitlines()[-1], output


def test_pictures_of_what_is_not_finite_end_no_run(train, tmp_path):
    case = train("--lr", "1e9", "--epochs", 2, "--viz-freq", 1, "--skip-non-finite", 10**6)
    _, output = case.ended()
    assert "Traceback" not in output and "no histogram of positiveness at step" in output, output


def test_evaluations_of_what_is_not_finite_end_no_run(train, tmp_path):
    flags = ["--lr", "1e30", "--epochs", 3, "--eval-freq", 1]
    case = train(*flags, "--skip-non-finite", 10**6)
    code, output = case.ended()
    assert code == 1 and "Traceback" not in output, output
    assert output.count("is not evaluated: the features are not finite") == 2
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert {"knn_top1" in line for line in lines if "loss" not in line and line["step"]} == {False}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory, programs, photographs):
    """A finished run, and its files in which every weight is NaN."""
    from conftest import SMALL

    root = tmp_path_factory.mktemp("poisoned")
    code, output = programs.run(
        "main_snclr.py", photographs, *SMALL.split(), "--workdir", root / "run"
    )
    assert code == 0, output
    for name in (LAST, "encoder_last.pth.tar"):
        state = load(root / "run" / name)
        for x in tensors(state):
            x.fill_(float("nan"))
        torch.save(state, root / name)
    return root


def test_files_of_nans_are_refused_in_one_line(poisoned, programs, photographs, train):
    encoder = poisoned / "encoder_last.pth.tar"
    one_line(train("--init-from", encoder), 2, "encoder_last.pth.tar", "not finite")
    one_line(train("--workdir", poisoned, "--resume", "auto"), 2, "not finite")
    case = programs.start("snclr.visualize", encoder, photographs)
    one_line(case, 2, "not finite")
    case = programs.start("main_lincls.py", photographs, "--pretrained", encoder)
    one_line(case, 2, "not finite")
    flags = ("--format", "timm", "--out", poisoned / "x.pth")
    case = programs.start("snclr.export", encoder, *flags)
    one_line(case, 2, "not finite")
