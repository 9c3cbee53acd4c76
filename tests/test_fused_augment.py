"""The kernels of --fused-augment: interpreted on a CPU, and compiled for a GPU."""

import importlib
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from main_snclr import choose_augmentation
from snclr import operations
from snclr.running import forward
from snclr.running.errors import UsageError

GPU, CPU = torch.device("cuda"), torch.device("cpu")
WITHOUT_TRITON = "triton is not installed: torch has it where it has CUDA"


@pytest.mark.parametrize("size, count", [(16, 8), (33, 3), (6, 3)])
def test_views_equal_torchvisions_image_by_image(size, count):
    pytest.importorskip("triton", reason=WITHOUT_TRITON)
    command = [sys.executable, "interpreted.py", str(size), str(count)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = str(Path(__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    differences = [float(line) for line in run.stdout.split()]
    assert len(differences) == 3 and max(differences) < 1e-5


def test_the_kernels_compile_for_a_gpu(tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", reason=WITHOUT_TRITON)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = importlib.import_module("snclr.fused_augment")
    floats = dict.fromkeys(("strengths", "luma", "moments", "x", "out"), "*fp32")
    types = {"crops": "*u8", "pixels": "i32", "size": "i32", **floats}
    for kernel, constants in (
        (kernels._mean_luma, {}),
        (kernels._colours, {}),
        (kernels._blur, {"IS_LAST": False}),
        (kernels._blur, {"IS_LAST": True}),
    ):
        constants = {**constants, "BLOCK": kernels.BLOCK}
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def test_the_flag_is_for_rgb_images_on_a_gpu(monkeypatch):
    def choose(flag, device=GPU, channels=3):
        return choose_augmentation(Namespace(fused_augment=flag, channels=channels), device)

    assert choose(False) is choose(True, CPU) is choose(True, channels=4) is operations.apply
    for triton, compiler in ((None, "gcc"), ("triton", None)):
        monkeypatch.setattr(forward.importlib.util, "find_spec", lambda _, found=triton: found)
        monkeypatch.setattr(forward.shutil, "which", lambda _, found=compiler: found)
        with pytest.raises(UsageError, match="--fused-augment needs triton and a C compiler"):
            choose(True)
    monkeypatch.undo()
    pytest.importorskip("triton", reason=WITHOUT_TRITON)
    monkeypatch.setattr(forward.shutil, "which", lambda name: name)
    assert choose(True) is importlib.import_module("snclr.fused_augment").apply
