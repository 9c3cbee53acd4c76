import json
from functools import partial

import numpy as np
import pytest
import torch
from sample_images import save_folder
from test_backbones import build
from test_linear import interrupted_after

import main_lincls
from snclr.backbones import ResNet
from snclr.evaluation import features, finetune
from snclr.evaluation.task import Task
from snclr.running.errors import UsageError
from snclr.weights import load as weights

TUNE = "--finetune --epochs 3 -b 8 -j 0 --amp off"


def tune(images, pretrained, workdir, *flags):
    main_lincls.main(
        [
            str(images),
            "--pretrained",
            str(pretrained),
            *TUNE.split(),
            "--workdir",
            str(workdir),
            *map(str, flags),
        ]
    )
    return json.loads((workdir / "results.json").read_text())


def content(workdir):
    return torch.load(workdir / "lincls_last.pth.tar", weights_only=True)


def state(workdir):
    return content(workdir)["model"]


def test_fine_tuning_trains_encoder_and_head_and_reports_the_last_epoch(
    images, pretrained, tmp_path, capsys
):
    result = tune(images, pretrained, tmp_path)
    is_vit = "vit" in result["arch"]
    assert result["finetune"]["optimizer"] == ("adamw" if is_vit else "sgd")
    assert result["finetune"]["layer_decay"] == (0.75 if is_vit else 1.0)
    assert (
        "linear_top1" not in result
        and result["finetune_top5"] == 100
        and "k=20 weighted" in result["knn"]
    )
    assert result["mean_per_class_top1"] == pytest.approx(
        np.mean(list(result["per_class_top1"].values()))
    )
    assert f"fine-tuned: top-1 {result['finetune_top1']:.2f} %" in capsys.readouterr().out
    before, _ = weights.open_encoder(str(pretrained))
    after = {
        name.removeprefix("encoder."): tensor
        for name, tensor in state(tmp_path).items()
        if name.startswith("encoder.")
    }
    changed = [
        name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after[name])
    ]
    fixed = {name for name, parameter in before.named_parameters() if not parameter.requires_grad}
    assert fixed == ({"pos_embed"} if is_vit else set()) and not fixed & set(changed)
    assert len(changed) > 0.9 * (len(after) - len(fixed))


def test_resumed_fine_tuning_equals_the_uninterrupted_one(
    images, pretrained, tmp_path, monkeypatch
):
    amp = "off" if "vit" in str(pretrained) else "fp16"  # that of a ViT is slow on a CPU
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**30)  # so gradients overflow at first
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    whole = tune(images, pretrained, tmp_path / "whole", "--amp", amp)
    monkeypatch.setattr(Task, "save", interrupted_after(2))
    with pytest.raises(KeyboardInterrupt):
        tune(images, pretrained, tmp_path / "parts", "--amp", amp)
    assert tune(images, pretrained, tmp_path / "parts", "--amp", amp, "--resume", "auto") == whole
    expected, resumed = content(tmp_path / "whole"), content(tmp_path / "parts")
    assert all(torch.equal(x, resumed["model"][name]) for name, x in expected["model"].items())
    assert expected["scaler"] == resumed["scaler"]


def test_an_untrained_encoder_starts_at_random_and_pixels_are_a_baseline_too(
    images, pretrained, tmp_path
):
    learned, _ = weights.open_encoder(str(pretrained))
    results = []
    for seed in (0, 0, 1):
        number = len(results)
        results.append(
            tune(
                images,
                pretrained,
                tmp_path / str(number),
                "--encoder",
                "untrained",
                "--seed",
                seed,
                "--epochs",
                1,
            )
        )
    digests = [result["encoder_digest"] for result in results]
    assert digests[0] == digests[1] != digests[2] and features.digest(learned) not in digests
    assert results[0]["encoder"] == "untrained" and results[0]["pretrained_epoch"] is None
    settings = results[0]["finetune"]  # all layers start untrained: one rate for all
    assert settings["lr"] == settings["head_lr"] and settings["layer_decay"] == 1
    flags = ["--encoder", "pixels", "--epochs", "2", "-b", "8", "--lrs", "0.1"]
    main_lincls.main(
        [
            str(images),
            "--pretrained",
            str(pretrained),
            *flags,
            "--workdir",
            str(tmp_path / "pixels"),
        ]
    )
    pixels = json.loads((tmp_path / "pixels/results.json").read_text())
    assert pixels["encoder"] == "pixels" and len(pixels["heads"]) == 2 and pixels["arch"] == "none"
    with pytest.raises(UsageError, match="cannot train --encoder pixels"):
        tune(images, pretrained, tmp_path / "w", "--encoder", "pixels")


@pytest.mark.parametrize(
    "flags, count", [(("--label-fraction", 0.5), 20), (("--label-fraction", 0.25), 10)]
)
def test_a_fraction_of_the_labels_is_balanced_and_the_same_each_time(
    images, pretrained, tmp_path, flags, count
):
    first = tune(images, pretrained, tmp_path / "first", *flags, "--epochs", 1)
    again = tune(images, pretrained, tmp_path / "again", *flags, "--epochs", 1)
    assert first["training_images"] == count and first["finetune_top1"] == again["finetune_top1"]
    assert first["label_fraction"] == flags[1]


def test_a_list_of_names_chooses_the_training_images(pretrained, tmp_path):
    for sizes in (
        [(32, 32)] * 24,
        [(32, 33)] * 12 + [(32, 32)] * 12,
    ):  # held in memory, and read from files
        root = tmp_path / f"images{len(set(sizes))}"
        save_folder(save_folder(root, sizes), [(32, 32)] * 4, split="val")
        (tmp_path / "names.txt").write_text(
            "\n".join(f"somewhere/{n:03}.png" for n in range(16)) + "\n"
        )
        result = tune(
            root,
            pretrained,
            tmp_path / root.name,
            "--label-list",
            tmp_path / "names.txt",
            "--epochs",
            1,
        )
        assert result["training_images"] == 16
    (tmp_path / "names.txt").write_text("000.png\nnowhere.png\n")
    with pytest.raises(
        UsageError, match=r"1 names of .*names\.txt are no training images: nowhere\.png"
    ):
        tune(root, pretrained, tmp_path / "w", "--label-list", tmp_path / "names.txt")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--label-fraction 0.01", "leaves class a with its 20 images none"),
        ("--label-fraction 1.5", "at most 1"),
        ("--label-fraction 0.5 --label-list setup.py", "there is no such file"),
        ("--warmup-epochs 3", "--warmup-epochs must be below --epochs, 3"),
        ("--lr 0", "--lr must be above 0"),
    ],
)
def test_a_wrong_flag_gives_one_line(images, pretrained, tmp_path, flags, message):
    with pytest.raises(UsageError) as caught:
        tune(images, pretrained, tmp_path / "w", *flags.split())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_option_of_fine_tuning_reaches_the_optimiser_and_the_crops(
    images, pretrained, tmp_path
):
    flags = "--optimizer adamw --lr 0.01 --head-lr 0.02 --wd 0.3 --warmup-epochs 0.5"
    flags += " --epochs 1 --amp bf16"
    is_vit = "vit" in str(pretrained)
    decay = ["--layer-decay", "0.5"] if is_vit else []
    settings = tune(images, pretrained, tmp_path / "run", *flags.split(), *decay)["finetune"]
    assert settings == dict(
        optimizer="adamw",
        lr=0.01,
        head_lr=0.02,
        weight_decay=0.3,
        layer_decay=0.5 if is_vit else 1.0,
    )
    groups = torch.load(tmp_path / "run/lincls_last.pth.tar", weights_only=True)["optimizer"][
        "param_groups"
    ]
    assert {group["weight_decay"] for group in groups} == {0, 0.3} and "betas" in groups[0]
    peaks = {group["peak"] for group in groups}
    assert {0.02 * 8 / 256, 0.01 * 8 / 256} <= peaks and len(peaks) > 10 * is_vit
    tune(images, pretrained, tmp_path / "crops", *flags.split(), *decay, "--crop-min", 0.9)
    assert not torch.equal(
        state(tmp_path / "run")["head.weight"], state(tmp_path / "crops")["head.weight"]
    )


def test_rates_fall_from_layer_to_layer(monkeypatch):
    encoder = build("timm:test_vit", img_size=32, timm_kwargs={"depth": 3})
    encoder.set_submodule("head", torch.nn.Identity())  # as open_encoder leaves it
    model = finetune.Classifier(encoder, 5)
    optimizer = finetune.build_optimizer(model, "adamw", 1.0, 7.0, 0.1, 0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    peaks = {
        names[id(p)]: (group["peak"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert peaks["head.weight"] == (7.0, 0.1) and peaks["head.bias"] == (7.0, 0.0)
    ladder = [
        "encoder.norm.weight",
        *(f"encoder.blocks.{n}.attn.qkv.weight" for n in (2, 1, 0)),
        "encoder.cls_token",
    ]
    assert [peaks[name][0] for name in ladder] == pytest.approx(
        [1.0, 1.0, 0.5, 0.25, 0.125], rel=1e-9
    )
    assert peaks["encoder.blocks.0.attn.qkv.weight"][1] == 0.1
    assert set(peaks) == {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    flat = finetune.build_optimizer(model, "sgd", 2.0, 3.0, 0.0, 1.0)
    assert {group["peak"] for group in flat.param_groups} == {2.0, 3.0}
    monkeypatch.delattr(ResNet, "group_matcher")
    with pytest.raises(UsageError, match=r"--layer-decay 0\.5 needs the layers of"):
        finetune.build_optimizer(finetune.Classifier(build("resnet8"), 5), "sgd", 1, 1, 0, 0.5)


def test_a_skipped_first_step_leaves_the_momentum_at_zero():
    model = finetune.Classifier(build("resnet8"), 5)
    optimizer = finetune.build_optimizer(model, "sgd", 1.0, 1.0, 0.0, 1.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.ones(())  # as GradScaler.step sets it for a fused optimiser
    optimizer.step()
    buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert buffers and not any(buffer.any() for buffer in buffers)


def test_transfer_to_a_torchvision_set_of_photographs(pretrained, tmp_path):
    from test_sources import save_pets

    save_pets(tmp_path)
    flags = [
        "--dataset",
        "pets",
        "--pretrained",
        str(pretrained),
        "-j",
        "0",
        "-b",
        "2",
        "--epochs",
        "2",
    ]
    probe_flags = ["--select", "val", "--lrs", "0.1"]
    for name, more in {"probe": probe_flags, "tuned": ["--finetune"]}.items():
        main_lincls.main([str(tmp_path), *flags, *more, "--workdir", str(tmp_path / name)])
        result = json.loads((tmp_path / name / "results.json").read_text())
        assert (
            result["dataset"] == "pets" and result["per_class_top1"]["Abyssinian"] is None
        )  # a class without test images
        assert result["mean_per_class_top1"] == result["per_class_top1"]["Beagle"]
