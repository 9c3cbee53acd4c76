"""Non-finite losses on one of two ranks; those of a single process are in test_runs.py."""

import json
import re
import subprocess
import sys

import attack
import torch

from snclr import augment


def poisoned(images, workdir, first, last, *flags):
    command = [
        sys.executable,
        attack.ROOT / "tools/torchrun.py",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command += [
        attack.ROOT / "tests/faults/poisoned.py",
        first,
        last,
        images,
        *attack.FLAGS,
        "--workdir",
        workdir,
        *flags,
    ]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        timeout=attack.PATIENCE,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_nan_on_one_rank_is_named_skipped_by_all_and_then_stops_the_run(images, tmp_path):
    code, output = poisoned(images, tmp_path, 7, 9, "--skip-non-finite", "2", "--eval-freq", "0")
    assert code == 1 and "Traceback" not in output
    assert "note: step 7: the loss is not finite (on rank 1); 1 such steps were skipped" in output
    message = r"step 7: the loss is not finite \(on rank 1\); 3 such steps"
    assert len(re.findall(rf"stopped on rank [01] \(.*\): {message}", output)) == 2
    record = json.loads((tmp_path / "non_finite.json").read_text())
    assert (
        record["ranks"] == [1] and record["images"] == augment.epoch_order(0, 1, 40)[8:16].tolist()
    )
    state = torch.load(tmp_path / attack.LAST, weights_only=True)
    assert state["step"] == 5 and all(x.isfinite().all() for x in state["state_dict"].values())
