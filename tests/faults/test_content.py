"""Content that somebody made to hang, fill or confuse what reads it: one line, in time."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import SMALL, jpeg, one_line

LAST = "checkpoint_last.pth.tar"
BANK = "module.memory_bank."


@pytest.fixture(scope="module")
def half(programs, photographs, tmp_path_factory):
    """The workdir of a run that was stopped in the middle."""
    workdir = tmp_path_factory.mktemp("half") / "run"
    flags = [photographs, *SMALL.split(), "--stop-after-steps", 2, "--workdir", workdir]
    code, output = programs.run("main_snclr.py", *flags)
    assert code == 0, output
    return workdir


def fill(name, value):
    def change(state):
        state["state_dict"][BANK + name].fill_(value)

    return change


def quantise(state):
    name = "module.base_encoder.conv1.weight"
    weights = state["state_dict"][name]
    state["state_dict"][name] = torch.quantize_per_tensor(weights, 0.1, 0, torch.qint8)


def set_step(state):
    state["step"] = 10**18


CHANGES = {
    "filled": fill("filled", 10**12),
    "negative filled": fill("filled", -7),
    "ids": fill("ids", 2**40),
    "negative ids": fill("ids", -7),
    "pointer": fill("pointer", 10**12),
    "quantised": quantise,
    "step": set_step,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CHANGES)
def test_a_checkpoint_with_numbers_that_no_run_writes(train, half, tmp_path, kind):
    shutil.copytree(half, tmp_path / "run")
    state = torch.load(half / LAST, weights_only=True)
    CHANGES[kind](state)
    torch.save(state, tmp_path / "run" / LAST)
    one_line(train("--resume", "auto"), 2, "cannot be resumed")


def tar_of(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_a_tar_entry_larger_than_its_file(train, tmp_path):
    member = tarfile.TarInfo("a.jpg")
    member.size = 2**50
    (tmp_path / "x.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    one_line(train(data=tmp_path / "x.tar"), 2, "x.tar")


def test_a_tar_in_a_tar_a_thousand_times(train, tmp_path):
    content = bytes(1024)
    for _ in range(1200):
        member = tarfile.TarInfo("a.tar")
        member.size = len(content)
        content = member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)
    (tmp_path / "x.tar").write_bytes(content)
    one_line(train(data=tmp_path / "x.tar"), 2, "x.tar")


def test_a_dangling_tar(train, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/x.tar").symlink_to("nowhere")
    one_line(train(data=tmp_path / "shards"), 2, "x.tar")
    one_line(train(data=tmp_path / "shards/x.tar"), 2, "x.tar")


DEEP = '{"a":' * 100_000


@pytest.mark.parametrize(
    "text", [DEEP, "[" * 100_000, '{"command":"\\ud800","method":"\\udfff","arch":"x\\ud83d"}']
)
def test_a_report_of_odd_json(programs, tmp_path, text):
    for content in (text, '{"method": "snclr"}'):
        (tmp_path / "args.json").write_text(content)
        (tmp_path / "metrics.jsonl").write_text(f'{{"step":1,"epoch":1,"loss":0.5}}\n{text}\n')
        (tmp_path / "results.json").write_text(text)
        code, output = programs.run("snclr.report", tmp_path)
        assert code in (0, 2) and len(output.splitlines()) == 1, output


def test_a_recipe_that_doubles_itself(train, tmp_path):
    (tmp_path / "0.args").write_text("--epochs 1\n")
    for number in range(1, 40):
        (tmp_path / f"{number}.args").write_text(f"@{tmp_path}/{number - 1}.args\n" * 2)
    one_line(train(f"@{tmp_path}/39.args"), 2, "name each other")


def test_a_recipe_of_bytes(train, tmp_path):
    (tmp_path / "x.args").write_bytes(bytes(range(256)) * 10)
    one_line(train(f"@{tmp_path}/x.args"), 2)


def test_a_workdir_whose_name_is_no_text(train, programs, tmp_path):
    odd = os.fsencode(tmp_path) + b"/\xff\xfe"
    code, output = train("--workdir", odd).ended()
    assert code in (0, 2) and "Traceback" not in output, output
    if code == 0:
        assert os.path.exists(odd + b"/checkpoint_last.pth.tar")
        assert programs.run("snclr.report", odd)[0] == 0


def test_labels_and_lists_that_are_none(train, programs, half, photographs, tmp_path):
    binary = tmp_path / "binary"
    binary.write_bytes(bytes(range(256)) * 100)
    one_line(train("--dataset", "tree", "--labels", tmp_path), 2, tmp_path.name)
    one_line(train("--dataset", "tree", "--labels", binary), 2, "binary")
    encoder = half / "encoder_last.pth.tar"
    flags = [photographs, "--pretrained", encoder, "--workdir", tmp_path / "probe", "-j", 1]
    for path in (binary, tmp_path, "/dev/zero"):
        one_line(programs.start("main_lincls.py", *flags, "--label-list", path), 2)


def test_a_huge_sparse_tar(train, tmp_path):
    with open(tmp_path / "x.tar", "wb") as file:
        file.truncate(200 * 2**30)
    one_line(train(data=tmp_path / "x.tar"), 2, "no image")


def test_an_image_in_a_tar_that_is_mostly_holes(train, tmp_path):
    import numpy as np

    member = tarfile.TarInfo("a.jpg")
    member.size = 100 * 2**30
    good = tarfile.TarInfo("b.jpg")
    content = jpeg(np.random.default_rng(0))
    good.size = len(content)
    with open(tmp_path / "x.tar", "wb") as file:
        for _ in range(12):
            file.write(good.tobuf() + content + bytes(-len(content) % 512))
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.seek(member.size, 1)
        file.write(bytes(1024))
    case = train(data=tmp_path / "x.tar", limits={"AS": 16 * 2**30})
    one_line(case, 2, "x.tar")


def test_settings_of_a_checkpoint_may_hold_odd_text(train, half, tmp_path):
    shutil.copytree(half, tmp_path / "run")
    state = torch.load(half / LAST, weights_only=True)
    state["args"]["lr"] = "\x1b[2J" * 10
    torch.save(state, tmp_path / "run" / LAST)
    code, output = train("--resume", "auto").ended()
    assert code in (0, 2) and "\x1b" not in output, repr(output)


def test_a_log_of_odd_lines(train, half, tmp_path):
    run = Path(shutil.copytree(half, tmp_path / "run"))
    odd = [DEEP, '{"step": 1e400}', '{"step": 1}', '{"step": true, "epoch": []}', "\x00", "[1]"]
    odd += [json.dumps({"step": 1, "epoch": 1, "loss": "x"}), '{"step": "1"}']
    (run / "metrics.jsonl").write_text("\n".join(odd) + "\n")
    code, output = train("--resume", "auto", "--eval-freq", 1).ended()
    assert code == 0 and "Traceback" not in output, output
