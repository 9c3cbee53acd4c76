import copy
import functools
import math

import pytest
import timm
import torch
import torchvision
from torch import nn

from snclr import backbones, choices, heads, options
from snclr import patches as patches_file
from snclr.backbones import build_encoder, sincos_position_embedding
from snclr.builder import SNCLR
from snclr.memory_bank import MemoryBank
from snclr.patches import PatchProjection
from snclr.running import batch_norm
from snclr.running.batch_norm import GlobalBatchNorm, synchronise_batch_norm
from snclr.running.errors import UsageError

VITS, RESNETS = tuple(backbones.VITS), tuple(backbones.RESNETS)


def build(arch, **settings):
    defaults = dict(
        img_size=32,
        patch_size=16,
        width=None,
        small_stem=False,
        stop_grad_conv1=False,
        timm_kwargs={},
    )
    return build_encoder(arch, **{**defaults, "hidden_dim": 24, "out_dim": 16, **settings})


@functools.lru_cache(maxsize=1)
def built(arch):
    """The encoder in eval mode. Tests must not change it."""
    torch.manual_seed(0)
    return build(arch).eval()


def reference(arch):
    """timm's or torchvision's model of the same architecture, without its classifier."""
    if arch in VITS:
        _, depth, num_heads, embed_layer = backbones.VITS[arch]
        name = f"{arch.replace('_conv', '')}_patch16_224"
        sizes = dict(depth=depth, num_heads=num_heads, embed_layer=embed_layer)
        return timm.create_model(name, img_size=32, num_classes=0, **sizes)
    model = getattr(torchvision.models, arch)()
    model.fc = nn.Identity()
    return model


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def backbone_of(encoder):
    head = "head." if encoder.kind == "vit" else "fc."
    return {
        name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith(head)
    }


def test_flags_and_backbones_know_the_same_archs():
    assert (*backbones.VITS, *backbones.RESNETS) == choices.ARCHS


def test_unknown_arch_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match="resnet50"):
        build("resnet51")


@pytest.mark.parametrize("arch", [arch for arch in backbones.ARCHS if arch != "resnet8"])
def test_backbone_has_the_reference_names_shapes_and_features(arch):
    encoder, twin = built(arch), reference(arch).eval()
    expected = {name: tuple(tensor.shape) for name, tensor in twin.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in backbone_of(encoder).items()} == expected
    twin.load_state_dict(backbone_of(encoder), strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.embed(x), twin(x), rtol=1e-5, atol=1e-5)


def test_resnet8_has_names_of_torchvision():
    assert set(backbone_of(build("resnet8"))) < set(torchvision.models.resnet18().state_dict())


@pytest.mark.parametrize("arch", backbones.ARCHS)
def test_projector_stands_in_the_place_of_the_last_layer(arch, shallow):
    encoder = build(arch, width=8 if arch in RESNETS else None)
    name, layers = ("head", 3) if arch in VITS else ("fc", 2)
    assert encoder.projector is getattr(encoder, name)
    widths = [encoder.num_features, *[24] * (layers - 1), 16]
    linear = {
        key: shape
        for key, shape in shapes(encoder).items()
        if key.startswith(f"{name}.") and len(shape) == 2
    }
    assert linear == {f"{name}.{3 * i}.weight": (widths[i + 1], widths[i]) for i in range(layers)}


@pytest.mark.parametrize("arch", backbones.ARCHS)
def test_forward_is_projector_of_embed(arch, shallow):
    encoder = build(arch).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        features = encoder.embed(x)
        assert features.shape == (3, encoder.num_features)
        torch.testing.assert_close(encoder(x), encoder.projector(features))


@pytest.mark.parametrize("arch", backbones.ARCHS)
def test_one_step_gives_every_trainable_parameter_a_gradient_and_the_momentum_encoder_none(
    arch, shallow
):
    torch.manual_seed(0)
    encoder = build(arch)
    for module in (
        encoder.modules()
    ):  # a last norm at zero keeps its branch without gradient in the very first step
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
    predictor = heads.predictor(encoder.kind, 16, 24)
    model = SNCLR(encoder, predictor, MemoryBank(12, 16), options.parse(["--topk", "3"])).double()
    model.memory_bank.enqueue(torch.randn(12, 16), torch.arange(100, 112))
    views = list(torch.randn(2, 4, 3, 32, 32, dtype=torch.float64))
    loss, _ = model(views, torch.arange(4), momentum=0.9)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.momentum_encoder.parameters())
    without = []
    for name, parameter in [
        *model.base_encoder.named_parameters(),
        *model.predictor.named_parameters(),
    ]:
        if not parameter.requires_grad:
            continue
        gradient = parameter.grad
        assert gradient is not None and gradient.isfinite().all(), name
        if name.endswith("attn.qkv.bias"):  # softmax ignores a constant added to all keys
            query, key, value = gradient.chunk(3)
            assert key.abs().max() < 1e-12
            gradient = torch.minimum(query.abs().max(), value.abs().max())
        if gradient.abs().max() < 1e-12:
            without.append(name)
    # and the projector's batch norm a constant added to all features
    assert without == (["norm.bias"] if arch in VITS else [])


# -- vision transformers ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_heads, expected", [(None, 12), (6, 6)])
def test_vit_small_has_twelve_heads_unless_another_number_is_chosen(num_heads, expected):
    blocks = build("vit_small", num_heads=num_heads).blocks
    assert {block.attn.num_heads for block in blocks} == {expected}


@pytest.mark.parametrize(
    "arch, name", [("vit_tiny", "head"), ("resnet8", "fc"), ("timm:test_convnext", "head.fc")]
)
def test_the_projector_has_the_name_of_the_classifier(arch, name):
    assert backbones.projector_name(build(arch)) == name


@pytest.mark.parametrize("img_size, patch_size", [(32, 8), (32, 16), (16, 16)])
def test_number_of_tokens_follows_image_and_patch_size(img_size, patch_size, shallow):
    encoder = build("vit_tiny", img_size=img_size, patch_size=patch_size)
    tokens = encoder.forward_features(torch.randn(1, 3, img_size, img_size))
    assert tokens.shape == (1, 1 + (img_size // patch_size) ** 2, 192)


@pytest.mark.parametrize("img_size, patch_size", [(33, 16), (224, 15), (8, 16)])
def test_image_size_that_the_patch_does_not_divide_is_refused(img_size, patch_size):
    with pytest.raises(ValueError, match=rf"{img_size}.*{patch_size}"):
        build("vit_tiny", img_size=img_size, patch_size=patch_size)


def test_embed_is_the_class_token_after_the_last_norm():
    encoder = built("vit_small")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = encoder.forward_features(x)
        torch.testing.assert_close(encoder.embed(x), tokens[:, 0])
        torch.testing.assert_close(encoder.embed(x), encoder.forward_head(tokens, pre_logits=True))
        torch.testing.assert_close(encoder.embed(x).std(dim=1), torch.ones(2), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows, columns, width", [(2, 2, 8), (3, 5, 12), (4, 1, 4), (1, 1, 16)])
def test_position_embedding_equals_the_loop(rows, columns, width):
    expected = [[0.0] * width]
    for row in range(rows):
        for column in range(columns):
            frequencies = [1 / 10000 ** (i / (width // 4)) for i in range(width // 4)]
            line = [
                f(position * w)
                for position in (column, row)
                for f in (math.sin, math.cos)
                for w in frequencies
            ]
            expected.append(line)
    torch.set_default_dtype(torch.float64)
    try:
        actual = sincos_position_embedding(rows, columns, width)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(
        actual, torch.tensor([expected], dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("width", [6, 2, 9])
def test_position_embedding_refuses_a_width_without_four_equal_parts(width):
    with pytest.raises(ValueError, match=str(width)):
        sincos_position_embedding(2, 2, width)


def test_position_embedding_is_fixed_and_zero_for_the_class_token(shallow):
    encoder = build("vit_tiny", patch_size=8)
    assert not encoder.pos_embed.requires_grad
    assert not encoder.pos_embed[:, 0].any()
    torch.testing.assert_close(encoder.pos_embed.data, sincos_position_embedding(4, 4, 192))


def assert_uniform(weight, bound):
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.99 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("patch_size", [8, 16])
def test_vit_starts_as_moco_v3s(patch_size, shallow):
    torch.manual_seed(0)
    encoder = build("vit_tiny", patch_size=patch_size)
    width = 192
    for block in encoder.blocks:
        for part in block.attn.qkv.weight.chunk(3):  # three square layers, not one of shape (3w, w)
            assert_uniform(part, math.sqrt(6 / (width + width)))
        assert_uniform(block.attn.proj.weight, math.sqrt(6 / (width + width)))
        assert_uniform(block.mlp.fc1.weight, math.sqrt(6 / (width + 4 * width)))
        assert_uniform(block.mlp.fc2.weight, math.sqrt(6 / (width + 4 * width)))
    assert_uniform(encoder.patch_embed.proj.weight, math.sqrt(6 / (3 * patch_size**2 + width)))
    biases = {
        name: p
        for name, p in encoder.named_parameters()
        if name.endswith("bias") and not name.startswith("head.")
    }
    assert [name for name, bias in biases.items() if bias.any()] == []
    assert encoder.cls_token.std().item() == pytest.approx(1e-6, rel=0.2)


@pytest.mark.parametrize(
    "stop, expected", [(True, {"patch_embed.proj.weight", "patch_embed.proj.bias"}), (False, set())]
)
def test_stop_grad_conv1_freezes_exactly_the_patch_embedding(stop, expected, shallow):
    encoder = build("vit_tiny", stop_grad_conv1=stop)
    frozen = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pos_embed"} | expected


def test_a_gpus_product_over_patches_is_the_convolution(monkeypatch, float64):
    convolution = torch.nn.Conv2d(2, 5, (4, 3), stride=(4, 3))
    patches = copy.deepcopy(convolution)
    patches.__class__ = PatchProjection
    results = []
    for on_host, layer in ((True, convolution), (True, patches), (False, patches)):
        monkeypatch.setattr(patches_file, "on_host", lambda _, on_host=on_host: on_host)
        x = torch.randn(6, 2, 8, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = layer(x)
        gradients = torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))
        results.append((y, *gradients))
    for expected, same, product in zip(*results, strict=True):
        assert torch.equal(same, expected)
        torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)


def test_convolutional_stem_has_moco_v3s_layers_and_one_block_less():
    encoder = build("vit_conv_small")
    stem = encoder.patch_embed.proj
    names = [name for name, _ in stem.named_parameters() if name.endswith("weight")]
    assert names == [
        f"{number}.weight" for number in (0, 1, 3, 4, 6, 7, 9, 10, 12)
    ]  # as in MoCo v3's files
    convolutions = [module for module in stem if isinstance(module, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride[0]) for c in convolutions] == [
        (3, 48, 2),
        (48, 96, 2),
        (96, 192, 2),
        (192, 384, 2),
        (384, 384, 1),
    ]
    assert [c.bias is None for c in convolutions] == [True] * 4 + [False]
    assert len(encoder.blocks) == 11 and stem(torch.randn(2, 3, 64, 64)).shape == (2, 384, 4, 4)
    frozen = {
        name
        for name, p in build("vit_conv_small", stop_grad_conv1=True).named_parameters()
        if not p.requires_grad
    }
    assert frozen == {"pos_embed"}


# -- any model of timm -----------------------------------------------------------------------------

TIMM = {
    "test_vit": "vit",
    "test_convnext": "vit",
    "test_resnet": "resnet",
    "mobilenetv3_small_050": "resnet",
}


@pytest.mark.parametrize("name, kind", TIMM.items())
def test_a_timm_model_keeps_its_names_and_features_and_gets_the_projector_for_its_classifier(
    name, kind
):
    torch.manual_seed(0)
    encoder = build(f"timm:{name}", img_size=32, hidden_dim=8).eval()
    sized = {"img_size": 32} if name == "test_vit" else {}
    twin = timm.create_model(name, **sized).eval()
    classifier = twin.pretrained_cfg["classifier"]
    assert encoder.kind == kind and encoder.projector is encoder.get_submodule(classifier)
    own = {
        name: tensor
        for name, tensor in encoder.state_dict().items()
        if not name.startswith(f"{classifier}.")
    }
    missing, unexpected = twin.load_state_dict(own, strict=False)
    assert {*missing} == {f"{classifier}.weight", f"{classifier}.bias"} and not unexpected
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = encoder.embed(x)
        assert features.shape == (2, encoder.num_features)
        torch.testing.assert_close(
            features, twin.forward_head(twin.forward_features(x), pre_logits=True)
        )
        torch.testing.assert_close(encoder(x), encoder.projector(features))


@pytest.mark.parametrize("name", ["dla46x_c", "dpn48b", "resnetv2_18", "caformer_s18"])
def test_classifiers_that_are_convolutions_or_stand_in_an_mlp_give_way_too(name):
    torch.manual_seed(0)
    encoder = build(f"timm:{name}", img_size=64, hidden_dim=8)
    features = encoder.embed(x := torch.randn(2, 3, 64, 64))
    assert features.shape == (2, encoder.num_features)
    projection = encoder(x)
    assert projection.shape == (2, 16)
    projection.square().sum().backward()
    # DDP waits for every gradient: what the features do not depend on is frozen, and nothing else
    assert all((p.grad is not None) == p.requires_grad for p in encoder.parameters())
    frozen = {key for key, p in encoder.named_parameters() if not p.requires_grad}
    mlp = {f"head.fc.{key}" for key in ("fc1.weight", "fc1.bias", "norm.weight", "norm.bias")}
    assert frozen == (mlp if name == "caformer_s18" else set())


def test_timm_arguments_reach_the_model():
    encoder = build("timm:test_vit", timm_kwargs={"drop_path_rate": 0.5, "depth": 3})
    assert len(encoder.blocks) == 3 and encoder.blocks[-1].drop_path1.drop_prob == 0.5


def test_a_timm_model_trains_with_a_momentum_encoder_of_its_own():
    torch.manual_seed(0)
    encoder = build("timm:test_convnext", img_size=32)
    predictor = heads.predictor(encoder.kind, 16, 24)
    model = SNCLR(encoder, predictor, MemoryBank(12, 16), options.parse(["--topk", "3"]))
    loss, _ = model(list(torch.randn(2, 4, 3, 32, 32)), torch.arange(4), momentum=0.9)
    loss.backward()
    assert all(p.grad is not None for p in model.base_encoder.parameters() if p.requires_grad)
    assert model.momentum_encoder.projector is not encoder.projector


@pytest.mark.parametrize(
    "name, settings, named",
    [
        ("convnext_tony", {}, "timm has no model convnext_tony; close names are .*convnext_tiny"),
        ("qqqqqqqqqqqq", {}, "timm has no model qqqqqqqqqqqq$"),
        ("test_resnet", {"layerz": 3}, "cannot be built .*layerz"),
        ("vit_tiny_patch16_224", {"img_size": 33}, "cannot be built"),
        ("test_vit", {"pretrained": True}, "pretrained would read other files or the network"),
        ("test_vit", {"global_pool": ""}, r"cannot be built .*not \(B, width\), but \(1, 5, 64\)"),
        ("test_resnet", {"features_only": True}, "cannot be built .*forward_head"),
        ("test_vit", {"norm_layer": "nope"}, "cannot be built .*nope"),
        ("deit_tiny_distilled_patch16_224", {}, "no single classifier"),
    ],
)
def test_what_timm_refuses_is_one_line_of_error(name, settings, named):
    with pytest.raises(UsageError, match=named) as caught:
        build(f"timm:{name}", timm_kwargs=settings)
    assert "\n" not in str(caught.value)


# -- residual networks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch, small_stem, stride",
    [
        ("resnet8", False, 8),
        ("resnet8", True, 4),
        ("resnet18", False, 32),
        ("resnet18", True, 8),
        ("resnet50", True, 8),
    ],
)
def test_stem_sets_the_output_stride(arch, small_stem, stride):
    encoder = build(arch, small_stem=small_stem, width=8).eval()
    sizes = []
    encoder.avgpool.register_forward_pre_hook(
        lambda module, inputs: sizes.append(inputs[0].shape[2:])
    )
    with torch.no_grad():
        encoder.embed(torch.randn(1, 3, 64, 64))
    assert sizes == [(64 // stride, 64 // stride)]


@pytest.mark.parametrize(
    "arch, width, features",
    [
        ("resnet8", None, 128),
        ("resnet8", 8, 32),
        ("resnet18", None, 512),
        ("resnet18", 16, 128),
        ("resnet50", 16, 512),
    ],
)
def test_width_sets_the_feature_width(arch, width, features):
    encoder = build(arch, width=width).eval()
    assert encoder.conv1.out_channels == (width or {"resnet8": 32}.get(arch, 64))
    assert encoder.num_features == features
    assert encoder.embed(torch.randn(1, 3, 32, 32)).shape == (1, features)


@pytest.mark.parametrize("arch", RESNETS)
def test_exactly_the_last_norms_of_bottlenecks_start_at_zero(arch):
    norms = {
        name: module.weight
        for name, module in build(arch, width=8).named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    zero = {name for name, weight in norms.items() if not weight.any()}
    assert zero == {name for name in norms if name.endswith(".bn3")}
    assert len(zero) == {"resnet50": 3 + 4 + 6 + 3, "resnet101": 3 + 4 + 23 + 3}.get(arch, 0)
    assert all((weight == 1).all() for name, weight in norms.items() if name not in zero)


# -- heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head, layers, last_norm",
    [
        (heads.projector("vit", 16, 24, 16), 3, True),
        (heads.projector("resnet", 16, 24, 16), 2, True),
        (heads.predictor("vit", 16, 24), 2, True),
        (heads.predictor("resnet", 16, 24), 2, False),
    ],
    ids=["vit projector", "resnet projector", "vit predictor", "resnet predictor"],
)
def test_head_is_bias_free_layers_with_norm_and_relu_between(head, layers, last_norm):
    expected = (
        [nn.Linear, GlobalBatchNorm, nn.ReLU] * (layers - 1)
        + [nn.Linear]
        + [GlobalBatchNorm] * last_norm
    )
    assert [type(module) for module in head] == expected
    assert all(module.bias is None for module in head if isinstance(module, nn.Linear))
    norms = [module for module in head if isinstance(module, GlobalBatchNorm)]
    assert [norm.affine for norm in norms] == [True] * (layers - 1) + [False] * last_norm
    assert [module.out_features for module in head if isinstance(module, nn.Linear)] == [24] * (
        layers - 1
    ) + [16]


def test_synchronised_norms_on_gpus_keep_timms_activations(monkeypatch):
    torch.manual_seed(0)
    encoder = build("timm:test_efficientnet").eval()
    monkeypatch.setattr(batch_norm, "world_size", lambda: 2)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():  # in eval mode torch's layer also runs on a CPU
        expected = encoder(x)
        keys = list(encoder.state_dict())
        # timm before 1.0.15 or so leaves what it converts in training mode
        synchronised = synchronise_batch_norm(encoder, torch.device("cuda")).eval()
        kinds = {
            type(module).__name__
            for module in synchronised.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        }
        assert kinds == {
            "SyncBatchNormAct",
            "GlobalBatchNorm",
        }  # of the backbone, and of the projector
        torch.testing.assert_close(synchronised(x), expected)
    assert list(synchronised.state_dict()) == keys
