"""Each exported format is read by the library that it is for, and by this project."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
from test_ranks import SMALL, write_images
from torch import nn

import main_snclr
import snclr
from snclr import export
from snclr.evaluation import features
from snclr.running.errors import RunError, UsageError

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
ARCHS = {
    "vit": "-a vit_tiny --patch-size 8",
    "resnet": "-a resnet18",
    "narrow": "-a resnet18 --width 8",
    "conv": "-a vit_conv_small",
    "timm": "-a timm:test_convnext",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A function from a name of ARCHS to a checkpoint after one long step, which leaves no norm or bias at its start."""
    root = tmp_path_factory.mktemp("checkpoints")
    images, made = write_images(root / "images"), {}
    step = "--eval-freq 0 --stop-after-steps 1 --warmup-epochs 0 --lr 1"

    def make(name):
        if name not in made:
            flags = f"{SMALL.replace('--arch resnet8 --width 8', ARCHS[name])} {step}".split()
            main_snclr.main([str(images), *flags, "--workdir", str(root / name)])
            made[name] = root / name / "checkpoint_last.pth.tar"
        return made[name]

    return make


def run(checkpoint, format_name, out, *flags):
    export.main([str(checkpoint), "--format", format_name, "--out", str(out), *flags])
    return out


def assert_same_features(model, checkpoint, which="online"):
    encoder, _ = snclr.load_encoder(str(checkpoint), which)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X), encoder(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_timm_reads_a_vit(checkpoints, tmp_path, suffix, capsys):
    out = run(checkpoints("vit"), "timm", tmp_path / f"vit.{suffix}")
    state = dict(img_size=32, patch_size=8, num_heads=3, num_classes=0)
    model = timm.create_model("vit_tiny_patch16_224", **state, checkpoint_path=str(out))
    assert_same_features(model, checkpoints("vit"))
    assert "checked: loaded back, features of a random image agree" in capsys.readouterr().out


def test_timm_reads_a_resnet_and_a_model_of_its_own(checkpoints, tmp_path):
    for name, model in (("resnet", "resnet18"), ("timm", "test_convnext")):
        out = run(checkpoints(name), "timm", tmp_path / f"{name}.pth")
        assert_same_features(
            timm.create_model(model, num_classes=0, checkpoint_path=str(out)), checkpoints(name)
        )


@pytest.mark.parametrize("which", ["online", "momentum"])
def test_torchvision_reads_a_resnet(checkpoints, tmp_path, which):
    out = run(checkpoints("resnet"), "torchvision", tmp_path / "resnet18.pth", "--encoder", which)
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    model.load_state_dict(torch.load(out, weights_only=True), strict=True)
    assert_same_features(model, checkpoints("resnet"), which)


def test_deits_files_have_timms_names_below_model(checkpoints, tmp_path):
    out = run(checkpoints("vit"), "deit", tmp_path / "deit.pth")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0)
    model.load_state_dict(torch.load(out, weights_only=True)["model"], strict=True)
    assert_same_features(model, checkpoints("vit"))


@pytest.mark.parametrize("name, head", [("vit", "head"), ("resnet", "fc"), ("conv", "head")])
def test_mocov3s_layout_is_read_as_its_linear_evaluation_does(checkpoints, tmp_path, name, head):
    out = run(checkpoints(name), "mocov3", tmp_path / "moco.pth.tar")
    state = torch.load(out, weights_only=True)["state_dict"]
    prefix = "module.base_encoder."
    names = {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
    assert len(names) == len(state) and not any(key.startswith(head) for key in names)
    encoder, info = snclr.load_encoder(
        str(out), img_size=32, patch_size=8 if name == "vit" else None
    )
    assert info["arch"] == ARCHS[name].split()[1]
    assert_same_features(encoder, checkpoints(name))


def test_transformers_reads_a_vit(checkpoints, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    out = run(checkpoints("vit"), "hf", tmp_path / "hf")
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
    model = transformers.AutoModel.from_pretrained(out, add_pooling_layer=False).eval()
    encoder, _ = snclr.load_encoder(str(checkpoints("vit")))
    with torch.no_grad():
        torch.testing.assert_close(
            model(X).last_hidden_state[:, 0], encoder(X), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    "name, format_name, named",
    [
        ("narrow", "torchvision", "torchvision has no resnet18 with the encoder's stem and width"),
        ("vit", "torchvision", "torchvision has no vit_tiny"),
        ("resnet", "deit", "--format deit is for ViTs"),
        ("resnet", "hf", "--format hf is for ViTs"),
        ("conv", "hf", "plain patch embedding"),
    ],
)
def test_a_format_that_has_no_such_model_is_refused_and_nothing_is_written(
    checkpoints, tmp_path, name, format_name, named
):
    with pytest.raises(UsageError, match=named):
        run(checkpoints(name), format_name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_nested_format_is_no_safetensors_file_and_an_existing_file_stays(checkpoints, tmp_path):
    with pytest.raises(UsageError, match="more than safetensors can hold"):
        run(checkpoints("vit"), "deit", tmp_path / "deit.safetensors")
    with pytest.raises(UsageError, match="its folder does not exist"):
        run(checkpoints("vit"), "timm", tmp_path / "nowhere/vit.safetensors")
    (tmp_path / "there.pth").write_text("mine")
    with pytest.raises(UsageError, match="exists: choose another name"):
        run(checkpoints("vit"), "timm", tmp_path / "there.pth")
    assert (tmp_path / "there.pth").read_text() == "mine"


def test_weights_that_give_other_features_are_noticed_and_never_get_the_name(
    checkpoints, tmp_path, monkeypatch
):
    def wrong(encoder, info):
        model, state = export.to_timm(encoder, info)
        return model, {
            name: tensor * (1.001 if name == "norm.weight" else 1) for name, tensor in state.items()
        }

    monkeypatch.setitem(export.FORMATS, "timm", wrong)
    with pytest.raises(RunError, match="do not use them"):
        run(checkpoints("vit"), "timm", tmp_path / "vit.pth")
    assert not (tmp_path / "vit.pth").exists()


def test_the_command_line_exports_and_ends_wrong_usage_in_one_line(checkpoints, tmp_path):
    command = [
        sys.executable,
        "-m",
        "snclr.export",
        str(checkpoints("resnet")),
        "--out",
        str(tmp_path / "out.pth"),
    ]
    done = subprocess.run([*command, "--format", "timm"], capture_output=True, text=True)
    assert done.returncode == 0 and "agree to" in done.stdout and (tmp_path / "out.pth").exists()
    done = subprocess.run([*command, "--format", "onnx"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


# -- in a notebook -----------------------------------------------------------------------------------------------------------


def test_load_encoder_gives_features_and_what_one_needs_to_know(checkpoints):
    path = checkpoints("vit")
    encoder, info = snclr.load_encoder(str(path))
    assert (
        encoder(X).shape == (2, 192)
        and not encoder.training
        and not any(p.requires_grad for p in encoder.parameters())
    )
    assert (info["arch"], info["img_size"], info["patch_size"], info["num_features"]) == (
        "vit_tiny",
        32,
        8,
        192,
    )
    assert info["mean"] == pytest.approx([0.485, 0.456, 0.406]) and info["encoder"] == "online"
    _, info = snclr.load_encoder(str(path), "momentum")
    assert info["encoder"] == "momentum"


def test_pretraining_leaves_the_backbone_alone_beside_each_checkpoint(checkpoints, tmp_path):
    path = checkpoints("resnet")
    small = path.with_name("encoder_last.pth.tar")
    assert small.stat().st_size < path.stat().st_size / 2
    whole, _ = snclr.load_encoder(str(path))
    alone, info = snclr.load_encoder(str(small))
    assert (
        features.digest(alone) == features.digest(whole)
        and info["encoder"] == "online"
        and info["arch"] == "resnet18"
    )
    with pytest.raises(UsageError, match="holds no momentum encoder"):
        snclr.load_encoder(str(small), "momentum")
    flags = SMALL.split() + [
        "--save-freq",
        "1",
        "--eval-encoder",
        "momentum",
        "--eval-freq",
        "0",
        "--epochs",
        "1",
    ]
    main_snclr.main([str(path.parent.parent / "images"), *flags, "--workdir", str(tmp_path)])
    names = {
        f"{kind}_{which}.pth.tar"
        for kind in ("encoder", "checkpoint")
        for which in ("last", "0001")
    }
    assert names <= set(os.listdir(tmp_path))
    momentum, _ = snclr.load_encoder(str(tmp_path / "checkpoint_last.pth.tar"), "momentum")
    alone, info = snclr.load_encoder(str(tmp_path / "encoder_0001.pth.tar"))
    assert features.digest(alone) == features.digest(momentum) and info["encoder"] == "momentum"


def test_another_image_size_recomputes_the_positions_and_says_so(checkpoints):
    encoder, info = snclr.load_encoder(str(checkpoints("vit")), img_size=64)
    assert encoder(torch.randn(1, 3, 64, 64)).shape == (1, 192) and info["img_size"] == 64
    assert any("pos_embed: sin-cos, computed for this image size" in note for note in info["notes"])


def test_a_file_that_does_not_say_its_architecture_needs_the_flag(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(UsageError, match="does not say its architecture: give --arch"):
        snclr.load_encoder(str(tmp_path / "resnet18.pth"))
    encoder, info = snclr.load_encoder(str(tmp_path / "resnet18.pth"), arch="resnet18")
    assert (
        encoder(X).shape == (2, 512)
        and np.isclose(info["mean"][0], 0.485)
        and json.dumps(info["notes"])
    )
    with pytest.raises(UsageError, match="is --arch the right one"):
        snclr.load_encoder(str(tmp_path / "resnet18.pth"), arch="resnet50")
    # another library's name for it says nothing here
    torch.save(
        {"arch": "test_vit.r160_in1k", "state_dict": timm.create_model("test_vit").state_dict()},
        tmp_path / "timm.pth",
    )
    with pytest.raises(UsageError, match="give --arch"):
        snclr.load_encoder(str(tmp_path / "timm.pth"))
    _, info = snclr.load_encoder(str(tmp_path / "timm.pth"), arch="timm:test_vit", img_size=160)
    assert info["arch"] == "timm:test_vit"
