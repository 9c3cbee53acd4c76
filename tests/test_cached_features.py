"""The key of cached features changes with the images, wherever they are, and with nothing else."""

import importlib.util
import io
import os
import shutil
import tarfile

import numpy as np
import pytest
from sample_images import picture, save_folder
from test_sources import save_pets

from snclr import mean_std
from snclr.datasets import hugging_face, sources
from snclr.datasets import images as image_sets
from snclr.evaluation.features import key_of

SIZES = [(12, 10)] * 4


def png(seed):
    """All these files have one size: their pixels are not compressed."""
    buffer = io.BytesIO()
    picture(12, 10, seed=seed).save(buffer, "png", compress_level=0)
    return buffer.getvalue()


def folder(root):
    save_folder(root, SIZES)
    save_folder(root, SIZES, "val")
    for number, path in enumerate(sorted((root / "train").rglob("*.png"))):
        path.write_bytes(png(number))
    return root, root / "train/ant/000.png"


def file_list(root):
    _, changed = folder(root)
    paths = sorted((root / "train").rglob("*.png"))
    (root / "list.txt").write_text("".join(f"{path}\n" for path in paths))
    return root / "list.txt", changed


def tar(root):
    with tarfile.open(root / "shard.tar", "w") as archive:
        for number in range(4):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(png(number))
            archive.addfile(member, io.BytesIO(png(number)))
    return root / "shard.tar", root / "shard.tar"


def hf(root):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.disable_progress_bars()
    hugging_face._load.cache_clear()
    data, _ = folder(root / "photos")
    return f"hf:{data}", data / "train/ant/000.png"


def pets(root):
    save_pets(root)
    return root, next((root / "oxford-iiit-pet/images").glob("*.jpg"))


KINDS = {"folder": folder, "list": file_list, "tar": tar, "hf": hf, "pets": pets}


def key(data, kind, *flags):
    flags = ["--dataset", kind] * (kind == "pets") + [*flags]
    return key_of(sources.open_data(mean_std.parse([str(data), "-j", "0", *flags]))[0], "facts")


@pytest.fixture
def on_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(image_sets, "RESIDENT_LIMIT", 0)
    if importlib.util.find_spec("datasets"):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_file_changes_the_key_under_its_old_name(kind, tmp_path, on_disk):
    data, path = KINDS[kind](tmp_path)
    before = key(data, kind)
    assert key(data, kind) == before
    time = path.stat().st_mtime_ns
    os.utime(path, ns=(time, time + 1))
    later = key(data, kind)
    with path.open("ab") as file:
        file.write(b"\0" * 512)
    os.utime(path, ns=(time, time))
    longer = key(data, kind)
    assert len({before, later, longer}) == 3


def test_images_in_memory_are_known_by_their_pixels(tmp_path):
    data, path = folder(tmp_path / "one")
    before, stat = key(data, "folder"), path.stat()
    path.write_bytes(png(9))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and key(data, "folder") != before
    path.write_bytes(png(0))
    shutil.copytree(data, tmp_path / "two")
    assert key(tmp_path / "two", "folder") == before


def test_another_folder_with_the_same_names_has_another_key(tmp_path, on_disk):
    data, _ = folder(tmp_path / "one")
    shutil.copytree(data, tmp_path / "two")
    assert key(data, "folder") != key(tmp_path / "two", "folder")


@pytest.mark.parametrize(
    "flags",
    [
        "--mean .4 .4 .4 --std .2 .2 .2",
        "--grey-range 0 4095",
        "--channels 1",
        "--on-bad-image skip",
        "--subset 3",
    ],
)
def test_what_is_done_with_the_images_changes_the_key(flags, tmp_path, on_disk):
    data, _ = folder(tmp_path)
    assert key(data, "folder", *flags.split()) != key(data, "folder")


def test_other_versions_have_another_key(tmp_path, monkeypatch):
    data, _ = folder(tmp_path)
    before = key(data, "folder")
    versions = {"versions": {"timm": "another"}}
    monkeypatch.setattr("snclr.evaluation.features.versions_and_commit", lambda: versions)
    assert key(data, "folder") != before


def test_features_of_images_that_do_not_say_their_files_are_never_used_again():
    unknown = image_sets.EncodedImages(None, [], ([0.5], [0.5]))
    assert key_of(unknown) != key_of(unknown)


def test_images_in_another_order_have_another_key(tmp_path):
    train, _, _ = sources.open_data(mean_std.parse([str(folder(tmp_path)[0])]))
    assert key_of(train) != key_of(train.select(np.arange(4)[::-1].copy()))
