"""Files of a user or of a workdir that are none: links, fifos, devices, folders. No link is
followed where something is written, nothing blocks, nothing fills the memory.
"""

import base64
import os
import shutil
from pathlib import Path

import pytest
from conftest import SMALL, one_line

KINDS = ("fifo", "zero", "folder", "dangling", "loop")


def make(kind, path):
    """Something at path that is no regular file; /dev/zero without root is a link to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"zero": "/dev/zero", "dangling": "nowhere", "loop": path.name}[kind])
    return path


@pytest.fixture(scope="module")
def finished(programs, photographs, tmp_path_factory):
    """The workdir of a finished run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    flags = [photographs, *SMALL.split(), "--viz-freq", 1, "--workdir", workdir]
    code, output = programs.run("main_snclr.py", *flags)
    assert code == 0, output
    return workdir


@pytest.mark.parametrize("kind", ["fifo", "zero"])
def test_what_is_no_file_is_refused_by_the_flags_that_read_files(
    train, photographs, kind, tmp_path
):
    odd = make(kind, tmp_path / "odd")
    one_line(train(f"@{odd}"), 2, "odd")
    for flags in (
        ("--resume", odd),
        ("--init-from", odd),
        ("--dataset", "tree", "--labels", odd),
    ):
        one_line(train(*flags), 2, "odd")
    listed = make(kind, tmp_path / "odd.txt")
    one_line(train("--dataset", "list", data=listed), 2, "odd.txt")
    tar = make(kind, tmp_path / "shards/odd.tar")
    one_line(train(data=tar.parent), 2, "odd.tar")
    one_line(train(data=tar), 2, "odd.tar")


@pytest.mark.parametrize("kind", ["fifo", "zero", "folder", "dangling"])
@pytest.mark.parametrize("name", ["checkpoint_last.pth.tar", "metrics.jsonl"])
def test_what_is_no_file_in_a_workdir_ends_in_one_line(train, finished, tmp_path, kind, name):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    make(kind, tmp_path / "run" / name)
    case = train("--resume", "auto", "--epochs", 2)
    code, output = case.ended()
    assert code in (0, 2) and "Traceback" not in output, output
    assert code == 0 or len(output.splitlines()) == 1, output


@pytest.mark.parametrize("kind", ["fifo", "dangling"])
@pytest.mark.parametrize("name", ["args.json", "main_snclr.lock", "tensorboard", "pictures"])
def test_other_files_of_a_workdir_that_are_none(train, tmp_path, kind, name):
    make(kind, tmp_path / "run" / name)
    code, output = train("--viz-freq", 1).ended()
    assert code in (0, 1, 2) and "Traceback" not in output, output
    assert not (tmp_path / "run/nowhere").exists()


def test_links_in_a_workdir_are_not_written_through(train, tmp_path):
    victim, run = tmp_path / "victim", tmp_path / "run"
    names = ["checkpoint_last.pth.tar.tmp", "encoder_last.pth.tar", "encoder_last.pth.tar.tmp"]
    names += ["args.json", "args.json.tmp", "report.html", "report.html.tmp", "metrics.jsonl.tmp"]
    names += ["pictures/views_0000005.png", "bad_images.txt"]
    victim.write_text("precious")
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).symlink_to(victim)
    code, output = train("--viz-freq", 1).ended()
    assert code in (0, 2) and "Traceback" not in output, output
    assert victim.read_text() == "precious"


def test_a_log_that_is_a_link_is_not_written_through(train, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text('{"epoch": 1, "step": 1, "loss": 1.0}\n')
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to(victim)
    code, output = train("--resume", "auto").ended()
    assert code in (0, 2) and "Traceback" not in output, output
    assert victim.read_text() == '{"epoch": 1, "step": 1, "loss": 1.0}\n'


@pytest.mark.parametrize("kind", ["link", "fifo", "zero"])
def test_a_report_embeds_only_pictures(programs, finished, tmp_path, kind):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    secret = tmp_path / "secret"
    secret.write_text("root:x:0:0:" * 10)
    picture = run / "pictures/neighbours_9999999.png"
    picture.symlink_to(secret) if kind == "link" else make(kind, picture)
    (run / "pictures/neighbours_0000000.png").write_text(secret.read_text())
    code, output = programs.run("snclr.report", run)
    assert code == 0, output
    page = (run / "report.html").read_text()
    assert base64.b64encode(secret.read_bytes()).decode()[:80] not in page


@pytest.mark.parametrize("kind", ["fifo", "zero", "folder"])
@pytest.mark.parametrize("name", ["args.json", "metrics.jsonl", "results.json"])
def test_a_report_of_what_is_no_file(programs, finished, tmp_path, kind, name):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    if (run / name).exists():
        (run / name).unlink()
    make(kind, run / name)
    code, output = programs.run("snclr.report", run)
    assert code in (0, 2) and len(output.splitlines()) == 1, output


def test_a_report_is_not_written_over_a_device(programs, finished, tmp_path):
    odd = make("fifo", tmp_path / "odd")
    one_line(programs.start("snclr.report", finished, "--out", odd), 2, "odd")
    assert odd.is_fifo()


def test_folders_that_lead_back_are_searched_once(programs, finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "up").symlink_to("..")
    (run / "self").symlink_to(".")
    assert programs.run("snclr.report", run)[0] == 0


def test_a_file_that_begins_like_postscript_starts_no_other_program(train, photographs, tmp_path):
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("gs", "gswin32c", "gswin64c"):
        (commands / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (commands / name).chmod(0o755)
    root = Path(shutil.copytree(photographs, tmp_path / "photographs"))
    (root / "train/a/00.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EOF")
    case = train(data=root, PATH=f"{commands}{os.pathsep}{os.environ['PATH']}")
    one_line(case, 2, "00.jpg")
    assert not (tmp_path / "started").exists()


def test_images_of_other_formats_than_the_documented_ones_are_unreadable(tmp_path):
    import numpy as np
    from PIL import Image

    from snclr.datasets.decoding import decode
    from snclr.running.errors import RunError

    for kind in ("tga", "sgi", "pcx", "im", "ico", "eps"):
        Image.new("RGB", (32, 32)).save(tmp_path / "x", kind)
        with pytest.raises(RunError, match="not an image of a known format"):
            decode(np.fromfile(tmp_path / "x", np.uint8), "x")


@pytest.mark.parametrize("policy", ["fail", "skip"])
@pytest.mark.parametrize("kind", ["sparse", "fifo", "zero", "folder"])
def test_pictures_that_are_none(train, photographs, tmp_path, kind, policy):
    root = Path(shutil.copytree(photographs, tmp_path / "photographs"))
    path = root / "train/a/00.jpg"
    path.unlink()
    if kind == "sparse":
        with open(path, "wb") as file:
            file.truncate(200 * 2**30)
    else:
        make(kind, path)
    case = train("--on-bad-image", policy, data=root)
    code, output = case.ended()
    assert "Traceback" not in output and code in (
        (0, 1, 2) if kind == "folder" else (0,) if policy == "skip" else (1, 2)
    ), output
