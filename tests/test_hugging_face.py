"""Data sets of the library `datasets`, from local folders."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from sample_images import picture, rgb, save_folder
from test_ranks import NO_EVALUATION, write_images
from test_sources import content, losses, open_data, refused

import main_snclr
from snclr.datasets import hugging_face
from snclr.loader import whole_images

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
pyarrow = pytest.importorskip("pyarrow")  # which datasets needs


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    hugging_face._load.cache_clear()


def png(number):
    buffer = io.BytesIO()
    picture(10, 9 + number, seed=number).save(buffer, "png")
    return buffer.getvalue()


def save(folder, numbers, split="train", kinds=None, **columns):
    """A parquet file with a column of pictures and the given ones."""
    images = [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]
    kinds = {"picture": datasets.Image(), **(kinds or {})}
    table = datasets.Dataset.from_dict(
        {"picture": images, **columns}, features=datasets.Features(kinds)
    )
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")


CLASSES = {"kind": datasets.ClassLabel(names=["wasp", "ant"]), "id": datasets.Value("int64")}


def save_splits(folder):
    for split, numbers, kinds in (
        ("train", [0, 1, 2], [1, 0, 1]),
        ("test", [9], [-1]),
        ("validation", [3, 4], [0, 1]),
    ):
        save(folder, numbers, split, CLASSES, kind=kinds, id=numbers)
    return folder


@pytest.mark.parametrize("flags", ["{0}", "hf:{0}", "--dataset hf:{0}", "{0} --dataset hf"])
def test_splits_images_and_labels_are_recognised(tmp_path, flags):
    folder = save_splits(tmp_path / "set")
    train, val, notes = open_data(*flags.format(folder).split())
    assert train.classes == val.classes == ["ant", "wasp"]  # in the order of all sets
    assert train.labels.tolist() == [0, 1, 0] and val.labels.tolist() == [1, 0]
    for index, image in enumerate(content(train)):
        assert torch.equal(image, rgb(picture(10, 9 + index, seed=index)))
    assert torch.equal(val.image(1).int(), rgb(picture(10, 13, seed=4)))
    assert [note.partition(": ")[2] for note in notes] == [
        "split train, images of column picture, labels of column kind",
        "split validation, images of column picture, labels of column kind",
    ]


def test_one_split_images_of_one_size_and_no_labels(tmp_path):
    save(tmp_path / "set", [5, 5, 5], "test")
    images, val, _ = open_data(f"hf:{tmp_path}/set")
    assert len(images.images) == 3 and images.labels is None and val is None


def test_plain_labels_files_by_path_and_empty_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("snclr.datasets.images.RESIDENT_LIMIT", 0)
    save_folder(tmp_path / "files", [(12, 10), (12, 11)])
    paths = sorted(map(str, (tmp_path / "files").rglob("*.png")))
    table = {
        "image": [{"path": path, "bytes": None} for path in paths]
        + [{"path": None, "bytes": png(3)}, None],
        "label": ["b", "a", None, "b"],
    }
    kinds = {"image": datasets.Image(decode=False), "label": datasets.Value("string")}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(table, features=datasets.Features(kinds)).to_parquet(
        tmp_path / "set/train.parquet"
    )
    images, _, _ = open_data(tmp_path / "set")
    assert images.labels.tolist() == [1, 0, -1, 1]
    assert images.paths.tolist() == [*paths, "2", "3"]
    assert torch.equal(images.image(0).int(), rgb(picture(12, 10, seed=0)))
    assert torch.equal(images.image(2).int(), rgb(picture(10, 12, seed=3)))
    assert images.size.tolist() == [0, 0, len(png(3)), 0]
    with pytest.raises(RuntimeError, match="cannot read image in row 3 of the table: there is"):
        images.image(3)
    chosen = images.select(np.array([2, 0]))
    assert torch.equal(chosen.image(0), images.image(2)) and chosen.labels.tolist() == [-1, 1]


def test_one_of_several_configurations_is_chosen_after_a_colon(tmp_path):
    save(tmp_path / "se:t/small", [0])
    save(tmp_path / "se:t/large", [1, 2])
    names = "".join(f"- config_name: {x}\n  data_dir: {x}\n" for x in ("small", "large"))
    (tmp_path / "se:t/README.md").write_text(f"---\nconfigs:\n{names}---\n")
    images, _, notes = open_data(f"hf:{tmp_path}/se:t:large")
    assert len(images) == 2 and torch.equal(images.image(0).int(), rgb(picture(10, 10, seed=1)))
    assert notes[0].startswith(f"hf:{tmp_path}/se:t:large: split train")
    line = refused(f"hf:{tmp_path}/se:t")
    assert line.endswith(f"configurations, hf:{tmp_path}/se:t:NAME; NAME is one of small, large")
    assert "'huge' not found. Available: ['small', 'large']" in refused(f"hf:{tmp_path}/se:t:huge")


def test_workers_read_the_same_images(tmp_path):
    images, _, _ = open_data(save_splits(tmp_path / "set"))
    settings = {"size": 8, "device": torch.device("cpu"), "chunk": 2}
    one, two = (
        torch.cat([*whole_images(images, np.arange(3), workers=workers, **settings)])
        for workers in (0, 2)
    )
    assert torch.equal(one, two)


def test_a_run_sees_the_images_of_a_folder_in_the_same_order_and_views(tmp_path):
    folder, names = write_images(tmp_path / "folder"), datasets.ClassLabel(names=["a", "b"])
    for split, name in (("train", "train"), ("val", "validation")):
        paths = sorted((folder / split).rglob("*.png"))
        table = datasets.Dataset.from_dict(
            {
                "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
                "label": ["ab".index(path.parent.name) for path in paths],
            },
            features=datasets.Features({"image": datasets.Image(), "label": names}),
        )
        (tmp_path / "hf").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / f"hf/{name}.parquet")
    for name in ("folder", "hf"):
        flags = f"{NO_EVALUATION} --stop-after-steps 3 --workdir {tmp_path}/run-{name}"
        main_snclr.main([str(tmp_path / name), *flags.split()])
    assert losses(tmp_path / "run-folder") == losses(tmp_path / "run-hf")
    assert json.loads((tmp_path / "run-hf/args.json").read_text())["dataset"] == "hf"


@pytest.mark.parametrize(
    "pictures, kinds, message",
    [
        ([{"bytes": None, "path": None}], [0], "in row 0 of the table: there is none"),
        ([{"bytes": png(0), "path": None}], [7], "column kind: Invalid integer class label 7"),
    ],
)
def test_tables_that_the_library_would_not_write(tmp_path, pictures, kinds, message):
    features = datasets.Features({"picture": datasets.Image(), "kind": CLASSES["kind"]})
    columns = {"picture": pictures, "kind": kinds}
    table = pyarrow.table(columns, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    assert message in refused(f"hf:{tmp_path}")


def without_network(name, configuration):
    raise ConnectionError(f"Couldn't reach '{name}'\nRetrying")


def test_what_cannot_be_opened_is_refused_in_one_line(tmp_path, monkeypatch):
    assert "cannot be opened by datasets.load_dataset: Couldn" in refused(f"hf:{tmp_path}/none")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/train.parquet").write_bytes(b"no parquet")
    assert "cannot be opened by datasets.load_dataset" in refused(tmp_path / "bad")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "text/train.parquet")
    assert "has no column of images, only text" in refused(f"hf:{tmp_path}/text")
    save(tmp_path / "two", [1], "test")
    save(tmp_path / "two", [1], "validation")
    assert "has no split train, only validation, test" in refused(f"hf:{tmp_path}/two")
    assert "--labels x cannot be used with --dataset hf" in refused("hf:x", "--labels", "x")
    monkeypatch.setattr(datasets, "load_dataset", without_network)
    line = refused("hf:nobody/nothing")
    assert line.endswith("opened by datasets.load_dataset: Couldn't reach 'nobody/nothing'")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refused("hf:x") == "--dataset hf needs datasets: pip install datasets"
