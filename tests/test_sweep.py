import json
import math
import os
import re
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
from snclr.pictures import report, runs
from snclr.pictures.runs import load
from snclr.running import jobs
from snclr.running.errors import Interrupted, RunError, UsageError
from snclr.running.jobs import DONE, FAILED, STOPPED, WAITS, Job
from snclr.running.lock import is_held
from snclr.running.preemption import handlers_given_back

ROOT = Path(sweep.__file__).resolve().parent.parent
KNN = ("knn_top1", "last")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """No GPU, one thread, a look at the jobs each 50 ms; the handlers of signals are restored."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(jobs, "POLL", 0.05)
    with handlers_given_back():
        yield


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
    assert runs.paired_differences(groups["other"], groups["base"], *KNN) == expected
    error = np.std(expected, ddof=1) / np.sqrt(len(expected))
    heads, rows = runs.comparison(groups)
    cells = dict(zip(heads, rows[1], strict=True))
    text = f"+{np.mean(expected):.2f} ± {error:.2f}"
    assert cells["kNN top-1 % against base"] == text == "+2.33 ± 0.60"
    assert heads[:3] == ["", "runs", "kNN top-1 %"] and rows[0][3] == ""
    of_all = [run for members in groups.values() for run in members]
    for page, head in (report.page(of_all), "topk 4"), (report.page(of_all, groups), "base"):
        heads, *rows = Page(page).tables[0]
        assert dict(zip(heads, rows[1], strict=True))[f"kNN top-1 % against {head}"] == text
    assert Page(page).tables[1] == [["", "topk"], ["base", "4"], ["other", "5"]]


@pytest.mark.parametrize(
    "differences, text", [([], ""), ([1.5], "+1.50"), ([-0.02, -0.04], "-0.030 ± 0.010")]
)
def test_a_difference_has_an_error_if_there_are_two_seeds(differences, text):
    assert runs.difference_text(differences) == text


def test_groups_without_a_common_seed_are_not_compared(tmp_path):
    groups = {
        name: [load(str(write_run(tmp_path / name, seed=s)))] for name, s in (("a", 0), ("b", 1))
    }
    heads, rows = runs.comparison(groups)
    assert not any("against" in head for head in heads)
    lines = runs.markdown(heads, rows).splitlines()
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
    plan = planned(tmp_path, *words, "4", "--", str(tmp_path), "--topk", "2")
    assert [job.name for job in plan] == [
        f"{name}-seed{s}" for s in (3, 4) for name in ("topk_1", "both")
    ]
    parsed = [sweep.options.parse(job.command[3:]) for job in plan]
    assert [args.bank_size for args in parsed] == [8192, 512, 8192, 512]
    assert {(args.topk, args.workers, args.resume) for args in parsed} == {(2, 3, "auto")}
    assert [args.workdir for args in parsed] == [str(tmp_path / job.name) for job in plan]
    assert "--topk" in plan[0].settings and not any(x.startswith("@") for x in plan[0].settings)


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


def test_a_run_does_not_go_on_with_other_settings_than_it_began_with(tmp_path):
    recipe = "a=--arch timm:test_vit --img-size 160 --timm-kwargs drop_path_rate=0.5 --lr"
    (job,) = planned(tmp_path, f"{recipe} 0.1")
    write_run(Path(job.workdir))
    begun = vars(sweep.options.parse(job.command[3:]))
    Path(job.workdir, "args.json").write_text(json.dumps(begun))
    planned(tmp_path, f"{recipe} 0.1 --print-freq 3")
    with pytest.raises(UsageError, match=r"^a-seed0: it was begun with .*\(lr 0.1 -> 0.2\): "):
        planned(tmp_path, f"{recipe} 0.2")


def test_the_first_recipe_stays_the_first_row_if_its_first_run_failed(tmp_path):
    """The runs are seed by seed: those that are compared stand in the order of the recipes."""
    plan = planned(tmp_path, "one=", "two=", "three=", "--seeds", "0", "1")
    for job in plan:
        job.state = FAILED if job.name in ("one-seed0", "three-seed0", "three-seed1") else DONE
        if job.state == DONE:
            write_run(Path(job.workdir), seed=int(job.name[-1]))
    rows = sweep.summarise(plan, str(tmp_path)).splitlines()[2:]
    assert [row.split()[1] for row in rows] == ["one", "two"]
    assert [*json.loads((tmp_path / "sweep.json").read_text())["runs"]] == [x.name for x in plan]


@pytest.mark.parametrize("names, gpus", [("", []), ("-1", []), ("2,5", ["2", "5"])])
def test_runs_share_the_gpus_of_the_allocation(monkeypatch, names, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert sweep.visible_gpus() == gpus


# -- jobs ------------------------------------------------------------------------------------------


def shell_jobs(tmp_path, **scripts):
    return [
        Job(name, str(tmp_path / name), ["sh", "-c", script], [script])
        for name, script in scripts.items()
    ]


def test_jobs_share_the_gpus_and_a_failed_one_stops_no_other(tmp_path, capsys):
    busy = f"{tmp_path}/$CUDA_VISIBLE_DEVICES"
    alone = f"mkdir {busy} && sleep 0.1 && rmdir {busy}"
    scripts = {f"good{n}": f"{alone} && echo 'epoch {n}/9  loss 1' && echo end" for n in range(4)}
    scripts |= {"bad": f"{alone}; echo no data >&2; exit 3", "mute": "exit 4", "saved": "exit 75"}
    scripts["killed"] = "echo 'epoch 3/9  loss 1'; kill -9 $$"
    scripts["bare"] = f"rm {tmp_path}/bare/console.txt"
    planned = shell_jobs(tmp_path, **scripts)
    assert jobs.run_jobs(planned, ["5", "7"], math.inf) == ""
    assert [(job.state, job.message) for job in planned] == [
        *((DONE, f"epoch {n}/9  loss 1") for n in range(4)),
        (FAILED, "no data"),
        (FAILED, "exit code 4"),
        (STOPPED, ""),
        (FAILED, "ended by SIGKILL"),
        (DONE, ""),
    ]
    assert {job.gpu for job in planned} == {"5", "7"}
    lines = capsys.readouterr().out.splitlines()
    assert {"bad  failed  no data", "good3  runs", "good3  finished  epoch 3/9  loss 1"} <= {*lines}


def test_finished_jobs_are_skipped_unless_their_settings_change(tmp_path):
    (job,) = shell_jobs(tmp_path, a="echo epoch 1/1")
    for settings in (["x"], ["x"], ["y"]):
        jobs.run_jobs([Job("a", job.workdir, job.command, settings)], [""], math.inf)
    assert (tmp_path / "a/console.txt").read_text() == 2 * "epoch 1/1\n"


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_signal_stops_the_jobs_and_no_other_starts(tmp_path, monkeypatch, name):
    monkeypatch.setenv("SLURM_JOB_ID", "77")  # the sweep requeues it, and not each run
    save = (
        "trap 'echo saved$SLURM_JOB_ID; exit 75' TERM; kill -{} $PPID; while :; do sleep 0.05; done"
    )
    planned = shell_jobs(tmp_path, a=save.format(name[3:]), b="echo")
    assert jobs.run_jobs(planned, [""], math.inf) == name
    assert [job.state for job in planned] == [WAITS, WAITS]
    assert (tmp_path / "a/console.txt").read_text() == "saved\n"
    second_ends = signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert second_ends == (name == "SIGINT")
    assert not (tmp_path / "b").exists() and not (tmp_path / "a/finished.json").exists()


def test_a_deadline_stops_the_jobs(tmp_path):
    for seconds in (0, 0.1):  # before the first job starts, and later
        planned = shell_jobs(tmp_path, a="exec sleep 60", b="echo")
        assert jobs.run_jobs(planned, [""], seconds) == "--minutes"
        assert [job.state for job in planned] == [WAITS, WAITS]


def test_a_job_waits_while_another_process_uses_its_folder(tmp_path, monkeypatch, capsys):
    lock = tmp_path / "a/main_snclr.lock"
    lock.parent.mkdir()
    code = f"import fcntl; file = open('{lock}', 'w'); fcntl.lockf(file, fcntl.LOCK_EX); input(1)"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.read(1) == b"1"
    show = jobs.show

    def show_and_release(*arguments):
        height = show(*arguments)
        process.stdin.close()
        process.wait()
        return height

    monkeypatch.setattr(jobs, "show", show_and_release)
    jobs.run_jobs(shell_jobs(tmp_path, a="echo"), [""], math.inf)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["a  waits  another process uses its folder", "a  runs", "a  finished"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_lines_of_running_jobs_change_in_place_on_a_terminal(monkeypatch, capsys, is_terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setattr(os, "get_terminal_size", lambda: os.terminal_size((22, 9)))
    shown, height, printed = [Job(name, "", [], []) for name in ("a", "b", "c")], 0, []
    for states in (
        [("runs", ""), ("runs", "epoch 1/2  9 images/s"), ("waits", "")],
        [("failed", "no file"), ("runs", "epoch 1/2  8 images/s"), ("waits", "")],
        [("failed", "no file"), ("runs", "epoch 2/2  8 images/s"), ("runs", "")],
    ):
        for job, state in zip(shown, states, strict=True):
            job.state, job.message = state
        height = jobs.show(shown, height)
        printed.append(capsys.readouterr().out)
    if is_terminal:
        up, cut = "\x1b[A\x1b[2K", "b  runs  epoch {}/2  {} \n"
        assert printed[0] == "a  runs\n" + cut.format(1, 9)
        assert printed[1] == up * 2 + "a  failed  no file\n" + cut.format(1, 8)
        assert printed[2] == up + cut.format(2, 8) + "c  runs\n"
    else:
        assert printed == [
            "a  runs\nb  runs  epoch 1/2  9 images/s\n",
            "a  failed  no file\n",
            "b  runs  epoch 2/2  8 images/s\nc  runs\n",
        ]


# -- a sweep ---------------------------------------------------------------------------------------


def test_a_killed_sweep_goes_on(tmp_path, images, monkeypatch, capsys):
    """Kill the sweep in a run; go on for three steps more; then run others, which fail."""
    workdir = tmp_path / "sweep"
    (tmp_path / "good.args").write_text(f"{SMALL} --epochs 999 --eval-freq 999")
    words = [f"{tmp_path}/good.args"]
    flags = ["--workdir", str(workdir), "--", str(images)]
    log = workdir / "good-seed0/metrics.jsonl"

    def steps():
        lines = log.read_text().splitlines() if log.exists() else []
        return [json.loads(line)["step"] for line in lines if '"loss"' in line]

    command = [sys.executable, "-m", "snclr.sweep", *words, *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        wait_for(steps)
        with pytest.raises(UsageError, match="is in use by pid"):
            sweep.main([*words, *flags])
        process.kill()
    wait_for(lambda: not is_held(str(workdir / "good-seed0"), "main_snclr"))  # it has saved
    seen = steps()[-1]

    with pytest.raises(Interrupted, match="--minutes: 2 runs are left; the same command continues"):
        sweep.main(["--minutes", "1e-12", *words, f"other={SMALL}", *flags])
    content = json.loads((workdir / "sweep.json").read_text())["runs"]
    assert {name: run["state"] for name, run in content.items()} == {
        "good-seed0": WAITS,
        "other-seed0": WAITS,
    }

    flags += ["--stop-after-steps", str(seen + 3)]
    capsys.readouterr()
    sweep.main([*words, *flags])
    message = rf"(?m)^good-seed0  finished  epoch \d+/999  step {seen + 3}/4995  loss"
    assert re.search(message, capsys.readouterr().out)
    console = (workdir / "good-seed0/console.txt").read_text()
    assert "resumed from" in console and "after step 0" not in console
    assert steps() == list(range(1, seen + 4))
    (row,) = [x for x in (workdir / "sweep.md").read_text().splitlines() if "good" in x]
    knn = json.loads((workdir / "sweep.json").read_text())["runs"]["good-seed0"]["kNN top-1 %"]
    name = row.split("|")[1].strip()  # as in the report
    assert f" {knn:.1f} " in row and f"<h3>{name}</h3>" in (workdir / "report.html").read_text()

    written = log.stat().st_mtime_ns
    monkeypatch.setattr(sys, "executable", "false")  # a program that fails
    with pytest.raises(RunError, match="failed: bad-seed0; the same command tries again"):
        sweep.main([*words, "bad=--topk 1", "--side-by-side", "2", *flags])
    assert log.stat().st_mtime_ns == written
    output = capsys.readouterr().out
    assert re.search(message, output) and "bad-seed0  failed  exit code 1\n" in output


def test_a_sweep_that_slurm_signals_requeues_its_job_when_the_runs_have_saved(
    tmp_path, monkeypatch
):
    script = f'#!/bin/sh\necho "$*" $(ps -o pgid= -p $$) >> {tmp_path}/log\n'
    (tmp_path / "scontrol").write_text(script)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    words = ["one=", "--workdir", str(tmp_path / "sweep")]
    for name, end in {"SIGTERM": "", "SIGUSR1": ", as job 77 will"}.items():
        monkeypatch.setattr(sweep, "run_jobs", lambda *_, name=name: name)
        message = f"^{name}: 1 runs are left; the same command continues{end}$"
        with pytest.raises(Interrupted, match=message):
            sweep.main(words)
    *words, group = (tmp_path / "log").read_text().split()
    assert words == ["requeue", "77"]
    assert int(group) != os.getpgrp()  # which a launcher signals, also while scontrol runs


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
    plan = planned(tmp_path, *words)
    assert len({tuple(job.settings) for job in plan}) == len(plan) >= 4
    main_snclr.main(plan[-1].command[3:])
    assert '"step": 1' in Path(plan[-1].workdir, "metrics.jsonl").read_text()
    head = path.read_text().split('"')[0]
    assert "Not run yet" in head or "docs/RESULTS.md" in head
