import os
import re
import sys
from argparse import Namespace
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_backbones import build
from test_ranks import CLOCK, SMALL, read_lines

import main_snclr
import snclr
from snclr import operations, visualize
from snclr.datasets.images import ResidentImages
from snclr.loader import Batch
from snclr.memory_bank import MemoryBank
from snclr.pictures import canvas, encoders, steps
from snclr.running.errors import RunError, UsageError
from snclr.running.log import Log
from snclr.running.metrics import StepView

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
LEVELS = np.arange(10, 250, 24)  # of ten plain images


def plain_images(labels=None):
    """Ten images of 8 px, each of one grey level, so that a picture tells which one it shows."""
    images = np.broadcast_to(LEVELS.astype(np.uint8)[:, None, None, None], (10, 3, 8, 8)).copy()
    return ResidentImages(images, labels, ["cat", "dog"] if labels is not None else [], (MEAN, STD))


def step_view(neighbour_ids, weights):
    number = len(weights)
    ids, weights, none = torch.tensor(neighbour_ids), torch.tensor(weights), torch.zeros(number, 4)
    return StepView(
        none,
        torch.full(ids.shape, 0.5),
        ids,
        weights,
        torch.zeros(7),
        torch.tensor(9),
        torch.tensor(1.0),
    )


def tiles_of(picture, rows, columns, words, lines, key=True, side=96):
    """The grey level in the middle of each place of a sheet, and the colour of its frame."""
    pixels = np.asarray(picture)
    top = canvas.MARGIN + 26 + 19 * lines + 19 * key + canvas.GAP + 22
    pitch, pace = (
        side + 2 * canvas.FRAME + canvas.GAP,
        side + 2 * canvas.FRAME + canvas.LINE * words + canvas.GAP,
    )
    places = [
        [(top + row * pace, canvas.MARGIN + column * pitch) for column in range(columns)]
        for row in range(rows)
    ]
    middle = canvas.FRAME + side // 2
    levels = [[int(pixels[y + middle, x + middle, 0]) for y, x in row] for row in places]
    return levels, [[tuple(map(int, pixels[y + 1, x + 1])) for y, x in row] for row in places]


# -- a training step -------------------------------------------------------------------------------


def test_neighbours_are_sorted_by_weight_and_their_frames_show_the_class():
    labels = np.array([0, 1, 0, 1, 0, 1, 0, 1, -1, 0])
    shown = step_view(
        [[3, 4, 5], [8, -1, 2], [-1, -1, -1]], [[0.1, 0.7, 0.2], [0.6, 0.0, 0.4], [0.0, 0.0, 0.0]]
    )
    picture = steps.neighbour_picture(
        torch.tensor([6, 7, 0]), shown, plain_images(labels), 8, "a title"
    )
    levels, frames = tiles_of(picture, 3, 4, words=3, lines=2)
    white, level = (255, 255, 255), LEVELS.tolist()
    assert levels == [
        [level[6], level[4], level[5], level[3]],
        [level[7], level[8], level[2], 255],
        [level[0], 255, 255, 255],
    ]
    assert frames[0] == [
        white,
        canvas.BLUE,
        canvas.ORANGE,
        canvas.ORANGE,
    ]  # image 6 is a cat, so is 4
    assert frames[1] == [white, canvas.GREY, canvas.ORANGE, white]  # image 8 has no label


def test_without_labels_there_are_no_frames():
    shown = step_view([[3, 4, 5]], [[0.2, 0.3, 0.5]])
    picture = steps.neighbour_picture(torch.tensor([6]), shown, plain_images(), 8, "a title")
    white = (255, 255, 255)
    assert tiles_of(picture, 1, 4, words=3, lines=2, key=False)[1][0][1:] == [white] * 3


def test_views_are_shown_in_their_own_colours():
    pixels = torch.randint(
        256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    x = operations.normalize_(pixels.float() / 255, torch.tensor(MEAN), torch.tensor(STD))
    shown = steps.denormalize(x, torch.tensor(MEAN), torch.tensor(STD))
    assert np.array_equal(shown, pixels.permute(0, 2, 3, 1).numpy())
    picture = steps.view_picture(Batch(torch.arange(2), [x, x.flip(3)]), plain_images(), "a title")
    area = np.asarray(picture)[
        canvas.MARGIN + 26 + 19 + canvas.GAP + canvas.FRAME :, canvas.MARGIN + canvas.FRAME :
    ]
    assert np.array_equal(
        area[8:128:16, 8:128:16], shown[0]
    )  # enlarged 16 times, pixels stay pixels
    below = area[128 + 2 * canvas.FRAME + canvas.GAP :]
    assert np.array_equal(below[8:128:16, 8:128:16], shown[0][:, ::-1])


@pytest.mark.parametrize("size, batch", [(7, 3), (12, 4), (5, 8), (20, 3)])
def test_bank_ages_are_those_of_a_bank_that_remembers_its_steps(size, batch):
    bank, generator = MemoryBank(size, 4), torch.Generator().manual_seed(0)
    for step in range(1, 9):
        counts = torch.randint(3, (size,), generator=generator).where(bank.valid(), torch.tensor(0))
        expected = (step - bank.ids).repeat_interleave(counts).tolist()
        assert steps.bank_ages(counts, step, batch).floor().tolist() == expected
        bank.enqueue(torch.randn(batch, 4, generator=generator), torch.full((batch,), step))


def test_a_step_without_neighbours_shows_only_its_views():
    shown = step_view([[-1, -1]], [[0.0, 0.0]])
    x = torch.zeros(1, 3, 8, 8)
    args = Namespace(img_size=8, batch_size=1, key_view="strong")
    pictures, histograms = steps.of_step(
        Batch(torch.tensor([0]), [x, x]), shown, plain_images(), args, 3
    )
    assert list(pictures) == ["views"] and histograms == {}


def test_the_weak_view_is_drawn_below_the_first_two_views():
    shown = step_view([[-1, -1]], [[0.0, 0.0]])
    views = [
        torch.full((1, 3, 8, 8), level) for level in (0.0, 0.2, 0.4, 0.6)
    ]  # the third is local
    args = Namespace(img_size=8, batch_size=1, key_view="weak")
    batch, images = Batch(torch.tensor([0]), views), plain_images()
    picture = steps.of_step(batch, shown, images, args, 3)[0]["views"]
    levels, _ = tiles_of(picture, 3, 1, words=0, lines=1, key=False, side=128)
    expected = [steps.denormalize(view, images.mean, images.std)[0, 0, 0, 0] for view in views]
    assert levels == [[expected[0]], [expected[1]], [expected[3]]]


# -- encoders --------------------------------------------------------------------------------------


def attention_by_hand(model, x):
    """The last block's attention from its queries and keys, head by head and image by image."""
    kept = []
    hook = model.blocks[-1].attn.register_forward_hook(
        lambda module, inputs, output: kept.append(inputs[0])
    )
    model.forward_features(x)
    hook.remove()
    attention, tokens = model.blocks[-1].attn, kept[0]
    width = tokens.shape[2] // attention.num_heads
    queries, keys, _ = (tokens @ attention.qkv.weight.T + attention.qkv.bias).chunk(3, dim=2)
    maps = torch.empty(len(x), attention.num_heads, tokens.shape[1], tokens.shape[1])
    for image in range(len(x)):
        for head in range(attention.num_heads):
            part = slice(head * width, (head + 1) * width)
            maps[image, head] = torch.softmax(
                queries[image, :, part] @ keys[image, :, part].T / width**0.5, dim=1
            )
    return maps


@torch.no_grad()
def test_attention_maps_are_the_last_blocks_own():
    torch.manual_seed(0)
    encoder, x = build("vit_tiny", patch_size=8).eval(), torch.randn(2, 3, 32, 32)
    before = encoder.embed(x)
    expected = attention_by_hand(encoder, x)[:, :, 0, 1:].unflatten(2, (4, 4))
    actual = encoders.attention_maps(encoder, x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(encoder.embed(x), before) and encoder.blocks[-1].attn.fused_attn


@pytest.mark.parametrize("registers", [0, 2])
@torch.no_grad()
def test_attention_without_a_class_token_is_the_patches_mean(registers):
    torch.manual_seed(0)
    settings = dict(img_size=32, class_token=False, global_pool="avg", num_classes=0)
    settings["reg_tokens"] = registers
    model, x = (
        timm.create_model("vit_tiny_patch16_224", **settings).eval(),
        torch.randn(2, 3, 32, 32),
    )
    maps = attention_by_hand(model, x)[:, :, registers:, registers:]
    expected = maps.mean(dim=2).unflatten(2, (2, 2))
    torch.testing.assert_close(encoders.attention_maps(model, x), expected, rtol=1e-5, atol=1e-7)


def test_pca_keeps_what_varies_most_whatever_the_signs_of_the_axes():
    features = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1, 9, 1, 4, 1, 1.0]
    )
    actual = encoders.pca(features)
    _, vectors = np.linalg.eigh(np.cov(features.double().numpy().T))
    expected = (features.double().numpy() - features.double().numpy().mean(axis=0)) @ vectors[
        :, [-1, -2]
    ]
    np.testing.assert_allclose(abs(actual), abs(expected), atol=1e-5)
    np.testing.assert_allclose(
        encoders.pca(-features), -actual, atol=1e-9
    )  # an axis points where its largest entry does


def test_retrieval_shows_the_nearest_and_never_the_image_itself():
    images = plain_images(np.arange(10) % 2)
    angles = torch.tensor([0, 50, 10, 60, 25, 75, 45, 90, 70, 99.0]).deg2rad()
    features, offered, asked = (
        torch.stack([angles.cos(), angles.sin()], dim=1),
        np.array([0, 2, 3, 4, 6, 7]),
        np.array([2, 9]),
    )
    by = {
        "A: one": (features[asked], features[offered]),
        "B: other": (features[asked], -features[offered]),
    }
    picture = encoders.retrieval_picture(images, asked, images, offered, by, 2, 8, "a title")
    levels, frames = tiles_of(picture, 2, 6, words=2, lines=2)
    wanted = [[2, 0, 4, 2, 7, 3], [9, 7, 3, 9, 0, 2]]
    assert levels == LEVELS[np.array(wanted)].tolist()
    assert frames[0][1] == canvas.BLUE and frames[0][4] == canvas.ORANGE


# -- whole runs ------------------------------------------------------------------------------------


def train(images, workdir, *flags):
    main_snclr.main(
        [str(images), *SMALL.split(), "--eval-freq", "0", "--workdir", str(workdir), *flags]
    )
    return read_lines(workdir, CLOCK)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    flags = ["--arch", "vit_tiny", "--patch-size", "8", "--epochs", "1"]
    train(images, workdir, *flags)
    return workdir / "checkpoint_last.pth.tar"


def test_a_run_shows_its_pictures_and_they_change_nothing(images, tmp_path):
    shown = train(images, tmp_path / "shown", "--viz-freq", "1")
    assert train(images, tmp_path / "never", "--viz-freq", "0") == shown
    assert not (tmp_path / "never/pictures").exists()
    names = [f"{name}_{step:07d}.png" for name in ("neighbours", "views") for step in (5, 10)]
    assert sorted(os.listdir(tmp_path / "shown/pictures")) == names
    events = EventAccumulator(
        str(tmp_path / "shown/tensorboard"), size_guidance={"images": 0}
    ).Reload()
    assert set(events.Tags()["images"]) == {"views", "neighbours"}
    assert [event.step for event in events.Images("neighbours")] == [5, 10]
    assert set(events.Tags()["histograms"]) == {
        "neighbours/positiveness",
        "neighbours/bank_age_steps",
    }
    ages = events.Histograms("neighbours/bank_age_steps")[-1].histogram_value
    assert ages.num == 8 * 3 and ages.min >= 1 and ages.max <= 1 + 30 / 8


def test_the_last_epoch_is_always_shown(images, tmp_path):
    train(images, tmp_path, "--viz-freq", "7")
    assert sorted(os.listdir(tmp_path / "pictures")) == [
        "neighbours_0000010.png",
        "views_0000010.png",
    ]


def test_pictures_that_cannot_be_written_do_not_stop_a_run(tmp_path, capsys):
    log = Log(str(tmp_path), step=0, enabled=True)
    (tmp_path / "pictures").write_text("a file")
    log.pictures(3, lambda: ({"views": Image.new("RGB", (4, 4))}, {}))
    log.close()
    assert "note: no pictures of step 3" in capsys.readouterr().out


def draw(trained, images, out, *flags):
    visualize.main(
        [str(trained), str(images), "--out", str(out), "--workers", "0", "--count", "3", *flags]
    )
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_command_draws_all_that_there_is_the_same_each_time(trained, images, tmp_path, capsys):
    flags = ["--against", "untrained", "--image", str(images / "val/a/00.png"), "--seed", "3"]
    first = draw(trained, images, tmp_path / "1", *flags)
    expected = {
        "neighbours.png",
        "retrieval.png",
        "map.png",
        "attention.png",
        "attention_against.png",
    }
    assert set(first) == expected
    out = capsys.readouterr().out
    assert f"backbone tensors from {trained}" in out and "attention heads, as the file says" in out
    assert re.search(r"\n40 training images of folder at \d+ px\n", out)
    assert draw(trained, images, tmp_path / "2", *flags) == first
    other = draw(trained, images, tmp_path / "3", "--seed", "4")
    assert (
        set(other) == {"neighbours.png", "map.png", "attention.png"}
        and other["neighbours.png"] != first["neighbours.png"]
    )


def test_pictures_wait_for_no_other_rank(trained, images, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as in the shell of a batch job
    assert "map.png" in draw(trained, images, tmp_path / "out")


def test_images_without_labels_are_drawn_too(trained, images, tmp_path):
    tree = tmp_path / "tree"
    (images / "val/a").rename(tree)
    try:
        assert "map.png" in draw(trained, tree, tmp_path / "out")
    finally:
        tree.rename(images / "val/a")


def test_images_that_cannot_be_read_are_left_out_where_that_is_allowed(
    trained, images, tmp_path, monkeypatch
):
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(4):
        Image.new("RGB", (40, 30), (60 * number, 90, 20)).save(tree / f"{number}.png")
    clean = draw(trained, tree, tmp_path / "clean")
    (tree / "9.png").write_text("no image")
    with pytest.raises(UsageError, match=r"9\.png"):
        draw(trained, tree, tmp_path / "refused")
    monkeypatch.setattr(
        visualize.augment, "epoch_order", lambda seed, epoch, count: np.arange(count)[::-1]
    )
    drawn = draw(trained, tree, tmp_path / "out", "--on-bad-image", "skip")
    (tree / "9.png").unlink()
    assert drawn == draw(trained, tree, tmp_path / "again") and set(drawn) == set(clean)


def test_a_map_of_collapsed_features_is_drawn():
    points = encoders.pca(torch.ones(9, 4))
    picture = encoders.map_picture({"x": {"PCA": points}}, np.arange(9) % 2, ["cat", "dog"], None)
    assert {canvas.COLOURS[0], canvas.COLOURS[1]} & {
        colour for _, colour in picture.getcolors(10**6)
    }


def test_a_map_without_labels_shows_images_where_there_is_room():
    points = np.array([[0, 0], [0.01, 0], [1, 0], [1, 1]])

    def small_image(number):
        return Image.new("RGB", (encoders.SMALL, encoders.SMALL), (0, 0, 60 * (number + 1)))

    maps = {"A": {"PCA": points, "UMAP": points}, "B": {"PCA": points}}
    picture = encoders.map_picture(maps, None, [], small_image)
    counts = {colour: count for count, colour in picture.getcolors(10**6)}
    drawn = {number: counts.get((0, 0, 60 * (number + 1)), 0) for number in range(4)}
    whole = 3 * encoders.SMALL**2  # the first two points are nearly the same: one of them is shown
    assert sorted([drawn[0], drawn[1]]) == [0, whole] and drawn[2] == drawn[3] == whole


@pytest.mark.slow  # numba compiles for many seconds
def test_map_by_umap_where_it_is_installed(monkeypatch):
    monkeypatch.delitem(sys.modules, "umap")
    pytest.importorskip("umap", reason="UMAP needs umap-learn")
    assert list(encoders.projections(torch.ones(20, 5), seed=1)) == ["PCA"]
    for features in (torch.randn(40, 5), torch.randn(3, 5)):
        maps = [encoders.projections(features, seed=1) for _ in range(2)]
        first, second = (points["UMAP"] for points in maps)
        assert first.shape == (len(features), 2) and np.array_equal(first, second)
        assert np.isfinite(first).all()


def test_a_map_by_umap_is_announced_and_drawn_where_it_is_installed(
    trained, images, tmp_path, monkeypatch, capsys
):
    without = draw(trained, images, tmp_path / "without")
    assert "UMAP" not in capsys.readouterr().out
    stub = ModuleType("umap")
    stub.__spec__ = ModuleSpec("umap", None)
    stub.UMAP = lambda **settings: Namespace(fit_transform=lambda x: x[:, :2])
    monkeypatch.setitem(sys.modules, "umap", stub)
    pictures = draw(trained, images, tmp_path / "with")
    assert "by UMAP takes about half a minute" in capsys.readouterr().out
    assert {name for name in pictures if pictures[name] != without[name]} == {"map.png"}


def test_map_by_tsne_where_scikit_learn_is_installed():
    pytest.importorskip("sklearn", reason="t-SNE needs scikit-learn")
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    first, second = (encoders.projections(features, seed=1)["t-SNE"] for _ in range(2))
    assert first.shape == (40, 2) and np.array_equal(first, second)


def test_without_scikit_learn_there_is_only_pca(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    assert list(encoders.projections(torch.randn(9, 5), seed=0)) == ["PCA"]


@pytest.mark.parametrize(
    "order", ["{file} {data} --count 3", "{file} --count 3 {data}", "--count 3 {file} {data}"]
)
def test_flags_and_places_come_in_any_order(order, tmp_path):
    args = visualize.parse(order.format(file="file.pth", data=tmp_path).split())
    assert (args.file, args.data, args.count) == ("file.pth", str(tmp_path), 3)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["nowhere.pth"], "cannot read nowhere.pth: No such file"),
        (["{file}", "--image", "nowhere.jpg"], "--image nowhere.jpg: there is no such file"),
        (["{file}", "--count", "0"], "--count must be above 0"),
        (["{file}", "--against", "nowhere.pth"], "cannot read nowhere.pth: No such file"),
        (["{file}", "nowhere"], "nowhere"),
        (["{file}", "--pool", "2", "--workers", "0"], "at least three training images, found 2"),
    ],
)
def test_wrong_flags_are_answered_in_one_line(trained, flags, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=named):
        visualize.main([flag.replace("{file}", str(trained)) for flag in flags])


def test_the_untrained_encoder_is_built_by_the_same_flags(trained, images, tmp_path):
    encoder, _ = snclr.load_encoder(str(trained))
    torch.save(encoder.state_dict(), tmp_path / "plain.pth")  # does not say its architecture
    flags = ["-a", "vit_tiny", "--patch-size", "8", "--img-size", "32", "--against", "untrained"]
    assert "attention_against.png" in draw(tmp_path / "plain.pth", images, tmp_path / "1", *flags)


def test_encoders_of_other_channels_are_not_compared(trained, images, tmp_path):
    content = torch.load(trained, weights_only=True)
    content["args"] |= {"channels": 1, "mean": [0.5], "std": [0.5]}
    name = "module.base_encoder.patch_embed.proj.weight"
    content["state_dict"][name] = content["state_dict"][name][:, :1].clone()
    torch.save(content, tmp_path / "grey.pth.tar")
    with pytest.raises(UsageError, match="is for images with 1 channels, not 3"):
        draw(trained, images, tmp_path / "out", "--against", str(tmp_path / "grey.pth.tar"))


def test_an_image_that_cannot_be_read_is_named(trained, images, tmp_path):
    (tmp_path / "photo.jpg").write_text("no image")
    with pytest.raises(RunError, match=r"photo\.jpg"):
        draw(trained, images, tmp_path / "out", "--image", str(tmp_path / "photo.jpg"))
