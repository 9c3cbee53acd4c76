"""Continuing from given weights: the frozen backbone, its rates by depth, and public weights."""

import dataclasses
import json

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from test_backbones import build
from test_ranks import NO_EVALUATION, assert_same

import main_snclr
import snclr
from snclr import export, optim, options
from snclr.backbones import backbone_tensors
from snclr.builder import build_model
from snclr.running.errors import UsageError
from snclr.weights import layouts, load, public


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


def test_a_run_is_resumed_when_the_weights_of_its_start_are_gone(
    images, start, tmp_path, capsys, monkeypatch
):
    """As a job of SLURM, which needs no --workdir."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.chdir(tmp_path)
    weights = torch.load(start("vit_tiny"), weights_only=True)
    weights["args"]["num_heads"] = 6
    torch.save(weights, tmp_path / "start.pth.tar")
    flags = ["-a", "vit_tiny", "--init-from", tmp_path / "start.pth.tar", "--epochs", 2]
    job = [str(images), *NO_EVALUATION.split(), *map(str, flags), "--stop-after-steps"]
    main_snclr.main([*job, "3"])
    (run,) = tmp_path.glob("runs/*-77")
    (tmp_path / "start.pth.tar").unlink()
    main_snclr.main([*job, "4", "--resume", "auto"])
    state = torch.load(run / "checkpoint_last.pth.tar", weights_only=True)
    assert state["step"] == 4 and state["args"]["num_heads"] == 6
    assert "is ignored" in capsys.readouterr().out
    for path in run.glob("checkpoint_*"):
        path.unlink()
    with pytest.raises(UsageError, match=r"cannot read .*start\.pth\.tar"):
        train(images, run, *flags, "--resume", "auto")


@pytest.mark.parametrize(
    "flags",
    [
        "",
        pytest.param("-a vit_tiny --stop-grad-conv1", marks=pytest.mark.slow),
        "--method mocov2",
        "--method nnclr",
    ],
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
    scales = optim.layer_scales(encoder, 0.7, "", "--lr-scale")
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
    assert optim.layer_scales(layer, 1.0, "", "--lr-scale") == {}
    groups = optim.parameter_groups(layer.named_parameters(), 0.1, {})
    assert [group.keys() for group in groups] == [{"params", "weight_decay"}] * 2
    with pytest.raises(UsageError, match=r"--lr-scale 0\.5 needs the layers"):
        optim.layer_scales(layer, 0.5, "", "--lr-scale")


# -- public weights: their downloads are replaced by local files -----------------------------------


@pytest.fixture
def timm_weights(tmp_path, monkeypatch):
    """From a name with its tag to a timm model with random weights, which timm then 'downloads'."""

    def publish(name):
        torch.manual_seed(1)
        configs = timm.models._registry._model_pretrained_cfgs
        num_classes = configs[name].num_classes
        model = timm.create_model(name.partition(".")[0], num_classes=num_classes).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        torch.save(model.state_dict(), tmp_path / "downloaded.pth")
        local = dataclasses.replace(configs[name], file=str(tmp_path / "downloaded.pth"))
        monkeypatch.setitem(configs, name, local)
        model.reset_classifier(0)
        return model

    return publish


def opened(source, arch, img_size):
    """The encoder that --init-from builds and loads, in eval mode, and the notes."""
    file, model = public.read_start(source, img_size)
    heads, notes = layouts.choose_num_heads(file, arch, None)
    encoder = build(arch, img_size=img_size, num_heads=heads)
    notes += load.load_backbone(encoder, file)
    if model is not None:
        public.check_features(source, model, encoder, torch.randn(1, 3, img_size, img_size))
    return encoder.eval(), notes


def test_weights_of_timm_come_with_their_heads_and_equal_features(timm_weights):
    twin = timm_weights("vit_small_patch16_224.dino")
    x = torch.randn(1, 3, 224, 224)
    encoder, notes = opened("timm:vit_small_patch16_224.dino", "vit_small", 224)
    assert "6 attention heads, as timm:vit_small_patch16_224.dino has" in notes
    torch.testing.assert_close(encoder.embed(x), twin(x), rtol=1e-4, atol=1e-4)
    # another image size: timm resizes the position embedding
    encoder, _ = opened("timm:vit_small_patch16_224.dino", "vit_small", 64)
    twin.set_input_size((64, 64))
    torch.testing.assert_close(encoder.pos_embed, twin.pos_embed)


def test_weights_whose_model_computes_otherwise_are_refused(timm_weights):
    timm_weights("vit_small_patch16_224.dino")
    source = "timm:vit_small_patch16_224.dino"
    file, model = public.read_start(source, 32)
    encoder = build("vit_small", img_size=32, num_heads=12)
    load.load_backbone(encoder, file)
    with pytest.raises(UsageError, match="this --arch computes other features"):
        public.check_features(source, model, encoder, torch.randn(1, 3, 32, 32))


def test_a_run_starts_from_a_model_of_timm_and_names_its_normalisation(
    images, tmp_path, timm_weights, capsys
):
    twin = timm_weights("test_vit.r160_in1k")
    flags = "-a timm:test_vit --img-size 160 --init-from timm:test_vit.r160_in1k"
    flags += " --mean 0.1 0.2 0.3 --std 0.1 0.1 0.1 --freeze-backbone-epochs 1 --lr-scale 0.8"
    flags += " --stop-after-steps 1"
    state = train(images, tmp_path / "run", *flags.split())
    assert_same(backbone(state), dict(twin.state_dict()))
    out = capsys.readouterr().out
    assert "backbone tensors from timm:test_vit.r160_in1k: weights of timm" in out
    assert "these weights were trained with --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5" in out


def test_an_unknown_name_is_answered_before_any_download(monkeypatch):
    monkeypatch.setattr(timm, "create_model", None)
    with pytest.raises(UsageError, match=r"no weights of this name; close names are .*\.dino"):
        public.read_start("timm:vit_small_patch16_224.dinoo", 224)


@pytest.mark.parametrize("source", ["timm:vit_small_patch16_224.dino", "hf:nobody/nothing"])
def test_without_network_there_is_one_clear_line(monkeypatch, tmp_path, source):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UsageError, match=r"cannot be downloaded or read .*without network"
    ) as caught:
        public.read_start(source, 224)
    assert source in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """The folder in which the hub's library has the files of hf:snclr/vit."""
    repository = tmp_path / "models--snclr--vit"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return repository / "snapshots" / ("0" * 40)


def test_other_models_of_the_hub_are_refused(cached):
    cached.mkdir()
    (cached / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    with pytest.raises(UsageError, match="'dinov2': of transformers' models only"):
        public.read_start("hf:snclr/vit", 32)
    config = {"model_type": "vit", "hidden_act": "quick_gelu"}
    (cached / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="has hidden_act 'quick_gelu', not 'gelu'"):
        public.read_start("hf:snclr/vit", 32)
    (cached / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UsageError, match="cannot be downloaded or read"):  # without its weights
        public.read_start("hf:snclr/vit", 32)


@pytest.mark.parametrize("library", ["timm", pytest.param("hf", marks=pytest.mark.slow)])
def test_weights_of_the_hugging_face_hub_come_from_its_cache(cached, library, start):
    if library == "hf":
        pytest.importorskip("transformers", reason="transformers is not installed")
    export.main([str(start("vit_tiny")), "--format", library, "--out", str(cached)])
    encoder, notes = opened("hf:snclr/vit", "vit_tiny", 32)
    expected, _ = snclr.load_encoder(str(start("vit_tiny")))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder.embed(x), expected(x), rtol=1e-4, atol=1e-5)
    assert "3 attention heads, as hf:snclr/vit has" in notes
    if library == "hf":
        tensors = safetensors.torch.load_file(cached / "model.safetensors")
        (cached / "model.safetensors").unlink()
        torch.save(tensors, cached / "pytorch_model.bin")  # as in older repositories
        assert torch.equal(opened("hf:snclr/vit", "vit_tiny", 32)[0].embed(x), encoder.embed(x))
