"""Each exported format is read by the library that it is for, and by this project."""

import argparse
import contextlib
import json
import os
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import timm
import torch
import torchvision
from PIL import Image
from test_backbones import build
from test_ranks import ROOT, SMALL, write_images
from torch import nn
from torch.nn import functional

import main_snclr
import snclr
from snclr import export
from snclr.evaluation import features
from snclr.running import checkpoint
from snclr.running.errors import RunError, UsageError
from snclr.weights import card, libraries

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
    """From a name of ARCHS to a checkpoint after a long step, which changes norms and biases."""
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


def assert_same_features(model, checkpoint, encoder_name="online"):
    with torch.no_grad():  # as in a notebook, around everything
        encoder, _ = snclr.load_encoder(str(checkpoint), encoder_name)
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


@pytest.mark.parametrize("encoder_name", ["online", "momentum"])
def test_torchvision_reads_a_resnet(checkpoints, tmp_path, encoder_name):
    out = run(
        checkpoints("resnet"), "torchvision", tmp_path / "resnet18.pth", "--encoder", encoder_name
    )
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    model.load_state_dict(torch.load(out, weights_only=True), strict=True)
    assert_same_features(model, checkpoints("resnet"), encoder_name)


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
    assert sorted(os.listdir(out)) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
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
        ("timm", "hf", "--format hf is for ViTs"),
        ("conv", "hf", "plain patch embedding"),
    ],
)
def test_a_format_that_has_no_such_model_is_refused_and_nothing_is_written(
    checkpoints, tmp_path, name, format_name, named
):
    with pytest.raises(UsageError, match=named):
        run(checkpoints(name), format_name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_nested_format_cannot_be_safetensors_and_an_existing_file_is_kept(checkpoints, tmp_path):
    with pytest.raises(UsageError, match="more than safetensors can hold"):
        run(checkpoints("vit"), "deit", tmp_path / "deit.safetensors")
    with pytest.raises(UsageError, match="its folder does not exist"):
        run(checkpoints("vit"), "timm", tmp_path / "nowhere/vit.safetensors")
    (tmp_path / "there.pth").write_text("mine")
    with pytest.raises(UsageError, match="exists: choose another name"):
        run(checkpoints("vit"), "timm", tmp_path / "there.pth")
    assert (tmp_path / "there.pth").read_text() == "mine"


def test_weights_that_give_other_features_are_refused_and_not_saved(
    checkpoints, tmp_path, monkeypatch
):
    def wrong(encoder, info):
        made = libraries.to_timm(encoder, info)
        return made._replace(
            content={
                name: tensor * (1.001 if name == "norm.weight" else 1)
                for name, tensor in made.content.items()
            }
        )

    monkeypatch.setitem(export.TO_LIBRARY, "timm", wrong)
    with pytest.raises(RunError, match="give other features"):
        run(checkpoints("vit"), "timm", tmp_path / "vit.pth")
    assert os.listdir(tmp_path) == []


def test_the_command_line_exports_and_ends_wrong_usage_in_one_line(
    checkpoints, tmp_path, monkeypatch, capsys
):
    flags = ["snclr.export", str(checkpoints("resnet")), "--out", str(tmp_path / "out.pth")]
    command = [sys.executable, "-m", *flags, "--format", "timm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "agree to" in done.stdout and (tmp_path / "out.pth").exists()
    # python -m in this process, which need not import torch again
    monkeypatch.setattr(sys, "argv", [*flags, "--format", "tensorflow"])
    monkeypatch.delitem(sys.modules, "snclr.export")
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        runpy.run_module("snclr.export", run_name="__main__", alter_sys=True)
    assert error.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# -- every library builds its model by the printed line --------------------------------------------

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
CIFAR = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]}
READS_FOLDERS = tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 26)


@pytest.fixture(scope="module")
def random_files(tmp_path_factory):
    """From arch, heads and image size to a file with weights that are far from their start."""
    folder, written = tmp_path_factory.mktemp("random"), {}

    def make(arch, num_heads=None, img_size=32):
        key = (arch, num_heads, img_size)
        if key not in written:
            torch.manual_seed(0)
            encoder = build(arch, img_size=img_size, num_heads=num_heads)
            with torch.no_grad():
                for parameter in encoder.parameters():
                    parameter += 0.05 * torch.randn_like(parameter)
            args = {"arch": arch, "num_heads": num_heads, "img_size": img_size, **CIFAR}
            state = checkpoint.pack_encoder(
                encoder, "online", args=argparse.Namespace(**args), epoch=3, step=9
            )
            written[key] = folder / f"{arch}_{num_heads}_{img_size}.pth.tar"
            torch.save(state, written[key])
        return written[key]

    return make


def built_by(printed):
    """The model that the printed line builds, in a Python that has imported nothing."""
    (line,) = [text for text in printed.splitlines() if text.startswith("build: ")]
    names = {}
    exec(line.removeprefix("build: "), names)
    return names["model"].eval()


def features_of(model, images=IMAGES):
    with torch.no_grad():
        output = model.eval()(images)
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state[:, 0]


VITS_TO_EXPORT = [("vit_small", 12), ("vit_small", 6), ("vit_base", 12)]
CASES = [
    (library, name, arch, num_heads)
    for library, name in [
        ("timm", "folder"),
        ("timm", "x.safetensors"),
        ("timm", "x.pth"),
        ("deit", "x.pth"),
        ("hf", "folder"),
        ("mocov3", "x.pth.tar"),
    ]
    for arch, num_heads in VITS_TO_EXPORT
    # MoCo v3's readers have 12 heads; one format per library is enough for the large model
    if (library, num_heads) != ("mocov3", 6)
    and (
        arch != "vit_base"
        or (library, name) not in [("timm", "folder"), ("timm", "x.pth"), ("deit", "x.pth")]
    )
]
CASES += [
    (library, name, "resnet50", None)
    for library, name in [
        ("timm", "folder"),
        ("timm", "x.safetensors"),
        ("timm", "x.pth"),
        ("torchvision", "x.safetensors"),
        ("torchvision", "x.pth"),
        ("mocov3", "x.pth.tar"),
        ("detectron2", "x.pth"),
    ]
]


@pytest.mark.parametrize("library, name, arch, num_heads", CASES)
def test_the_printed_line_builds_the_librarys_model_with_equal_features(
    random_files, tmp_path, capsys, library, name, arch, num_heads
):
    if library == "hf":
        pytest.importorskip("transformers", reason="transformers is not installed")
    if (library, name) == ("timm", "folder") and not READS_FOLDERS:
        pytest.skip("timm before 1.0.26 does not read folders")
    path = random_files(arch, num_heads)
    run(path, library, tmp_path / name)
    model = built_by(capsys.readouterr().out)
    encoder, info = snclr.load_encoder(str(path))
    assert info["num_heads"] == num_heads
    expected = features_of(encoder)
    torch.testing.assert_close(features_of(model), expected, rtol=1e-4, atol=1e-5)


def test_another_number_of_heads_gives_other_features_and_every_shape_fits(random_files):
    path = str(random_files("vit_small", 6))
    right, _ = snclr.load_encoder(path)
    wrong, info = snclr.load_encoder(path, num_heads=12)
    assert "12 attention heads, as --num-heads asks for" in info["notes"]
    difference = features_of(right) - features_of(wrong)
    assert difference.norm() > 0.03 * features_of(right).norm()


@pytest.mark.parametrize("name", ["folder/model.safetensors", "x.safetensors", "x.pth"])
@pytest.mark.parametrize("library", ["timm", "deit"])
def test_exported_files_store_their_number_of_heads_and_are_read_with_it(
    random_files, tmp_path, library, name
):
    if library == "deit" and name != "x.pth":
        return  # DeiT's files are a dictionary with a state dict, in torch's format
    path = random_files("vit_small", 12)
    run(path, library, tmp_path / name.split("/")[0])
    encoder, info = snclr.load_encoder(str(tmp_path / name))
    assert (info["arch"], info["num_heads"], info["img_size"]) == ("vit_small", 12, 32)
    assert (info["mean"], info["std"], info["epoch"]) == (CIFAR["mean"], CIFAR["std"], 3)
    assert "12 attention heads, as the file says" in info["notes"]
    expected, _ = snclr.load_encoder(str(path))
    assert torch.equal(features_of(encoder), features_of(expected))


def test_the_line_is_in_the_metadata_of_every_file(random_files, tmp_path):
    path = random_files("vit_small", 12)
    line = "model = timm.create_model('vit_small_patch16_224', num_heads=12, num_classes=0, "
    with safetensors.safe_open(run(path, "timm", tmp_path / "x.safetensors"), "pt") as file:
        assert file.metadata()["build"].startswith(line)
    state = torch.load(run(path, "timm", tmp_path / "x.pth"), weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert state._metadata["snclr"]["build"].startswith(line)
    for library in ("deit", "mocov3"):
        content = torch.load(run(path, library, tmp_path / f"{library}.pth"), weights_only=True)
        assert "num_heads=12" in content["snclr"]["build"]
    assert str(tmp_path) not in content["snclr"]["build"]


def test_timm_finds_mean_std_and_size_of_the_images(random_files, tmp_path, capsys):
    path = random_files("vit_small", 12)
    models = []
    for name in ["x.safetensors", "folder"] if READS_FOLDERS else ["x.safetensors"]:
        run(path, "timm", tmp_path / name)
        models.append(built_by(capsys.readouterr().out))
    for model in models:
        data = timm.data.resolve_model_data_config(model)
        assert [*data["mean"]] == CIFAR["mean"] and [*data["std"]] == CIFAR["std"]
        assert tuple(data["input_size"]) == (3, 32, 32) and data["crop_pct"] == 1.0
        assert data["interpolation"] == "bilinear" and model.num_classes == 0


def test_timms_folder_is_one_for_its_hub_and_takes_a_new_classifier(random_files, tmp_path):
    out = run(random_files("vit_small", 12), "timm", tmp_path / "folder")
    assert sorted(os.listdir(out)) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "vit_small_patch16_224"
    assert config["model_args"] == {"num_heads": 12, "num_classes": 0, "img_size": 32}
    assert config["num_classes"] == 0 and config["num_features"] == 384
    timm.models.PretrainedCfg(**config["pretrained_cfg"])  # refuses names that it does not know
    if READS_FOLDERS:
        model = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=10)
        assert model(IMAGES).shape == (2, 10) and model.blocks[0].attn.num_heads == 12


def test_transformers_finds_mean_std_and_size_of_the_images(random_files, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    out = run(random_files("vit_small", 6), "hf", tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    assert list(processor.image_mean) == CIFAR["mean"] and list(processor.image_std) == CIFAR["std"]
    assert (processor.size["height"], processor.size["width"]) == (32, 32)


def test_moco_v3s_layout_is_refused_for_another_number_of_heads_than_its_readers_have(
    random_files, tmp_path
):
    with pytest.raises(UsageError, match="MoCo v3's vit_small has 12 attention heads, this one 6"):
        run(random_files("vit_small", 6), "mocov3", tmp_path / "x.pth")


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_mode_of_the_umask(random_files, tmp_path, umask, mode):
    path, before = random_files("vit_tiny", 3), os.umask(umask)
    try:
        run(path, "timm", tmp_path / "folder")
        run(path, "timm", tmp_path / "x.safetensors")
        run(path, "timm", tmp_path / "x.pth")
        with contextlib.suppress(UsageError):  # transformers is not installed
            run(path, "hf", tmp_path / "hf")
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) >= 4 and {file.stat().st_mode & 0o777 for file in files} == {mode}


def test_a_convolutional_stem_has_a_line_for_a_file_and_no_folder(random_files, tmp_path, capsys):
    path = random_files("vit_conv_small", 12)
    with pytest.raises(UsageError, match="timm has no model with the convolutional stem"):
        run(path, "timm", tmp_path / "folder")
    run(path, "timm", tmp_path / "x.pth")
    encoder, _ = snclr.load_encoder(str(path))
    printed = capsys.readouterr().out
    torch.testing.assert_close(
        features_of(built_by(printed)), features_of(encoder), rtol=1e-4, atol=1e-5
    )


# -- transformers, ONNX and the model card ---------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "resnet", "narrow"])
def test_transformers_auto_classes_and_its_pipeline_give_equal_features(
    checkpoints, tmp_path, name, caplog
):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    out = run(checkpoints(name), "hf", tmp_path / "hf")
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    encoder, info = snclr.load_encoder(str(checkpoints(name)))
    mean, std = (torch.tensor(info[key])[:, None, None] for key in ("mean", "std"))
    pixels = (torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - mean) / std
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    processed = processor(Image.fromarray(image), return_tensors="pt").pixel_values
    torch.testing.assert_close(processed, pixels, rtol=1e-5, atol=1e-5)
    pipeline = transformers.pipeline("image-feature-extraction", model=str(out))
    pooled = pipeline(Image.fromarray(image), return_tensors=True, pool=True).flatten(1)
    is_old = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 50)
    expected = encoder(pixels).tanh() if is_old and name == "vit" else encoder(pixels)
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)
    assert "MISSING" not in caplog.text and "UNEXPECTED" not in caplog.text
    again, info = snclr.load_encoder(str(out / "model.safetensors"))
    assert torch.equal(again(X), encoder(X))


@pytest.mark.parametrize("name", ["vit", "narrow", "conv", "timm"])
def test_onnxruntime_reads_any_backbone_for_any_number_of_images(checkpoints, tmp_path, name):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    out = run(checkpoints(name), "onnx", tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(str(out))
    encoder, info = snclr.load_encoder(str(checkpoints(name)))
    for images in (X, X[:1], torch.cat([X, X + 1, X - 1])):
        (features,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(features), encoder(images), rtol=1e-4, atol=1e-5
        )
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(out).metadata_props}
    assert metadata == {key: info[key] for key in ("mean", "std", "arch")} | {
        "input_size": [3, 32, 32]
    }


@pytest.mark.parametrize(
    "format_name, package, command",
    [
        ("onnx", "onnx", "pip install onnx onnxruntime"),
        ("onnx", "onnxruntime", "pip install onnx onnxruntime"),
        ("hf", "transformers", "pip install transformers"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    checkpoints, tmp_path, monkeypatch, format_name, package, command
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=command):
        run(checkpoints("vit"), format_name, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def card_code(card):
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), flags=re.DOTALL)
    return code


@pytest.mark.parametrize(
    "format_name, out, name",
    [
        ("timm", "x.safetensors", "vit"),
        ("timm", "folder", "vit"),
        ("torchvision", "x.safetensors", "resnet"),
        ("mocov3", "x.pth", "vit"),
        ("deit", "x.pth", "vit"),
        ("hf", "folder", "narrow"),
        ("onnx", "x.onnx", "resnet"),
    ],
)
def test_the_lines_of_the_model_card_compute_the_encoders_features(
    checkpoints, tmp_path, monkeypatch, format_name, out, name
):
    needed = {"hf": ["transformers"], "onnx": ["onnx", "onnxruntime"]}
    for package in needed.get(format_name, []):
        pytest.importorskip(package, reason=f"{package} is not installed")
    if out == "folder" and format_name == "timm" and not READS_FOLDERS:
        pytest.skip("timm before 1.0.26 does not read folders")
    run(checkpoints(name), format_name, tmp_path / out)
    card = tmp_path / out / "README.md" if out == "folder" else tmp_path / f"{out}.md"
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(card_code(card), names)
    encoder, info = snclr.load_encoder(str(checkpoints(name)))
    assert names["mean"].tolist() == pytest.approx(info["mean"])
    torch.testing.assert_close(
        torch.as_tensor(names["features"]), encoder(names["images"]), rtol=1e-4, atol=1e-5
    )


def test_the_model_card_has_the_recipe_and_only_figures_of_these_weights(
    images, tmp_path, monkeypatch
):
    flags = SMALL.replace("resnet8 --width 8", "resnet18").split()
    flags += ["--workdir", str(tmp_path / "run"), "--save-freq", "1"]
    (tmp_path / "my.args").write_text("--wd 0.25")
    monkeypatch.setattr(sys, "argv", ["main_snclr.py", f"@{tmp_path}/my.args", str(images)])
    main_snclr.main([f"@{tmp_path}/my.args", str(images), *flags])
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines if "knn_top1" in line]
    for epoch in (1, 2):
        file = tmp_path / f"run/checkpoint_000{epoch}.pth.tar"
        run(file, "mocov3", tmp_path / f"{epoch}.pth")
        text = (tmp_path / f"{epoch}.pth.md").read_text()
        (line,) = [line for line in lines if line["epoch"] == epoch]
        assert f"| kNN top-1 while training | {line['knn_top1']:.2f} % |" in text
        assert f"| epochs of these weights | {epoch} |" in text
        assert f"| effective rank while training | {line['effective_rank']:.1f} |" in text
        assert f"| view agreement while training | {line['view_agreement']:.3f} |" in text
        assert "| recipe | my.args |" in text and "| wd | 0.25 |" in text and "| seed | 0 |" in text
        assert "patch_size" not in text
        assert str(tmp_path) not in text and "linear" not in text
        _, info = snclr.load_encoder(str(file))
        within_an_epoch = info | {"step": info["step"] + 1}
        assert card.run_figures(str(file), within_an_epoch, lambda: "another") == {}
    # results.json counts only if it is of the same weights
    digest = features.digest(snclr.load_encoder(str(file))[0])
    result = {"encoder_digest": digest, "linear_top1": 43.21, "knn_top1": 12, "dataset": "a|b"}
    evaluation = tmp_path / "run/checkpoint_0002.pth_lincls"  # where main_lincls.py writes
    evaluation.mkdir()
    for number, shown in enumerate([result, result | {"encoder_digest": "other"}, [1], {}]):
        (evaluation / "results.json").write_text(json.dumps(shown))
        run(file, "mocov3", tmp_path / f"{number}_linear.pth")
        text = (tmp_path / f"{number}_linear.pth.md").read_text()
        assert ("| linear probe, top-1 | 43.21 %, on a\\|b |" in text) == (number == 0)
    # a part of the labels gives other numbers
    (tmp_path / "run/results.json").write_text(json.dumps(result | {"label_fraction": 0.1}))
    _, info = snclr.load_encoder(str(file), "momentum")
    assert card.run_figures(str(file), info, lambda: digest) == {}
    assert card.run_figures(str(file), info, lambda: "another") == {}
    (tmp_path / "run/results.json").write_text(json.dumps(result | {"linear_top1": True}))
    assert list(card.run_figures(str(file), info, lambda: digest)) == ["kNN top-1"]


def test_weights_of_others_get_their_channels_mean_and_std(tmp_path):
    torch.save(build("vit_tiny", channels=1, patch_size=8).state_dict(), tmp_path / "grey.pth")
    flags = ["-a", "vit_tiny", "--patch-size", "8", "--img-size", "32"]
    flags += ["--channels", "1", "--mean", "0.4", "--std", "0.3"]
    out = run(tmp_path / "grey.pth", "timm", tmp_path / "out.pth", *flags)
    _, info = snclr.load_encoder(str(out))
    assert (info["channels"], info["mean"], info["std"]) == (1, [0.4], [0.3])
    with pytest.raises(UsageError, match="--img-size must be above 0"):
        run(tmp_path / "grey.pth", "timm", tmp_path / "x.pth", "--img-size", "0")


def test_an_export_says_how_images_of_more_than_8_bits_are_scaled(checkpoints, tmp_path, capsys):
    content = torch.load(checkpoints("vit"), weights_only=True)
    content["args"]["grey_range"] = [-1000, 3095.5]
    torch.save(content, tmp_path / "x-ray.pth.tar")
    out = run(tmp_path / "x-ray.pth.tar", "mocov3", tmp_path / "x.pth")
    assert "grey range [-1000.0, 3095.5]" in capsys.readouterr().out
    assert snclr.load_encoder(str(out))[1]["grey_range"] == [-1000, 3095.5]
    line = "Images of more than 8 bits are scaled first: -1000..3095.5 becomes 0..255;"
    assert line in (tmp_path / "x.pth.md").read_text()
    run(checkpoints("vit"), "mocov3", tmp_path / "photos.pth")
    assert "8 bits" not in (tmp_path / "photos.pth.md").read_text()


def test_an_existing_card_is_not_overwritten(checkpoints, tmp_path):
    (tmp_path / "x.pth.md").write_text("mine")
    with pytest.raises(UsageError, match=r"the model card .*x\.pth\.md exists: choose another"):
        run(checkpoints("vit"), "timm", tmp_path / "x.pth")
    assert (tmp_path / "x.pth.md").read_text() == "mine" and len(os.listdir(tmp_path)) == 1


# -- detection -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet50(random_files):
    path = random_files("resnet50")
    return path, snclr.load_encoder(str(path))[0]


def detectron2_features(weights, x):
    """Features (B, C) of a ResNet-50, with detectron2's names and functions only."""

    def convolution(name, x, stride=1):
        kernel = weights.pop(f"{name}.weight")
        x = functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        mean, variance, scale, shift = (
            weights.pop(f"{name}.norm.{part}")[:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        weights.pop(f"{name}.norm.num_batches_tracked")
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    x = functional.max_pool2d(convolution("stem.conv1", x, 2).relu(), 3, 2, padding=1)
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        for block in range(blocks):
            name = f"res{stage}.{block}"
            stride = 2 if block == 0 and stage > 2 else 1
            shortcut = convolution(f"{name}.shortcut", x, stride) if block == 0 else x
            out = convolution(f"{name}.conv1", x).relu()
            out = convolution(f"{name}.conv2", out, stride).relu()  # STRIDE_IN_1X1 False
            x = (convolution(f"{name}.conv3", out) + shortcut).relu()
    return x.mean((2, 3))


def test_a_network_written_from_detectron2s_names_has_equal_features(resnet50, tmp_path):
    # detectron2 itself is not installed: this shows the names and their meaning, not its reader
    path, encoder = resnet50
    content = torch.load(run(path, "detectron2", tmp_path / "x.pth"), weights_only=True)
    assert content["matching_heuristics"] is True and content["__author__"] == "snclr"
    weights = dict(content["model"])
    with torch.no_grad():
        features = detectron2_features(weights, IMAGES)
    assert weights == {}  # every tensor was used
    torch.testing.assert_close(features, features_of(encoder), rtol=1e-4, atol=1e-4)


def test_the_hint_has_the_width_that_detectron2_needs_for_small_resnets(checkpoints, resnet50):
    for path, flags in (
        (checkpoints("resnet"), "DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 "),
        (resnet50[0], "DEPTH 50 "),
    ):
        export_of = libraries.to_detectron2(*snclr.load_encoder(path))
        assert f"MODEL.RESNETS.{flags}INPUT.FORMAT RGB" in export_of.hint("x.pth")


def test_mmdetection_finds_torchvisions_names_in_the_same_file_without_a_second_copy(
    resnet50, tmp_path
):
    path, encoder = resnet50
    out = run(path, "detectron2", tmp_path / "x.pth")
    # mmengine's loader takes the tensors below 'state_dict'
    # mmdetection's ResNet has torchvision's names
    state = torch.load(out, weights_only=True)["state_dict"]
    expected = torchvision.models.resnet50().state_dict()
    assert state.keys() == {name for name in expected if not name.startswith("fc.")}
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert out.stat().st_size < 1.1 * size
    again, info = snclr.load_encoder(str(out))
    assert info["arch"] == "resnet50" and torch.equal(features_of(again), features_of(encoder))


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def test_torchvisions_detectors_take_the_whole_backbone(resnet50, tmp_path, name):
    path, encoder = resnet50
    out = run(path, "torchvision", tmp_path / "x.pth")
    detector = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None)
    body = detector.backbone.body
    body.load_state_dict(torch.load(out, weights_only=True), strict=True)
    with torch.no_grad():
        features = body.eval()(IMAGES)["3"].mean((2, 3))
    torch.testing.assert_close(features, features_of(encoder), rtol=1e-5, atol=1e-6)


def test_the_pages_example_of_fine_tuning_runs(resnet50, tmp_path, monkeypatch, capsys):
    path, _ = resnet50
    page = (ROOT / "docs/DETECTION.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(code.splitlines()) <= 40
    monkeypatch.chdir(tmp_path)
    run(path, "torchvision", tmp_path / "backbone.pth")
    capsys.readouterr()
    exec(compile(code, "docs/DETECTION.md", "exec"), {"__name__": "example"})
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out)]
    assert len(losses) >= 2 and losses[-1] < losses[0]


# -- in a notebook ---------------------------------------------------------------------------------


def test_load_encoder_gives_features_and_the_settings_to_use_them(checkpoints):
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


def test_pretraining_saves_the_backbone_as_a_separate_file_with_each_checkpoint(
    checkpoints, tmp_path
):
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
        f"{kind}_{suffix}.pth.tar"
        for kind in ("encoder", "checkpoint")
        for suffix in ("last", "0001")
    }
    assert names <= set(os.listdir(tmp_path))
    momentum, _ = snclr.load_encoder(str(tmp_path / "checkpoint_last.pth.tar"), "momentum")
    alone, info = snclr.load_encoder(str(tmp_path / "encoder_0001.pth.tar"))
    assert features.digest(alone) == features.digest(momentum) and info["encoder"] == "momentum"


def test_another_image_size_recomputes_the_positions_and_reports_it(checkpoints):
    encoder, info = snclr.load_encoder(str(checkpoints("vit")), img_size=64)
    assert encoder(torch.randn(1, 3, 64, 64)).shape == (1, 192) and info["img_size"] == 64
    assert any("pos_embed: sin-cos, computed for this image size" in note for note in info["notes"])


def test_a_file_without_its_architecture_needs_the_flag(tmp_path):
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
