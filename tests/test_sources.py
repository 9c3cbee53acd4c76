import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from test_data import picture, rgb, save_folder

from snclr import data, embedded, options, sources
from snclr.data import ImageFiles, ResidentImages
from snclr.errors import UsageError


def open_data(*flags):
    """Training set, validation set and notes, through the flags as a user gives them."""
    return sources.open_data(options.parse_data([str(flag) for flag in flags]))


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


# -- folders ---------------------------------------------------------------------------------------------------------------


def test_a_folder_gets_its_classes_labels_and_paths_in_sorted_order(tmp_path):
    for name in ("train/bee/2.png", "train/bee/deep/er/1.PNG", "train/ant/10.png", "train/ant/9.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(8 + len(name), 8).save(tmp_path / name)
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    (tmp_path / "train/readme.md").write_text("no class")
    train, val, _ = open_data(tmp_path)
    assert train.classes == ["ant", "bee"] and train.labels.tolist() == [0, 0, 1, 1] and val is None
    names = [str(Path(path).relative_to(tmp_path / "train")) for path in train.paths]
    assert names == ["ant/10.png", "ant/9.png", "bee/2.png", "bee/deep/er/1.PNG"]


def test_equal_small_images_become_resident_and_keep_number_and_label(tmp_path):
    images, _, _ = open_data(save_folder(tmp_path, [(12, 10)] * 5))
    assert isinstance(images, ResidentImages) and len(images) == 5
    assert images.labels.tolist() == [0, 0, 0, 1, 1]
    for position, number in enumerate([0, 2, 4, 1, 3]):  # even ones are ants
        assert torch.equal(images.images[position].int(), rgb(picture(12, 10, seed=number)))


@pytest.mark.parametrize("sizes", [[(12, 10)] * 4 + [(12, 11)], [(10, 12), (12, 10)]])
def test_images_of_mixed_sizes_stay_files(tmp_path, sizes):
    images, _, _ = open_data(save_folder(tmp_path, sizes))
    assert isinstance(images, ImageFiles) and len(images) == len(sizes)


@pytest.mark.parametrize("limit, kind", [(5 * 12 * 10 * 3, ResidentImages), (5 * 12 * 10 * 3 - 1, ImageFiles)])
def test_equal_images_beyond_the_limit_stay_files(tmp_path, monkeypatch, limit, kind):
    monkeypatch.setattr(data, "RESIDENT_LIMIT", limit)
    images, _, _ = open_data(save_folder(tmp_path, [(12, 10)] * 5))
    assert isinstance(images, kind)


def test_a_folder_with_validation_gives_both_with_the_same_classes(tmp_path):
    save_folder(save_folder(tmp_path, [(12, 10)] * 5), [(12, 10)] * 3, split="val")
    train, val, _ = open_data(tmp_path)
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
        (other_classes, r"must hold the same classes; only one of them has bee, cow$"),
        (missing_class, r"must hold the same classes; only one of them has bee$"),
        (unreadable_image, r"cannot read image .*broken\.png"),
    ],
)
def test_a_folder_of_another_form_is_a_usage_error_in_one_line(tmp_path, prepare, line):
    prepare(tmp_path)
    assert re.search(line, refused(tmp_path, "--dataset", "folder"))


# -- CIFAR-10 ------------------------------------------------------------------------------------------------------------


def save_cifar10(root, images_per_file=4):
    """Tiny files in the layout of the original: rows of 3072 bytes, channel after channel."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    content = {}
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        rows, labels = rng.integers(0, 256, (images_per_file, 3072), dtype=np.uint8), rng.integers(0, 10, images_per_file)
        content[name] = rows, labels
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": labels.tolist()}))
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    return content, classes


def test_cifar10_is_read_from_torchvisions_files(tmp_path, monkeypatch):
    content, classes = save_cifar10(tmp_path)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: os.path.exists(path))
    train, val, _ = open_data(tmp_path, "--dataset", "cifar10")
    for images, names in ((train, [f"data_batch_{number}" for number in range(1, 6)]), (val, ["test_batch"])):
        rows = np.concatenate([content[name][0] for name in names])
        assert isinstance(images, ResidentImages) and images.classes == classes
        assert np.array_equal(images.images.numpy(), rows.reshape(-1, 3, 32, 32))
        assert images.labels.tolist() == np.concatenate([content[name][1] for name in names]).tolist()


@pytest.mark.parametrize("state", ["absent", "damaged"])
def test_absent_or_damaged_cifar10_is_a_usage_error(tmp_path, state):
    if state == "damaged":
        save_cifar10(tmp_path)  # of the right form, with wrong checksums
    assert re.search(r"no whole CIFAR10 in .*--download", refused(tmp_path, "--dataset", "cifar10"))


def test_the_embedded_set_opens_without_a_folder():
    train, val, _ = open_data()
    assert isinstance(train, ResidentImages) and len(train) == 5000 and len(val) == 1000
    assert train.classes == val.classes == list(embedded.CLASSES)
    torch.testing.assert_close((train.mean, train.std), (torch.tensor(embedded.MEAN), torch.tensor(embedded.STD)))
