"""The features of a whole data set in one file: the encoder's own, and the same after any
interruption. (On several ranks: test_lincls_ranks.py.)
"""

import os
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import snclr
from snclr import embed, mean_std
from snclr.datasets import embedded, sources
from snclr.datasets.decoding import decode
from snclr.evaluation import embedding
from snclr.evaluation.embedding import check_tokens, embedder
from snclr.running.errors import RunError, UsageError

CPU = torch.device("cpu")


def write(file, data, out, *flags):
    embed.main([str(file), str(data), "--out", str(out), "--workers", "0", *flags])
    return np.load(out)


def paths_below(folder):
    return [str(path) for path in sorted(folder.rglob("*.png"))]


def one_by_one(file, paths):
    """The oracle: each image alone through the encoder of load_encoder."""
    encoder, info = snclr.load_encoder(str(file))
    mean, std = (torch.tensor(info[name]).view(3, 1, 1) for name in ("mean", "std"))
    images = [decode(np.fromfile(path, np.uint8), path) / 255 for path in paths]
    with torch.no_grad():
        return torch.cat([encoder.embed((image - mean)[None] / std) for image in images]).numpy()


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 8 images, in two batches."""
    monkeypatch.setattr(embedding, "EVALUATION_BATCH", 4)
    monkeypatch.setattr(embedding, "PART_BATCHES", 2)


def test_names_labels_and_features_are_those_of_the_images_one_by_one(
    pretrained, images, tmp_path, small_parts, capsys
):
    file = write(pretrained, images, tmp_path / "x.npz")
    paths = paths_below(images / "train")
    assert file["names"].tolist() == paths
    assert file["labels"].tolist() == [0] * 20 + [1] * 20
    assert file["classes"].tolist() == ["a", "b"]
    expected = one_by_one(pretrained, paths)
    assert file["features"].dtype == np.float32
    np.testing.assert_allclose(file["features"], expected, rtol=1e-4, atol=1e-5)
    assert os.listdir(tmp_path) == ["x.npz"]  # without its parts
    assert f"features 40 x {expected.shape[1]}" in capsys.readouterr().out


def test_validation_images_and_images_without_labels(pretrain, images, tmp_path):
    file = pretrain("resnet8")
    val = write(file, images, tmp_path / "val.npz", "--split", "val")
    assert val["names"].tolist() == paths_below(images / "val")
    tree = write(file, images / "val", tmp_path / "tree.npz")
    assert sorted(tree) == ["features", "names"]
    np.testing.assert_array_equal(tree["features"], val["features"])
    with pytest.raises(UsageError, match="--split val: there are no validation images"):
        write(file, images / "val", tmp_path / "none.npz", "--split", "val")


@pytest.mark.parametrize("limit", [0, 2**30])  # read one by one, or held in memory
def test_images_that_cannot_be_read_have_nan_as_features_and_are_named(
    pretrain, images, tmp_path, small_parts, monkeypatch, capsys, limit
):
    monkeypatch.setattr("snclr.datasets.images.RESIDENT_LIMIT", limit)
    folder = shutil.copytree(images / "val", tmp_path / "photos")
    paths = paths_below(folder)
    for path in paths[3], paths[9]:
        with open(path, "wb"):
            pass
    with Image.open(paths[0]) as image:
        Image.new("RGB", image.size, (127, 127, 127)).save(paths[1])  # grey, but not damaged
    file = write(pretrain("resnet8"), folder, tmp_path / "x.npz", "--on-bad-image", "skip")
    assert np.isnan(file["features"]).any(axis=1).nonzero()[0].tolist() == [3, 9]
    assert np.isnan(file["features"][[3, 9]]).all()
    named = f"2 images cannot be read, and their features are NaN: {paths[3]}, {paths[9]}"
    assert named in capsys.readouterr().out

    def measured():
        flags = ["-j", "0", "--img-size", "32", "--on-bad-image", "skip"]
        train = sources.open_data(mean_std.parse([str(folder), *flags]))[0]
        return np.array(mean_std.mean_std(train, 32, 0))

    without = measured()
    os.remove(paths[3])
    os.remove(paths[9])
    np.testing.assert_allclose(without, measured(), rtol=1e-12)


def test_a_zip_file_that_two_workers_read(pretrain, images, tmp_path, small_parts, monkeypatch):
    monkeypatch.setattr("snclr.datasets.images.RESIDENT_LIMIT", 0)
    folder = images / "val"
    archive = shutil.make_archive(f"{tmp_path}/photos", "zip", folder)
    file = write(pretrain("resnet8"), archive, tmp_path / "x.npz", "--workers", "2")
    expected = write(pretrain("resnet8"), folder, tmp_path / "y.npz")
    names = [os.path.join(archive, os.path.relpath(path, folder)) for path in expected["names"]]
    order = [file["names"].tolist().index(name) for name in names]
    np.testing.assert_array_equal(file["features"][order], expected["features"])
    assert file["labels"][order].tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_gap_224"]
)
def test_tokens_and_layers_are_those_that_the_blocks_give(name):
    """The oracle runs block after block, as get_intermediate_layers of DINO and DINOv2."""
    small = {"img_size": 28, "patch_size": 14, "depth": 3, "embed_dim": 12, "num_heads": 2}
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0, **small).eval()
    x, prefixes = torch.randn(2, 3, 28, 28), vit.num_prefix_tokens
    outputs, tokens = [], vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    for block in vit.blocks:
        tokens = block(tokens)
        outputs.append(vit.norm(tokens))
    last_two = torch.cat(outputs[-2:], dim=2)
    expected = {"patch": last_two[:, prefixes:], "mean": last_two[:, prefixes:].mean(dim=1)}
    if prefixes:
        expected["class"] = last_two[:, 0]
    else:
        with pytest.raises(UsageError, match="no class token"):
            check_tokens(vit, "class", 2)
    for kind, features in expected.items():
        check_tokens(vit, kind, 2)
        torch.testing.assert_close(embedder(vit, kind, 2, "off", CPU)(x), features)
    with pytest.raises(UsageError, match="--layers 4 exceeds the 3 blocks"):
        check_tokens(vit, "patch", 4)


def test_images_without_files_keep_their_numbers_in_a_subset(pretrain, tmp_path, monkeypatch):
    for split in ("train", "val"):
        monkeypatch.setitem(embedded.SPLITS, split, (40, 0))
    file = pretrain("resnet8")
    for name, flags in (("all", []), ("few", ["--subset", "5"])):
        embed.main([str(file), "--out", f"{tmp_path}/{name}.npz", "--workers", "0", *flags])
    whole, few = np.load(tmp_path / "all.npz"), np.load(tmp_path / "few.npz")
    assert whole["names"].tolist() == [str(number) for number in range(40)]
    numbers = few["names"].astype(int)
    assert numbers.tolist() != [0, 1, 2, 3, 4]
    np.testing.assert_allclose(few["features"], whole["features"][numbers], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, small",
    [
        ("cait_xxs24_224", {"num_heads": 2}),
        ("xcit_nano_12_p16_224", {"num_heads": 2}),
        ("vit_relpos_small_patch16_224", {"num_heads": 2}),
    ],
)
def test_blocks_without_a_class_token_give_their_patches(name, small):
    vit = timm.create_model(name, img_size=32, depth=2, embed_dim=16, num_classes=0, **small).eval()
    if not hasattr(vit, "num_prefix_tokens"):
        pytest.skip(f"timm {timm.__version__} does not say how the tokens of {name} are arranged")
    x = torch.randn(2, 3, 32, 32)
    check_tokens(vit, "patch", 2)
    patches = embedder(vit, "patch", 2, "off", CPU)(x)
    assert patches.shape == (2, 4, 32)
    torch.testing.assert_close(embedder(vit, "mean", 2, "off", CPU)(x), patches.mean(dim=1))
    with pytest.raises(UsageError, match="no class token"):
        check_tokens(vit, "class", 2)


def test_patch_tokens_of_a_run_in_half_precision(pretrain, images, tmp_path):
    flags = ["--tokens", "patch", "--layers", "2", "--amp", "bf16"]
    file = write(pretrain("vit_tiny"), images, tmp_path / "x.npz", *flags)
    assert file["features"].shape == (40, 4, 2 * 192) and file["features"].dtype == np.float32
    with pytest.raises(UsageError, match="--tokens mean --layers 1 is for ViTs"):
        write(pretrain("resnet8"), images, tmp_path / "y.npz", "--tokens", "mean")


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_and_parts_of_other_settings_are_not_used(
    pretrain, images, tmp_path, small_parts, monkeypatch, capsys
):
    file, out = pretrain("vit_tiny"), tmp_path / "x.npz"
    expected = write(file, images, tmp_path / "whole.npz")
    real, encoded = embedding.embedder, []

    def counting(*arguments):
        def embed(x):
            if len(encoded) == 6:  # in the fourth part
                raise Killed
            if len(x) > 1:  # not the image of zeros that shows the shape
                encoded.append(len(x))
            return inner(x)

        inner = real(*arguments)
        return embed

    monkeypatch.setattr(embed, "embedder", counting)
    with pytest.raises(Killed):
        write(file, images, out)
    parts = sorted((tmp_path / "x.npz.parts").iterdir())
    assert len(parts) == 3 and not out.exists()
    np.testing.assert_array_equal(np.load(parts[1]), expected["features"][8:16])
    encoded[:] = [0] * 7
    resumed = write(file, images, out)
    assert sum(encoded) == 40 - 24 and "3 of 5 parts" in capsys.readouterr().out
    for name in expected:
        np.testing.assert_array_equal(resumed[name], expected[name])

    out.unlink()
    encoded.clear()
    with pytest.raises(Killed):
        write(file, images, out, "--tokens", "mean")
    encoded[:] = [0] * 7
    write(file, images, out)
    assert sum(encoded) == 40 and "parts are in" not in capsys.readouterr().out
    assert not (tmp_path / "x.npz.parts").exists()


def test_parts_without_their_content_are_encoded_again(
    pretrain, images, tmp_path, small_parts, monkeypatch, capsys
):
    file, out = pretrain("resnet8"), tmp_path / "x.npz"
    expected = write(file, images, tmp_path / "whole.npz")

    def stop(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(embed, "join_parts", stop)
        with pytest.raises(Killed):
            write(file, images, out)
    empty, cut, other_shape, link, _ = sorted((tmp_path / "x.npz.parts").iterdir())
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-1])
    np.save(other_shape, np.zeros((8, 3), np.float32))
    link.rename(tmp_path / "elsewhere.npy")
    link.symlink_to(tmp_path / "elsewhere.npy")
    resumed = write(file, images, out)
    assert "1 of 5 parts" in capsys.readouterr().out
    for name in expected:
        np.testing.assert_array_equal(resumed[name], expected[name])
    assert (tmp_path / "elsewhere.npy").exists()


def test_a_part_that_is_lost_is_named(pretrain, images, tmp_path, small_parts, monkeypatch):
    real = embed.encode_parts

    def losing(*arguments, **settings):
        paths = real(*arguments, **settings)
        os.remove(paths[2])
        return paths

    monkeypatch.setattr(embed, "encode_parts", losing)
    with pytest.raises(
        RunError, match=r"the part .*_000000016.npy cannot be read: .* see its folder"
    ):
        write(pretrain("resnet8"), images, tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists()


def test_parquet_has_the_same_content(pretrain, images, tmp_path, small_parts):
    parquet = pytest.importorskip("pyarrow.parquet")
    flags = ["--tokens", "patch"]
    expected = write(pretrain("vit_tiny"), images, tmp_path / "x.npz", *flags)
    embed.main([str(pretrain("vit_tiny")), str(images), "--out", f"{tmp_path}/x.parquet", *flags])
    table = parquet.read_table(tmp_path / "x.parquet").to_pydict()
    assert table["names"] == expected["names"].tolist()
    assert table["labels"] == ["a"] * 20 + ["b"] * 20
    np.testing.assert_array_equal(np.float32(table["features"]), expected["features"])


@pytest.mark.parametrize(
    "out, message",
    [
        ("x.csv", r"--out must end in .npz or .parquet, found .*x.csv"),
        ("absent/x.npz", "its folder does not exist or is not writable"),
        ("taken.npz", "taken.npz exists: choose another name or remove it"),
        ("x.parquet", "needs pyarrow: pip install pyarrow"),
    ],
)
def test_an_out_that_cannot_be_written_is_refused_in_one_line(out, message, tmp_path, monkeypatch):
    monkeypatch.setattr(embed.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "taken.npz").touch()
    with pytest.raises(UsageError, match=message):
        embed.parse(["file.pth", "--out", str(tmp_path / out)])
