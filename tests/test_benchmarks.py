"""Each benchmark runs with tiny sizes and prints its table. The times are not checked."""

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import gpu_report, measure, runs

ROOT = Path(__file__).resolve().parent.parent
RUNS = {
    "objective": (
        "--batch 4 --ranks 2 -K 3 -M 200 -D 8 --steps 1",
        ["dense, as released", "streamed, bfloat16", "clusters"],
    ),
    "attention": (
        "--views 2 --heads 2 --width 16 --tokens 5 --steps 1",
        ["torch's choice", "math"],
    ),
    "augmentation": (
        "--images 2 --size 32 --steps 1",
        ["crops of images in memory", "operations"],
    ),
    "search": (
        "--rows 50 200 --queries 4 -K 3 -D 8 --steps 1",
        ["50 rows, float32", "200 rows, bfloat16"],
    ),
    "step": ("--only resnet optimiser --cifar-batch 2 --steps 1", ["channels-last", "fused"]),
    "micro_batch": (
        "-b 4 --micro-batch 2 --img-size 32 --steps 1 --peak-tflops 1 "
        "--flags '--arch vit_tiny --bank-size 100'",
        ["--micro-batch 2", "TFLOP/s"],
    ),
    "kernels": (
        "--recipes resnet --rows 3 --flags '-b 4 --width 8 --snclr-mlp-dim 32 --bank-size 100'",
        ["all "],
    ),
    "loop": (
        "--rows eager graph --steps 1 --flags '-b 4 --width 8 --snclr-mlp-dim 32 --bank-size 100'",
        ["--no-compile --step-graph"],
    ),
    "images": (
        "{folder} -n 4 -b 2 --steps 1",
        ["torchvision and PIL", "first half", "only decoding"],
    ),
    "loading": (
        "{folder} -b 4 -j 1 -n 8 --img-size 16",
        [f"4{'4':>22}"],
    ),
    "linear_probe": (
        "--arch vit_tiny --img-size 32 -b 4 --classes 3 --steps 1",
        ["one head, cached", "grid, cached"],
    ),
    "peers": ("{folder} -b 4 --steps 1", ["lightly, NNCLR, float32", "ours, snclr, bfloat16"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_prints_a_time_for_each_row(name, tmp_path, monkeypatch, capsys):
    if name == "peers":
        pytest.importorskip(
            "lightly", reason="lightly is not installed (benchmarks/requirements.txt)"
        )
    noise = np.random.default_rng(0).integers(0, 256, (8, 40, 32, 3), dtype=np.uint8)
    (tmp_path / "train" / "noise").mkdir(parents=True)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels[: 32 if name == "peers" else 32 + number]).save(
            tmp_path / "train" / "noise" / f"{number}.jpg"
        )
    monkeypatch.chdir(tmp_path)
    flags, expected = RUNS[name]
    monkeypatch.setattr(sys, "argv", [name, *shlex.split(flags.format(folder=tmp_path))])
    importlib.import_module(f"benchmarks.{name}").main()
    output = capsys.readouterr().out
    for row in expected:
        line = re.search(rf"^.*{re.escape(row)}.*$", output, re.MULTILINE)[0]
        assert "." in line, output  # with figures


@pytest.mark.parametrize("flags, seconds", [([], 480), (["--quick"], 180)])
def test_the_parts_of_the_gpu_script_parse_and_fit_into_their_time(flags, seconds, monkeypatch):
    script = str(ROOT / "benchmarks" / "gpu.sh")
    command = ["bash", script, "--dry-run", *flags]
    environment = {**os.environ, "CIFAR": "/data/cifar 10"}
    output = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    parts = re.findall(r"^(.+), (\d+) s: (.+)$", output, re.MULTILINE)
    assert len(parts) >= 4 and sum(int(limit) for _, limit, _ in parts) <= seconds

    def parse(parser, *args):
        assert parse_args(parser, *args)
        raise StopIteration

    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for name, _, line in parts:
        _, *words = shlex.split(line)
        if name.endswith("tests"):
            assert (ROOT / words[-1]).exists()
            continue
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(StopIteration):
            importlib.import_module(f"benchmarks.{Path(words[0]).stem}").main()
    if not flags:
        assert "/data/cifar 10" in words


def test_the_gpu_script_says_that_there_is_no_gpu(tmp_path):
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    environment = {**os.environ, "PYTHON": "false", "OUT": str(tmp_path / "out")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "finds no GPU" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_gpu_script_leaves_two_files_also_if_parts_fail(tmp_path):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(
        f'#!/bin/sh\ncase $1 in benchmarks/gpu_report.py) exec {sys.executable} "$@";; -c) ;;'
        "*) echo some output; echo a reason >&2; exit 3;; esac\n"
    )
    python.chmod(0o755)
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--quick"]
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(out)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "gpu.md"]
    report = json.loads((out / "gpu.json").read_text())
    assert len(report) >= 4
    for part in report.values():
        assert part["status"] == 3 and part["errors"] == "a reason\n"
        assert part["output"] == "some output\n"


def test_the_gpu_report_keeps_tables_and_failures(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SNCLR_MARKDOWN", "1")
    table = measure.table(["", "ms"], [["dense", "4.0"], ["ours", "2.0"]])
    for name, status in (("good", "0"), ("bad", "124")):
        (tmp_path / f"{name}.txt").write_text(f"one GPU\n{table}\n")
        (tmp_path / f"{name}.err").write_text("a warning\n")
        gpu_report.main(str(tmp_path), name, status, "3", "python x")
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert list(report) == ["good", "bad"]
    assert report["good"]["tables"] == [[{"": "dense", "ms": "4.0"}, {"": "ours", "ms": "2.0"}]]
    printed = capsys.readouterr().out
    assert (tmp_path / "gpu.md").read_text() == printed
    assert printed.count("stopped by its time limit") == 1 == printed.count("a warning")


@pytest.mark.slow
def test_whole_runs_are_timed_and_one_that_fails_stops_no_other(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(runs.ROWS, "vit", ("@configs/embedded.args --lr x", 1))
    rows = {"embedded": ("@configs/embedded.args -b 16", 1)}
    monkeypatch.setitem(runs.ROWS, "embedded", rows["embedded"])
    monkeypatch.setattr(sys, "argv", ["runs", "--rows", "vit", "embedded", "--steps", "3"])
    runs.main()
    failed, done = capsys.readouterr().out.splitlines()[-2:]
    assert "--lr" in failed and re.search(r" \d+ +[\d.]+% +[\d.]+$", done)


def test_images_for_whole_runs_are_made(tmp_path):
    folder = runs.make_images(tmp_path, 2, 5, (40, 30))
    paths = sorted(Path(folder, "train").rglob("*.jpg"))
    assert len(paths) == 5 and Image.open(paths[-1]).size == (40, 30)


def test_growth_is_measured_and_drawn(tmp_path, monkeypatch, capsys):
    scaling = importlib.import_module("benchmarks.scaling")
    monkeypatch.setattr(scaling, "BASE", dict(batch=4, topk=3, bank=200, ranks=2, dim=8))
    monkeypatch.setattr(scaling, "SWEEPS", {"topk": (1, 5), "ranks": (1, 3)})
    monkeypatch.setattr(
        sys,
        "argv",
        ["scaling", "--steps", "1", "--true-ranks", "--out", str(tmp_path / "growth.png")],
    )
    scaling.main()
    output = capsys.readouterr().out
    assert "topk" in output and "all rows, ms" in output
    assert Image.open(tmp_path / "growth.png").size[0] > 300
