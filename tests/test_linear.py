import argparse
import functools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import main_lincls
from snclr import augment
from snclr.datasets import sources
from snclr.datasets.split import class_share
from snclr.evaluation import confusion, features, knn, linear
from snclr.evaluation import options as lincls_options
from snclr.evaluation import probe as probes
from snclr.evaluation.task import Task
from snclr.loader import ViewLoader, whole_images
from snclr.running.errors import RunError, UsageError
from snclr.weights import load as weights

RATES, DIMS, CLASSES = (0.01, 0.3, 2.0), {"token": 4, "token+mean": 7}, 5
CPU = torch.device("cpu")


# -- the grid of heads -------------------------------------------------------------------------


def train_one_head(grid, kind, norm, rate, steps, factors):
    """One head trained by torch's own layers and SGD: the layer and its normalisation."""
    layer = nn.Linear(DIMS[kind], CLASSES)
    with torch.no_grad():
        layer.weight.copy_(grid.weights[f"{kind}/{norm}"][0])
        layer.bias.zero_()
    normalise = nn.BatchNorm1d(DIMS[kind], affine=False) if norm == "batchnorm" else nn.Identity()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0, momentum=0.9)
    for (x, y), factor in zip(steps, factors, strict=True):
        optimizer.param_groups[0]["lr"] = factor * rate
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(normalise(x[:, : DIMS[kind]])), y).backward()
        optimizer.step()
    return layer, normalise.eval()


def test_each_head_of_the_grid_equals_a_head_trained_separately(float64):
    torch.manual_seed(0)
    steps = [(torch.randn(12, 7) * 3 + 1, torch.randint(CLASSES, (12,))) for _ in range(9)]
    factors = [1.0, 0.9, 0.7, 0.5, 0.5, 0.3, 0.2, 0.1, 0.0]
    grid = linear.LinearGrid(DIMS, CLASSES, RATES)
    expected = [
        train_one_head(grid, kind, norm, RATES[rate], steps, factors)
        for kind, norm, rate in grid.names()
    ]
    optimizer = torch.optim.SGD(grid.parameters(), lr=1.0, momentum=0.9)
    for (x, y), factor in zip(steps, factors, strict=True):
        optimizer.param_groups[0]["lr"] = factor
        grid.train_step(optimizer, x, y)
    x, y = torch.randn(30, 7) * 3 + 1, torch.randint(CLASSES, (30,))
    logits_of_all = grid.eval().logits(x)
    right = grid.correct(x, y, chunk=8)
    assert logits_of_all.shape == (30, 12, CLASSES) and len(expected) == 12
    for head, ((kind, _, _), (layer, normalise)) in enumerate(
        zip(grid.names(), expected, strict=True)
    ):
        logits = layer(normalise(x[:, : DIMS[kind]]))
        torch.testing.assert_close(logits_of_all[:, head], logits, rtol=1e-9, atol=1e-9)
        assert (
            right[0, head] == (logits.argmax(dim=1) == y).sum() and right[1, head] == 30
        )  # five classes
        counts = grid.confusion(head, x, y, chunk=7)
        for true in range(CLASSES):
            for predicted in range(CLASSES):
                assert (
                    counts[true, predicted]
                    == ((y == true) & (logits.argmax(dim=1) == predicted)).sum()
                )


def test_top_five_counts_the_five_best():
    grid = linear.LinearGrid({"pooled": 3}, 20, (0.1,))
    x, y = torch.randn(50, 3), torch.randint(20, (50,))
    expected = sum(y[i] in grid.eval().logits(x)[i, 0].topk(5).indices for i in range(50))
    assert grid.correct(x, y)[1, 0] == expected


def test_the_result_of_a_head_does_not_depend_on_the_other_heads():
    x, y = torch.randn(16, 7), torch.randint(CLASSES, (16,))
    trained = []
    for rates in (RATES, (0.3,)):
        grid = linear.LinearGrid(DIMS, CLASSES, rates)
        optimizer = torch.optim.SGD(grid.parameters(), lr=1.0, momentum=0.9)
        for _ in range(5):
            grid.train_step(optimizer, x, y)
        trained.append(grid.weights["token+mean/batchnorm"][rates.index(0.3)])
    torch.testing.assert_close(*trained)


def test_a_share_of_each_class_is_keyed_and_nested():
    labels = torch.tensor([0] * 40 + [1] * 7 + [2] * 2)
    keys = torch.rand(49, generator=torch.Generator().manual_seed(0))
    share_of = functools.partial(class_share, labels, ["a", "b", "c"])
    held = share_of(0.1, keys, both_sides=True)
    assert [int(held[labels == c].sum()) for c in range(3)] == [4, 1, 1]
    assert keys[:40][held[:40]].max() < keys[:40][~held[:40]].min()
    most = share_of(0.99, keys, both_sides=True)
    assert [int(most[labels == c].sum()) for c in range(3)] == [39, 6, 1]
    half, all_of_them = (
        share_of(0.5, keys),
        share_of(1, keys),
    )
    assert [int(half[labels == c].sum()) for c in range(3)] == [20, 4, 1] and all_of_them.all()
    assert (half | held)[:47].equal(half[:47])
    with pytest.raises(UsageError, match="leaves class c with its 2 images none"):
        share_of(0.1, keys)


def test_features_of_a_vit_are_the_class_token_and_the_mean_of_its_patches():
    from test_backbones import build

    encoder = build("vit_tiny", patch_size=8).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        x_features, tokens = linear.features_of(encoder, x), encoder.forward_features(x)
    assert linear.kinds_of(encoder) == {"token": 192, "token+mean": 384} and x_features.shape == (
        2,
        384,
    )
    torch.testing.assert_close(x_features[:, :192], encoder.embed(x))
    torch.testing.assert_close(x_features[:, 192:], tokens[:, 1:].mean(dim=1))
    resnet = build("resnet8", width=8).eval()
    assert linear.kinds_of(resnet) == {"pooled": 32} and linear.features_of(resnet, x).shape == (
        2,
        32,
    )


def test_knn_table_equals_the_loops():
    generator = torch.Generator().manual_seed(0)
    stored = nn.functional.normalize(
        torch.randn(60, 6, generator=generator, dtype=torch.float64), dim=1
    )
    queries = nn.functional.normalize(
        torch.randn(25, 6, generator=generator, dtype=torch.float64), dim=1
    )
    labels, truth = torch.arange(60) % 4, torch.arange(25) % 4
    votes = {f"k={k} weighted": knn.Vote(k, 0.07) for k in (3, 10)}
    votes |= {f"k={k} plain": knn.Vote(k, None) for k in (3, 10)}
    votes["cooler"] = knn.Vote(7, 0.1)
    top1 = knn.table((3 * stored, labels), 2 * queries, truth, 4, votes, CPU)
    assert top1.keys() == votes.keys()
    for name, (k, temperature) in votes.items():
        right = 0
        for query, true in zip(queries, truth, strict=True):
            pairs = zip(stored, labels, strict=True)
            cosines = sorted(((float(query @ row), int(y)) for row, y in pairs), reverse=True)
            weights = [
                (1.0 if temperature is None else np.exp(c / temperature), y) for c, y in cosines
            ]
            scores = [sum(w for w, y in weights[:k] if y == number) for number in range(4)]
            right += int(np.argmax(scores)) == true
        assert top1[name] == pytest.approx(100 * right / 25)


# -- frozen features ---------------------------------------------------------------------------


def test_the_digest_sees_every_bit():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = features.digest(module)
    assert features.digest(module) == before
    module[1].num_batches_tracked += 1
    changed = features.digest(module)
    assert changed != before
    module[0].weight.data.view(torch.int32)[0, 0] ^= 1
    assert features.digest(module) != changed


PROBE = "--epochs 4 -b 8 -j 0 --lrs 0.01 0.1 1 --amp off"


def probe(images, pretrained, workdir, *flags):
    main_lincls.main(
        [
            str(images),
            "--pretrained",
            str(pretrained),
            *PROBE.split(),
            "--workdir",
            str(workdir),
            *map(str, flags),
        ]
    )
    return json.loads((workdir / "results.json").read_text())


def comparable(result):
    """A result without what may differ between two equal runs: a path, the commit of the code."""
    return {name: value for name, value in result.items() if name not in ("pretrained", "git")}


def test_a_probe_writes_its_results(images, pretrained, tmp_path, capsys):
    result = probe(images, pretrained, tmp_path)
    kinds = 1 if "resnet" in result["arch"] else 2
    assert (
        len(result["heads"]) == kinds * 2 * 3
        and result["encoder"] == "online"
        and result["select"] == "heldout"
    )
    best = max(result["heads"], key=lambda head: head["heldout_top1"])
    assert (
        result["best_head"]["heldout_top1"] == best["heldout_top1"]
        and result["best_lr"] == result["best_head"]["lr"]
    )
    assert (
        result["linear_top1"] == result["best_head"]["val_top1"] and result["linear_top5"] == 100
    )  # of two classes
    assert (
        result["knn_top1"] == result["knn"]["k=20 weighted"]
        and result["knn200_top1"] == result["knn"]["k=200 weighted, T=0.1"]
        and "4 held-out training images" in result["protocol"]
    )
    rights = result["per_class_top1"]
    assert set(rights) == {"a", "b"} and sum(rights.values()) / 2 == pytest.approx(
        result["linear_top1"], abs=0.01
    )
    encoder, _ = weights.open_encoder(str(pretrained))
    assert result["encoder_digest"] == features.digest(encoder)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.width > 100
    out = capsys.readouterr().out
    assert f"linear probe: top-1 {result['linear_top1']:.2f} %" in out and "base lr" in out


def interrupted_after(epochs):
    """A Task.save that raises KeyboardInterrupt after so many epochs."""
    saves, save = [], Task.save

    def interrupted(*args, **kwargs):
        save(*args, **kwargs)
        saves.append(1)
        if len(saves) == epochs:
            raise KeyboardInterrupt

    return interrupted


def test_a_resumed_probe_equals_the_uninterrupted_one(images, pretrained, tmp_path, monkeypatch):
    whole = probe(images, pretrained, tmp_path / "whole")
    monkeypatch.setattr(Task, "save", interrupted_after(2))
    with pytest.raises(KeyboardInterrupt):
        probe(images, pretrained, tmp_path / "parts")
    assert not (tmp_path / "parts/results.json").exists()
    assert probe(images, pretrained, tmp_path / "parts", "--resume", "auto") == whole
    states = [
        torch.load(tmp_path / name / "lincls_last.pth.tar", weights_only=True)["model"]
        for name in ("whole", "parts")
    ]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    with pytest.raises(UsageError, match="seed changed"):
        probe(images, pretrained, tmp_path / "parts", "--resume", "auto", "--seed", 1)


def test_a_head_has_the_same_result_in_a_grid_and_separately(images, pretrained, tmp_path):
    grid = {
        (h["features"], h["norm"]): h
        for h in probe(images, pretrained, tmp_path / "grid")["heads"]
        if h["lr"] == 0.1
    }
    single = probe(images, pretrained, tmp_path / "single", "--lrs", 0.1)["heads"]
    assert [grid[head["features"], head["norm"]] for head in single] == single


def test_cached_features_on_disk_equal_those_in_memory_and_are_used_again(
    images, pretrained, tmp_path, monkeypatch
):
    memory = probe(images, pretrained, tmp_path / "memory", "--cache-features")
    disk = probe(images, pretrained, tmp_path / "disk", "--cache-features", "--cache-limit-gb", 0)
    assert comparable(disk) == comparable(memory) and not list((tmp_path / "memory").glob("*.f32"))
    (file,) = (tmp_path / "disk").glob("features_*.f32")
    calls, original = [], features.encode_in_order
    monkeypatch.setattr(features, "encode_in_order", lambda *a: calls.append(1) or original(*a))
    finished = "--cache-features", "--resume", "auto"  # nothing is left to train
    assert probe(images, pretrained, tmp_path / "memory", *finished) == memory and not calls
    for name in ("results.json", "lincls_last.pth.tar"):
        (tmp_path / "disk" / name).unlink()
    assert (
        probe(images, pretrained, tmp_path / "disk", "--cache-features", "--cache-limit-gb", 0)
        == disk
        and not calls
    )
    # an incomplete file is not used
    content = file.read_bytes()
    for name in ("results.json", "lincls_last.pth.tar"):
        (tmp_path / "disk" / name).unlink()
    file.write_bytes(content[: len(content) // 2])
    assert (
        probe(images, pretrained, tmp_path / "disk", "--cache-features", "--cache-limit-gb", 0)
        == disk
        and calls
    )
    assert file.read_bytes() == content and not list((tmp_path / "disk").glob("*.tmp"))


def test_other_images_have_another_cache_and_a_full_disk_is_reported(images, pretrained, tmp_path):
    import resource

    flags = [
        "--label-list",
        tmp_path / "names.txt",
        "--cache-features",
        "--cache-limit-gb",
        0,
        "--epochs",
        1,
    ]
    for number, first in enumerate((0, 4)):  # as many images of each class, at the same place
        (tmp_path / "names.txt").write_text("".join(f"{first + n:02}.png\n" for n in range(12)))
        probe(images, pretrained, tmp_path / "w", *flags)
        assert len(list((tmp_path / "w").glob("features_*.f32"))) == number + 1
        for name in ("results.json", "lincls_last.pth.tar"):
            (tmp_path / "w" / name).unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # settings fit, features do not
    try:
        with pytest.raises(
            RunError,
            match=r"cannot write the features to .*features_.*: File too large; "
            "choose another --workdir",
        ):
            probe(images, pretrained, tmp_path / "full", *flags, "--cache-copies", 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "full").glob("*.f32"))


def test_epochs_use_the_cached_copies_of_random_crops_in_turn(images, pretrained, tmp_path):
    crops = probe(images, pretrained, tmp_path / "crops")
    copies = probe(images, pretrained, tmp_path / "copies", "--cache-features", "--cache-copies", 4)
    for one, other in zip(crops["heads"], copies["heads"], strict=True):
        assert one == other  # four copies for four epochs: the same crops


def test_the_momentum_encoder_and_the_choice_on_the_validation_images(images, pretrained, tmp_path):
    result = probe(
        images, pretrained, tmp_path, "--encoder", "momentum", "--select", "val", "--cache-features"
    )
    momentum, _ = weights.open_encoder(str(pretrained), "momentum")
    assert result["encoder"] == "momentum" and result["encoder_digest"] == features.digest(momentum)
    assert result["select"] == "val" and result["linear_top1"] == max(
        head["val_top1"] for head in result["heads"]
    )
    assert "on which it is also reported" in result["protocol"]


# -- the published protocol, and the chosen head on all images ---------------------------------


def slow_head(images, pretrained, lr_at, epochs, batch, crop_min, norm="plain", column_mean=False):
    """Linear layer and normalisation trained on all images by torch's own layers and optimiser, and
    top-1 in percent on the validation images after each epoch. lr_at: rate at (epoch, step, steps).
    """
    encoder, info = weights.open_encoder(str(pretrained))
    args = lincls_options.parse([str(images), "--pretrained", str(pretrained), "-j", "0"])
    args.mean, args.std, args.img_size = info["mean"], info["std"], info["img_size"]
    args.channels = info["channels"]
    train, val, _ = sources.open_data(args)
    width = next(iter(linear.kinds_of(encoder).values())) * (1 + column_mean)
    layer = nn.Linear(width, 2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2, width, generator=generator) * 0.01)
        layer.bias.zero_()
    normalise = nn.BatchNorm1d(width, affine=False) if norm == "batchnorm" else nn.Identity()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0, momentum=0.9, weight_decay=0)
    recipe = augment.Recipe(0, (augment.View(args.img_size, crop_min),))
    loader = ViewLoader(train, recipe, CPU, 0)
    whole = torch.cat(
        list(whole_images(val, np.arange(len(val)), size=args.img_size, device=CPU, workers=0))
    )
    history = []
    for epoch in range(epochs):
        order, steps = augment.epoch_order(0, epoch, len(train)), len(train) // batch
        normalise.train()
        for step in range(steps):
            part = order[step * batch : (step + 1) * batch]
            ((ids, (x,)),) = loader.load([(epoch, part, (0,))])
            with torch.no_grad():
                x = linear.features_of(encoder, x)[:, :width]
            optimizer.param_groups[0]["lr"] = lr_at(epoch, step, steps)
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(normalise(x)), train.labels[ids]).backward()
            optimizer.step()
        normalise.eval()
        with torch.no_grad():
            logits = layer(normalise(linear.features_of(encoder, whole)[:, :width]))
        history.append(100 * (logits.argmax(dim=1) == val.labels).double().mean().item())
    return layer, history


def published(images, pretrained, workdir, *flags):
    command = [str(images), "--pretrained", str(pretrained), "--workdir", str(workdir), "-j", "0"]
    main_lincls.main([*command, "--protocol", "mocov3", "--epochs", "3", "-b", "8", *flags])
    return json.loads((workdir / "results.json").read_text())


def test_the_published_protocol_equals_a_plain_loop(images, pretrained, tmp_path, float64):
    result = published(images, pretrained, tmp_path)
    base = 3 if "vit" in result["arch"] else 0.1

    def rate(epoch, step, steps):
        return base * 8 / 256 * 0.5 * (1 + math.cos(math.pi * epoch / 3))

    layer, history = slow_head(images, pretrained, rate, epochs=3, batch=8, crop_min=0.08)
    state = torch.load(tmp_path / "lincls_last.pth.tar", weights_only=True)["model"]
    (weight,) = (x for name, x in state.items() if name.startswith("weights."))
    (bias,) = (x for name, x in state.items() if name.startswith("biases."))
    torch.testing.assert_close(weight[0], layer.weight.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bias[0], layer.bias.detach(), rtol=1e-9, atol=1e-12)
    assert result["linear_top1"] == pytest.approx(history[-1])
    assert result["best_epoch_top1"] == pytest.approx(max(history))
    assert result["best_epoch"] == 1 + int(np.argmax(history)) and result["best_lr"] == base
    assert len(result["heads"]) == 1 and result["best_head"]["norm"] == "plain"
    assert "mocov3: one head on all 40 training images" in result["protocol"]
    assert "crops of at least 8% of the area, encoder in float32" in result["protocol"]
    expected = {"protocol": "mocov3", "epochs": 3, "batch_size": 8, "crop_min": 0.08, "amp": "off"}
    assert result["probe"] == expected and "select" not in result


def test_the_best_epoch_survives_an_interruption(images, pretrained, tmp_path, monkeypatch):
    whole = published(images, pretrained, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Task, "save", interrupted_after(2))
        with pytest.raises(KeyboardInterrupt):
            published(images, pretrained, tmp_path / "parts")
    assert published(images, pretrained, tmp_path / "parts", "--resume", "auto") == whole
    histories = [
        torch.load(tmp_path / name / "lincls_last.pth.tar", weights_only=True)["history"]
        for name in ("whole", "parts")
    ]
    assert len(histories[0]) == 3 and histories[0] == histories[1]


@pytest.mark.parametrize("history", [[], [50.0], "50", None])
def test_a_state_without_the_accuracy_of_each_epoch_is_refused(
    images, pretrained, tmp_path, history
):
    published(images, pretrained, tmp_path)
    path = tmp_path / "lincls_last.pth.tar"
    torch.save(torch.load(path, weights_only=True) | {"history": history}, path)
    with pytest.raises(UsageError, match=r"lincls_last\.pth\.tar .*choose a new --workdir"):
        published(images, pretrained, tmp_path, "--resume", "auto")


def test_the_chosen_head_is_trained_again_on_all_images(images, pretrained, tmp_path, float64):
    plain = probe(images, pretrained, tmp_path / "plain")
    result = probe(images, pretrained, tmp_path / "w", "--retrain")
    assert {key: result[key] for key in plain} == plain
    head = result["best_head"]

    def rate(epoch, step, steps):
        return head["lr"] * 8 / 256 * 0.5 * (1 + math.cos(math.pi * (epoch + step / steps) / 4))

    layer, history = slow_head(
        images,
        pretrained,
        rate,
        epochs=4,
        batch=8,
        crop_min=1.0,
        norm=head["norm"],
        column_mean=head["features"] == "token+mean",
    )
    state = torch.load(tmp_path / "w/retrain_last.pth.tar", weights_only=True)["model"]
    weight = state[f"weights.{head['features']}/{head['norm']}"]
    torch.testing.assert_close(weight[0], layer.weight.detach(), rtol=1e-8, atol=1e-10)
    assert result["retrained_top1"] == pytest.approx(history[-1])
    assert result["retrained_protocol"].startswith("retrained on all 40 training images; 4 epochs")


def test_an_interrupted_retraining_is_resumed(images, pretrained, tmp_path, monkeypatch):
    whole = probe(images, pretrained, tmp_path / "whole", "--retrain")
    with monkeypatch.context() as patch:
        patch.setattr(Task, "save", interrupted_after(6))
        with pytest.raises(KeyboardInterrupt):
            probe(images, pretrained, tmp_path / "parts", "--retrain")
    resumed = probe(images, pretrained, tmp_path / "parts", "--retrain", "--resume", "auto")
    assert resumed == whole


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--lrs 1", "leave out --lrs"),
        ("--select val", "leave out --select"),
        ("--heldout 0.2", "leave out --heldout"),
        ("--retrain", "leave out --retrain"),
        ("--cache-features", "leave out --cache-features"),
        ("--cache-copies 2", "leave out --cache-copies"),
        ("--crop-min 0.2", "leave out --crop-min"),
        ("--amp bf16", "leave out --amp"),
        ("--finetune", "--protocol is for the linear probe"),
        ("--protocol grid --finetune --retrain", "--retrain is for the linear probe"),
        (
            "--protocol grid --finetune --heldout 0.2",
            "--heldout is for the linear probe, without --finetune",
        ),
        ("--lr 3", "--lr is for fine-tuning, with --finetune"),
        ("--protocol grid --retrain --select val", "--retrain needs held-out images"),
    ],
)
def test_flags_that_contradict_a_protocol_are_refused(pretrained, flags, message):
    command = ["--pretrained", str(pretrained), "--protocol", "mocov3"]
    with pytest.raises(UsageError, match=message):
        lincls_options.parse([*command, *flags.split()])
    assert lincls_options.parse([*command, "--amp", "off"]).lrs == list(lincls_options.RATES)


@pytest.mark.parametrize(
    "size, count, flags, batch_size, crop_min",
    [
        (224, 10**6, "", 1024, 0.08),
        (32, 50_000, "", 1024, 1.0),
        (64, 5_000, "", 256, 1.0),
        (65, 5_000, "", 256, 0.08),
        (32, 20, "", 8, 1.0),
        (32, 9, "", 4, 1.0),  # of two classes, 7 are left to train on
        (32, 2, "--select val", 2, 1.0),
        (32, 5_000, "--protocol mocov3", 1024, 0.08),
        (32, 5_000, "--finetune", 256, 0.08),
        (32, 5_000, "-b 96 --crop-min 0.3", 96, 0.3),
    ],
)
def test_batch_and_crops_follow_from_the_images(
    pretrained, size, count, flags, batch_size, crop_min
):
    args = lincls_options.parse(["--pretrained", str(pretrained), *flags.split()])
    args.img_size = size
    lincls_options.resolve_training(args, count)
    assert (args.batch_size, args.crop_min) == (batch_size, crop_min)


@pytest.mark.parametrize("flags, batch", [("--finetune", 256), ("--protocol mocov3", 1024)])
def test_a_batch_of_more_images_than_there_are_is_refused_before_they_are_encoded(
    pretrained, flags, batch
):
    args = lincls_options.parse(["--pretrained", str(pretrained), *flags.split()])
    with pytest.raises(UsageError, match=f"--batch-size {batch} exceeds the 100 training images"):
        lincls_options.resolve_training(args, 100)


def test_a_default_batch_that_ranks_cannot_share_is_refused(pretrained, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    args = lincls_options.parse(["--pretrained", str(pretrained)])
    args.img_size = 32
    with pytest.raises(
        UsageError,
        match="--batch-size 1024 is for all ranks together and must be divisible by the 3",
    ):
        lincls_options.resolve_training(args, 10**6)


# -- the key of cached features ----------------------------------------------------------------


def test_every_setting_that_features_depend_on_changes_their_key(images, pretrained):
    args = lincls_options.parse([str(images), "--pretrained", str(pretrained)])
    encoder, info = weights.open_encoder(str(pretrained))
    args.mean, args.std, args.img_size = info["mean"], info["std"], info["img_size"]
    args.channels = info["channels"]
    train, val, _ = sources.open_data(args)
    identity = {"encoder_digest": "digest"}
    task = Task(args, encoder, info, identity, None, None, train, val, CPU, "off", None, print)

    def key(images=train, **changed):
        return probes.cache_key(task._replace(**changed), images)

    def key_with(name, value):
        return key(args=argparse.Namespace(**{**vars(args), name: value}))

    settings = set(vars(args))
    ignored = {name for name in settings if key_with(name, "another") == key()}
    assert ignored == lincls_options.NOT_IN_FEATURES
    assert settings - ignored >= {
        *("data", "dataset", "labels", "subset", "subset_seed", "label_fraction", "label_list"),
        *("val_fraction", "val_seed"),
        *(
            "select",
            "heldout",
            "seed",
            "protocol",
            "mean",
            "std",
            "img_size",
            "grey_range",
            "crop_min",
        ),
        *("cache_copies", "encoder", "arch", "patch_size", "width", "small_stem", "timm_kwargs"),
        "on_bad_image",
    }
    assert key_with("a_new_flag", 1) != key()
    others = [
        key(identity={"encoder_digest": "another"}),
        key(amp="bf16"),
        key(device=torch.device("cuda")),
        key(info={**info, "num_heads": 6}),
        key(train.select(np.arange(39))),
        key(train.select(np.arange(40)[::-1].copy())),
    ]
    assert len({key(), *others}) == 7
    assert key(info={**info, "epoch": 9, "notes": ["other"]}) == key()


def test_features_of_another_normalisation_are_not_taken(images, pretrained, tmp_path):
    flags = ["--cache-features", "--cache-limit-gb", 0, "--epochs", 1]
    for number, mean in enumerate((0.4, 0.5)):
        probe(images, pretrained, tmp_path, *flags, "--mean", *3 * [mean], "--std", *3 * [0.2])
        assert len(list(tmp_path.glob("features_*.f32"))) == number + 1
        for name in ("results.json", "lincls_last.pth.tar"):
            (tmp_path / name).unlink()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--labels none", "needs labelled training and validation images"),
        ("-b 1", "--batch-size must be at least 2"),
        ("-b 1000", "--batch-size 1000 exceeds the 40 training images"),
        ("--arch resnet50", "not --arch resnet50: leave --arch out"),
        ("--lrs 0 1", "--lrs must be above 0"),
        ("--heldout 1", "--heldout must be above 0 and at most 0.99"),
        ("--pretrained nowhere.pth", "there is no such file"),
        ("--epochs 0", "--epochs must be above 0"),
    ],
)
def test_a_wrong_flag_gives_one_line(images, pretrained, tmp_path, flags, message):
    with pytest.raises(UsageError) as caught:
        probe(images, pretrained, tmp_path / "w", *flags.split())
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "w/results.json").exists()


def test_data_that_no_classifier_can_learn_from_is_refused(pretrained, tmp_path):
    from sample_images import save_folder

    one = save_folder(
        save_folder(tmp_path / "one", [(32, 32)] * 9, classes=("a",)), [(32, 32)] * 2, "val", ("a",)
    )
    with pytest.raises(
        UsageError, match="a classifier needs two classes, the training images have 1"
    ):
        probe(one, pretrained, tmp_path / "w")
    few = save_folder(
        save_folder(
            tmp_path / "few", [(32, 32)] * 9, classes=("a", "a", "a", "a", "b", "a", "a", "a", "a")
        ),
        [(32, 32)] * 2,
        "val",
    )
    with pytest.raises(UsageError, match="must have the same classes"):
        probe(few, pretrained, tmp_path / "w")
    rare = save_folder(
        save_folder(tmp_path / "rare", [(32, 32)] * 9, classes=("a",) * 8 + ("b",)),
        [(32, 32)] * 2,
        "val",
        ("a", "b"),
    )
    with pytest.raises(
        UsageError,
        match="every class needs two training images, one to be held out; only one has b",
    ):
        probe(rare, pretrained, tmp_path / "w")


def test_pretrained_is_needed():
    with pytest.raises(UsageError, match="--pretrained FILE is needed"):
        lincls_options.parse([])


@pytest.mark.parametrize("classes", [2, 10, 25, 26, 300])
def test_the_confusion_picture_shows_correct_predictions_on_the_diagonal(classes, tmp_path):
    picture = confusion.picture(
        np.eye(classes, dtype=int) * 7, [f"class {n}" for n in range(classes)], "a title"
    )
    picture.save(tmp_path / "confusion.png")
    pixels = np.asarray(picture)
    dark = (pixels == confusion.HIGH).all(axis=2)
    rows, columns = np.nonzero(dark)
    assert np.corrcoef(rows, columns)[0, 1] > 0.7 and 150 < picture.width < 1500


def test_a_class_without_validation_images_has_no_percentage():
    assert confusion.class_accuracies(np.array([[2, 1], [0, 0]])) == [200 / 3, None]
