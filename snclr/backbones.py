"""Backbones: from images (B, C, S, S) to features (B, num_features).

Every encoder has `embed(x)`, the features; `projector`, which takes the place of the classifier;
`forward(x) = projector(embed(x))`; `num_features`; and `kind`, 'vit' or 'resnet', which selects the
shape of its heads (snclr/heads.py). Parameter names are those of timm's VisionTransformer
(projector: `head`) and torchvision's ResNet (projector: `fc`), so that other tools can read them.
Models named `timm:NAME` keep timm's names.
"""

import math
import sys
from functools import partial

import timm
import timm.models.vision_transformer as timm_vit
import torch
import torchvision.models.resnet as tv_resnet
from torch import Tensor, nn

from . import heads
from .choices import ARCHS, NUM_HEADS, check_num_heads
from .patches import ConvStem, Patches
from .running.errors import UsageError, close_names, first_line
from .running.forward import recomputed

# arch: (embedding width, blocks, attention heads, patch embedding)
# A convolutional stem replaces one block.
VITS = {
    "vit_tiny": (192, 12, NUM_HEADS["vit_tiny"], Patches),
    "vit_small": (384, 12, NUM_HEADS["vit_small"], Patches),
    "vit_base": (768, 12, NUM_HEADS["vit_base"], Patches),
    "vit_conv_small": (384, 11, NUM_HEADS["vit_conv_small"], ConvStem),
    "vit_conv_base": (768, 11, NUM_HEADS["vit_conv_base"], ConvStem),
}

# arch: (block, blocks of each stage, default width of the first stage, stem)
RESNETS = {
    "resnet8": (tv_resnet.BasicBlock, (1, 1, 1), 32, "light"),
    "resnet18": (tv_resnet.BasicBlock, (2, 2, 2, 2), 64, "imagenet"),
    "resnet34": (tv_resnet.BasicBlock, (3, 4, 6, 3), 64, "imagenet"),
    "resnet50": (tv_resnet.Bottleneck, (3, 4, 6, 3), 64, "imagenet"),
    "resnet101": (tv_resnet.Bottleneck, (3, 4, 23, 3), 64, "imagenet"),
}

# stem: (kernel, stride, whether a 3x3 stride-2 max pool follows)
STEMS = {"imagenet": (7, 2, True), "small": (3, 1, False), "light": (3, 2, False)}

TIMM = "timm:"  # prefix of the name of any other timm model


class VisionTransformer(timm_vit.VisionTransformer):
    """timm's ViT with a fixed 2-D sin-cos position embedding and MoCo v3's initialisation.

    The class token is the feature. stop_grad_conv1 freezes a plain patch embedding at its random
    initialisation, which keeps training stable (Chen et al. 2021, section 4). A convolutional stem
    is stable without it: it is trained, and keeps torch's default initialisation.
    """

    kind = "vit"

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        embed_layer: type[nn.Module],
        stop_grad_conv1: bool,
        channels: int,
    ):
        super().__init__(
            img_size,
            patch_size,
            in_chans=channels,
            num_classes=0,
            embed_dim=width,
            depth=depth,
            num_heads=num_heads,
            embed_layer=embed_layer,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            weight_init="skip",
            dynamic_img_size=True,  # the position embedding is interpolated for local views
        )
        grid = img_size // patch_size
        self.pos_embed = nn.Parameter(
            sincos_position_embedding(grid, grid, width), requires_grad=False
        )
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                timm_vit.init_weights_vit_moco(module, name)
        nn.init.normal_(self.cls_token, std=1e-6)
        if embed_layer is Patches:
            patches = self.patch_embed.proj
            # Xavier initialisation of a linear layer on flattened patches
            bound = math.sqrt(6 / (channels * patch_size**2 + width))
            nn.init.uniform_(patches.weight, -bound, bound)
            nn.init.zeros_(patches.bias)
            patches.requires_grad_(not stop_grad_conv1)

    @property
    def projector(self) -> nn.Module:
        return self.head

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, S, S) -> class token after the last norm (B, num_features)."""
        return self.forward_head(self.forward_features(x), pre_logits=True)


class ResNet(tv_resnet.ResNet):
    """torchvision's ResNet with a variable width of the first stage, stem and number of stages.

    In bottleneck networks the last norm of each residual branch starts at zero, as in MoCo v3's
    ResNet-50. The shallow networks learn their first features faster without that.
    """

    kind = "resnet"

    def __init__(
        self, block: type[nn.Module], stages: tuple[int, ...], width: int, stem: str, channels: int
    ):
        nn.Module.__init__(self)  # torchvision's own constructor fixes stem, width and four stages
        self._norm_layer = nn.BatchNorm2d
        self.inplanes, self.dilation, self.groups, self.base_width = width, 1, 1, 64
        kernel, stride, pool = STEMS[stem]
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Identity()
        self.stages = [f"layer{stage + 1}" for stage in range(len(stages))]
        for stage, (name, blocks) in enumerate(zip(self.stages, stages, strict=True)):
            layer = self._make_layer(block, width * 2**stage, blocks, stride=1 if stage == 0 else 2)
            self.add_module(name, layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.num_features = self.inplanes
        self.fc = nn.Identity()
        self.grad_checkpointing = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, tv_resnet.Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    @property
    def projector(self) -> nn.Module:
        return self.fc

    def group_matcher(self, coarse: bool = False) -> dict:
        """Names of the layers from the stem on, as timm's models have it: each block is a layer."""
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": r"^layer(\d+)\.(\d+)\."}

    def set_grad_checkpointing(self) -> None:
        """Keep only the input of each residual block for backward, and recompute the rest."""
        self.grad_checkpointing = True

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, S, S) -> globally averaged features (B, num_features)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            for block in getattr(self, name):
                x = (
                    recomputed(block, x, module=block)
                    if self.grad_checkpointing and torch.is_grad_enabled()
                    else block(x)
                )
        return self.avgpool(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.embed(x))


class TimmEncoder:
    """Turns a timm model into an encoder.

    build_timm mixes it into the model's own class, so that timm's names stay.
    """

    def from_authors_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict from the names of a model's authors to timm's, by timm's function.

        Returns the tensors unchanged where timm has no such function for this model. Raises
        UsageError where it fails.
        """
        name, settings = self.timm_call
        convert = getattr(
            sys.modules[timm.model_entrypoint(name).__module__], "checkpoint_filter_fn", None
        )
        if convert is None:
            return tensors
        # timm's functions compare shapes with a model that has its classifier
        reference = timm.create_model(name, pretrained=False, **settings)
        try:
            return convert(dict(tensors), reference)
        except Exception as error:  # timm's functions do not check that the weights fit
            raise UsageError(
                f"timm cannot convert these weights to {name}: {first_line(error)}; "
                "is --arch the right one?"
            ) from error

    @property
    def projector(self) -> nn.Module:
        return self.get_submodule(self.pretrained_cfg["classifier"])

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, S, S) -> features that the model's classifier would get (B, num_features)."""
        return self.forward_head(self.forward_features(x), pre_logits=True)

    def set_grad_checkpointing(self) -> None:
        """Recompute each block in backward, with timm's own method.

        Raises UsageError where the model has no such method, or where it would not be exact.
        """
        if has_batch_norm(self, besides=self.projector):
            raise UsageError(
                "--grad-checkpointing would let timm's batch norms count each batch twice: "
                "use --micro-batch"
            )
        try:
            super().set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise UsageError(
                "this timm model does not support --grad-checkpointing: use --micro-batch"
            ) from error

    def forward(self, x: Tensor) -> Tensor:
        # not timm's own forward, which passes (B, C, 1, 1) to some classifiers, and has an MLP
        # around others
        return self.projector(self.embed(x))


def timm_settings(name: str, img_size: int, channels: int, timm_kwargs: dict) -> dict:
    """Arguments of timm.create_model for a model that takes such images of img_size pixels."""
    sized = {"img_size": img_size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    return {**sized, **in_chans(channels), **timm_kwargs}


def in_chans(channels: int) -> dict:
    """timm's argument for the number of channels, of which 3 is its default."""
    return {"in_chans": channels} if channels != 3 else {}


def build_timm(
    name: str, img_size: int, channels: int, timm_kwargs: dict, hidden_dim: int, out_dim: int
) -> nn.Module:
    """The timm model `name` with random weights and the projector in place of its classifier.

    The heads are those of a ResNet if the model has batch norms, else those of a ViT. timm_kwargs:
    further arguments of the model. Parameters that do not influence the features (an MLP around the
    classifier) keep their names and are frozen, since DDP waits for the gradient of every other
    parameter. Raises UsageError where timm cannot build it.
    """
    for key in timm_kwargs:
        if not str(key).isidentifier():
            raise UsageError(f"timm:{name} has no argument {key!r}")
        if key.startswith(("pretrained", "checkpoint", "cache")):
            raise UsageError(f"timm's {key} would read other files or the network: use --init-from")
    if not timm.is_model(name):
        raise UsageError(f"timm has no model {name}{close_names(name, timm.list_models())}")
    config = timm.get_pretrained_cfg(name)
    if not isinstance(config.classifier, str):
        raise UsageError(
            f"timm:{name} has no single classifier that the projector could replace, "
            f"but {config.classifier}"
        )
    settings = timm_settings(name, img_size, channels, timm_kwargs)
    try:
        model = timm.create_model(name, pretrained=False, **settings).eval()
        features = model.forward_head(
            model.forward_features(torch.zeros(1, channels, img_size, img_size)), pre_logits=True
        )
        if features.ndim != 2:
            raise ValueError(f"its features are not (B, width), but {tuple(features.shape)}")
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(features.sum(), trainable, allow_unused=True)
    except Exception as error:  # a wrong argument can raise any exception
        raise UsageError(
            f"timm:{name} cannot be built with --img-size {img_size} and {timm_kwargs}: "
            f"{first_line(error)}"
        ) from error
    for parameter, gradient in zip(trainable, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    width = features.shape[1]  # timm's num_features is another number in some models
    model.train()
    model.kind, model.num_features = "resnet" if has_batch_norm(model) else "vit", width
    model.timm_call = (name, settings)
    model.set_submodule(config.classifier, heads.projector(model.kind, width, hidden_dim, out_dim))
    model.__class__ = type(type(model).__name__, (TimmEncoder, type(model)), {})
    return model


def projector_name(encoder: nn.Module) -> str:
    """The name of the projector in the encoder: 'head', 'fc', or that of timm's classifier."""
    return next(name for name, module in encoder.named_modules() if module is encoder.projector)


def backbone_tensors(encoder: nn.Module) -> dict[str, Tensor]:
    """The encoder's parameters and buffers by name, without those of the projector."""
    head, state = f"{projector_name(encoder)}.", encoder.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith(head)}


def has_batch_norm(module: nn.Module, besides: nn.Module | None = None) -> bool:
    """Whether a layer of module is a batch norm, without the layers of `besides`."""
    layers = {*module.modules()}
    if besides is not None:
        layers -= {*besides.modules()}
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in layers)


def sincos_position_embedding(rows: int, columns: int, width: int) -> Tensor:
    """Fixed 2-D position embedding (1, 1 + rows * columns, width); zeros for the class token.

    A quarter of the width each: sine and cosine of the column, sine and cosine of the row, with
    width/4 frequencies. Raises ValueError for a width that 4 does not divide.
    """
    if width % 4:
        raise ValueError(
            f"a 2-D sin-cos position embedding needs a width divisible by 4, found {width}"
        )
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(
        torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij"
    )
    column, row = column.reshape(-1, 1) * frequencies, row.reshape(-1, 1) * frequencies
    patches = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
    return torch.cat([torch.zeros(1, width), patches])[None].to(torch.get_default_dtype())


def build_encoder(
    arch: str,
    *,
    img_size: int,
    patch_size: int,
    width: int | None,
    small_stem: bool,
    stop_grad_conv1: bool,
    timm_kwargs: dict,
    hidden_dim: int,
    out_dim: int,
    num_heads: int | None = None,
    channels: int = 3,
) -> nn.Module:
    """The encoder `arch` for images with `channels`, and its projector (hidden_dim, out_dim).

    patch_size, stop_grad_conv1 and num_heads are for ViTs (num_heads None: the arch's own, as in
    VITS). width is that of a ResNet's first stage (None: the arch's own). small_stem is for ResNets
    and images of about 32 px: 3x3, stride 1, no pooling. timm_kwargs are for models named
    timm:NAME. Raises UsageError for an unknown arch, an image size that patch_size does not divide,
    and a num_heads that does not fit.
    """
    check_num_heads(num_heads, arch)
    if arch in VITS:
        width, depth, own_heads, embed_layer = VITS[arch]
        num_heads = own_heads if num_heads is None else num_heads
        if type(num_heads) is not int or num_heads < 1 or width % num_heads:
            raise UsageError(
                f"--num-heads must divide the width of {arch}, {width}; found {num_heads!r}"
            )
        if img_size % patch_size:
            raise UsageError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        encoder = VisionTransformer(
            img_size, patch_size, width, depth, num_heads, embed_layer, stop_grad_conv1, channels
        )
        encoder.head = heads.projector("vit", encoder.num_features, hidden_dim, out_dim)
    elif arch in RESNETS:
        block, stages, default_width, stem = RESNETS[arch]
        stem = "small" if small_stem else stem
        encoder = ResNet(block, stages, width or default_width, stem, channels)
        encoder.fc = heads.projector("resnet", encoder.num_features, hidden_dim, out_dim)
    elif arch.startswith(TIMM):
        name = arch.removeprefix(TIMM)
        encoder = build_timm(name, img_size, channels, timm_kwargs, hidden_dim, out_dim)
    else:
        raise UsageError(f"unknown arch {arch!r}; known are {', '.join(ARCHS)} and {TIMM}NAME")
    return encoder
