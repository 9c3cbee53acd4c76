import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sample_images import picture, rgb, save_folder
from test_ranks import SMALL, start_ranks, write_images

import main_snclr
from snclr import augment, choices, mean_std, options
from snclr.choices import IMAGENET
from snclr.datasets import embedded, shards, sources
from snclr.datasets import images as image_sets
from snclr.datasets.files import FileImages
from snclr.datasets.images import ResidentImages
from snclr.datasets.split import class_share, hold_out, image_keys
from snclr.evaluation import options as lincls_options
from snclr.running.errors import RunError, UsageError


def open_data(*flags):
    """Training set, validation set and notes, through the flags as a user gives them."""
    return sources.open_data(mean_std.parse([str(flag) for flag in flags]))


def refused(*flags):
    """The one line of the usage error."""
    with pytest.raises(UsageError) as caught:
        open_data(*flags)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 400
    return message


def content(images):
    """All images as (3, H, W) int tensors, however they are kept."""
    if isinstance(images, ResidentImages):
        return [image.int() for image in images.images]
    return [images.image(index).int() for index in range(len(images))]


# -- folders ---------------------------------------------------------------------------------------


def test_a_folder_gets_its_classes_labels_and_paths_in_sorted_order(tmp_path):
    for name in (
        "train/bee/2.png",
        "train/bee/deep/er/1.PNG",
        "train/ant/10.png",
        "train/ant/9.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(8 + len(name), 8).save(tmp_path / name)
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    (tmp_path / "train/readme.md").write_text("no class")
    picture(8, 8).save(tmp_path / "train/0.png")  # in no class
    train, val, _ = open_data(tmp_path)
    assert train.classes == ["ant", "bee"] and train.labels.tolist() == [0, 0, 1, 1] and val is None
    assert len(open_data(tmp_path, "--val", f"{tmp_path}/train/")[1]) == 4
    names = [str(Path(path).relative_to(tmp_path / "train")) for path in train.paths]
    assert names == ["ant/10.png", "ant/9.png", "bee/2.png", "bee/deep/er/1.PNG"]


def test_equal_small_images_become_resident_and_keep_number_and_label(tmp_path):
    images, _, _ = open_data(save_folder(tmp_path, [(12, 10)] * 5))
    assert isinstance(images, ResidentImages) and len(images) == 5
    assert images.labels.tolist() == [0, 0, 0, 1, 1]
    for position, number in enumerate([0, 2, 4, 1, 3]):  # even ones are ants
        assert torch.equal(images.images[position].int(), rgb(picture(12, 10, seed=number)))


@pytest.mark.parametrize("bad", [False, True])
def test_worker_processes_decode_resident_images_as_one_process_does(tmp_path, monkeypatch, bad):
    folder = save_folder(tmp_path, [(12, 10)] * 40)
    if bad:
        (tmp_path / "train/ant/006.png").write_bytes(b"no image")
    skip = [folder, "--on-bad-image", "skip", "--workers"]
    expected, _, _ = open_data(*skip, 0)
    monkeypatch.setattr(image_sets, "PART", 3 * 12 * 10 * 4)  # 4 images, so 10 parts
    workers = Mock(side_effect=image_sets.WorkerBatches)
    monkeypatch.setattr(image_sets, "WorkerBatches", workers)
    actual, _, _ = open_data(*skip, 2)
    assert workers.call_args.args[2] == 2
    assert isinstance(actual, ResidentImages) and torch.equal(actual.images, expected.images)
    assert (actual.errors is None) != bad
    if bad:
        assert list(actual.errors) == list(expected.errors) and "006.png" in actual.errors[3]
        with pytest.raises(UsageError, match=r"006\.png.*or add --on-bad-image skip"):
            open_data(folder, "--workers", 2)
    save_folder(tmp_path, [(12, 11)], classes=("cat",))
    assert isinstance(open_data(*skip, 2)[0], FileImages)


@pytest.mark.parametrize("sizes", [[(12, 10)] * 4 + [(12, 11)], [(10, 12), (12, 10)]])
def test_images_of_mixed_sizes_stay_files(tmp_path, sizes):
    images, _, _ = open_data(save_folder(tmp_path, sizes))
    assert isinstance(images, FileImages) and len(images) == len(sizes)


def test_a_start_that_ends_early_exits_with_its_own_code(tmp_path):
    """An image of another size ends the decoding; Python aborts if a thread still decodes."""
    folder = tmp_path / "train" / "ant"
    folder.mkdir(parents=True)
    for number in range(40):
        size = (700, 500 + number)
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{number:02}.jpg")
    program = """if True:  # one import of torch for all tries
        import os, sys
        from snclr import mean_std
        from snclr.datasets import sources
        args = mean_std.parse(sys.argv[1:])
        for _ in range(5):
            child = os.fork()
            if not child:
                sources.open_data(args)
                sys.exit(2)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["2"] * 5


@pytest.mark.parametrize(
    "limit, kind", [(5 * 12 * 10 * 3, ResidentImages), (5 * 12 * 10 * 3 - 1, FileImages)]
)
def test_equal_images_beyond_the_limit_stay_files(tmp_path, monkeypatch, limit, kind):
    monkeypatch.setattr("snclr.datasets.images.RESIDENT_LIMIT", limit)
    images, _, _ = open_data(save_folder(tmp_path, [(12, 10)] * 5))
    assert isinstance(images, kind)


def test_a_folder_with_validation_gives_both_with_the_same_classes(tmp_path):
    save_folder(save_folder(tmp_path, [(12, 10)] * 5), [(12, 10)] * 3, split="val")
    picture().save(tmp_path / "train/1.png")
    train, val, notes = open_data(tmp_path)
    assert f"1 images in {tmp_path}/train are in no class folder and are ignored" in notes
    assert len(train) == 5 and len(val) == 3 and val.classes == train.classes == ["ant", "bee"]


def no_train(root):
    (root / "other").mkdir()


def no_image(root):
    (root / "train" / "ant").mkdir(parents=True)
    (root / "train" / "ant" / "notes.txt").write_text("no image")


def images_without_class(root):
    (root / "train").mkdir()
    picture().save(root / "train" / "1.png")


def other_classes(root):
    save_folder(root, [(8, 8)] * 4)
    save_folder(root, [(8, 8)] * 4, split="val", classes=("ant", "cow"))


def missing_class(root):
    save_folder(root, [(8, 8)] * 4)
    save_folder(root, [(8, 8)] * 4, split="val", classes=("ant",))


def unreadable_image(root):
    save_folder(root, [(8, 8)] * 4)
    (root / "train" / "bee" / "broken.png").write_text("no image")


@pytest.mark.parametrize(
    "prepare, line",
    [
        (no_train, r"no folder train/; expected .*/train/<class>/<image>"),
        (no_image, r"no image in .*train; expected .*train/<class>/<image>"),
        (images_without_class, r"no image in .*train; expected .*train/<class>/<image>"),
        (other_classes, r"must have the same classes; only one of the two has bee, cow$"),
        (missing_class, r"must have the same classes; only one of the two has bee$"),
        (unreadable_image, r"cannot read image .*broken\.png"),
    ],
)
def test_a_folder_of_another_form_is_a_usage_error_in_one_line(tmp_path, prepare, line):
    prepare(tmp_path)
    assert re.search(line, refused(tmp_path, "--dataset", "folder"))


# -- CIFAR-10 --------------------------------------------------------------------------------------


def save_cifar10(root, images_per_file=4):
    """Tiny files in the layout of the original: rows of 3072 bytes, channel after channel."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    content = {}
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        rows, labels = (
            rng.integers(0, 256, (images_per_file, 3072), dtype=np.uint8),
            rng.integers(0, 10, images_per_file),
        )
        content[name] = rows, labels
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": labels.tolist()}))
    classes = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    return content, classes


def test_cifar10_is_read_from_torchvisions_files(tmp_path, monkeypatch):
    content, classes = save_cifar10(tmp_path)
    monkeypatch.setattr(
        torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: os.path.exists(path)
    )
    train, val, _ = open_data(tmp_path, "--dataset", "cifar10")
    for images, names in (
        (train, [f"data_batch_{number}" for number in range(1, 6)]),
        (val, ["test_batch"]),
    ):
        rows = np.concatenate([content[name][0] for name in names])
        assert isinstance(images, ResidentImages) and images.classes == classes
        assert np.array_equal(images.images.numpy(), rows.reshape(-1, 3, 32, 32))
        assert (
            images.labels.tolist() == np.concatenate([content[name][1] for name in names]).tolist()
        )


@pytest.mark.parametrize("state", ["absent", "damaged"])
def test_absent_or_damaged_cifar10_is_a_usage_error(tmp_path, state):
    if state == "damaged":
        save_cifar10(tmp_path)  # of the right form, with wrong checksums
    assert re.search(
        r"no complete CIFAR10 in .*--download", refused(tmp_path, "--dataset", "cifar10")
    )


def test_the_embedded_set_opens_without_a_folder():
    train, val, _ = open_data()
    assert isinstance(train, ResidentImages) and len(train) == 5000 and len(val) == 1000
    assert train.classes == val.classes == list(embedded.CLASSES)
    torch.testing.assert_close(
        (train.mean, train.std), tuple(map(torch.tensor, choices.MEAN_STD["embedded"]))
    )


# -- trees without labels --------------------------------------------------------------------------


def save_tree(root):
    """Five images in a tree of mixed depth, three other files, and hidden ones, not counted."""
    names = ["z.png", "a/1.PNG", "a/b/10.png", "a/b/2.jpg", "c/3.webp"]
    for number, name in enumerate([*names, ".hidden.png", ".cache/4.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(10, 9 + number, seed=number).save(root / name)
    for name in ("readme.txt", "a/labels.csv", "c/3.webp.part"):
        (root / name).write_text("no image")
    return names


def test_a_tree_is_read_recursively_in_sorted_order_and_other_files_are_counted(tmp_path):
    names = save_tree(tmp_path)
    images, val, notes = open_data(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in images.paths] == [
        "z.png",
        "a/1.PNG",
        "a/b/10.png",
        "a/b/2.jpg",
        "c/3.webp",
    ]
    assert set(names) == {os.path.relpath(path, tmp_path) for path in images.paths}
    assert images.labels is None and val is None
    ignored = f"3 files in {tmp_path} are ignored: not images of a known format"
    assert f"{ignored} (1 .txt, 1 .csv, 1 .part)" in notes
    assert any("no labels" in note for note in notes)


def test_a_train_folder_without_classes_is_a_tree(tmp_path):
    (tmp_path / "train").mkdir()
    picture().save(tmp_path / "train/1.png")
    (tmp_path / "elsewhere.png").write_bytes(b"not looked at")
    images, _, _ = open_data(tmp_path)
    assert len(images) == 1 and images.labels is None


def test_a_tree_takes_labels_from_a_file_in_the_order_of_its_paths(tmp_path):
    save_tree(tmp_path / "images")
    save_tree(tmp_path / "test")
    (tmp_path / "labels.txt").write_text("10\n9\n-1\n10\n\n")
    (tmp_path / "test_labels.txt").write_text("9\n9\n9\n10\n9")
    flags = [
        "--labels",
        tmp_path / "labels.txt",
        "--val",
        tmp_path / "test",
        "--val-labels",
        tmp_path / "test_labels.txt",
    ]
    train, val, _ = open_data(tmp_path / "images", *flags)
    assert train.classes == val.classes == ["9", "10"]  # numbers in the order of numbers
    assert train.labels.tolist() == [1, 0, -1, 1, -1] and val.labels.tolist() == [0, 0, 0, 1, 0]
    assert train.labelled().labels.tolist() == [1, 0, 1] and len(train.labelled()) == 3
    assert train.labelled().paths[2] == train.paths[3]


def test_a_share_of_many_classes_is_that_of_each_class():
    labels = torch.from_numpy(np.random.default_rng(0).integers(-1, 40, 500))
    keys = image_keys(3, 500)
    chosen = class_share(labels, [*range(40)], 0.3, keys, both_sides=True)
    for label in range(40):
        members = np.flatnonzero(labels == label)
        count = min(max(round(0.3 * len(members)), 1), len(members) - 1)
        smallest = sorted(members, key=lambda number: keys[number].item())[:count]
        assert sorted(smallest) == [number for number in members if chosen[number]]
    assert not chosen[labels < 0].any()


def test_classes_of_equal_numbers_are_in_the_order_of_their_names(tmp_path):
    names = ["1".zfill(digits) for digits in range(6, 0, -1)]
    train, _, _ = open_data(save_folder(tmp_path, [(12, 10)] * 6, classes=names[::-1]))
    assert train.classes == names


@pytest.mark.parametrize("count", [0, 4, 6])
def test_a_labels_file_of_the_wrong_length_is_refused(tmp_path, count):
    save_tree(tmp_path / "images")
    (tmp_path / "labels.txt").write_text("1\n" * count)
    message = refused(tmp_path / "images", "--labels", tmp_path / "labels.txt")
    assert f"labels.txt has {count} labels for the 5 images of" in message


def test_a_byte_order_mark_is_no_part_of_a_path_or_label(tmp_path):
    save_tree(tmp_path)
    for name, lines in {"list": "z.png\r\nz.png", "labels": "cat\r\ncat"}.items():
        (tmp_path / f"{name}.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    train, _, _ = open_data(tmp_path / "list.txt", "--labels", tmp_path / "labels.txt")
    assert train.classes == ["cat"] and len(train) == 2


def test_labels_can_be_ignored(tmp_path):
    save_folder(save_folder(tmp_path, [(12, 10)] * 5), [(12, 10)] * 3, split="val")
    train, val, notes = open_data(tmp_path, "--labels", "none")
    assert (
        len(train) == 5
        and train.labels is None
        and val is None
        and any("no labels" in note for note in notes)
    )


# -- lists -----------------------------------------------------------------------------------------


def test_a_list_names_paths_relative_to_itself_or_absolute_in_its_own_order(tmp_path):
    save_tree(tmp_path / "deep/images")
    (tmp_path / "deep/list.txt").write_text(
        f"images/c/3.webp\n\nimages/a/b/2.jpg\n{tmp_path}/deep/images/z.png\n"
    )
    images, _, _ = open_data(tmp_path / "deep/list.txt")
    assert [os.path.basename(path) for path in images.paths] == [
        "3.webp",
        "2.jpg",
        "z.png",
    ] and images.labels is None
    assert torch.equal(images.image(2).int(), rgb(picture(10, 9, seed=0)))


def test_lists_with_labels_and_validation(tmp_path):
    save_tree(tmp_path)
    for name, lines in {
        "train": "z.png\na/1.PNG\na/b/2.jpg",
        "val": "c/3.webp\na/b/10.png",
    }.items():
        (tmp_path / f"{name}.txt").write_text(lines)
    (tmp_path / "train_labels.txt").write_text("dog\ncat\ndog")
    (tmp_path / "val_labels.txt").write_text("cat\ndog\n")
    flags = ["--val", tmp_path / "val.txt", "--val-labels", tmp_path / "val_labels.txt"]
    train, val, notes = open_data(
        tmp_path / "train.txt", "--labels", tmp_path / "train_labels.txt", *flags
    )
    assert (
        train.classes == ["cat", "dog"]
        and train.labels.tolist() == [1, 0, 1]
        and val.labels.tolist() == [0, 1]
    )
    assert notes == []


@pytest.mark.parametrize(
    "lines, named",
    [("", "lists no image"), ("z.png\nnowhere.png\n", "nowhere.png, which does not exist")],
)
def test_a_list_of_missing_files_is_refused(tmp_path, lines, named):
    save_tree(tmp_path)
    (tmp_path / "list.txt").write_text(lines)
    assert named in refused(tmp_path / "list.txt")


# -- tar shards ------------------------------------------------------------------------------------


def encoded(number, format="png"):
    """The bytes of a picture, no two of one size."""
    buffer = io.BytesIO()
    picture(10, 9 + number, seed=number).save(buffer, format)
    return buffer.getvalue()


def save_tar(path, members):
    """A tar file of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def save_webdataset(folder, labels, first=0):
    """Two shards of samples with an image, a class and a text each."""
    samples = [
        (f"{first + n:06}.png", encoded(first + n), f"{first + n:06}.cls", str(label))
        for n, label in enumerate(labels)
    ]
    for number, part in enumerate((samples[:2], samples[2:])):
        members = []
        for image, content, cls, label in part:
            members += [
                (cls, label.encode()),
                (image, content),
                (image.replace(".png", ".txt"), b"a caption"),
            ]
        save_tar(folder / f"shard-{number:06}.tar", members)


def test_webdataset_shards_give_images_and_labels_and_count_the_rest(tmp_path):
    save_webdataset(tmp_path / "train", [10, 9, 10, 9, 9])
    save_webdataset(tmp_path / "val", [9, 10, 9], first=5)
    train, val, notes = open_data(tmp_path)
    assert isinstance(train.files, shards.Index) and train.classes == val.classes == ["9", "10"]
    assert train.labels.tolist() == [1, 0, 1, 0, 0] and val.labels.tolist() == [0, 1, 0]
    for index, image in enumerate(content(train)):
        assert torch.equal(image, rgb(picture(10, 9 + index, seed=index)))
    assert torch.equal(val.image(2).int(), rgb(picture(10, 16, seed=7)))
    assert (
        f"5 files in {tmp_path}/train are ignored: links, or not images of a known format" in notes
    )


def test_one_tar_a_class_as_imagenet_ships_also_inside_one_tar(tmp_path):
    names = {"n02": [0, 1], "n01": [2]}
    for stem, numbers in names.items():
        save_tar(
            tmp_path / f"a/{stem}.tar",
            [(f"{stem}_{number}.JPEG", encoded(number, "jpeg")) for number in numbers],
        )
    inner = [(f"{stem}.tar", (tmp_path / f"a/{stem}.tar").read_bytes()) for stem in names]
    save_tar(tmp_path / "b/ILSVRC2012_img_train.tar", [("LICENSE", b"terms"), *inner])
    outside, _, _ = open_data(tmp_path / "a")
    inside, _, notes = open_data(tmp_path / "b/ILSVRC2012_img_train.tar")
    assert outside.classes == inside.classes == ["n01", "n02"]
    assert outside.labels.tolist() == [0, 1, 1] and inside.labels.tolist() == [
        1,
        1,
        0,
    ]  # n02 comes first in the tar
    assert all(
        torch.equal(a, content(outside)[index])
        for a, index in zip(content(inside), (1, 2, 0), strict=True)
    )
    assert any(note.startswith("1 files") for note in notes)


def test_numbered_shards_without_classes_have_no_labels_and_take_a_file(tmp_path):
    for number in range(2):
        save_tar(
            tmp_path / f"part-{number}.tar",
            [(f"image{number}{n}.png", encoded(n)) for n in range(2)],
        )
    (tmp_path / "labels.txt").write_text("a\nb\nb\na\n")
    images, _, _ = open_data(tmp_path)
    assert len(images) == 4 and images.labels is None
    images, _, _ = open_data(tmp_path, "--labels", tmp_path / "labels.txt")
    assert images.labels.tolist() == [0, 1, 1, 0]
    assert "labels for the 4 images" in refused(
        tmp_path, "--labels", save_lines(tmp_path / "short.txt", 3)
    )


def save_lines(path, count):
    path.write_text("1\n" * count)
    return path


def test_the_index_is_built_once_and_rebuilt_when_a_shard_changes(tmp_path, monkeypatch):
    save_webdataset(tmp_path, [0, 1, 0, 1])
    scans, scan = [], shards._scan
    monkeypatch.setattr(shards, "_scan", lambda *arguments: scans.append(1) or scan(*arguments))
    first, _, _ = open_data(tmp_path)
    again, _, _ = open_data(tmp_path)
    assert len(scans) == 1 and (tmp_path / "snclr_index.npz").exists()
    assert all(torch.equal(a, b) for a, b in zip(content(first), content(again), strict=True))
    assert first.labels.tolist() == again.labels.tolist() == [0, 1, 0, 1]
    save_webdataset(tmp_path, [1, 1, 1, 0, 1])
    changed, _, _ = open_data(tmp_path)
    assert len(scans) == 2 and changed.labels.tolist() == [1, 1, 1, 0, 1]
    kept = (tmp_path / "snclr_index.npz").read_bytes()
    damages = [kept[: len(kept) // 2], kept[:200] + bytes([kept[200] ^ 1]) + kept[201:], b""]
    entry = kept.index(b"PK\1\2")
    damages += [kept[: entry + 8] + b"\1" + kept[entry + 9 :]]  # claims to be encrypted
    for name, value in (("classes", [0, 1]), ("classes", [["0", "1"]]), ("ignored", ["5", "6"])):
        buffer = io.BytesIO()
        np.savez(buffer, **{**np.load(io.BytesIO(kept)), name: np.array(value)})
        damages.append(buffer.getvalue())
    for damaged in damages:
        (tmp_path / "snclr_index.npz").write_bytes(damaged)
        again, _, _ = open_data(tmp_path)
        assert again.labels.tolist() == [1, 1, 1, 0, 1]


def test_the_index_goes_to_the_workdir_where_the_shards_may_not_be_written_beside(
    tmp_path, monkeypatch
):
    save_webdataset(tmp_path / "data", [0, 1, 0, 1])
    replace = os.replace

    def read_only(source, target):
        if str(target).startswith(str(tmp_path / "data")):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", read_only)
    args = mean_std.parse([str(tmp_path / "data")])
    args.workdir = str(tmp_path / "work")
    scans, scan = [], shards._scan
    monkeypatch.setattr(shards, "_scan", lambda *arguments: scans.append(1) or scan(*arguments))
    for _ in range(2):
        images, _, _ = sources.open_data(args)
        assert images.labels.tolist() == [0, 1, 0, 1]
    assert len(scans) == 1 and os.listdir(tmp_path / "work") == ["index_data.npz"]


def truncated(folder):
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:700])
    return "shard-000001.tar cannot be read"


def foreign(folder):
    (folder / "shard-000001.tar").write_bytes(b"no tar file" * 100)
    return "shard-000001.tar cannot be read"


def compressed(folder):
    for path in list(folder.glob("*.tar")):
        path.rename(path.with_suffix(".tar.gz"))
    return "is compressed: unpack it"


def without_images(folder):
    for path in folder.glob("*.tar"):
        save_tar(path, [("readme.txt", b"nothing")])
    return "no image in the 2 tar files"


@pytest.mark.parametrize("damage", [truncated, foreign, compressed, without_images])
def test_shards_that_cannot_be_read_are_refused_in_one_line(tmp_path, damage):
    save_webdataset(tmp_path, [0, 1, 0, 1])
    assert damage(tmp_path) in refused(tmp_path, "--dataset", "shards")


def test_a_damaged_image_in_a_shard_is_named_by_shard_and_offset(tmp_path):
    save_webdataset(tmp_path, [0, 1, 0, 1])
    images, _, _ = open_data(tmp_path)
    index = images.files
    path, offset = str(index.files[1]), int(index.offset[3])
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(bytes(60))
    with pytest.raises(
        RunError, match=rf"cannot read image of \d+ bytes at offset {offset} in .*shard-000001\.tar"
    ):
        images.image(3)


# -- torchvision's sets ----------------------------------------------------------------------------


def save_cifar100(root):
    folder = root / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 6), ("test", 4)):
        rows = {
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": list(range(count)),
        }
        (folder / name).write_bytes(pickle.dumps(rows))
    (folder / "meta").write_bytes(
        pickle.dumps({"fine_label_names": [f"class {n}" for n in range(100)]})
    )
    return dict(train=[0, 1, 2, 3, 4, 5], val=[0, 1, 2, 3], classes=100, size=(3, 32, 32))


def save_stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    (folder / "class_names.txt").write_text("\n".join(f"class {n}" for n in range(10)))
    for name, count in (("train", 3), ("test", 2), ("unlabeled", 4)):
        rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            np.arange(1, count + 1, dtype=np.uint8).tofile(folder / f"{name}_y.bin")
    return dict(train=[0, 1, 2, -1, -1, -1, -1], val=[0, 1], classes=10, size=(3, 96, 96))


def save_svhn(root):
    sio = pytest.importorskip("scipy.io", reason="torchvision's SVHN needs scipy")
    rng = np.random.default_rng(0)
    for name, labels in (("train", [1, 10, 2]), ("test", [10, 1])):
        pixels = rng.integers(0, 256, (32, 32, 3, len(labels)), dtype=np.uint8)
        sio.savemat(root / f"{name}_32x32.mat", {"X": pixels, "y": np.array(labels)[:, None]})
    return dict(train=[1, 0, 2], val=[0, 1], classes=3, size=(3, 32, 32))


def save_pictures(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(20, 24 + number, seed=number).save(folder / name)


def save_flowers102(root):
    sio = pytest.importorskip("scipy.io", reason="torchvision's Flowers-102 needs scipy")
    folder = root / "flowers-102"
    save_pictures(folder, [f"jpg/image_{number:05}.jpg" for number in range(1, 7)])
    sio.savemat(folder / "imagelabels.mat", {"labels": np.array([[2, 1, 1, 2, 2, 1]])})
    sio.savemat(folder / "setid.mat", {"trnid": [[1, 5]], "valid": [[3, 6]], "tstid": [[2, 4]]})
    return dict(train=[1, 1, 0, 0], val=[0, 1], classes=None, size=(3, 20, 24))


def save_pets(root):
    folder = root / "oxford-iiit-pet"
    save_pictures(folder / "images", ["Abyssinian_1.jpg", "beagle_7.jpg", "beagle_8.jpg"])
    (folder / "annotations").mkdir()
    (folder / "annotations/trainval.txt").write_text("Abyssinian_1 1 1 1\nbeagle_7 2 2 1\n")
    (folder / "annotations/test.txt").write_text("beagle_8 2 2 1\n")
    return dict(train=[0, 1], val=[1], classes=2, size=(3, 20, 24))


def save_food101(root):
    folder = root / "food-101"
    save_pictures(folder / "images", ["pie/1.jpg", "pie/2.jpg", "soup/3.jpg"])
    (folder / "meta").mkdir()
    for name, content in {
        "train": {"pie": ["pie/1"], "soup": ["soup/3"]},
        "test": {"pie": ["pie/2"], "soup": []},
    }.items():
        (folder / f"meta/{name}.json").write_text(json.dumps(content))
    return dict(train=[0, 1], val=[0], classes=2, size=(3, 20, 24))


def save_dtd(root):
    folder = root / "dtd/dtd"
    save_pictures(
        folder / "images", ["banded/1.jpg", "zigzag/2.jpg", "banded/3.jpg", "zigzag/4.jpg"]
    )
    (folder / "labels").mkdir()
    lines = {
        "train": "banded/1.jpg\nzigzag/2.jpg\n",
        "val": "zigzag/4.jpg\nbanded/3.jpg\n",
        "test": "banded/3.jpg\nzigzag/2.jpg\n",
    }
    for name, content in lines.items():
        (folder / f"labels/{name}1.txt").write_text(content)
    return dict(train=[0, 1, 1, 0], val=[0, 1], classes=2, size=(3, 20, 24))


def save_aircraft(root):
    folder = root / "fgvc-aircraft-2013b/data"
    save_pictures(folder / "images", ["1.jpg", "2.jpg", "3.jpg"])
    (folder / "variants.txt").write_text("707-320\nA300\n")
    (folder / "images_variant_trainval.txt").write_text("1 707-320\n2 A300\n")
    (folder / "images_variant_test.txt").write_text("3 A300\n")
    return dict(train=[0, 1], val=[1], classes=2, size=(3, 20, 24))


TORCHVISION_SETS = {
    "cifar100": save_cifar100,
    "stl10": save_stl10,
    "svhn": save_svhn,
    "flowers102": save_flowers102,
    "pets": save_pets,
    "food101": save_food101,
    "dtd": save_dtd,
    "aircraft": save_aircraft,
}


@pytest.mark.parametrize("name", TORCHVISION_SETS)
def test_torchvision_sets_open_from_files_in_their_own_layout(tmp_path, monkeypatch, name):
    for module in ("cifar", "stl10", "svhn", "flowers102"):  # checksums of the real files
        monkeypatch.setattr(
            getattr(torchvision.datasets, module),
            "check_integrity",
            lambda path, md5=None: os.path.exists(path),
        )
    expected = TORCHVISION_SETS[name](tmp_path)
    train, val, notes = open_data(tmp_path, "--dataset", name)
    assert (
        train.labels.tolist() == expected["train"]
        and val.labels.tolist() == expected["val"]
        and notes == []
    )
    assert expected["classes"] is None or len(train.classes) == expected["classes"]
    assert content(train)[0].shape == expected["size"] and content(train)[0].double().std() > 10
    assert len(content(train)) == len(train) and len(content(val)) == len(val)
    half, _, _ = open_data(tmp_path, "--dataset", name, "--subset", 0.5)
    assert all(
        any(torch.equal(image, other) for other in content(train)) for image in content(half)
    )


def test_options_and_sources_know_the_same_sets():
    assert tuple(sources.TORCHVISION) == choices.TORCHVISION_DATASETS
    assert {*TORCHVISION_SETS, "cifar10"} == {*sources.TORCHVISION}


@pytest.mark.parametrize("name", choices.TORCHVISION_DATASETS)
def test_a_set_that_is_not_on_disk_is_refused_without_download(tmp_path, monkeypatch, name):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    assert "add --download" in refused(tmp_path, "--dataset", name)


def test_a_failing_download_is_one_line(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", unreachable)
    message = refused(tmp_path / "new", "--dataset", "cifar10", "--download")
    assert "CIFAR10 cannot be downloaded" in message and "Name or service not known" in message


# -- subset, mean and standard deviation -----------------------------------------------------------


def test_subsets_are_keyed_nested_and_keep_images_with_their_labels(tmp_path):
    save_folder(tmp_path, [(12, 10)] * 40)
    full, _, _ = open_data(tmp_path)
    chosen = {}
    for amount in ("0.25", "20", "30"):
        images, _, _ = open_data(tmp_path, "--subset", amount)
        chosen[amount] = {
            next(number for number in range(40) if torch.equal(full.images[number], image))
            for image in images.images
        }
        assert len(chosen[amount]) == len(images) == {"0.25": 10}.get(amount) or int(float(amount))
        for image, label in zip(images.images, images.labels, strict=True):
            assert (
                label
                == full.labels[
                    next(number for number in range(40) if torch.equal(full.images[number], image))
                ]
            )
    assert chosen["0.25"] < chosen["20"] < chosen["30"]
    other, _, _ = open_data(tmp_path, "--subset", "20", "--subset-seed", 1)
    assert not torch.equal(other.images, open_data(tmp_path, "--subset", "20")[0].images)


def test_a_share_of_each_class_is_held_out_for_validation(tmp_path):
    """The same images in pretraining and evaluation; the validation images of DATA are not read."""
    save_folder(tmp_path, [(12, 10)] * 40)
    full, _, _ = open_data(tmp_path)
    (tmp_path / "val/cat").mkdir(parents=True)
    (tmp_path / "val/cat/1.png").write_bytes(b"not read")
    (tmp_path / "x.pth").touch()
    flags = [str(tmp_path), "--val-fraction", "0.2", "--val-seed", "3", "--subset", "20"]
    lincls_args = lincls_options.parse([*flags, "--pretrained", str(tmp_path / "x.pth")])
    # those of the checkpoint
    lincls_args.mean, lincls_args.std, lincls_args.channels = [0.5] * 3, [0.5] * 3, 3
    splits = [sources.open_data(args)[:2] for args in (options.parse(flags), lincls_args)]
    keys = augment.keyed_uniforms(1, 3, np.arange(40))[:, 0]
    held = set()
    for label in range(len(full.classes)):
        members = [i for i in range(40) if full.labels[i] == label]
        held |= {*sorted(members, key=lambda i: keys[i])[: round(0.2 * len(members))]}
    expected = full.select(np.array(sorted(held)))
    for train, val in splits:
        assert torch.equal(val.images, expected.images) and len(train) == 20
        assert torch.equal(val.labels, expected.labels)
        assert not any(torch.equal(a, b) for a in train.images for b in val.images)
        assert torch.equal(train.images, splits[0][0].images)
    whole, _, _ = open_data(*flags[:3])
    assert len(whole) == 40 - len(held)
    other = open_data(*flags[:3], "--val-seed", 4)[1]
    assert not torch.equal(other.images, expected.images)


def test_held_out_images_have_labels():
    labels = torch.tensor([0, -1, 1, 0, -1, 1, 0, 1])
    images = ResidentImages(torch.zeros(8, 3, 1, 1), labels, ["a", "b"], IMAGENET)
    held = hold_out(images, 0.4, seed=0)
    assert sorted(labels[held].tolist()) == [0, 1]
    images.labels[3] = images.labels[6] = -1
    with pytest.raises(
        UsageError, match="needs two training images, one to be held out; only one has a"
    ):
        hold_out(images, 0.4, seed=0)


@pytest.mark.parametrize("flags", [["--val", "."], ["--labels", "none"]])
def test_val_fraction_needs_the_labels_of_the_training_images(tmp_path, flags):
    save_folder(tmp_path, [(12, 10)] * 4)
    path = tmp_path / "train" if "none" in flags else tmp_path
    kind = ["--dataset", "tree"]
    assert "--val-fraction validates on labelled training images" in refused(
        path, *kind, "--val-fraction", 0.5, *flags
    )
    assert "needs training images with labels" in refused(path, *kind, "--val-fraction", 0.5)


def test_a_subset_of_files_and_shards_reads_the_chosen_ones(tmp_path):
    save_folder(tmp_path / "files", [(12, 10 + n) for n in range(12)])
    save_webdataset(tmp_path / "tars", range(6))
    for root in (tmp_path / "files", tmp_path / "tars"):
        full, _, _ = open_data(root)
        half, _, _ = open_data(root, "--subset", 0.5)
        assert len(half) == len(full) // 2
        position = [
            next(i for i in range(len(full)) if torch.equal(full.image(i), image.byte()))
            for image in content(half)
        ]
        assert (
            position == sorted(position) and full.labels[position].tolist() == half.labels.tolist()
        )


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--subset 41", "--subset 41 exceeds the 40 training images"),
        ("--subset 0", "--subset must be above 0"),
        ("--subset 2.5", "whole number"),
        ("--mean 0.5 0.5 0.5", "--mean and --std must be given together"),
        ("--mean 0.5 0.5 0.5 --std 0 1 1", "--std above 0"),
        ("--mean 120 110 100 --std 58 57 56", "units of 0..1"),
        ("--download", "--download is for torchvision's data sets"),
        ("--val nowhere", "--val nowhere does not exist"),
        ("--labels nowhere", "--labels nowhere cannot be used with --dataset folder"),
        ("--dataset tree --labels nowhere", "--labels nowhere does not exist"),
        ("--dataset cifar10 --val .", "cannot be used with --dataset cifar10"),
        ("--dataset tree --val-labels .", "--val-labels needs --labels"),
        ("--dataset list", "there is no file"),
        ("--dataset imagenet", "invalid choice"),
    ],
)
def test_data_flags_that_cannot_work_are_refused(tmp_path, flags, named):
    save_folder(tmp_path, [(12, 10)] * 40)
    assert named in refused(tmp_path, *flags.split())


def test_moments_from_flags_are_used_and_the_command_measures_them(tmp_path, capsys):
    save_folder(tmp_path, [(16, 16)] * 10)
    pixels = np.stack([np.array(picture(16, 16, seed=number)) for number in range(10)]) / 255
    images, _, _ = open_data(tmp_path)
    assert images.mean.tolist() == pytest.approx(choices.IMAGENET[0])
    measured = mean_std.mean_std(images, 16, workers=0)
    np.testing.assert_allclose(
        measured, (pixels.mean(axis=(0, 1, 2)), pixels.std(axis=(0, 1, 2))), atol=1e-6
    )
    command = [sys.executable, "-m", "snclr.mean_std", str(tmp_path), "--img-size", "16"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    again, _, _ = open_data(tmp_path, *printed)
    np.testing.assert_allclose((again.mean, again.std), measured, atol=1e-4)


# -- whole runs ------------------------------------------------------------------------------------


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line.get("loss", line.get("knn_top1")) for line in lines]


def test_folder_tree_list_and_shards_of_the_same_images_train_alike(tmp_path, float64):
    """Numbers, order and augmentation are keyed by the position in the set; also on two ranks."""
    folder = write_images(tmp_path / "folder")
    paths = {split: sorted((folder / split).rglob("*.png")) for split in ("train", "val")}
    flags = []
    for split, files in paths.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(map(str, files)))
        (tmp_path / f"{split}_labels.txt").write_text("\n".join(path.parent.name for path in files))
        for start in range(0, len(files), 15):
            members = []
            for path in files[start : start + 15]:
                key = f"{path.parent.name}{path.stem}"
                members += [
                    (f"{key}.png", path.read_bytes()),
                    (f"{key}.cls", path.parent.name.encode()),
                ]
            save_tar(tmp_path / f"shards/{split}/{start:03}.tar", members)
        flags += [
            f"--{'' if split == 'train' else 'val-'}labels",
            str(tmp_path / f"{split}_labels.txt"),
        ]
    cases = {
        "folder": [folder],
        "tree": [folder / "train", "--val", folder / "val", *flags],
        "list": [tmp_path / "train.txt", "--val", tmp_path / "val.txt", *flags],
        "shards": [tmp_path / "shards"],
    }
    for name, case in cases.items():
        main_snclr.main([*map(str, case), *SMALL.split(), "--workdir", str(tmp_path / name)])
        assert json.loads((tmp_path / name / "args.json").read_text())["dataset"] == name
    assert (
        losses(tmp_path / "folder")
        == losses(tmp_path / "tree")
        == losses(tmp_path / "list")
        == losses(tmp_path / "shards")
    )
    flags = f"{tmp_path / 'shards'} {SMALL} --stop-after-steps 2 --workdir {tmp_path}"
    main_snclr.main(f"{flags}/ranks1".split())
    for index in tmp_path.glob("shards/*/*.npz"):  # so that two ranks have to build it
        index.unlink()
    start_ranks(2, tmp_path, [f"float64:{flags}/ranks2"])
    assert losses(tmp_path / "ranks2") == pytest.approx(losses(tmp_path / "ranks1"), rel=1e-5)
    assert not list(tmp_path.glob("shards/*/*.tmp"))


@pytest.mark.parametrize(
    "flags",
    [
        "--subset 0.5",
        "--subset 24 --subset-seed 3",
        "--mean 0.4 0.4 0.4 --std 0.2 0.2 0.2",
        "--labels none",
    ],
)
def test_data_options_train(tmp_path, flags):
    write_images(tmp_path / "images")
    main_snclr.main(
        [
            str(tmp_path / "images"),
            *SMALL.split(),
            "--workdir",
            str(tmp_path / "run"),
            *flags.split(),
        ]
    )
    expected = {"--subset 0.5": 20, "--subset 24 --subset-seed 3": 24}.get(flags, 40)
    state = torch.load(tmp_path / "run/checkpoint_last.pth.tar", weights_only=True)
    assert state["images"] == expected and state["step"] == expected // 8 * 2
