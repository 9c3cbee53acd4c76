import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# processes that tests start find the package, too
os.environ["PYTHONPATH"] = str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", "")


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restore signal handlers that a test changes; they would keep a signal from ending pytest."""
    from snclr.running.preemption import handlers_given_back

    with handlers_given_back():
        yield


@pytest.fixture
def photographs():
    """Paths of eight photographs of many sizes."""
    root = os.environ.get("SNCLR_TEST_DATA")
    paths = sorted(Path(root, "imagenet-sample").rglob("*.JPEG"))[::32] if root else []
    if not paths:
        pytest.skip("SNCLR_TEST_DATA names no folder that holds imagenet-sample/")
    return paths
