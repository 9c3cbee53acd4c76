"""Resume a run in another environment and back again, each from the checkpoint of the other.

FOLDER=.venv-oldest bash tests/oldest.sh tests/test_versions.py      makes the old environment
python tests/faults/versions.py .venv-oldest/bin/python
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import attack
import torch
from test_ranks import write_images


def main(other, folder):
    images, workdir = write_images(folder / "images"), folder / "run"
    for python, steps in ((other, 3), (sys.executable, 6), (other, 10)):
        command = [
            python,
            attack.ROOT / "main_snclr.py",
            images,
            *attack.FLAGS,
            "--workdir",
            workdir,
        ]
        command += ["--resume", "auto", "--stop-after-steps", steps]
        environment = os.environ | {"PYTHONPATH": str(attack.ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(done.stderr)
        state = torch.load(workdir / attack.LAST, weights_only=True)
        print(
            f"step {state['step']}: written by torch {state['provenance']['versions']['torch']}",
            flush=True,
        )
    steps = [line["step"] for line in attack.lines_of(workdir) if "loss" in line]
    print("each step once" if steps == list(range(1, 11)) else f"steps {steps}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(sys.argv[1], Path(temporary))
