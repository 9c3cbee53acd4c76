"""The package installed by pip, read by torch.hub, and on a system without fcntl."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes

import pytest
import torch
from test_ranks import ROOT

import snclr

BUILD_FILES = ("pyproject.toml", "README.md", "LICENSE", "requirements.txt", "requirements")
CODE = ("snclr", "configs", "main_snclr.py", "main_lincls.py")
# in one process, since each import of torch takes seconds
USE = """
import os, runpy, sys
import snclr
from snclr.arguments import read_recipes

sys.modules["sklearn"] = sys.modules["umap"] = None  # optional, and slow

def run(module, line):  # python -m module line
    sys.argv[1:] = line.split()
    runpy.run_module(module, run_name="__main__")

installed = os.path.dirname(os.path.dirname(sys.executable))
assert snclr.__file__.startswith(installed), snclr.__file__
flags = "-a vit_tiny --patch-size 16 -b 8 --bank-size 16 --topk 2 --snclr-mlp-dim 8 --subset 24"
flags += " --stop-after-steps 1 --eval-freq 0 --workers 0 --workdir run"
run("main_snclr", "@configs/ablations/base.args " + flags)
FILE = "run/checkpoint_last.pth.tar"
assert snclr.load_encoder(FILE)[1]["arch"] == "vit_tiny"
run("snclr.export", FILE + " --format timm --out timm.pth")
run("snclr.visualize", FILE + " --pool 8 --count 2 --workers 0 --out pictures")
run("snclr.embed", FILE + " --dataset embedded --subset 8 --workers 0 --out features.npz")
assert len(read_recipes(["@configs/sweeps/cpu_levers.sweep"], [])) > 8
run("snclr.report", "run --out report.html")
run("snclr.mean_std", "--dataset embedded --subset 8 --workers 0")
"""
# Windows has neither the module nor these names
WITHOUT_POSIX = """
import os, runpy, signal, sys
sys.modules["fcntl"] = None
for name in ("O_NONBLOCK", "O_NOFOLLOW", "lockf"):
    delattr(os, name)
for name in ("SIGUSR1", "SIGCHLD", "SIGHUP"):
    delattr(signal, name)
import snclr
print(*snclr.load_encoder(sys.argv.pop())[1]["notes"])
commands = ("main_snclr", "snclr.sweep --workdir run NAME=")
for line in (*commands, "snclr.embed FILE --out x.npz", "snclr.visualize FILE"):
    module, *sys.argv[1:] = line.split()
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        print("exit code", end.code)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that pip builds from a copy of the repository."""
    copy = tmp_path_factory.mktemp("copy")
    for name in (*BUILD_FILES, *CODE):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(copy), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = copy.glob("snclr-*.whl")
    return path


def test_the_wheel_holds_the_package_the_scripts_and_the_recipes(wheel):
    paths = [ROOT / "main_snclr.py", ROOT / "main_lincls.py"]
    paths += [*ROOT.glob("snclr/**/*.py"), *ROOT.glob("configs/**/*.*")]
    expected = {path.relative_to(ROOT).as_posix() for path in paths}
    expected = {f"snclr/{x}" if x.startswith("configs/") else x for x in expected}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


def test_its_requirements_are_those_of_the_files(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    metadata = message_from_bytes(archive.read(name))
    assert metadata["Version"] == snclr.__version__
    expected = []
    for path in (ROOT / "requirements.txt", *(ROOT / "requirements").iterdir()):
        needs = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
        extra = f'; extra == "{path.stem}"' if path.parent != ROOT else ""
        expected += [need + extra for need in needs if need]
    assert sorted(metadata.get_all("Requires-Dist")) == sorted(expected)


def test_an_installation_works_in_any_folder(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv/bin/python")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"]
    subprocess.run([*command, "--no-index", "--quiet", str(wheel)], check=True)
    scheme = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    own = sysconfig.get_path("purelib", vars=scheme)
    with open(os.path.join(own, "dependencies.pth"), "w") as file:  # torch and the others
        file.write(sysconfig.get_path("purelib"))
    (origin,) = (tmp_path / "venv").rglob("direct_url.json")
    origin.write_text('{"vcs_info": {"commit_id": "c0ffee"}}')  # as after pip install git+URL
    (tmp_path / "elsewhere").mkdir()
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", USE],
        cwd=tmp_path / "elsewhere",
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "elsewhere/run/args.json").read_text())["git"] == "c0ffee"
    files = {path.name for path in (tmp_path / "elsewhere").rglob("*")}
    assert (
        files >= {"timm.pth", "neighbours.png", "features.npz", "report.html"}
        and "--std" in done.stdout
    )


def test_torch_hub_reads_a_file_and_an_address(pretrain, tmp_path, monkeypatch):
    path = pretrain("resnet8")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    expected, _ = snclr.load_encoder(path)
    x = torch.randn(2, 3, 32, 32)
    for file in (path, path.as_uri(), path.as_uri()):
        encoder = torch.hub.load(str(ROOT), "snclr", file, source="local")
        assert torch.equal(encoder(x), expected(x)) and len(encoder.info["mean"]) == 3
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_without_posix_weights_are_read_and_training_is_refused(pretrain):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX, pretrain("vit_tiny")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "attention heads" in done.stdout, done.stderr[-3000:]
    assert done.stdout.count("exit code 2\n") == 4 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if ": error: " in line]
    programs = ["main_snclr.py", "snclr.sweep", "snclr.embed", "snclr.visualize"]
    assert [line.split(": ")[0] for line in lines] == programs
    assert all("this command needs POSIX: Linux, macOS" in line for line in lines)


@pytest.mark.docs
def test_files_for_others_are_valid_and_name_the_version():
    yaml = pytest.importorskip("yaml")  # torch's and transformers' dependencies bring it
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == snclr.__version__ and citation["license"] == "MIT"
    assert f"## {snclr.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step.get("run", "") for step in workflow["jobs"]["tests"]["steps"]]
    assert any(".ci/run" in step for step in steps)
    assert yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
