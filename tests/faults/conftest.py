import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import attack
import pytest
from test_ranks import write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def undisturbed(images, tmp_path_factory):
    """The workdir of a run of two ranks that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, output = attack.ended(attack.start(images, *attack.FLAGS, "--workdir", workdir))
    assert code == 0, output
    return workdir
