import json
import math
import os
import pickle
import re

import pytest
import timm
import torch
import torchvision
from test_backbones import build
from test_ranks import SMALL, write_images

import main_snclr
from snclr.running.errors import UsageError
from snclr.weights import reading as weights


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    return build("resnet18", width=4, **settings)


def backbone(encoder, head="fc"):
    return {
        name: tensor
        for name, tensor in encoder.state_dict().items()
        if not name.startswith(f"{head}.")
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def load(encoder, path, *which):
    """The lines that load_backbone tells, joined."""
    return "\n".join(weights.load_backbone(encoder, weights.read_encoder(str(path), *which)))


def refused(encoder, path, *which):
    with pytest.raises(UsageError) as caught:
        load(encoder, path, *which)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def moco_v3_file(online, momentum, path):
    """A file as MoCo v3 and the released SNCLR leave it."""
    state = {f"module.base_encoder.{name}": tensor for name, tensor in online.state_dict().items()}
    state |= {
        f"module.momentum_encoder.{name}": tensor for name, tensor in momentum.state_dict().items()
    }
    state |= {
        "module.predictor.0.weight": torch.zeros(3),
        "module.queue": torch.zeros(4),
        "module.queue_ptr": torch.zeros(1),
    }
    torch.save({"epoch": 300, "arch": "resnet18", "state_dict": state, "optimizer": {}}, path)
    return path


@pytest.mark.parametrize("which, seed", [("online", 1), ("momentum", 2)])
def test_moco_v3s_layout(tmp_path, which, seed):
    path = moco_v3_file(tiny(1), tiny(2), tmp_path / "moco.pth.tar")
    encoder = tiny(3)
    projector = {name: tensor.clone() for name, tensor in encoder.projector.state_dict().items()}
    told = load(encoder, path, which)
    assert_equal(backbone(encoder), backbone(tiny(seed)))
    assert_equal(encoder.projector.state_dict(), projector)  # stays random
    assert f"the {which} encoder of module." in told and "tensors of its head (fc.*)" in told
    count = len(backbone(encoder))
    assert told.startswith(f"{count} of {count} backbone tensors")
    assert f"left out: {len(tiny().state_dict()) + 3} others: " in told


def published_names(arch):
    """The encoder's tensors in MoCo v3's published files, written out: name and shape."""
    if arch == "resnet50":
        shapes, width = {"conv1.weight": (64, 3, 7, 7)}, 64
        norms = {"bn1": 64}
        for stage, blocks in enumerate((3, 4, 6, 3)):
            inner = 64 * 2**stage
            for block in range(blocks):
                name = f"layer{stage + 1}.{block}"
                convolutions = {
                    "conv1": (inner, width, 1, 1),
                    "conv2": (inner, inner, 3, 3),
                    "conv3": (4 * inner, inner, 1, 1),
                }
                shapes |= {f"{name}.{conv}.weight": shape for conv, shape in convolutions.items()}
                norms |= {
                    f"{name}.bn{number}": inner * (4 if number == 3 else 1) for number in (1, 2, 3)
                }
                if not block:
                    shapes[f"{name}.downsample.0.weight"] = (4 * inner, width, 1, 1)
                    norms[f"{name}.downsample.1"] = 4 * inner
                width = 4 * inner
        for norm, width in norms.items():
            shapes |= {
                f"{norm}.{part}": (width,)
                for part in ("weight", "bias", "running_mean", "running_var")
            }
            shapes[f"{norm}.num_batches_tracked"] = ()
        return shapes | {
            "fc.0.weight": (4096, 2048),
            "fc.1.weight": (4096,),
            "fc.3.weight": (256, 4096),
        }
    width, depth = 384, 12
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 197, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    shapes |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    for block in range(depth):
        layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        layers |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for layer, shape in layers.items():
            shapes |= {
                f"blocks.{block}.{layer}.weight": shape,
                f"blocks.{block}.{layer}.bias": shape[:1],
            }
        shapes |= {
            f"blocks.{block}.{norm}.{part}": (width,)
            for norm in ("norm1", "norm2")
            for part in ("weight", "bias")
        }
    return shapes | {
        "head.0.weight": (4096, width),
        "head.1.weight": (4096,),
        "head.6.weight": (256, 4096),
    }


@pytest.mark.parametrize("arch, width", [("vit_small", 384), ("resnet50", 2048)])
def test_moco_v3s_published_files_open_whole_without_a_flag(tmp_path, arch, width):
    names = {
        name: torch.rand(shape) if shape else torch.tensor(7)
        for name, shape in published_names(arch).items()
    }
    state = {
        f"module.{which}_encoder.{name}": x
        for which in ("base", "momentum")
        for name, x in names.items()
    }
    state["module.predictor.0.weight"] = torch.zeros(2, 2)
    torch.save(
        {"epoch": 300, "arch": arch, "state_dict": state, "optimizer": {"state": {}}, "scaler": {}},
        tmp_path / "m.pth",
    )
    encoder, info = weights.open_encoder(str(tmp_path / "m.pth"))
    head = "head." if arch == "vit_small" else "fc."
    assert_equal(
        dict(encoder.state_dict()),
        {name: x for name, x in names.items() if not name.startswith(head)},
    )
    assert (info["arch"], info["img_size"], info["epoch"], info["num_features"]) == (
        arch,
        224,
        300,
        width,
    )
    assert encoder.embed(torch.randn(1, 3, 224, 224)).shape == (1, width)
    assert f"left out: 3 tensors of its head ({head}*)" in info["notes"]


def test_everything_else_in_the_file_is_counted_as_left_out(tmp_path):
    path = moco_v3_file(tiny(1), tiny(2), tmp_path / "moco.pth.tar")
    others = weights.read_encoder(str(path)).others
    assert len(others) == len(tiny().state_dict()) + 3 and "module.queue_ptr" in others


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s},
        lambda s: {"state_dict": {f"module.{n}": t for n, t in s.items()}},
    ],
)
def test_torchvisions_state_dict_wrapped_or_not(tmp_path, wrap):
    torch.manual_seed(1)
    twin = torchvision.models.resnet18()
    torch.save(wrap(twin.state_dict()), tmp_path / "resnet18.pth")
    encoder = build("resnet18")
    told = load(encoder, tmp_path / "resnet18.pth")
    twin.fc = torch.nn.Identity()
    assert_equal(backbone(encoder), twin.state_dict())
    assert "plain state dict" in told and "left out: 2 tensors of its head" in told


def test_timms_vit_as_safetensors_keeps_its_learned_position_embedding(tmp_path):
    save_file = pytest.importorskip(
        "safetensors.torch", reason="safetensors is not installed"
    ).save_file
    twin = timm.create_model("vit_tiny_patch16_224", img_size=32)
    save_file(twin.state_dict(), tmp_path / "vit.safetensors")
    encoder = build("vit_tiny")
    load(encoder, tmp_path / "vit.safetensors")
    twin.reset_classifier(0)
    assert_equal(backbone(encoder, "head"), twin.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder.eval().embed(x), twin.eval()(x))


def test_another_image_size_recomputes_a_fixed_and_interpolates_a_learned_position_embedding(
    tmp_path,
):
    torch.save(build("vit_tiny", img_size=64).state_dict(), tmp_path / "fixed.pth")
    encoder = build("vit_tiny", img_size=32)
    expected = encoder.pos_embed.clone()
    assert "pos_embed: sin-cos, computed for this image size" in load(
        encoder, tmp_path / "fixed.pth"
    )
    assert torch.equal(encoder.pos_embed, expected)

    twin = timm.create_model("test_vit", img_size=64)
    torch.save(twin.state_dict(), tmp_path / "learned.pth")
    encoder = build("timm:test_vit", img_size=32)
    old, new = twin.pos_embed.shape[1], encoder.pos_embed.shape[1]
    assert f"pos_embed: interpolated from {old} to {new} positions" in load(
        encoder, tmp_path / "learned.pth"
    )
    expected = timm.layers.resample_abs_pos_embed(twin.pos_embed, [2, 2], num_prefix_tokens=1)
    torch.testing.assert_close(encoder.pos_embed, expected)


def moco_v3_position_embedding(grid, width):
    """By loops from its code: meshgrid's first axis, a patch's row here, takes the first half."""
    lines = [[0.0] * width]
    for row in range(grid):
        for column in range(grid):
            angles = [
                [position / 10000 ** (i / (width // 4)) for i in range(width // 4)]
                for position in (row, column)
            ]
            lines.append(
                [f(angle) for each in angles for f in (math.sin, math.cos) for angle in each]
            )
    return torch.tensor([lines])


@pytest.mark.parametrize("kind", ["learned", "moco v3"])
def test_another_image_size_interpolates_what_is_not_this_projects_sincos(tmp_path, kind):
    state = build("vit_tiny", img_size=64).state_dict()
    position = torch.randn(1, 17, 192) if kind == "learned" else moco_v3_position_embedding(4, 192)
    torch.save({**state, "pos_embed": position}, tmp_path / "other.pth")
    encoder = build("vit_tiny", img_size=32)
    assert "pos_embed: interpolated from 17 to 5 positions" in load(encoder, tmp_path / "other.pth")
    expected = timm.layers.resample_abs_pos_embed(position, [2, 2], num_prefix_tokens=1)
    torch.testing.assert_close(encoder.pos_embed.data, expected)
    assert not encoder.pos_embed.requires_grad


def test_a_position_embedding_of_no_square_is_refused_as_it_is_in_the_file(tmp_path):
    torch.save(timm.create_model("test_vit", img_size=(32, 64)).state_dict(), tmp_path / "wide.pth")
    message = refused(build("timm:test_vit", img_size=64), tmp_path / "wide.pth")
    assert "pos_embed (1, 9, 64) instead of (1, 17, 64)" in message


def test_averaged_weights_are_read_alone_and_left_out_by_name_beside_others(tmp_path):
    torch.save({"model_ema": tiny(1).state_dict(), "epoch": 3}, tmp_path / "alone.pth")
    encoder = tiny(3)
    assert "a plain state dict, 'model_ema'" in load(encoder, tmp_path / "alone.pth")
    assert_equal(backbone(encoder), backbone(tiny(1)))
    torch.save(
        {"model_ema": tiny(1).state_dict(), "model": tiny(2).state_dict()}, tmp_path / "both.pth"
    )
    told = load(encoder, tmp_path / "both.pth")
    assert_equal(backbone(encoder), backbone(tiny(2)))
    assert (
        "'model'" in told
        and f"left out: {len(tiny().state_dict())} others: model_ema.conv1.weight, " in told
    )


def test_missing_counters_of_batch_norms_are_said(tmp_path):
    state = {
        name: tensor for name, tensor in tiny(1).state_dict().items() if "num_batches" not in name
    }
    torch.save(state, tmp_path / "old.pth")
    assert "counters of batch norms are not in the file" in load(tiny(2), tmp_path / "old.pth")


class Code:
    def __reduce__(self):
        return os.system, ("true",)


def test_what_does_not_fit_is_refused_in_one_line_and_changes_nothing(tmp_path):
    encoder = tiny(5)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    torch.save(build("resnet18", width=8).state_dict(), tmp_path / "wider.pth")
    assert "have another shape: conv1.weight (8, 3, 7, 7) instead of (4, 3, 7, 7)" in refused(
        encoder, tmp_path / "wider.pth"
    )
    torch.save(build("vit_tiny").state_dict(), tmp_path / "vit.pth")
    message = refused(encoder, tmp_path / "vit.pth")
    assert (
        "of 120 tensors are missing: conv1.weight, " in message
        and "is --arch the right one?" in message
    )
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    assert "no tensors by name" in refused(encoder, tmp_path / "empty.pth")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    assert "no tensors by name" in refused(encoder, tmp_path / "list.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"state_dict": Code()}, protocol=2))
    assert "nothing else is loaded" in refused(encoder, tmp_path / "code.pth")
    torch.save({"state_dict": Code()}, tmp_path / "code.pth")
    assert "nothing else is loaded" in refused(encoder, tmp_path / "code.pth")
    whole = (tmp_path / "wider.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    assert "truncated or no checkpoint" in refused(encoder, tmp_path / "half.pth")
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "no whole safetensors file" in refused(encoder, tmp_path / "half.safetensors")
    assert "does not exist" in refused(encoder, tmp_path / "nowhere.pth")
    online = {
        f"module.base_encoder.{name}": tensor for name, tensor in tiny(1).state_dict().items()
    }
    torch.save({"state_dict": online}, tmp_path / "online.pth")
    assert "holds no momentum encoder" in refused(encoder, tmp_path / "online.pth", "momentum")
    assert_equal(encoder.state_dict(), before)


# -- whole runs --------------------------------------------------------------------------------------------------------------


def run(images, workdir, *flags):
    main_snclr.main(
        [
            str(images),
            *SMALL.split(),
            "--eval-freq",
            "0",
            "--workdir",
            str(workdir),
            *map(str, flags),
        ]
    )
    return torch.load(workdir / "checkpoint_last.pth.tar", weights_only=True)["state_dict"]


def test_a_run_starts_from_given_weights_in_both_encoders_and_says_so(images, tmp_path, capsys):
    first = run(images, tmp_path / "first", "--stop-after-steps", 2)
    flags = ["--init-from", tmp_path / "first/checkpoint_last.pth.tar", "--seed", 3]
    # the first step has learning rate 0, so both encoders still hold what they started from
    second = run(images, tmp_path / "second", *flags, "--stop-after-steps", 1)
    for name, tensor in second.items():
        if (
            name.startswith(("module.base_encoder.", "module.momentum_encoder."))
            and ".fc." not in name
            and "running" not in name
        ):
            source = name.replace("momentum_encoder", "base_encoder")
            if not name.endswith("num_batches_tracked"):
                assert torch.equal(tensor, first[source]), name
    assert not torch.equal(
        second["module.base_encoder.fc.0.weight"], first["module.base_encoder.fc.0.weight"]
    )
    assert re.search(
        r"note: (\d+) of \1 backbone tensors from .*first/checkpoint_last", capsys.readouterr().out
    )
    # a resumed run has its own weights
    run(images, tmp_path / "second", *flags, "--resume", "auto", "--stop-after-steps", 3)
    out = capsys.readouterr().out
    assert "backbone tensors" not in out and "second/checkpoint_last.pth.tar is resumed" in out


@pytest.mark.parametrize("encoder", ["online", "momentum"])
def test_the_start_of_a_run_from_given_weights_is_these_weights(images, tmp_path, capsys, encoder):
    """Its evaluation is that of the encoder that was loaded, with the batch norms that it has."""
    flags = ["--stop-after-steps", 5, "--eval-freq", 1, "--eval-encoder", encoder]
    run(images, tmp_path / "first", *flags)
    file = tmp_path / "first/encoder_last.pth.tar"
    run(images, tmp_path / "second", *flags, "--init-from", file)
    out = capsys.readouterr().out
    first, second = (
        [
            json.loads(line)
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            if "loss" not in line
        ]
        for name in ("first", "second")
    )
    loaded, start = first[-1], second[0]
    assert start["encoder"] == f"start (from {file})" and start["step"] == 0
    assert (loaded["encoder"], loaded["step"], second[-1]["encoder"]) == (encoder, 5, encoder)
    for name in ("knn_top1", "effective_rank", "view_agreement"):
        assert start[name] == loaded[name]
    assert "raw_pixels_knn_top1" in start and "encoder" not in first[0]
    assert f"view agreement {start['view_agreement']:.3f} (start (from {file}))" in out
    assert f"start (from {file}) {start['knn_top1']:.1f} %, epoch 1: " in out
    page = (tmp_path / "second/report.html").read_text()
    assert "start (from --init-from) %" in page and "untrained %" not in page
    assert "untrained %" in (tmp_path / "first/report.html").read_text()


@pytest.mark.parametrize(
    "flags",
    [
        "-a timm:test_convnext",
        "-a timm:test_vit --timm-kwargs drop_path_rate=0.2 depth=2",
        "-a vit_conv_small",
        "-a resnet34 --width 4",
        "-a resnet101 --width 4",
    ],
)
def test_every_kind_of_backbone_trains_and_resumes_bit_for_bit(images, tmp_path, flags):
    whole = run(images, tmp_path / "whole", *flags.split(), "--epochs", 1, "--stop-after-steps", 3)
    run(images, tmp_path / "parts", *flags.split(), "--epochs", 1, "--stop-after-steps", 2)
    parts = run(
        images,
        tmp_path / "parts",
        *flags.split(),
        "--epochs",
        1,
        "--stop-after-steps",
        3,
        "--resume",
        "auto",
    )
    assert_equal(parts, whole)
    settings = json.loads((tmp_path / "whole/args.json").read_text())
    if "kwargs" in flags:
        assert settings["timm_kwargs"] == [["drop_path_rate", 0.2], ["depth", 2]]
