import fcntl
import io
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import attack
import numpy as np
import pytest
from forked import Programs, may_mount
from PIL import Image
from test_ranks import write_images

# 5 steps an epoch on `photographs`
SMALL = (
    "-a resnet8 --width 8 --img-size 32 --snclr-dim 16 --snclr-mlp-dim 32 --bank-size 60 --topk 3"
    " --lr 0.01 -b 8 --print-freq 1 -j 1 --epochs 1 --eval-freq 0 --viz-freq 0"
)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def undisturbed(images, tmp_path_factory):
    """The workdir of a run of two ranks that nobody disturbed, one for all processes of pytest."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    workdir, ended = folder / "undisturbed", folder / "undisturbed_has_ended"
    with open(folder / "undisturbed.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ended.exists():
            code, output = attack.ended(attack.start(images, *attack.FLAGS, "--workdir", workdir))
            assert code == 0, output
            ended.touch()
    return workdir


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder of 40 + 8 images of different sizes, which workers decode."""
    root, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 8)):
        for number in range(count):
            folder = root / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:02}.jpg").write_bytes(jpeg(random))
    return root


def jpeg(random):
    """A JPEG file of noise, 40 to 90 pixels high and wide."""
    size = (*random.integers(40, 90, 2), 3)
    file = io.BytesIO()
    Image.fromarray(random.integers(256, size=size, dtype=np.uint8)).save(file, "jpeg")
    return file.getvalue()


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    programs = Programs(tmp_path_factory.mktemp("programs"))
    yield programs
    programs.close()


@pytest.fixture
def train(programs, photographs, tmp_path):
    """Start a small run in tmp_path/run; more flags override."""

    def start(*flags, data=photographs, **how):
        base = [data, *SMALL.split(), "--workdir", tmp_path / "run"]
        return programs.start("main_snclr.py", *base, *flags, **how)

    return start


def one_line(case, code, *words):
    """Check that a program ends in time, with this code and one line of these words; its output."""
    ended, output = case.ended()
    lines = [x for x in output.splitlines() if " error: " in x or " stopped on rank " in x]
    assert ended == code and "Traceback" not in output and "Exception ignored" not in output, output
    assert len(lines) == 1 and lines[0] == output.splitlines()[-1], output
    assert all(word in lines[0] for word in words), lines[0]
    return output


needs_root = pytest.mark.skipif(not may_mount(), reason="only root may mount")
