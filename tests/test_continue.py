"""Continuing from given weights: the frozen backbone, and its rates by depth."""

import pytest
import torch
from test_backbones import build
from test_ranks import NO_EVALUATION, assert_same

import main_snclr
from snclr import optim, options
from snclr.backbones import backbone_tensors
from snclr.builder import build_model
from snclr.running.errors import UsageError


def train(images, workdir, *flags):
    main_snclr.main(
        [str(images), *NO_EVALUATION.split(), "--workdir", str(workdir), *map(str, flags)]
    )
    return torch.load(workdir / "checkpoint_last.pth.tar", weights_only=True)


def backbone(state, encoder="base_encoder"):
    prefix = f"module.{encoder}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state["state_dict"].items()
        if name.startswith(prefix) and not name.startswith((f"{prefix}fc.", f"{prefix}head."))
    }


@pytest.fixture(scope="module")
def start(images, tmp_path_factory):
    """The weights to start from, by architecture: a checkpoint after three long steps."""
    made = {}

    def get(arch):
        if arch not in made:
            workdir = tmp_path_factory.mktemp("start")
            flags = ["-a", arch, "--warmup-epochs", 0, "--lr", 1, "--stop-after-steps", 3]
            train(images, workdir, *flags)
            made[arch] = workdir / "checkpoint_last.pth.tar"
        return made[arch]

    return get


@pytest.mark.parametrize(
    "flags",
    ["", "-a vit_tiny --stop-grad-conv1", "--method mocov2", "--method nnclr"],
)
def test_a_frozen_backbone_keeps_every_bit_and_is_trained_afterwards(
    images, start, tmp_path, flags
):
    arch = "vit_tiny" if "vit" in flags else "resnet8"
    flags = [*flags.split(), "--init-from", start(arch), "--freeze-backbone-epochs", 1]
    flags += ["--wd", 0.5, "--warmup-epochs", 0, "--snclr-m", 0.5]
    initial = backbone(torch.load(start(arch), weights_only=True))
    frozen = train(images, tmp_path, *flags, "--stop-after-steps", 5)
    encoders = ["base_encoder"] + (["momentum_encoder"] if "nnclr" not in flags else [])
    for encoder in encoders:
        assert_same(backbone(frozen, encoder), initial)
    # the heads moved, and their batch norms counted
    untrained = build_model(options.parse([*NO_EVALUATION.split(), *map(str, flags[:-8])]))
    for name, tensor in untrained.state_dict().items():
        is_head = ".fc." in name or ".head." in name or name.startswith("predictor.")
        if is_head and "momentum_encoder" not in name:
            assert not torch.equal(frozen["state_dict"][f"module.{name}"], tensor), name
    trained = train(images, tmp_path, *flags, "--stop-after-steps", 7, "--resume", "auto")
    for encoder in encoders:
        changed = backbone(trained, encoder)
        same = {name for name in initial if torch.equal(changed[name], initial[name])}
        same = {name for name in same if not name.endswith("num_batches_tracked")}
        assert same <= {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
        assert ("patch_embed.proj.weight" in same) == (arch == "vit_tiny")


def test_a_resumed_run_equals_the_uninterrupted_one_within_and_after_the_frozen_epoch(
    images, start, tmp_path, capsys
):
    flags = ["--init-from", start("resnet8"), "--freeze-backbone-epochs", 1, "--lr-scale", 0.5]
    whole = train(images, tmp_path / "whole", *flags)
    assert capsys.readouterr().out.count("the backbone is trained from here on") == 1
    for steps in (3, 5, 7, 10):
        more = ["--stop-after-steps", steps, "--resume", "auto"]
        parts = train(images, tmp_path / "parts", *flags, *more)
    for part in ("state_dict", "optimizer"):
        assert_same(parts[part], whole[part])
    with pytest.raises(UsageError, match=r"lr_scale 0\.5 -> 1\.0"):
        train(images, tmp_path / "parts", *flags[:-2], "--resume", "auto")


# -- rates by depth --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch, kwargs, depths",
    [
        ("vit_tiny", {}, ["cls_token", *(f"blocks.{n}." for n in range(12))]),
        ("resnet8", {}, ["conv1.", *(f"layer{n}.0." for n in (1, 2, 3))]),
        ("timm:test_vit", {"depth": 3}, ["cls_token", *(f"blocks.{n}." for n in range(3))]),
    ],
)
def test_rates_by_depth_are_those_of_a_loop(arch, kwargs, depths):
    encoder = build(arch, img_size=32, timm_kwargs=kwargs)
    num_blocks = len(depths) - 1
    expected = {}
    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if name.startswith(("cls_token", "pos_embed", "patch_embed.", "conv1.", "bn1.")):
            for _ in range(num_blocks + 1):
                scale *= 0.7
        for block in range(num_blocks):
            if name.startswith(depths[1 + block]):
                for _ in range(num_blocks - block):
                    scale *= 0.7
        if name.startswith("norm."):
            scale = 0.7
        expected[name] = (0.3 * scale, 0.2 if parameter.ndim > 1 else 0.0)
    scales = optim.layer_scales(encoder, 0.7, prefix="")
    optimizer = optim.build_optimizer("adamw", encoder, 0.2, scales)
    optim.set_learning_rate(optimizer, 0.3)
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    actual = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert actual.keys() == expected.keys()
    for name, rates in expected.items():
        assert actual[name] == pytest.approx(rates, rel=1e-12), name
    assert any(name not in backbone_tensors(encoder) for name in expected)  # also the projector


def test_a_scale_of_one_keeps_the_two_groups_and_needs_no_layers():
    layer = torch.nn.Linear(2, 2)
    assert optim.layer_scales(layer, 1.0, prefix="") == {}
    groups = optim.parameter_groups(layer.named_parameters(), 0.1, {})
    assert [group.keys() for group in groups] == [{"params", "weight_decay"}] * 2
    with pytest.raises(UsageError, match=r"--lr-scale 0\.5 needs the layers"):
        optim.layer_scales(layer, 0.5, prefix="")
