"""Images in zip files, and the parts of a data set that the names of files and folders tell."""

import io
import os
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from test_sources import content, encoded, open_data, refused, save_tar, save_webdataset

from snclr.datasets import shards
from snclr.datasets.archives import split_numbers
from snclr.running.errors import RunError

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


def save_zip(path, members, method=DEFLATED):
    """A zip file of the names, each a picture with the number of its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("empty/", b"")
        for number, name in enumerate(members):
            archive.writestr(name, encoded(number, "bmp"))
    return path


def same_images(images, numbers):
    expected = [np.frombuffer(encoded(number, "bmp"), np.uint8) for number in numbers]
    return len(images) == len(numbers) and all(
        np.array_equal(images.encoded(index)[1], content) for index, content in enumerate(expected)
    )


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_a_zip_file_is_read_in_place_and_its_folders_are_the_classes(tmp_path, method):
    names = ["top/b/0.bmp", "top/a/1.bmp", "top/a/deep/2.bmp", "top/readme.txt", "top/a/.3.bmp"]
    path = save_zip(tmp_path / "photos.ZIP", names, method)
    path.write_bytes(path.read_bytes().replace(b"top/a/", b"top\\a\\"))  # as Windows may write
    images, val, notes = open_data(path)
    assert isinstance(images.files, shards.Index) and val is None
    assert images.classes == ["a", "b"] and images.labels.tolist() == [1, 0, 0]
    assert same_images(images, [0, 1, 2])
    assert f"2 files in {path} are ignored: links, or not images of a known format" in notes
    assert images.paths.tolist() == [f"{path}/{name}" for name in names[:3]]
    again, _, _ = open_data(path)  # with the index
    assert same_images(again, [0, 1, 2]) and again.labels.tolist() == [1, 0, 0]
    assert same_images(images.select(np.array([2, 0])), [2, 0])
    assert sorted(os.listdir(tmp_path)) == ["photos.ZIP", "photos.ZIP.index.npz"]


def test_images_have_one_identity_in_tar_and_zip_files(tmp_path):
    members = [(f"{number}.bmp", encoded(number, "bmp")) for number in range(3)]
    save_tar(tmp_path / "x.tar", members)
    names = [name for name, _ in members]
    sets = [open_data(tmp_path / "x.tar")[0]]
    for method in (STORED, DEFLATED):
        sets.append(open_data(save_zip(tmp_path / f"{method}.zip", names, method))[0])
    assert len({images.fingerprint() for images in sets}) == 1
    for images in sets[1:]:
        assert all(map(torch.equal, content(images), content(sets[0])))
    assert open_data(tmp_path / "0.zip")[0].labels is None  # as for a tree


def test_several_zip_files_and_those_named_by_class(tmp_path):
    save_zip(tmp_path / "parts/1.zip", ["x/cat/0.bmp"])
    save_zip(tmp_path / "parts/2.zip", ["x/dog/0.bmp", "x/cat/1.bmp"])
    images, _, _ = open_data(tmp_path / "parts")
    assert [images.classes[label] for label in images.labels] == ["cat", "dog", "cat"]
    save_zip(tmp_path / "classes/ant.zip", ["0.bmp"])
    save_zip(tmp_path / "classes/bee.zip", ["0.bmp"])
    assert open_data(tmp_path / "classes")[0].classes == ["ant", "bee"]


def test_shards_are_read_once_and_hidden_files_are_none(tmp_path):
    save_webdataset(tmp_path / "shards", [0, 1])
    expected = len(open_data(tmp_path / "shards")[0])
    (tmp_path / "shards/latest").symlink_to(".")
    (tmp_path / "shards/._a.tar").write_bytes(b"as macOS writes")
    assert len(open_data(tmp_path / "shards")[0]) == expected


@pytest.mark.parametrize(
    "names, splits",
    [
        (["train-000.tar", "val-000.tar"], [0, 1]),
        (["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"], [0, 1]),
        (["training.tar", "validation-1.tar", "TEST.tar", "more.tar"], [0, 1, 2, 0]),
        (["train-000.tar", "train-001.tar"], [0, 0]),
        (["val-000.tar", "val-001.tar", "shard-0.tar"], [0, 0, 0]),
        (["trainee.tar", "values.tar", "latest.tar"], [0, 0, 0]),
        (["train", "test", "train"], [0, 2, 0]),
        (["", ""], [0, 0]),
    ],
)
def test_names_of_splits(names, splits):
    assert split_numbers(names) == splits


def test_a_flat_folder_with_tars_for_training_and_validation(tmp_path):
    save_webdataset(tmp_path / "t", [1, 0, 1, 0])
    save_webdataset(tmp_path / "v", [0, 1, 1], first=4)
    for folder, split in (("t", "train"), ("v", "val")):
        for number in range(2):
            source = tmp_path / f"{folder}/shard-00000{number}.tar"
            (tmp_path / "all").mkdir(exist_ok=True)
            source.rename(tmp_path / f"all/{split}-{number}.tar")
    for _ in range(2):  # without and with the index
        train, val, notes = open_data(tmp_path / "all")
        assert train.labels.tolist() == [1, 0, 1, 0] and val.labels.tolist() == [0, 1, 1]
        assert torch.equal(val.image(1).int(), content(train)[0]) is False
        assert (
            f"{tmp_path}/all has 7 images; those for train, 4, are recognised by the names of its "
            "files or folders" in notes
        )
    images, _, _ = open_data(tmp_path / "all", "--val", tmp_path / "all/val-0.tar")
    assert len(images) == 4
    (tmp_path / "all/val-0.tar").unlink()
    (tmp_path / "all/val-1.tar").unlink()
    assert not any("recognised" in note for note in open_data(tmp_path / "all")[2])


def test_a_zip_file_with_folders_for_training_and_validation(tmp_path):
    names = [
        f"set/{split}/{label}/{number}.bmp"
        for split in ("train", "val", "test")
        for number, label in enumerate(("bee", "ant", "bee"))
    ]
    train, val, _ = open_data(save_zip(tmp_path / "x.zip", names))
    assert train.classes == ["ant", "bee"]
    assert train.labels.tolist() == val.labels.tolist() == [1, 0, 1]
    assert same_images(train, [0, 1, 2]) and same_images(val, [3, 4, 5])


def change(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def encrypted(path):
    entry = b"PK\x01\x02\x14\x03\x14\x00"  # signature and versions, before the flags
    change(path, entry + b"\x00", entry + b"\x01")


def other_method(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("0.bmp", encoded(0))


def leading_out(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/../../0.bmp", encoded(0))


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def without_headers(path):
    change(path, b"PK\x03\x04", b"PK\x03\x05")


def of_a_later_version(path):
    change(path, b"PK\x01\x02\x14\x03\x14\x00", b"PK\x01\x02\x14\x03\xff\x00")


def of_an_impossible_size(path):
    content = save_zip(path, ["0.bmp"], STORED).read_bytes()
    start = content.rindex(b"PK\x01\x02")
    entry, end = bytearray(content[start:-22]), bytearray(content[-22:])
    entry[24:28] = b"\xff" * 4  # the size is in a further field
    entry[30:32] = struct.pack("<H", 12)
    entry += struct.pack("<HHQ", 1, 8, 2**63)
    end[12:16] = struct.pack("<I", struct.unpack("<I", end[12:16])[0] + 12)
    path.write_bytes(content[:start] + entry + end)


def without_a_name(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", b"")
    change(path, b"\x01\x00\x00\x00x", b"\x00\x00\x00\x00x")


@pytest.mark.parametrize(
    "damage, reason",
    [
        (of_a_later_version, "zip file version 25.5"),
        (of_an_impossible_size, "0.bmp has an impossible size"),
        (without_a_name, "no image in the 1 zip files"),
        (encrypted, "0.bmp is encrypted"),
        (other_method, "0.bmp is compressed by another method than deflate"),
        (leading_out, "a/../../0.bmp leads out of it"),
        (cut, "File is not a zip file"),
        (without_headers, "0.bmp has no header"),
        (lambda path: save_zip(path, ["x.txt"]), "no image in the 1 zip files"),
    ],
)
def test_zip_files_that_cannot_be_read_are_refused_in_one_line(tmp_path, damage, reason):
    path = save_zip(tmp_path / "x.zip", ["0.bmp", "1.bmp"])
    damage(path)
    assert reason in refused(path)


@pytest.mark.parametrize("size", [2**40, 2**62, 2**80])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
def test_a_tar_file_with_impossible_sizes_is_refused_in_one_line(tmp_path, size, kind):
    member = tarfile.TarInfo("0.bmp")
    member.size, member.type = size, kind
    (tmp_path / "x.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert "x.tar cannot be read" in refused(tmp_path / "x.tar")


def test_hard_links_are_images_and_other_links_are_counted(tmp_path):
    (tmp_path / "0.bmp").write_bytes(encoded(0, "bmp"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/0.bmp").write_bytes(encoded(1, "bmp"))
    (tmp_path / "a/1.bmp").symlink_to("0.bmp")
    os.link(tmp_path / "a/0.bmp", tmp_path / "a/2.bmp")
    with tarfile.open(path := tmp_path / "x.tar", "w") as archive:
        for name in ("0.bmp", "a/0.bmp", "a/1.bmp", "a/2.bmp"):
            archive.add(tmp_path / name, name)
    images, _, notes = open_data(path)
    assert same_images(images, [0, 1, 1]) and images.paths[2] == f"{path}/a/2.bmp"
    assert f"1 files in {path} are ignored: links, or not images of a known format" in notes
    with tarfile.open(path, "w") as archive:
        archive.add(tmp_path / "a/1.bmp", "1.bmp")
    assert "1 files in them are no images, or links out of them" in refused(path)
    member = tarfile.TarInfo("0.bmp")
    member.type = tarfile.GNUTYPE_SPARSE
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert "0.bmp is sparse: pack it without tar --sparse" in refused(path)


def test_a_bomb_and_damaged_bytes_are_unreadable_images(tmp_path, monkeypatch):
    monkeypatch.setattr("snclr.datasets.images.RESIDENT_LIMIT", 0)
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", DEFLATED) as archive:
        archive.writestr("0.bmp", encoded(0, "bmp"))
        archive.writestr("1.bmp", bytes(2**22))
    images, _, _ = open_data(path)
    small = len(encoded(0, "bmp"))
    with pytest.raises(RunError, match="cannot read image of 4194304 bytes at offset"):
        images.image(1)  # no BMP
    sizes = images.files.size
    sizes[1] = small  # the member unfolds to more than it claims
    with pytest.raises(RunError, match=f"it does not unpack to {small} bytes"):
        images.encoded(1)
    sizes[1] = 2**40
    with pytest.raises(RunError, match="1099511627776 bytes are more than"):
        images.encoded(1)
    with open(path, "r+b") as file:
        file.seek(images.files.offset[0])
        file.write(b"\xff" * 8)
    with pytest.raises(RunError, match=f"cannot read image of {small} bytes .*invalid block type"):
        images.encoded(0)


def test_an_index_of_the_time_before_zip_files_is_made_again(tmp_path):
    save_webdataset(tmp_path, [0, 1, 0, 1])
    open_data(tmp_path)
    with np.load(tmp_path / "snclr_index.npz") as file:
        fields = {name: file[name] for name in file if name not in ("packed", "split", "member")}
    buffer = io.BytesIO()
    np.savez(buffer, **fields)
    (tmp_path / "snclr_index.npz").write_bytes(buffer.getvalue())
    assert open_data(tmp_path)[0].labels.tolist() == [0, 1, 0, 1]
    with np.load(tmp_path / "snclr_index.npz") as file:
        assert "packed" in file
