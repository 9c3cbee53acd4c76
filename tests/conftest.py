import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# what tests start as processes of their own finds the package too, and does not fight over the cores
os.environ["PYTHONPATH"] = str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", "")


@pytest.fixture(autouse=True)
def signal_handlers():
    """What runs in this process outside main (the benchmarks' loop) leaves its handlers behind, which would keep a signal from
    ending the tests."""
    from snclr.running.preemption import handlers_given_back

    with handlers_given_back():
        yield
