"""start.sh called through sh or a link, with invalid numbers, with an incomplete environment."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import attack
import pytest

START = attack.ROOT / "start.sh"
# replaces python3 -m venv and the interpreter of the new environment; installs nothing
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$1 $2" in
  "- "*) [ -e "$0.satisfied" ] && exit 0; exit 1 ;;
  "-c "*) exec "$REAL" "$@" ;;
  "-m venv") [ -z "${SLOW_VENV:-}" ] || { mkdir -p "$3/bin"; touch "$3/half"; sleep 60; }
    mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; [ -n "${NO_PIP:-}" ] || touch "$3/bin/pip" ;;
  "-m ensurepip") touch "${0%/*}/pip" ;;
  "-m pip") [ -e "${0%/*}/pip" ] || { echo "No module named pip" >&2; exit 1; }
    [ "$3" = --version ] || { [ -z "${SLOW_PIP:-}" ] || sleep 60; touch "$0.satisfied"; } ;;
  *) echo "started $*" ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A function that starts a copy of start.sh with the replaced python3."""
    root = tmp_path / "clone"
    (root / "tools").mkdir(parents=True)
    for name in ("start.sh", "tools/environment.sh", "main_snclr.py", "requirements.txt"):
        (root / name).write_bytes((attack.ROOT / name).read_bytes())
    (tmp_path / "commands").mkdir()
    python = tmp_path / "commands/python3"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {n: v for n, v in os.environ.items() if not n.startswith(attack.FOREIGN)}
    environment |= {"PATH": f"{tmp_path}/commands{os.pathsep}{os.environ['PATH']}"}
    environment |= {"REAL": sys.executable, "CALLS": str(tmp_path / "calls")}

    def start(**more):
        return subprocess.Popen(
            ["bash", str(root / "start.sh")],
            env=environment | more,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    start.root, start.calls = root, tmp_path / "calls"
    return start


def test_an_environment_is_made_once_and_then_used(clone):
    code, output = attack.ended(clone())
    assert code == 0 and "installing into" in output and "started" in output
    assert not (clone.root / ".venv.unfinished").exists()
    clone.calls.unlink()
    code, output = attack.ended(clone())
    assert code == 0 and "installing" not in output and "venv" not in clone.calls.read_text()


@pytest.mark.parametrize("moment", ["SLOW_VENV", "SLOW_PIP"])
def test_an_environment_that_was_half_made_when_a_start_was_killed_is_made_anew(clone, moment):
    process = clone(**{moment: "1"})
    wanted = {"SLOW_VENV": "-m venv", "SLOW_PIP": "-m pip install"}[moment]
    attack.wait_for(lambda: clone.calls.exists() and wanted in clone.calls.read_text(), process)
    attack.wait_for((clone.root / ".venv").exists, process)  # "-m venv" makes it after that line
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (clone.root / ".venv/half").touch()
    code, output = attack.ended(clone())
    assert code == 0 and "started" in output
    assert output.count("was not finished by an earlier start: it is created again") == 1
    assert not (clone.root / ".venv/half").exists()


def test_a_second_start_waits_for_the_one_that_makes_the_environment(clone):
    first = clone(SLOW_PIP="1")
    attack.wait_for(
        lambda: clone.calls.exists() and "pip install" in clone.calls.read_text(), first
    )
    second = clone()
    time.sleep(1)
    assert second.poll() is None and (clone.root / ".venv/bin/python").exists()
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    code, output = attack.ended(second)
    assert code == 0 and "created again" in output and "started" in output


def test_an_environment_without_pip_gets_it(clone):
    subprocess.run(
        [clone.root.parent / "commands/python3", "-m", "venv", clone.root / ".venv"],
        env={**os.environ, "NO_PIP": "1", "CALLS": str(clone.calls)},
        check=True,
    )
    (clone.root / ".venv/mine").touch()
    code, output = attack.ended(clone())
    assert code == 0 and "has no pip: it is installed" in output and "started" in output
    assert (clone.root / ".venv/mine").exists()  # somebody may have made it for more than this


@pytest.fixture
def dry(tmp_path):
    """The exit code and output of a dry run."""

    def call(*command, **environment):
        keep = {n: v for n, v in os.environ.items() if not n.startswith(attack.FOREIGN)}
        keep["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [*map(str, command), "--dry-run"],
            env=keep | {"CUDA_VISIBLE_DEVICES": ""} | environment,
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=attack.PATIENCE,
        )
        return done.returncode, done.stdout + done.stderr

    return call


def test_sh_and_links_start_the_same(dry, tmp_path):
    expected = dry("bash", START, "--lr", "1")
    assert expected[0] == 0 and str(attack.ROOT / "main_snclr.py") in expected[1]
    assert dry("sh", START, "--lr", "1") == expected
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(START)
    (tmp_path / "folder/relative").symlink_to("../link")
    for link in (tmp_path / "link", tmp_path / "folder/relative", "folder/relative"):
        assert dry("bash", link, "--lr", "1") == expected
        assert dry("sh", link, "--lr", "1") == expected


@pytest.mark.parametrize("name", ["NNODES", "NPROC_PER_NODE", "MAX_RESTARTS", "JOIN_SECONDS"])
@pytest.mark.parametrize("value", ["9" * 29, "x", "-1", "1.5", "1 2", "0x8", "$(exit 3)", "٣"])
def test_numbers_of_the_environment_that_are_none_are_one_line(dry, name, value):
    code, output = dry("bash", START, **{name: value})
    assert code == 2 and output.startswith(f"start.sh: error: {name} must be ")
    assert len(output.splitlines()) == 1 and value in output


def test_leading_zeros_are_no_octal_numbers(dry):
    code, output = dry("bash", START, NPROC_PER_NODE="08", NNODES="01")
    assert code == 0 and "--nproc_per_node 8 " in output


def test_start_may_be_executed():
    assert START.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize("script", ["main_snclr.py", "main_lincls.py"])
def test_packages_that_do_not_go_together_are_one_line(script, tmp_path):
    (tmp_path / "torchvision").mkdir()
    text = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "torchvision/__init__.py").write_text(text)
    done = subprocess.run(
        [sys.executable, attack.ROOT / script, "--pretrained", __file__][
            : 2 if "snclr" in script else 4
        ],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        text=True,
        capture_output=True,
        timeout=attack.PATIENCE,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "cannot be imported together: operator torchvision::nms" in done.stderr
