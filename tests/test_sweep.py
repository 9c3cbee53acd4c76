import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_ranks import SMALL, write_images
from test_report import Page, write_run

import main_snclr
from snclr import sweep
from snclr.arguments import read_recipes
from snclr.pictures import compare, report
from snclr.pictures.runs import load
from snclr.running.errors import Interrupted, RunError, UsageError

ROOT = Path(sweep.__file__).resolve().parent.parent
KNN = ("knn_top1", "last")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """No GPU; the handlers of signals are restored."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before[signal.SIGUSR1] = signal.getsignal(signal.SIGUSR1)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


# -- the comparison --------------------------------------------------------------------------------


def test_differences_are_paired_by_seed(tmp_path):
    knn = {"base": {0: 50.0, 1: 54.0, 2: 49.0, 7: 90.0}, "other": {2: 51.0, 0: 51.5, 1: 57.5}}
    groups = {
        name: [
            load(str(write_run(tmp_path / f"{name}{s}", x, seed=s, topk=len(name))))
            for s, x in values.items()
        ]
        for name, values in knn.items()
    }
    expected = [knn["other"][s] - knn["base"][s] for s in (2, 0, 1)]
    assert compare.paired_differences(groups["other"], groups["base"], *KNN) == expected
    error = np.std(expected, ddof=1) / np.sqrt(len(expected))
    heads, rows = compare.comparison(groups)
    cells = dict(zip(heads, rows[1], strict=True))
    text = f"+{np.mean(expected):.2f} ± {error:.2f}"
    assert cells["kNN top-1 % against base"] == text == "+2.33 ± 0.60"
    assert heads[:3] == ["", "runs", "kNN top-1 %"] and rows[0][3] == ""
    page = Page(report.page([run for members in groups.values() for run in members]))
    heads, *rows = page.tables[0]
    assert dict(zip(heads, rows[1], strict=True))["kNN top-1 % against topk 4"] == text


@pytest.mark.parametrize(
    "differences, text", [([], ""), ([1.5], "+1.50"), ([-0.02, -0.04], "-0.030 ± 0.010")]
)
def test_a_difference_has_an_error_if_there_are_two_seeds(differences, text):
    assert compare.difference_text(differences) == text


def test_groups_without_a_common_seed_are_not_compared(tmp_path):
    groups = {
        name: [load(str(write_run(tmp_path / name, seed=s)))] for name, s in (("a", 0), ("b", 1))
    }
    heads, rows = compare.comparison(groups)
    assert not any("against" in head for head in heads)
    lines = compare.markdown(heads, rows).splitlines()
    assert len(lines) == 4 and len({len(text) for text in lines}) == 1
    assert [cell.strip() for cell in lines[3].split("|")[1:4]] == ["b", "1", "50.0"]


# -- the plan --------------------------------------------------------------------------------------


def planned(tmp_path, *words):
    split = words.index("--") if "--" in words else len(words)
    args = sweep.parse(["--workdir", str(tmp_path), *words[:split]])
    return sweep.plan(args, [*words[split + 1 :]], cores=3)


def test_runs_are_recipes_times_seeds_on_a_base(tmp_path):
    topk_1 = "configs/ablations/topk_1.args"
    both = f"both=@{topk_1} --bank-size 512"
    words = [topk_1, both, "--base", "configs/cifar10_cpu.args", "--seeds", "3"]
    jobs = planned(tmp_path, *words, "4", "--", str(tmp_path), "--topk", "2")
    assert [job.name for job in jobs] == [
        f"{name}-seed{s}" for name in ("topk_1", "both") for s in (3, 4)
    ]
    parsed = [sweep.options.parse(job.flags) for job in jobs]
    assert [args.bank_size for args in parsed] == [8192, 8192, 512, 512]
    assert {(args.topk, args.workers, args.resume) for args in parsed} == {(2, 3, "auto")}
    assert [args.workdir for args in parsed] == [str(tmp_path / job.name) for job in jobs]
    assert "--topk" in jobs[0].settings and not any(x.startswith("@") for x in jobs[0].settings)


@pytest.mark.parametrize(
    "words, message",
    [
        (["configs/embedded.args", "--", "--seed", "1"], "--seed cannot be a flag of all runs"),
        (["configs/embedded.args", "--", "--workdir=x"], "--workdir=x cannot be a flag"),
        (["configs/embedded.args"] * 2, "embedded-seed0 would run twice"),
        (["configs/embedded.args", "no.args"], "no-seed0: there is no recipe 'no.args'"),
        (["configs/embedded.args", "--", "--topk", "9999"], "embedded-seed0: --topk 9999 exceeds"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(tmp_path, words, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        planned(tmp_path, *words)


@pytest.mark.parametrize("names, gpus", [("", []), ("-1", []), ("2,5", ["2", "5"])])
def test_runs_share_the_gpus_of_the_allocation(monkeypatch, names, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert sweep.visible_gpus() == gpus


@pytest.mark.parametrize("is_terminal", [False, True])
def test_lines_of_working_runs_change_in_place_on_a_terminal(monkeypatch, capsys, is_terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setattr(os, "get_terminal_size", lambda: os.terminal_size((22, 9)))
    jobs = [sweep.Job(name, name, "", [], []) for name in ("a", "b", "c")]
    display, printed = sweep.Display(), []
    for states in (
        [("runs", ""), ("runs", "epoch 1  9 images/s"), ("waits", "")],
        [("failed", "no file"), ("runs", "epoch 1  8 images/s"), ("waits", "")],
        [("failed", "no file"), ("runs", "epoch 2  8 images/s"), ("runs", "")],
    ):
        for job, state in zip(jobs, states, strict=True):
            job.state, job.message = state
        display.update(jobs)
        printed.append(capsys.readouterr().out)
    if is_terminal:
        up, cut = "\x1b[A\x1b[2K", "b  runs  epoch {}  {} im\n"
        assert printed[0] == "a  runs\n" + cut.format(1, 9)
        assert printed[1] == up * 2 + "a  failed  no file\n" + cut.format(1, 8)
        assert printed[2] == up + cut.format(2, 8) + "c  runs\n"
    else:
        assert printed == [
            "a  runs\nb  runs  epoch 1  9 images/s\n",
            "a  failed  no file\n",
            "b  runs  epoch 2  8 images/s\nc  runs\n",
        ]


# -- a sweep ---------------------------------------------------------------------------------------


def test_a_killed_sweep_goes_on_and_a_failed_run_stops_no_other(tmp_path, images, capsys):
    """Kill the sweep in the first run; stop it by --minutes; then let it end, and start again."""
    workdir = tmp_path / "sweep"
    (tmp_path / "good.args").write_text(f"{SMALL} --epochs 12 --eval-freq 6")
    (tmp_path / "bad.args").write_text(f"{SMALL} --init-from {tmp_path}/good.args")
    recipes = [str(tmp_path / "good.args"), str(tmp_path / "bad.args")]
    words = [*recipes, "--side-by-side", "2", "--workdir", str(workdir), "--", str(images)]
    log = workdir / "good-seed0/metrics.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "snclr.sweep", *words], env=environment, cwd=ROOT
    ) as process:
        wait_for(lambda: log.exists() and '"loss"' in log.read_text())
        with pytest.raises(UsageError, match="is in use by pid"):
            sweep.main(words)
        process.kill()
    seen = len(log.read_text().splitlines())
    assert not (workdir / "good-seed0/finished.json").exists()

    with pytest.raises(Interrupted, match=r"--minutes: [12] runs are left"):
        sweep.main(["--minutes", "0.01", *words])
    assert json.loads((workdir / "sweep.json").read_text())["runs"]["good-seed0"]["state"] in (
        sweep.WAITS,
        sweep.STOPPED,
    )
    capsys.readouterr()

    with pytest.raises(RunError, match="failed: bad-seed0; the same command tries again"):
        sweep.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r"bad-seed0  failed  main_snclr.py: error: .*good.args", x) for x in lines)
    assert any(re.match(r"good-seed0  finished  epoch 12  kNN [\d.]+ %", x) for x in lines)
    console = (workdir / "good-seed0/console.txt").read_text()
    assert "resumed from" in console and "after step 0" not in console
    steps = [json.loads(x)["step"] for x in log.read_text().splitlines() if '"loss"' in x]
    assert steps == list(range(1, 61)) and seen < len(steps)
    (row,) = [x for x in (workdir / "sweep.md").read_text().splitlines() if "good" in x]
    knn = json.loads((workdir / "sweep.json").read_text())["runs"]["good-seed0"]["kNN top-1 %"]
    assert f" {knn:.1f} " in row and (workdir / "report.html").exists()

    shutil.rmtree(workdir / "bad-seed0")
    written = log.stat().st_mtime_ns
    sweep.main([recipes[0], *words[2:]])
    assert log.stat().st_mtime_ns == written
    assert "good-seed0  finished  epoch 12" in capsys.readouterr().out
    # other settings: the run is no longer finished
    jobs = planned(workdir, recipes[0], "--", str(images), "--epochs", "13")
    marker = json.loads((workdir / "good-seed0/finished.json").read_text())
    assert marker["settings"] != jobs[0].settings


def wait_for(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -- the sweep files -------------------------------------------------------------------------------

FILES = sorted(ROOT.glob("configs/sweeps/*.sweep"))
# all settings but the sizes: one step on a few images
STEP = "--dataset folder --img-size 32 --subset 8 -b 4 --width 8 --snclr-mlp-dim 32 --bank-size 16 "
STEP += "--topk 2 --amp off --eval-freq 0 --stop-after-steps 1"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_file_has_valid_runs_and_the_last_one_trains(path, tmp_path, images):
    words = read_recipes([f"@{path}", str(images), *STEP.split()], [])
    jobs = planned(tmp_path, *words)
    assert len({tuple(job.settings) for job in jobs}) == len(jobs) >= 4
    main_snclr.main(jobs[-1].flags)
    assert '"step": 1' in Path(jobs[-1].workdir, "metrics.jsonl").read_text()
    head = path.read_text().split('"')[0]
    assert "Not run yet" in head or "docs/RESULTS.md" in head
