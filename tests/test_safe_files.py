"""Files are written whole or not at all, links are not followed, only regular files are read."""

import os
import stat
from collections import OrderedDict

import pytest
import torch

import main_snclr
from snclr.running import lock, safe_files, tensor_files
from snclr.running.errors import RunError, UsageError
from snclr.running.log import Log

WRITERS = {
    "save_text": lambda path: safe_files.save_text(path, "new"),
    "save_json": lambda path: safe_files.save_json(path, {"new": 1}),
    "tensor_files.save": lambda path: tensor_files.save(path, {"new": 1}),
}
writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@writers
def test_a_new_file_has_the_usual_permissions_and_nothing_lies_beside_it(write, tmp_path):
    path = tmp_path / "file"
    write(str(path))
    usual = os.open(tmp_path / "usual", os.O_CREAT, 0o666)
    assert path.stat().st_mode == os.fstat(usual).st_mode
    assert sorted(os.listdir(tmp_path)) == ["file", "usual"]


@writers
def test_links_are_replaced_and_not_followed(write, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("old")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("file", "file.tmp"):
        (folder / name).symlink_to(victim)
    write(str(folder / "file"))
    assert victim.read_text() == "old"
    assert not (folder / "file").is_symlink() and (folder / "file").stat().st_size > 0


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@writers
def test_what_is_no_file_is_not_replaced(write, make, tmp_path):
    path = tmp_path / "file"
    make(path)
    mode = path.lstat().st_mode
    with pytest.raises(RunError, match=r"cannot write .*file: it exists and is not a regular file"):
        write(str(path))
    assert path.lstat().st_mode == mode and os.listdir(tmp_path) == ["file"]


def test_a_name_that_is_taken_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_files.secrets, "token_hex", lambda _: "taken")
    (tmp_path / "file.taken.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(RunError, match=r"cannot write .*File exists"):
        safe_files.save_text(str(tmp_path / "file"), "new")
    assert not (tmp_path / "victim").exists() and (tmp_path / "file.taken.tmp").is_symlink()


def test_an_error_in_the_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), safe_files.new_file(str(path)) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_files_of_a_killed_save_are_removed_by_the_next_one(tmp_path):
    path = tmp_path / "checkpoint_last.pth.tar"
    (tmp_path / "checkpoint_last.pth.tar.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / "checkpoint_0001.pth.tar.0123abcd.tmp").write_bytes(b"of another name")
    tensor_files.save(str(path), {"step": 1})
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_0001.pth.tar.0123abcd.tmp", path.name]


# -- reading ---------------------------------------------------------------------------------------


def fifo(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def folder(path):
    path.mkdir()


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(2**40)


def nothing(path):
    pass


READERS = (safe_files.read_bytes, safe_files.read_text, safe_files.read_json_lines)


@pytest.mark.parametrize("make", [fifo, device, folder, sparse, nothing])
@pytest.mark.parametrize("read", READERS)
def test_what_cannot_be_read_is_answered_in_one_line(read, make, tmp_path):
    make(tmp_path / "file")
    with pytest.raises(UsageError, match=r"^cannot read .*file: ") as caught:
        read(str(tmp_path / "file"))
    assert "\n" not in str(caught.value)


def test_a_limit_is_the_largest_size_that_is_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert safe_files.read_bytes(str(path), 5) == b"12345"
    with pytest.raises(UsageError, match="more than 4 bytes"):
        safe_files.read_bytes(str(path), 4)


def test_links_are_followed_on_demand(tmp_path):
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert safe_files.read_bytes(str(tmp_path / "link")) == b"content"
    with pytest.raises(UsageError, match="cannot read"):
        safe_files.read_bytes(str(tmp_path / "link"), follow=False)


def test_a_name_with_a_zero_byte_is_one_line_of_error():
    with pytest.raises(UsageError, match="cannot read"):
        safe_files.open_regular("a\0b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        (b'{"a": 1}', {"a": 1}),
        ("[1]", {}),
        ("", {}),
        ("{", {}),
        ("[" * 100_000, {}),
        ('{"a":' * 100_000, {}),
        (b"\xff\xfe", {}),
    ],
)
def test_text_without_an_object_is_an_empty_one(text, expected):
    assert safe_files.json_object(text) == expected


def test_lines_that_hold_no_object_are_ignored(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b'{"a": 1}\n[2]\n\xff\n{"b": "\xe2\x80\xa8"}\n{"c"')
    assert safe_files.read_json_lines(str(path)) == [{"a": 1}, {"b": "\u2028"}]


# -- content ---------------------------------------------------------------------------------------


def test_plain_tensors_are_those_with_ordinary_content_under_a_name():
    plain = {"a": torch.zeros(2), "b": torch.tensor(1), "c": torch.zeros(0, 3)}
    others = {
        "meta": torch.zeros(2, device="meta"),
        "sparse": torch.zeros(2, 2).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8),
        "list": [1.0],
        1: torch.zeros(2),
    }
    assert tensor_files.plain_tensors({**plain, **others}) == plain
    assert tensor_files.plain_tensors([torch.zeros(2)]) == {}


def test_wrong_entries_are_those_that_are_missing_or_of_another_type():
    kinds = {"a": int, "b": dict, "c": str, "d": int}
    assert tensor_files.wrong_entries({"a": 1, "b": OrderedDict(), "d": True}, kinds) == ["c", "d"]
    assert tensor_files.wrong_entries([1], kinds) == list(kinds)


# -- a workdir from others -------------------------------------------------------------------------


def test_no_link_in_a_workdir_leads_a_run_out_of_it(tmp_path):
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("old")
    (run / "pictures").mkdir(parents=True)
    names = [f"{name}{end}" for end in ("", ".tmp") for name in ("args.json", "report.html")]
    names += ["encoder_last.pth.tar", "encoder_last.pth.tar.tmp", "checkpoint_last.pth.tar.tmp"]
    names += ["pictures/views_0000004.png", "pictures/neighbours_0000004.png"]
    for name in names:
        (run / name).symlink_to(victim)
    flags = "-a resnet8 --width 8 --snclr-dim 8 --snclr-mlp-dim 16 --bank-size 32 --topk 3 -j 0"
    flags += " --subset 32 -b 8 --epochs 1 --viz-freq 1 --eval-freq 0 --print-freq 1 --amp off"
    main_snclr.main([*flags.split(), "--workdir", str(run)])
    assert victim.read_text() == "old"
    written = [name for name in names if not name.endswith(".tmp")]
    assert [name for name in written if (run / name).is_symlink()] == []
    assert all(stat.S_ISREG((run / name).lstat().st_mode) for name in written)


def test_a_log_is_not_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text('{"step": 1}\n{"step": 5}\n')
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to(victim)
    log = Log(str(tmp_path / "run"), step=3, enabled=True)
    log.line({"step": 4})
    log.close()
    assert victim.read_text() == '{"step": 1}\n{"step": 5}\n'
    lines = safe_files.read_json_lines(str(tmp_path / "run/metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 4]


def test_a_lock_is_not_written_through_a_link_nor_into_a_fifo(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("old")
    (tmp_path / "x.lock").symlink_to(victim)
    with pytest.raises(RunError, match="cannot write"):
        lock.hold(str(tmp_path), "x")
    assert victim.read_text() == "old"
    os.mkfifo(tmp_path / "y.lock")
    with pytest.raises(RunError, match=r"cannot write .*: it is not a regular file"):
        lock.hold(str(tmp_path), "y")


@pytest.mark.parametrize("make", [fifo, device, folder])
def test_a_log_that_is_no_file_is_answered_in_one_line(make, tmp_path):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(UsageError, match=r"metrics.jsonl: "):
        Log(str(tmp_path), step=3, enabled=True)
