import argparse
import json
import math
import os
import pickle
import re
from collections import OrderedDict

import pytest
import timm
import torch
import torchvision
from test_backbones import build
from test_ranks import SMALL

import main_snclr
from snclr.running.errors import UsageError
from snclr.weights import load as weights
from snclr.weights.hf_names import to_hf_names


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    return build("resnet18", width=4, **settings)


def backbone(encoder, head="fc"):
    return {
        name: tensor
        for name, tensor in encoder.state_dict().items()
        if not name.startswith(f"{head}.")
    }


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def load(encoder, path, *encoder_name):
    """The lines of load_backbone, joined."""
    return "\n".join(weights.load_backbone(encoder, weights.read_encoder(str(path), *encoder_name)))


def refused(encoder, path, *encoder_name):
    with pytest.raises(UsageError) as caught:
        load(encoder, path, *encoder_name)
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


@pytest.mark.parametrize("encoder_name, seed", [("online", 1), ("momentum", 2)])
def test_moco_v3s_layout(tmp_path, encoder_name, seed):
    path = moco_v3_file(tiny(1), tiny(2), tmp_path / "moco.pth.tar")
    encoder = tiny(3)
    projector = {name: tensor.clone() for name, tensor in encoder.projector.state_dict().items()}
    message = load(encoder, path, encoder_name)
    assert_equal(backbone(encoder), backbone(tiny(seed)))
    assert_equal(encoder.projector.state_dict(), projector)  # stays random
    assert (
        f"the {encoder_name} encoder of module." in message
        and "tensors of its head (fc.*)" in message
    )
    count = len(backbone(encoder))
    assert message.startswith(f"{count} of {count} backbone tensors")
    assert f"ignored: {len(tiny().state_dict()) + 3} other tensors: " in message


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
        f"module.{encoder_name}_encoder.{name}": x
        for encoder_name in ("base", "momentum")
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
    assert f"ignored: 3 tensors of its head ({head}*)" in info["notes"]


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
        lambda s: {f"module._orig_mod.{n}": t for n, t in s.items()},
    ],
)
def test_torchvisions_state_dict_wrapped_or_not(tmp_path, wrap):
    torch.manual_seed(1)
    twin = torchvision.models.resnet18()
    torch.save(wrap(twin.state_dict()), tmp_path / "resnet18.pth")
    encoder = build("resnet18")
    message = load(encoder, tmp_path / "resnet18.pth")
    twin.fc = torch.nn.Identity()
    assert_equal(backbone(encoder), twin.state_dict())
    assert "plain state dict" in message and "ignored: 2 tensors of its head" in message


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


def test_models_without_tokens_take_no_other_image_size(tmp_path):
    torch.save(timm.create_model("pit_ti_224").state_dict(), tmp_path / "pit.pth")
    with pytest.raises(UsageError, match="1 have another shape: pos_embed"):
        weights.open_encoder(str(tmp_path / "pit.pth"), arch="timm:pit_ti_224", img_size=192)


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


def test_averaged_weights_are_read_if_alone_and_otherwise_ignored_by_name(tmp_path):
    torch.save({"model_ema": tiny(1).state_dict(), "epoch": 3}, tmp_path / "alone.pth")
    encoder = tiny(3)
    assert "a plain state dict, 'model_ema'" in load(encoder, tmp_path / "alone.pth")
    assert_equal(backbone(encoder), backbone(tiny(1)))
    torch.save(
        {"model_ema": tiny(1).state_dict(), "model": tiny(2).state_dict()}, tmp_path / "both.pth"
    )
    message = load(encoder, tmp_path / "both.pth")
    assert_equal(backbone(encoder), backbone(tiny(2)))
    assert (
        "'model'" in message
        and f"ignored: {len(tiny().state_dict())} other tensors: model_ema.conv1.weight, "
        in message
    )


def test_missing_counters_of_batch_norms_are_reported(tmp_path):
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
    torch.save({**tiny(1).state_dict(), "conv1.weight": torch.zeros(4)}, tmp_path / "flat.pth")
    assert "conv1.weight (4,) instead of (4, 3, 7, 7)" in refused(encoder, tmp_path / "flat.pth")
    torch.save(build("vit_tiny").state_dict(), tmp_path / "vit.pth")
    message = refused(encoder, tmp_path / "vit.pth")
    assert (
        "of 120 tensors are missing: conv1.weight, " in message
        and "is --arch the right one?" in message
    )
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    assert "no named tensors" in refused(encoder, tmp_path / "empty.pth")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    assert "no named tensors" in refused(encoder, tmp_path / "list.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"state_dict": Code()}, protocol=2))
    assert "nothing else is loaded" in refused(encoder, tmp_path / "code.pth")
    torch.save({"state_dict": Code()}, tmp_path / "code.pth")
    assert "nothing else is loaded" in refused(encoder, tmp_path / "code.pth")
    whole = (tmp_path / "wider.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    assert "truncated or not a checkpoint" in refused(encoder, tmp_path / "half.pth")
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "is not a complete safetensors file" in refused(encoder, tmp_path / "half.safetensors")
    assert "No such file" in refused(encoder, tmp_path / "nowhere.pth")
    online = {
        f"module.base_encoder.{name}": tensor for name, tensor in tiny(1).state_dict().items()
    }
    torch.save({"state_dict": online}, tmp_path / "online.pth")
    assert "holds no momentum encoder" in refused(encoder, tmp_path / "online.pth", "momentum")
    assert_equal(encoder.state_dict(), before)


# -- attention heads: no tensor shows their number -------------------------------------------------


def plain_vit(name, **settings):
    """A ViT of timm far from its start, whose features depend on the number of heads."""
    torch.manual_seed(4)
    model = timm.create_model(name, num_classes=0, **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def features_of(model, size=32):
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        return model(x)


def opened(path, arch, **settings):
    """The encoder of a file that does not say its architecture, and the lines about it."""
    encoder, info = weights.open_encoder(str(path), arch=arch, **{"img_size": 32, **settings})
    return encoder, info, "\n".join(info["notes"])


@pytest.mark.parametrize(
    "name, wrap",
    [
        ("vit_small_patch16_224", lambda state: state),
        ("deit_small_patch16_224", lambda state: {"model": state}),
        ("vit_small_patch16_224.dino", lambda state: state),
        ("vit_small_patch16_224", lambda state: {"state_dict": state, "arch": "vit_small"}),
    ],
    ids=["timm", "deit", "dino", "timm's training"],
)
def test_a_librarys_vit_small_is_read_as_the_librarys_model(tmp_path, name, wrap):
    twin = plain_vit(name, img_size=32)
    torch.save(wrap(twin.state_dict()), tmp_path / "x.pth")
    encoder, info, notes = opened(tmp_path / "x.pth", "vit_small")
    assert info["num_heads"] == 6 == twin.blocks[0].attn.num_heads
    assert "6 attention heads, as vit_small has in timm, DeiT and DINO" in notes
    torch.testing.assert_close(features_of(encoder), features_of(twin), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch, num_heads", [("vit_tiny", 3), ("vit_base", 12)])
def test_other_sizes_have_the_same_number_everywhere(tmp_path, arch, num_heads):
    twin = plain_vit(f"{arch}_patch16_224", img_size=32, depth=12)
    torch.save(twin.state_dict(), tmp_path / "x.pth")
    encoder, info, _ = opened(tmp_path / "x.pth", arch)
    assert info["num_heads"] == num_heads
    torch.testing.assert_close(features_of(encoder), features_of(twin), rtol=1e-5, atol=1e-5)


def test_a_number_of_heads_is_the_callers_then_the_files_then_the_layouts(tmp_path):
    twin = plain_vit("vit_small_patch16_224", img_size=32, num_heads=12)
    torch.save(twin.state_dict(), tmp_path / "x.pth")
    encoder, info, notes = opened(tmp_path / "x.pth", "vit_small", num_heads=12)
    assert info["num_heads"] == 12 and "12 attention heads, as --num-heads asks for" in notes
    torch.testing.assert_close(features_of(encoder), features_of(twin), rtol=1e-5, atol=1e-5)
    state = {f"module.base_encoder.{name}": x for name, x in twin.state_dict().items()}
    torch.save({"arch": "vit_small", "state_dict": state}, tmp_path / "moco.pth")
    encoder, info, notes = opened(tmp_path / "moco.pth", None)
    assert info["num_heads"] == 12 and "as vit_small has in MoCo v3 and this project" in notes
    torch.testing.assert_close(features_of(encoder), features_of(twin), rtol=1e-5, atol=1e-5)
    own = {"state_dict": twin.state_dict(), "arch": "vit_small", "encoder": "online"}
    for args, expected in (({}, 12), ({"num_heads": 6}, 6), ({"num_heads": 12}, 12)):
        torch.save({**own, "args": {"arch": "vit_small", **args}}, tmp_path / "own.pth")
        _, info, _ = opened(tmp_path / "own.pth", None)
        assert info["num_heads"] == expected


@pytest.mark.parametrize("num_heads", [5, 0, -12, "12", 6.0, [6], torch.tensor(6)])
def test_a_number_of_heads_that_does_not_fit_is_refused_in_one_line(tmp_path, num_heads):
    twin = timm.create_model("vit_small_patch16_224", img_size=32)
    args = {"arch": "vit_small", "num_heads": num_heads}
    torch.save({"state_dict": twin.state_dict(), "args": args}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match="--num-heads must divide the width of vit_small, 384"):
        weights.open_encoder(str(tmp_path / "x.pth"))


@pytest.mark.parametrize("arch", ["resnet18", "timm:test_vit"])
def test_a_number_of_heads_is_for_vits(tmp_path, arch):
    torch.save(tiny().state_dict(), tmp_path / "x.pth")
    with pytest.raises(UsageError, match="--num-heads is for vit_tiny, "):
        weights.open_encoder(str(tmp_path / "x.pth"), arch=arch, num_heads=6)


@pytest.mark.parametrize(
    "settings",
    [
        {"arch": ["vit_small"]},
        {"arch": "vit_small", "num_heads": [12]},
        {"arch": "vit_small", "num_heads": torch.zeros(3)},
        {"arch": "vit_small", "mean": "grey"},
        {"arch": "timm:test_vit", "timm_kwargs": [["x=1, y", 2]]},
        {"arch": torch.zeros(2), "encoder": torch.zeros(2), "epoch": []},
        "vit_small",
        torch.zeros(2),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_attached", [True, False])
def test_odd_settings_in_the_metadata_are_refused_in_one_line(tmp_path, settings, is_attached):
    state = OrderedDict(tiny().state_dict())
    if is_attached:
        state._metadata = {"snclr": settings}
    torch.save(state if is_attached else {"state_dict": state, "snclr": settings}, tmp_path / "x")
    with pytest.raises(UsageError) as caught:
        weights.open_encoder(str(tmp_path / "x"))
    assert "\n" not in str(caught.value)


# -- files of other libraries ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoder_name, prefix", [("online", "encoder_q"), ("momentum", "encoder_k")]
)
@pytest.mark.parametrize("version", [1, 2])
def test_mocos_files(tmp_path, encoder_name, prefix, version):
    heads = {1: {"fc.weight": (128, 2048), "fc.bias": (128,)}}
    heads[2] = {"fc.0.weight": (2048, 2048), "fc.0.bias": (2048,)}
    heads[2] |= {"fc.2.weight": (128, 2048), "fc.2.bias": (128,)}
    names = {name: s for name, s in published_names("resnet50").items() if name[:3] != "fc."}
    names = {
        name: torch.rand(shape) if shape else torch.tensor(7)
        for name, shape in (names | heads[version]).items()
    }
    state = {
        f"module.{each}.{n}": x for each in ("encoder_q", "encoder_k") for n, x in names.items()
    }
    state = {name: x if prefix in name else x * 0 for name, x in state.items()}
    state |= {"module.queue": torch.zeros(128, 65536), "module.queue_ptr": torch.zeros(1)}
    content = {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {}}
    torch.save(content, tmp_path / "moco.pth.tar")
    encoder, info = weights.open_encoder(str(tmp_path / "moco.pth.tar"), encoder_name)
    assert_equal(
        dict(encoder.state_dict()), {n: x for n, x in names.items() if not n.startswith("fc.")}
    )
    assert (info["arch"], info["epoch"], info["encoder"]) == ("resnet50", 200, encoder_name)


def dino_file(twin, path, **more):
    """DINO's training checkpoint: student with DDP's prefix, teacher, head and arguments."""
    state = {f"backbone.{name}": tensor for name, tensor in twin.state_dict().items()}
    heads = {"head.mlp.0.weight": (2048, 384), "head.mlp.0.bias": (2048,)}
    heads |= {"head.last_layer.weight_g": (65536, 1), "head.last_layer.weight_v": (64, 256)}
    state |= {name: torch.zeros(shape) for name, shape in heads.items()}
    student = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    content = {"student": student, "teacher": state, "optimizer": {"state": {}}, "epoch": 100}
    content |= {"args": argparse.Namespace(arch="vit_small", patch_size=16), "fp16_scaler": {}}
    torch.save(content | {"dino_loss": {"center": torch.zeros(1, 65536)}} | more, path)


@pytest.mark.parametrize("encoder_name", ["online", "momentum"])
def test_the_teacher_is_the_backbone_in_dinos_files(tmp_path, encoder_name):
    twin = plain_vit("vit_small_patch16_224.dino", img_size=32)
    assert published_backbone("vit_small").keys() == twin.state_dict().keys()
    dino_file(twin, tmp_path / "checkpoint.pth")
    encoder, info = weights.open_encoder(
        str(tmp_path / "checkpoint.pth"), encoder_name, arch="vit_small", img_size=32
    )
    notes = "\n".join(info["notes"])
    assert (info["num_heads"], info["encoder"], info["epoch"]) == (6, "momentum", 100)
    assert "a plain state dict, 'teacher', backbone.*" in notes and "ignored: " in notes
    torch.testing.assert_close(features_of(encoder), features_of(twin), rtol=1e-5, atol=1e-5)


def published_backbone(arch):
    """Without the heads of MoCo v3."""
    return {name: s for name, s in published_names(arch).items() if not name.startswith("head.")}


def test_dinos_published_vit_small_has_patches_of_8_or_16(tmp_path):
    shapes = published_backbone("vit_small") | {"pos_embed": (1, 785, 384)}
    shapes["patch_embed.proj.weight"] = (384, 3, 8, 8)
    names = {name: torch.rand(shape) for name, shape in shapes.items()}
    torch.save(names, tmp_path / "dino_deitsmall8_pretrain.pth")
    encoder, info, _ = opened(
        tmp_path / "dino_deitsmall8_pretrain.pth", "vit_small", img_size=224, patch_size=8
    )
    assert_equal(dict(encoder.state_dict()), names)
    assert info["num_heads"] == 6


def dinov2_names(registers):
    """The tensors of DINOv2's ViT-S/14 in its authors' files: name and shape."""
    width = 384
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1370, width), "mask_token": (1, width)}
    if registers:
        shapes["register_tokens"] = (1, 4, width)
    shapes |= {"patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for block in range(12):
        start = f"blocks.{block}."
        for layer, shape in layers.items():
            shapes |= {f"{start}{layer}.weight": shape, f"{start}{layer}.bias": shape[:1]}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{start}{norm}.{part}": (width,) for part in ("weight", "bias")}
        shapes |= {f"{start}{scale}.gamma": (width,) for scale in ("ls1", "ls2")}
    return shapes


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"teacher": state}])
@pytest.mark.parametrize(
    "name, registers",
    [("vit_small_patch14_dinov2", False), ("vit_small_patch14_reg4_dinov2", True)],
)
def test_dinov2s_files_in_the_names_of_its_authors(tmp_path, name, registers, wrap):
    torch.manual_seed(3)
    state = {name: 0.2 * torch.randn(shape) for name, shape in dinov2_names(registers).items()}
    torch.save(wrap({f"backbone.{n}": x for n, x in state.items()}), tmp_path / "wrapped.pth")
    torch.save(state, tmp_path / "x.pth")
    # timm's own way of loading these files, which is not ours
    twin = timm.create_model(
        name,
        img_size=56,
        num_classes=0,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": dict(state)},
    ).eval()
    for path in (tmp_path / "x.pth", tmp_path / "wrapped.pth"):
        encoder, _, notes = opened(path, f"timm:{name}", img_size=56)
        torch.testing.assert_close(
            features_of(encoder, 56), features_of(twin, 56), rtol=1e-4, atol=1e-4
        )
        assert "interpolated" in notes
        assert ("converted by timm's checkpoint_filter_fn" in notes) == registers


def test_a_convnext_in_the_names_of_its_authors(tmp_path):
    torch.manual_seed(3)
    encoder = build("timm:convnext_atto", img_size=32, timm_kwargs={"conv_mlp": False})
    state = {}
    for name, tensor in encoder.state_dict().items():
        if name.startswith("head.fc."):
            continue
        name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        name = re.sub(r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", name)
        name = re.sub(r"^stages\.(\d+)\.blocks\.", r"stages.\1.", name)
        name = name.replace("conv_dw.", "dwconv.").replace("mlp.fc", "pwconv")
        state[name.replace("head.norm.", "norm.")] = torch.randn_like(tensor)
    state |= {"head.weight": torch.zeros(1000, 320), "head.bias": torch.zeros(1000)}
    torch.save({"model": state}, tmp_path / "convnext.pth")
    message = load(encoder, tmp_path / "convnext.pth")
    assert "converted by timm's checkpoint_filter_fn" in message
    name = "stages.1.blocks.0.mlp.fc1.weight"
    assert torch.equal(encoder.state_dict()[name], state["stages.1.0.pwconv1.weight"])


def test_weights_of_another_timm_model_are_refused_in_one_line(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "x.pth")
    for name in ("test_vit", "convnext_atto", "vit_small_patch14_reg4_dinov2"):
        size = 56 if "dinov2" in name else 32
        message = refused(build(f"timm:{name}", img_size=size), tmp_path / "x.pth")
        assert "is --arch the right one?" in message


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_timms_resnets_have_torchvisions_names(tmp_path, name):
    twin = timm.create_model(name)
    torch.save({"model": twin.state_dict()}, tmp_path / "x.pth")
    encoder, _, notes = opened(tmp_path / "x.pth", name)
    twin.reset_classifier(0)
    assert_equal(dict(encoder.state_dict()), twin.state_dict())
    assert "ignored: 2 tensors of its head (fc.*)" in notes


def test_mmpretrains_files_have_the_backbone_below_a_prefix(tmp_path):
    twin = torchvision.models.resnet18()
    state = {f"backbone.{n}": x for n, x in twin.state_dict().items() if not n.startswith("fc.")}
    state |= {"head.fc.weight": torch.zeros(10, 512)}
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "x.pth")
    encoder, _, notes = opened(tmp_path / "x.pth", "resnet18")
    twin.fc = torch.nn.Identity()
    assert_equal(dict(encoder.state_dict()), twin.state_dict())
    assert "ignored: 1 other tensors: head.fc.weight" in notes


@pytest.mark.parametrize("num_heads", [6, 12])
def test_a_folder_of_transformers_is_read_with_the_heads_of_its_config(tmp_path, num_heads):
    """The weights below 'vit', as a model with a classifier saves them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = dict(num_attention_heads=num_heads, hidden_size=384, intermediate_size=1536)
    config = transformers.ViTConfig(**config, image_size=32, layer_norm_eps=1e-6)
    twin = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    twin.save_pretrained(tmp_path)
    encoder, info, notes = opened(tmp_path / "model.safetensors", "vit_small")
    assert info["num_heads"] == num_heads and "names of transformers, converted" in notes
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = twin.vit(x).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.embed(x), expected, rtol=1e-4, atol=1e-4)


def test_a_folder_of_timm_is_read_with_the_heads_of_its_config(tmp_path):
    torch.save(plain_vit("vit_small_patch16_224", img_size=32).state_dict(), tmp_path / "x.pth")
    os.rename(tmp_path / "x.pth", tmp_path / "pytorch_model.bin")
    for config, expected in (({"model_args": {"num_heads": 12}}, 12), ({"model_args": [1]}, 6)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        _, info, _ = opened(tmp_path / "pytorch_model.bin", "vit_small")
        assert info["num_heads"] == expected


def test_transformers_resnet_with_a_classifier(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = dict(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2])
    config = transformers.ResNetConfig(**sizes, layer_type="basic")
    twin = transformers.ResNetForImageClassification(config).eval()
    twin.save_pretrained(tmp_path)
    encoder, _, notes = opened(tmp_path / "model.safetensors", "resnet18")
    assert "ignored: 2 other tensors: classifier.1." in notes
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = twin.resnet(x).pooler_output.flatten(1)
    torch.testing.assert_close(encoder.embed(x), expected, rtol=1e-4, atol=1e-5)


# -- weights of another architecture whose names contain those of the backbone --------------------


def add_to(state, *names):
    return state | {name: torch.ones(4) for name in names}


@pytest.mark.parametrize(
    "arch, state, extra",
    [
        ("resnet18", lambda: backbone(build("resnet34", width=4)), "layer1.2.conv1.weight"),
        (
            "resnet18",
            lambda: to_hf_names(backbone(build("resnet34", width=4))),
            "encoder.stages.0.layers.2.layer.0.convolution.weight",
        ),
        (  # squeeze and excitation, by timm's names
            "resnet18",
            lambda: add_to(backbone(tiny()), "layer1.0.se.fc1.weight"),
            "layer1.0.se.fc1.weight",
        ),
        (  # DINOv2's layer scale
            "vit_tiny",
            lambda: add_to(backbone(build("vit_tiny"), "head"), "mask_token", "blocks.0.ls1.gamma"),
            "blocks.0.ls1.gamma",
        ),
        (
            "vit_tiny",
            lambda: backbone(plain_vit("vit_tiny_patch16_224", img_size=32, depth=13), "head"),
            "blocks.12.norm1.weight",
        ),
        (
            "timm:test_vit",
            lambda: add_to(timm.create_model("test_vit", img_size=32).state_dict(), "reg_token"),
            "reg_token",
        ),
        (  # DINOv2 with registers, read as the model without them
            "timm:test_vit",
            lambda: add_to(
                timm.create_model("test_vit", img_size=32).state_dict(), "register_tokens"
            ),
            "register_tokens",
        ),
    ],
)
def test_a_file_with_more_weights_of_the_backbone_than_arch_has_is_refused(
    tmp_path, arch, state, extra
):
    """Every tensor that the architecture has is there, and the features would be others."""
    torch.save(state(), tmp_path / "x.pth")
    encoder = tiny() if arch == "resnet18" else build(arch)
    message = refused(encoder, tmp_path / "x.pth")
    assert f"of the file are not in the backbone: {extra}" in message
    assert message.endswith("is --arch the right one?")


def test_tensors_that_features_do_not_depend_on_are_ignored_by_name(tmp_path):
    others = ["mask_token", "decoder_blocks.0.norm1.weight", "prototypes.weight"]
    state = add_to(backbone(tiny()), *others, "layer1.0.attn_mask")
    torch.save(state | {"layer1.0.relative_position_index": torch.ones(4).long()}, tmp_path / "x")
    assert "ignored: 5 other tensors: mask_token, " in load(tiny(), tmp_path / "x")


# -- whole runs ------------------------------------------------------------------------------------


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


def test_a_run_starts_from_pretrained_weights_in_both_encoders_and_reports_it(
    images, tmp_path, capsys
):
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
def test_epoch_0_of_a_run_from_pretrained_weights_has_these_weights(
    images, tmp_path, capsys, encoder
):
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


def test_a_run_from_a_librarys_vit_small_keeps_its_heads_and_reports_them(images, tmp_path, capsys):
    state = timm.create_model("vit_small_patch16_224", img_size=32).state_dict()
    torch.save(state, tmp_path / "timm.pth")
    flags = ["-a", "vit_small", "--stop-after-steps", 1]
    start = ["--init-from", tmp_path / "timm.pth"]
    path = tmp_path / "run/checkpoint_last.pth.tar"
    arch = SMALL.replace("--arch resnet8 --width 8", "").split()

    def go(*more):
        steps = ["--eval-freq", 0, "--workdir", tmp_path / "run", *flags, *more]
        main_snclr.main([str(images), *arch, *map(str, steps)])
        return torch.load(path, weights_only=True)["args"]["num_heads"]

    assert go(*start) == 6
    assert "note: 6 attention heads, as vit_small has in timm, DeiT and DINO" in (
        capsys.readouterr().out
    )
    assert json.loads((tmp_path / "run/args.json").read_text())["num_heads"] == 6
    assert go(*start, "--resume", "auto", "--stop-after-steps", 2) == 6
    with pytest.raises(UsageError, match="num_heads 6 -> 12"):
        go("--resume", "auto")
    # files of earlier versions do not say it, and had the architecture's own
    saved = torch.load(path, weights_only=True)
    del saved["args"]["num_heads"]
    torch.save(saved, path)
    with pytest.raises(UsageError, match="num_heads 12 -> 6"):
        go("--num-heads", 6, "--resume", "auto")
    assert go("--resume", "auto", "--stop-after-steps", 3) == 12
    _, info = weights.open_encoder(str(tmp_path / "run/encoder_last.pth.tar"))
    assert info["num_heads"] == 12


def start_of(images, tmp_path, file, *flags):
    run(images, tmp_path, "--init-from", file, "--stop-after-steps", 1, *flags)


def test_a_start_from_weights_with_other_settings_that_fit_their_shapes_is_refused(
    images, tmp_path, capsys
):
    """Names and shapes do not show them: the stem's stride, and the attention heads."""
    torch.manual_seed(0)
    state = build("vit_tiny", num_heads=12).state_dict()
    args = {"arch": "vit_tiny", "num_heads": 12, "img_size": 32, "patch_size": 16}
    vit = {"state_dict": state, "encoder": "online", "args": args}
    torch.save(vit, tmp_path / "vit.pth")
    with pytest.raises(UsageError, match="holds vit_tiny, whose features are others than those of"):
        flags = ["--img-size", 32, "-a", "timm:vit_tiny_patch16_224"]
        start_of(images, tmp_path / "run", tmp_path / "vit.pth", *flags)
    state = build("resnet8", width=8).state_dict()
    args = {"arch": "resnet8", "width": 8, "img_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    torch.save({"state_dict": state, "encoder": "online", "args": args}, tmp_path / "resnet.pth")
    with pytest.raises(UsageError, match=r"holds resnet8, .* give the settings of the file"):
        start_of(images, tmp_path / "run", tmp_path / "resnet.pth", "--small-stem")
    start_of(images, tmp_path / "run", tmp_path / "resnet.pth")
    assert "these weights were trained with --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25: the same" in (
        capsys.readouterr().out
    )


def test_a_mean_that_is_assumed_is_reported(tmp_path):
    torch.save(backbone(tiny()), tmp_path / "x.pth")
    line = "ImageNet's mean and std of images; the file does not say them, --mean and --std change"
    assert line in opened(tmp_path / "x.pth", "resnet18", width=4)[2]
    chosen = {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert "ImageNet" not in opened(tmp_path / "x.pth", "resnet18", width=4, **chosen)[2]
    torch.save({"state_dict": backbone(tiny()), "args": chosen}, tmp_path / "x.pth")
    assert "ImageNet" not in opened(tmp_path / "x.pth", "resnet18", width=4)[2]
