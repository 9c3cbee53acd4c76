import functools
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# so that processes that tests start can import the package
os.environ["PYTHONPATH"] = str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", "")

if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    # nohup ignores it, and programs that tests start would, too; a handler ends with exec
    signal.signal(signal.SIGHUP, lambda number, frame: None)


def pytest_collection_modifyitems(items):
    """Start with the longest files, so that no process is left with one of them at the end."""
    longest = ("test_gpu.py", "test_ranks.py", "test_signals.py", "test_export.py")
    longest += ("test_lost_ranks.py", "test_content.py", "test_unsound.py", "test_lincls_ranks.py")
    items.sort(key=lambda item: item.path.name not in longest)


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restore signal handlers after each test, so that a signal can still end pytest."""
    from snclr.running.preemption import handlers_given_back

    with handlers_given_back():
        yield


@pytest.fixture(autouse=True)
def without_umap(monkeypatch):
    """Hide UMAP, which compiles for many seconds in each process. Its own test shows it again."""
    monkeypatch.setitem(sys.modules, "umap", None)


@pytest.fixture
def float64():
    """Let float64 be torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def shallow(monkeypatch):
    """Let all ViTs have 2 blocks, where their depth does not matter."""
    from snclr import backbones

    for arch, (width, _, *others) in backbones.VITS.items():
        monkeypatch.setitem(backbones.VITS, arch, (width, 2, *others))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 40 + 10 small images in two classes."""
    from test_ranks import write_images

    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def pretrain(images, tmp_path_factory):
    """From an architecture to a checkpoint after two steps."""
    from test_ranks import NO_EVALUATION

    import main_snclr

    @functools.cache
    def pretrain(arch):
        workdir = tmp_path_factory.mktemp(arch)
        flags = f"{NO_EVALUATION} --stop-after-steps 2 --workdir {workdir}"
        main_snclr.main([str(images), *flags.replace("resnet8", arch).split()])
        return workdir / "checkpoint_last.pth.tar"

    return pretrain


@pytest.fixture(scope="module", params=["resnet8", "vit_tiny"])
def pretrained(request, pretrain):
    """A checkpoint after two steps, of a ResNet and of a ViT."""
    return pretrain(request.param)


@pytest.fixture
def photographs():
    """Paths of eight photographs of many sizes."""
    root = os.environ.get("SNCLR_TEST_DATA")
    paths = sorted(Path(root, "imagenet-sample").rglob("*.JPEG"))[::32] if root else []
    if not paths:
        pytest.skip("SNCLR_TEST_DATA names no folder that holds imagenet-sample/")
    return paths
