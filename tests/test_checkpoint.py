import contextlib
import copy
import errno
import io
import os
import pickle
import re
import struct
import zipfile
from argparse import Namespace

import pytest
import torch

from snclr import backbones, builder, optim, options
from snclr.running import checkpoint, safe_files, tensor_files
from snclr.running.errors import RunError, UsageError

TINY = (
    "--arch resnet8 --width 8 --snclr-dim 8 --snclr-mlp-dim 8 --bank-size 6 --topk 2 --batch-size 4"
)


class Run:
    """Model, optimiser and scaler as main_snclr.py saves and resumes them."""

    def __init__(self, flags="", images=10):
        self.args, self.images = options.parse(f"{TINY} {flags}".split()), images
        self.model = builder.build_model(self.args)
        self.optimizer = optim.build_optimizer(self.args.optimizer, self.model, self.args.wd)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)

    def train(self, steps=2):
        optim.set_learning_rate(self.optimizer, 0.01)
        for step in range(steps):
            views = torch.randn(2, 4, 3, 16, 16)
            loss, _ = self.model(list(views), torch.arange(4) + 4 * step, 0.9)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return self

    def pack(self):
        numbers = dict(args=self.args, epoch=1, step=7, images=self.images)
        return checkpoint.pack(self.model, self.optimizer, self.scaler, **numbers)

    def resume(self, path):
        settings = dict(args=self.args, on_resume=options.ON_RESUME, images=self.images)
        return checkpoint.resume(str(path), self.model, self.optimizer, self.scaler, **settings)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return Run().train().pack()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint_last.pth.tar"


def equal(a, b):
    """Whether nested dictionaries, lists and tensors are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def refused(function, *arguments, **keywords):
    """The one line of the usage error."""
    with pytest.raises(UsageError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def small():
    """A checkpoint of a few kilobytes, to damage in many ways."""
    tensors = {
        "module.a": torch.arange(300.0),
        "module.b": torch.arange(50),
        "module.c": torch.zeros(()),
    }
    return {
        "epoch": 1,
        "step": 2,
        "arch": "x",
        "state_dict": tensors,
        "optimizer": {},
        "args": {},
        "images": 3,
    }


# -- what a file holds -----------------------------------------------------------------------------


def test_file_has_the_documented_keys_and_only_plain_values(state, path):
    tensor_files.save(str(path), state)
    saved = torch.load(path, weights_only=True)
    documented = set(re.findall(r"'(\w+)'", checkpoint.__doc__))
    assert {"epoch", "step", "arch", "state_dict", "optimizer"} < documented == set(saved)
    assert (saved["epoch"], saved["step"], saved["arch"], saved["images"]) == (1, 7, "resnet8", 10)
    assert saved["args"]["topk"] == 2
    assert {"torch", "timm", "python", "snclr"} <= set(saved["provenance"]["versions"])
    assert equal(saved, state)


@pytest.mark.parametrize("arch, head", [("resnet8", "fc"), ("vit_tiny", "head")])
def test_state_has_moco_v3s_layout(arch, head, monkeypatch):
    monkeypatch.setitem(backbones.VITS, "vit_tiny", (192, 1, 3, backbones.Patches))
    keys = set(Run(f"--arch {arch}").pack()["state_dict"])
    parts = {"base_encoder", "momentum_encoder", "predictor", "memory_bank"}
    assert {tuple(key.split(".")[:2]) for key in keys} == {("module", part) for part in parts}
    assert {
        f"module.memory_bank.{name}" for name in ("features", "ids", "pointer", "filled")
    } <= keys
    assert {
        f"module.base_encoder.{head}.0.weight",
        f"module.momentum_encoder.{head}.0.weight",
    } <= keys
    assert "module.predictor.0.weight" in keys
    online = {key.removeprefix("module.base_encoder.") for key in keys if ".base_encoder." in key}
    assert online == {
        key.removeprefix("module.momentum_encoder.") for key in keys if ".momentum_encoder." in key
    }


@pytest.mark.parametrize("optimizer", options.OPTIMIZERS)
def test_resumed_run_equals_the_uninterrupted_one(optimizer, path):
    torch.manual_seed(0)
    run = Run(f"--optimizer {optimizer}").train()
    tensor_files.save(str(path), run.pack())
    resumed = Run(f"--optimizer {optimizer}")
    assert resumed.resume(path) == (7, [])
    ends = []
    for either in (run, resumed):
        torch.manual_seed(1)
        ends.append(either.train(steps=1).pack())
    assert equal(*ends)


# -- writing ---------------------------------------------------------------------------------------


class FullDisk(io.FileIO):
    """A file on a disk with room for so many bytes."""

    def __init__(self, path, room):
        super().__init__(path, "w")
        self.room = room

    def write(self, data):
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def fails_to_save(path, state, reason):
    before = path.read_bytes()
    with pytest.raises(RunError, match=reason) as caught:
        tensor_files.save(str(path), state)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("room", [0, 1000, 50_000])
def test_full_disk_leaves_the_old_file_and_nothing_beside_it(room, state, path, monkeypatch):
    tensor_files.save(str(path), small())
    monkeypatch.setattr(safe_files, "open", lambda name, mode: FullDisk(name, room), raising=False)
    fails_to_save(path, state, "No space left on device")


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_failed_flush_or_rename_leaves_the_old_file_and_nothing_beside_it(
    operation, state, path, monkeypatch
):
    tensor_files.save(str(path), small())

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, operation, fail)
    fails_to_save(path, state, "Input/output error")


def test_name_appears_only_after_the_bytes_are_on_the_disk(path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    tensor_files.save(str(path), small())
    assert order[:2] == ["fsync", "replace"]


def test_crash_while_writing_leaves_the_old_file(path, monkeypatch):
    tensor_files.save(str(path), small())
    before = path.read_bytes()

    def die(state, file):
        file.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with contextlib.suppress(KeyboardInterrupt):
        tensor_files.save(str(path), small())
    assert path.read_bytes() == before
    assert checkpoint.newest(str(path.parent)) == (str(path), [])


# -- damage ----------------------------------------------------------------------------------------


def records(path):
    """(first, length) of the bytes of each record of a checkpoint."""
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name, extra = struct.unpack_from("<HH", whole, info.header_offset + 26)
            yield info.header_offset + 30 + name + extra, info.file_size


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused(share, path):
    tensor_files.save(str(path), small())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert str(path) in refused(checkpoint.load, str(path))


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_flipped_bit_in_any_record_is_refused(share, path):
    tensor_files.save(str(path), small())
    whole = path.read_bytes()
    spans = [(first, length) for first, length in records(path) if length]
    assert len(spans) >= 5
    for first, length in spans:
        damaged = bytearray(whole)
        damaged[first + round(share * (length - 1))] ^= 1
        path.write_bytes(damaged)
        assert "checksum" in refused(checkpoint.load, str(path))


@pytest.mark.parametrize("mask", [0x08, 0x10, 0xFF])
def test_flipped_byte_of_the_directory_is_refused_or_changes_nothing(mask, path):
    """The directory of the zip, and what lies around the records (the rest is covered by their
    checksums).
    """
    tensor_files.save(str(path), small())
    whole = path.read_bytes()
    sound = checkpoint.load(str(path))
    inside = {offset for first, length in records(path) for offset in range(first, first + length)}
    around = [
        offset for offset in range(len(whole)) if offset not in inside and whole[offset] != ord("Z")
    ]  # padding
    assert len(around) > 1000
    wrong = {}
    for offset in around:
        damaged = bytearray(whole)
        damaged[offset] ^= mask
        path.write_bytes(damaged)
        try:
            if not equal(checkpoint.load(str(path)), sound):
                wrong[offset] = "other values, in silence"
        except UsageError:
            pass
        except Exception as error:
            wrong[offset] = repr(error)
    assert wrong == {}


def test_record_that_unfolds_to_something_huge_is_refused_unread(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    assert path.stat().st_size < 10**6 and "damaged" in refused(checkpoint.load, str(path))


@pytest.mark.parametrize(
    "changed",
    [
        {"args": []},
        {"step": "7"},
        {"step": -1},
        {"step": True},
        {"state_dict": {"a": 1}},
        {"format": "x"},
    ],
)
def test_file_with_content_of_another_kind_is_refused(changed, path):
    torch.save({**small(), **changed}, path)
    assert (
        next(iter(changed)).split("_dict")[0] in refused(checkpoint.load, str(path))
        or "a" in changed["state_dict"]
    )


def test_missing_file_is_refused(path):
    assert "No such file" in refused(checkpoint.load, str(path))


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"\x00" * 5000, pickle.dumps(small()["args"])]
)
def test_file_that_is_no_zip_is_refused(content, path):
    path.write_bytes(content)
    message = refused(checkpoint.load, str(path))
    assert str(path) in message and "not a checkpoint" in message


def test_zip_that_is_no_checkpoint_is_refused(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes/readme.txt", "hello")
    assert str(path) in refused(checkpoint.load, str(path))


@pytest.mark.parametrize(
    "content", [[1, 2], torch.zeros(3), {"state_dict": {}}, {"epoch": 1, "step": 2}]
)
def test_file_that_lacks_something_is_refused_and_what_it_lacks_is_named(content, path):
    torch.save(content, path)
    message = refused(checkpoint.load, str(path))
    needed = {"epoch", "step", "arch", "state_dict", "optimizer", "args", "images"}
    assert set(message.split("has no valid ")[1].split(", ")) == needed - set(
        content if isinstance(content, dict) else ()
    )


def test_file_of_a_later_format_is_refused(path):
    torch.save({**small(), "format": checkpoint.FORMAT + 1}, path)
    assert f"format {checkpoint.FORMAT + 1}" in refused(checkpoint.load, str(path))


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_malicious_file_is_refused_and_nothing_is_executed(path, tmp_path):
    target = tmp_path / "executed"
    torch.save({**small(), "provenance": Malicious(str(target))}, path)
    refused(checkpoint.load, str(path))
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # an unguarded load would have


def test_malicious_file_is_refused_without_advice_how_to_execute_it(path, tmp_path):
    torch.save({**small(), "provenance": Malicious(str(tmp_path / "executed"))}, path)
    message = refused(checkpoint.load, str(path))
    assert "weights_only" not in message and len(message) < 300


# -- what does not fit -----------------------------------------------------------------------------


@pytest.fixture
def run():
    return Run()


def test_missing_unexpected_and_misshapen_keys_are_named(run):
    tensors = run.pack()["state_dict"]
    tensors["module.extra.weight"] = torch.zeros(1)
    del tensors["module.predictor.0.weight"]
    tensors["module.base_encoder.conv1.weight"] = torch.zeros(8, 3, 5, 5)
    message = refused(checkpoint.load_strictly, "the file", tensors, run.model)
    assert "1 keys missing: module.predictor.0.weight" in message
    assert "1 keys unexpected: module.extra.weight" in message
    assert "module.base_encoder.conv1.weight (8, 3, 5, 5) instead of (8, 3, 3, 3)" in message


def test_many_keys_are_counted_and_the_first_are_named(run):
    message = refused(checkpoint.load_strictly, "the file", {}, run.model)
    assert (
        f"{len(run.model.state_dict())} keys missing: module.base_encoder.conv1.weight" in message
    )
    assert message.endswith(" ...") and len(message) < 300


def test_model_that_does_not_fit_is_not_changed(run):
    before = copy.deepcopy(run.model.state_dict())
    other = Run().pack()["state_dict"]
    del other["module.predictor.0.weight"]
    refused(checkpoint.load_strictly, "the file", other, run.model)
    assert equal(run.model.state_dict(), before)


OTHERS = {
    "arch": "resnet18",
    "method": "mocov2",
    "batch_size": 8,
    "seed": 5,
    "crop_min": 0.5,
    "blur": True,
}


def change(run, **settings):
    run.args = Namespace(**{**vars(run.args), **settings})


FIXED = [name for name, rule in options.ON_RESUME.items() if rule == "fixed"]
FREE = [name for name, rule in options.ON_RESUME.items() if rule == "free"]


@pytest.mark.parametrize("name", FIXED)
def test_changed_setting_of_a_resumed_run_is_named(name, state, path, run):
    tensor_files.save(str(path), state)
    old, new = getattr(run.args, name), OTHERS.get(name, "another")
    change(run, **{name: new})
    assert f"{name} {old!r} -> {new!r};" in refused(run.resume, path)


def test_what_images_a_run_sees_and_the_shapes_and_meaning_of_its_state_are_fixed():
    images, state = (
        {"seed", "batch_size", "dataset", "img_size", "crop_min", "blur"},
        {"arch", "method", "optimizer"},
    )
    shapes = {"bank_size", "snclr_dim", "snclr_mlp_dim", "width", "patch_size", "stop_grad_conv1"}
    assert images | state | shapes <= set(FIXED)


def test_all_changes_are_named_at_once(state, path, run):
    tensor_files.save(str(path), state)
    change(run, seed=5, batch_size=8)
    run.images = 11
    message = refused(run.resume, path)
    assert all(
        part in message for part in ("seed 0 -> 5", "batch_size 4 -> 8", "training images 10 -> 11")
    )


@pytest.mark.parametrize("name", ["topk", "snclr_t", "epochs", "lr"])
def test_setting_that_may_change_does_and_is_reported(name, state, path, run):
    tensor_files.save(str(path), state)
    old = getattr(run.args, name)
    change(run, **{name: 1})
    assert run.resume(path) == (7, [f"{name} {old!r} -> 1"])


@pytest.mark.parametrize("name", FREE)
def test_setting_that_changes_no_result_is_not_reported(name, state, path, run):
    tensor_files.save(str(path), state)
    change(run, **{name: 1})
    assert run.resume(path) == (7, [])


def test_file_from_before_a_setting_existed_can_be_resumed(state, path, run):
    args = {name: value for name, value in state["args"].items() if name not in ("blur", "topk")}
    tensor_files.save(str(path), {**state, "args": args})
    assert run.resume(path) == (7, [])


def test_changed_weight_decay_is_refused_or_used(state, path):
    tensor_files.save(str(path), state)
    run = Run("--wd 0.5")
    with contextlib.suppress(UsageError):
        run.resume(path)
        assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.5, 0.0]


def test_optimiser_state_that_does_not_fit_is_refused(state, path, run):
    short = {**state["optimizer"], "param_groups": state["optimizer"]["param_groups"][:1]}
    tensor_files.save(str(path), {**state, "optimizer": short})
    assert "optimiser" in refused(run.resume, path)


@pytest.mark.parametrize(
    "flags, change",
    [
        ("--bank-size 12", "bank_size 6 -> 12"),
        ("--snclr-dim 16", "snclr_dim 8 -> 16"),
        ("--width 16", "width 8 -> 16"),
    ],
)
def test_model_of_another_size_is_refused(flags, change, state, path):
    run = Run(flags)
    tensor_files.save(str(path), state)
    assert change in refused(run.resume, path)
    tensor_files.save(str(path), {**state, "args": vars(run.args)})  # they do not say so
    assert "another shape" in refused(run.resume, path)


@pytest.mark.parametrize(
    "key, value",
    [("param_groups", [None]), ("state", {0: {"exp_avg": torch.zeros(2)}}), ("state", None)],
)
def test_optimiser_state_of_another_kind_is_refused(key, value, state, path, run):
    tensor_files.save(str(path), {**state, "optimizer": {**state["optimizer"], key: value}})
    assert "optimiser" in refused(run.resume, path)


def test_other_images_under_the_same_numbers_are_refused(state, path, run):
    tensor_files.save(str(path), {**state, "fingerprint": "of these"})
    settings = dict(args=run.args, on_resume=options.ON_RESUME, images=run.images)
    message = refused(
        checkpoint.resume,
        str(path),
        run.model,
        run.optimizer,
        run.scaler,
        **settings,
        fingerprint="of those",
    )
    assert "other names or in another order" in message
    checkpoint.resume(
        str(path), run.model, run.optimizer, run.scaler, **settings, fingerprint="of these"
    )


# -- choosing --------------------------------------------------------------------------------------


def names_and_steps(folder):
    return {
        path.name.split("_")[1].split(".")[0]: torch.load(path)["step"]
        for path in folder.glob("checkpoint_*.tar")
    }


def write(folder, **steps):
    for name, step in steps.items():
        torch.save(
            {**small(), "step": step}, folder / f"checkpoint_{name.replace('_', '-')}.pth.tar"
        )


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_are_kept_the_newest_first(keep, path):
    for step in range(1, 6):
        tensor_files.save(str(path), {**small(), "step": step}, keep)
    names = ["last", "last-1", "last-2"][:keep]
    assert names_and_steps(path.parent) == dict(zip(names, (5, 4, 3), strict=False))


@pytest.mark.parametrize("crash_at", [1, 2, 3])
def test_a_crash_between_the_renames_leaves_the_one_before_or_the_new_one(
    crash_at, path, monkeypatch
):
    for step in range(1, 4):
        tensor_files.save(str(path), {**small(), "step": step}, 3)
    calls, replace = [], os.replace

    def die(source, target):
        calls.append(target)
        if len(calls) == crash_at:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        tensor_files.save(str(path), {**small(), "step": 4}, 3)
    newest, _ = checkpoint.newest(str(path.parent))
    assert checkpoint.load(newest)["step"] == 3


@pytest.mark.parametrize(
    "steps, expected",
    [
        ({"last": 5}, "last"),
        ({"0002": 4, "last": 5}, "last"),
        ({"0002": 5, "last": 5}, "last"),  # saved together
        ({"0002": 5, "last": 4}, "0002"),  # an older file was copied to 'last'
        ({"0002": 4, "0010": 6, "0004": 5}, "0010"),
        ({"last_1": 4, "0002": 2}, "last-1"),  # a crash between two renames
        ({"0009": 90, "0010": 100}, "0010"),
    ],
)
def test_checkpoint_of_the_latest_step_is_chosen_whatever_its_time(steps, expected, tmp_path):
    write(tmp_path, **steps)
    for age, path in enumerate(sorted(tmp_path.iterdir())):
        os.utime(path, (age, age))
    assert checkpoint.newest(str(tmp_path)) == (
        str(tmp_path / f"checkpoint_{expected}.pth.tar"),
        [],
    )


def test_a_run_that_goes_back_abandons_later_checkpoints(tmp_path):
    write(tmp_path, **{"0002": 2, "0004": 4, "last_1": 4, "last": 5})
    notes = checkpoint.abandon_later(str(tmp_path), 2)
    assert len(notes) == 3 and names_and_steps(tmp_path) == {"0002": 2}
    assert checkpoint.newest(str(tmp_path)) == (str(tmp_path / "checkpoint_0002.pth.tar"), [])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "no zip"])
def test_the_newest_readable_checkpoint_is_loaded_and_the_damaged_one_named_and_renamed(
    damage, tmp_path
):
    write(tmp_path, last=5, last_1=4, last_2=3)
    path = tmp_path / "checkpoint_last.pth.tar"
    whole = path.read_bytes()
    first, length = next(records(path))
    flipped = bytearray(whole)
    flipped[first + length // 2] ^= 4
    broken = {
        "truncated": whole[: len(whole) // 2],
        "flipped": flipped,
        "empty": b"",
        "no zip": b"hello",
    }[damage]
    path.write_bytes(broken)
    path_found, (note,) = checkpoint.newest(str(tmp_path))
    assert path_found == str(tmp_path / "checkpoint_last-1.pth.tar")
    assert str(path) in note and path_found in note and "\n" not in note
    assert (
        tmp_path / "checkpoint_last.pth.tar.damaged"
    ).read_bytes() == broken and not path.exists()
    tensor_files.save(str(path), {**small(), "step": 6}, 2)
    assert names_and_steps(tmp_path) == {
        "last": 6,
        "last-1": 4,
        "last-2": 3,
    }  # the readable one is not overwritten
    assert checkpoint.newest(str(tmp_path)) == (str(path), [])


def test_without_a_readable_checkpoint_no_run_starts_and_no_file_is_renamed(tmp_path):
    write(tmp_path, last=5, last_1=4)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:500])
    before = sorted(os.listdir(tmp_path))
    assert "no whole checkpoint" in refused(checkpoint.newest, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == before


def test_half_written_and_foreign_files_are_never_chosen(tmp_path):
    write(tmp_path, last=5)
    for name in (
        "checkpoint_last.pth.tar.tmp",
        "metrics.jsonl",
        "model.pth.tar",
        "checkpoint_best.txt",
    ):
        (tmp_path / name).touch()
    assert os.path.basename(checkpoint.newest(str(tmp_path))[0]) == "checkpoint_last.pth.tar"


@pytest.mark.parametrize("folder", [".", "new"])
def test_empty_or_absent_folder_has_no_newest(folder, tmp_path):
    assert checkpoint.newest(str(tmp_path / folder)) == (None, [])
