"""The run of `bash start.sh` on the embedded images learns (minutes each)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_embedded_run_learns(tmp_path, amp, seed):
    """On CPUs without bfloat16 it is emulated, many times slower."""
    flags = ["--amp", amp, "--seed", str(seed), "--workdir", str(tmp_path)]
    subprocess.run([sys.executable, str(ROOT / "main_snclr.py"), *flags], check=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "knn_top1" in line]
    assert evaluations[0]["epoch"] == 0 and evaluations[-1]["epoch"] == 8
    assert max(evaluations[0]["knn_top1"], evaluations[0]["raw_pixels_knn_top1"]) < 40
    assert evaluations[-1]["knn_top1"] > 80
