"""Each benchmark runs with tiny sizes and prints its table. The times are not checked."""

import importlib
import re
import shlex
import sys

import numpy as np
import pytest
from PIL import Image

RUNS = {
    "objective": (
        "--batch 4 --ranks 2 -K 3 -M 200 -D 8 --steps 1",
        ["dense, as released", "streamed, bfloat16", "clusters"],
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
    "images": (
        "{folder} -n 4 -b 2 --steps 1",
        ["torchvision and PIL", "first half", "only decoding"],
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
