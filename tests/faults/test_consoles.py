"""Consoles, disks and folders that vanish while a run goes on: it goes on, and its log says so."""

import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import attack
import pytest
from conftest import SMALL, needs_root, one_line


def notes(tmp_path):
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    return [line["note"] for line in lines if "note" in line]


def assert_done(case, tmp_path):
    code, output = case.ended()
    assert code == 0 and output == "", output
    assert (tmp_path / "run/checkpoint_last.pth.tar").exists()
    assert (tmp_path / "run/report.html").exists()


def test_a_console_on_a_full_disk(train, tmp_path):
    assert_done(train(stdout="/dev/full"), tmp_path)
    assert notes(tmp_path) == ["stdout is lost (No space left on device)"]


def test_a_closed_console(train, tmp_path):
    assert_done(train(stdout="-"), tmp_path)
    assert notes(tmp_path) == ["stdout is lost (closed)"]


def test_both_streams_closed(train, tmp_path):
    assert_done(train(stdout="-", stderr="-"), tmp_path)
    assert notes(tmp_path) == ["stdout is lost (closed); stderr is lost (closed)"]


def test_both_streams_on_a_full_disk(train, tmp_path):
    assert_done(train(stdout="/dev/full", stderr="/dev/full"), tmp_path)


def test_a_reader_that_leaves(train, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    case = train("--epochs", 12, stdout=str(pipe))
    with open(pipe, "rb", buffering=0) as file:
        fcntl.fcntl(file, fcntl.F_SETPIPE_SZ, 4096)  # the run prints more: it cannot end before
        file.read(200)
    assert_done(case, tmp_path)
    assert notes(tmp_path) == ["stdout is lost (Broken pipe)"]


def test_a_terminal_that_is_closed(train, tmp_path):
    leader, follower = pty.openpty()
    name = os.ttyname(follower)
    case = train("--epochs", 20, stdout=name, stderr=name)
    os.read(leader, 200)  # a terminal takes 4 KB and the run prints more: it cannot end before
    os.close(follower)
    os.close(leader)
    assert_done(case, tmp_path)
    # either stream may be the first to write after the terminal is closed
    assert "stdout is lost (Input/output error)" in "; ".join(notes(tmp_path))


@pytest.mark.parametrize("where", ["/dev/full", "-"])
def test_usage_errors_keep_their_code_where_nobody_can_read_them(train, where):
    assert train("--lr", "-1", stderr=where).ended()[0] == 2
    assert train("--lr", "-1", stderr=where, stdout=where).ended()[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("end", [" | head -2", " >&-", " > /dev/full", " >&- 2>&-"])
def test_the_same_in_a_shell(end, images, tmp_path):
    command = [sys.executable, str(attack.ROOT / "main_snclr.py"), str(images), *SMALL.split()]
    command = " ".join([*command, "--workdir", str(tmp_path / "run")])
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command + end], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr


@needs_root
def test_tensorboard_on_a_full_disk_is_one_line(train, tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=True)
    try:
        output = one_line(train("--epochs", 4), 1, "No space left on device")
        assert output.count("TensorBoard's events are not written") <= 1
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize("flags", [(), ("--viz-freq", 1), ("--eval-freq", 1)])
def test_a_workdir_that_is_deleted_is_one_line_at_the_next_save(train, tmp_path, flags):
    case = train("--epochs", 100, *flags)
    case.wait_for("step 3/")
    while (tmp_path / "run").exists():  # again if a file was made meanwhile
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    one_line(case, 1, "run was deleted or renamed during the run")
    assert not (tmp_path / "run").exists()


def test_a_signal_to_a_run_without_a_console(train, tmp_path):
    case = train("--epochs", 500, stdout="-", stderr="-")
    path = tmp_path / "run/checkpoint_last.pth.tar"
    while not path.exists():
        assert case.running()
        time.sleep(0.02)
    case.signal(signal.SIGTERM)
    assert case.ended()[0] == 75
