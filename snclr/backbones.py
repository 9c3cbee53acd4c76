"""Backbones: an image batch (B, 3, S, S) to features (B, num_features), each with its projector in the last layer's place.

Every encoder has `embed(x)` (features), `projector` (the head), `forward(x) = projector(embed(x))`, and a `kind`, 'vit' or
'resnet', which decides over its heads. Parameter names are timm's VisionTransformer's (projector: `head`) and torchvision's
ResNet's (projector: `fc`), so that other tools read them; `timm:` models keep their own.
"""

import difflib
import math
from functools import partial

import timm
import timm.models.vision_transformer as timm_vit
import torch
import torchvision.models.resnet as tv_resnet
from timm.layers import PatchEmbed
from torch import Tensor, nn

from . import heads
from .options import ARCHS
from .running.errors import UsageError, first_line
from .running.recompute import recomputed


class ConvStem(PatchEmbed):
    """Patch embedding of four 3x3 convolutions of stride 2 and a 1x1 one (Xiao et al. 2021), numbered as MoCo v3's."""

    def __init__(self, *args, embed_dim: int, **kwargs):
        super().__init__(*args, embed_dim=embed_dim, **kwargs)
        layers, channels = [], 3
        for width in (embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim):
            layers += [
                nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(True),
            ]
            channels = width
        self.proj = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))


# arch: (embedding width, blocks, attention heads, patch embedding); ViT-S has 12 heads, as MoCo v3's (DeiT's has 6), and a
# convolutional stem takes the place of one block
VITS = {
    "vit_tiny": (192, 12, 3, PatchEmbed),
    "vit_small": (384, 12, 12, PatchEmbed),
    "vit_base": (768, 12, 12, PatchEmbed),
    "vit_conv_small": (384, 11, 12, ConvStem),
    "vit_conv_base": (768, 11, 12, ConvStem),
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

TIMM = "timm:"  # what names any other model of timm


class VisionTransformer(timm_vit.VisionTransformer):
    """timm's ViT with fixed 2-D sin-cos position embedding and MoCo v3's initialisation (Chen et al. 2021, section 4).

    Class token as feature. stop_grad_conv1 freezes a plain patch embedding at its random start, which keeps training stable;
    a convolutional stem is stable by itself, trains, and starts as torch's convolutions do.
    """

    kind = "vit"

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        embed_layer: type[PatchEmbed],
        stop_grad_conv1: bool,
    ):
        norm = partial(nn.LayerNorm, eps=1e-6)
        size = dict(embed_dim=width, depth=depth, num_heads=num_heads, embed_layer=embed_layer)
        super().__init__(
            img_size, patch_size, num_classes=0, norm_layer=norm, weight_init="skip", **size
        )
        grid = img_size // patch_size
        self.pos_embed = nn.Parameter(
            sincos_position_embedding(grid, grid, width), requires_grad=False
        )
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith("qkv"):  # queries, keys and values are three layers in one matrix
                    bound = math.sqrt(6 / (module.weight.shape[0] // 3 + module.weight.shape[1]))
                    nn.init.uniform_(module.weight, -bound, bound)
                else:
                    nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        if embed_layer is PatchEmbed:
            patches = self.patch_embed.proj
            bound = math.sqrt(
                6 / (3 * patch_size**2 + width)
            )  # Xavier for a linear layer on flattened patches
            nn.init.uniform_(patches.weight, -bound, bound)
            nn.init.zeros_(patches.bias)
            patches.requires_grad_(not stop_grad_conv1)

    @property
    def projector(self) -> nn.Module:
        return self.head

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> class token after the last norm (B, num_features)."""
        return self.forward_head(self.forward_features(x), pre_logits=True)


class ResNet(tv_resnet.ResNet):
    """torchvision's ResNet with the width of its first stage, its stem and its number of stages as parameters.

    In bottleneck nets the last norm of each residual branch starts at zero (MoCo v3's ResNet-50); the shallow ones learn
    their first features faster without it.
    """

    kind = "resnet"

    def __init__(self, block: type[nn.Module], stages: tuple[int, ...], width: int, stem: str):
        nn.Module.__init__(self)  # torchvision's own constructor fixes stem, width and four stages
        self._norm_layer = nn.BatchNorm2d
        self.inplanes, self.dilation, self.groups, self.base_width = width, 1, 1, 64
        kernel, stride, pool = STEMS[stem]
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Identity()
        self.stages = [f"layer{stage + 1}" for stage in range(len(stages))]
        for stage, (name, blocks) in enumerate(zip(self.stages, stages, strict=True)):
            setattr(
                self,
                name,
                self._make_layer(block, width * 2**stage, blocks, stride=1 if stage == 0 else 2),
            )
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

    def set_grad_checkpointing(self) -> None:
        """Keep the inputs of each residual block alone for backward, and compute the rest again."""
        self.grad_checkpointing = True

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> globally averaged features (B, num_features)."""
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
    """What turns a model of timm into an encoder: mixed into the model's own class by build_timm, so that keys stay timm's."""

    @property
    def projector(self) -> nn.Module:
        return self.get_submodule(self.pretrained_cfg["classifier"])

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> features as the model's classifier would get them (B, num_features)."""
        return self.forward_head(self.forward_features(x), pre_logits=True)

    def set_grad_checkpointing(self) -> None:
        """Recompute each block in backward, as timm does it. Raises UsageError where that would not be exact, or cannot be."""
        if has_batch_norm(self, besides=self.projector):
            raise UsageError(
                "--grad-checkpointing would let timm's batch norms count each batch twice: use --micro-batch"
            )
        try:
            super().set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise UsageError(
                "--grad-checkpointing is not known to this model of timm: use --micro-batch"
            ) from error

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(
            self.embed(x)
        )  # timm's own passes some classifiers (B, C, 1, 1), or wraps them in an MLP


def build_timm(
    name: str, img_size: int, settings: dict, hidden_dim: int, out_dim: int
) -> nn.Module:
    """timm's model `name`, random, its classifier replaced by the projector. Raises UsageError for what timm refuses.

    The heads are a ResNet's where the model has batch norms, else a ViT's. settings: further arguments of the model.
    Parameters that the features do not depend on (an MLP around the classifier) keep their names and are frozen, since DDP
    waits for the gradient of every other.
    """
    foreign = [key for key in settings if key.startswith(("pretrained", "checkpoint", "cache"))]
    if foreign:
        raise UsageError(
            f"timm's {', '.join(foreign)} would read other files or the network: --init-from is the way"
        )
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
        raise UsageError(
            f"timm has no model {name}" + (f"; close names are {', '.join(close)}" if close else "")
        )
    config = timm.get_pretrained_cfg(name)
    if not isinstance(config.classifier, str):
        raise UsageError(
            f"timm:{name} has no single classifier to stand its projector in, but {config.classifier}"
        )
    sized = {"img_size": img_size} if config.fixed_input_size else {}
    try:
        model = timm.create_model(name, pretrained=False, **{**sized, **settings}).eval()
        features = model.forward_head(
            model.forward_features(torch.zeros(1, 3, img_size, img_size)), pre_logits=True
        )
        if features.ndim != 2:
            raise ValueError(f"its features are not (B, width), but {tuple(features.shape)}")
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(features.sum(), trainable, allow_unused=True)
    except Exception as error:  # a wrong argument leads to anything
        told = f"timm:{name} cannot be built with --img-size {img_size} and {settings}: {first_line(error)}"
        raise UsageError(told) from error
    for parameter, gradient in zip(trainable, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    width = features.shape[
        1
    ]  # timm has no attribute that is the width of pooled features in every model
    model.train()
    model.kind, model.num_features = "resnet" if has_batch_norm(model) else "vit", width
    model.set_submodule(config.classifier, heads.projector(model.kind, width, hidden_dim, out_dim))
    model.__class__ = type(type(model).__name__, (TimmEncoder, type(model)), {})
    return model


def has_batch_norm(module: nn.Module, besides: nn.Module | None = None) -> bool:
    """Whether any layer of module, those of `besides` left aside, is a batch norm."""
    left_out = set() if besides is None else {*besides.modules()}
    return any(
        isinstance(layer, nn.modules.batchnorm._BatchNorm)
        for layer in {*module.modules()} - left_out
    )


def sincos_position_embedding(
    rows: int, columns: int, width: int, temperature: float = 10000.0
) -> Tensor:
    """Fixed 2-D position embedding (1, 1 + rows * columns, width); zeros for the class token.

    A quarter of the width each: sine and cosine of the column, sine and cosine of the row, over width/4 frequencies.
    """
    if width % 4:
        raise ValueError(
            f"a 2-D sin-cos position embedding needs a width divisible by 4, found {width}"
        )
    frequencies = temperature ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
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
) -> nn.Module:
    """The encoder `arch` with its projector (hidden_dim, out_dim).

    width: of a ResNet's first stage (None: the arch's own); small_stem: 3x3, stride 1, no pool, for images of about 32 px;
    patch_size and stop_grad_conv1 concern ViTs; timm_kwargs the models named timm:NAME. Raises UsageError for an unknown arch
    or an indivisible size.
    """
    if arch in VITS:
        if img_size % patch_size:
            raise UsageError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        encoder = VisionTransformer(img_size, patch_size, *VITS[arch], stop_grad_conv1)
        encoder.head = heads.projector("vit", encoder.num_features, hidden_dim, out_dim)
    elif arch in RESNETS:
        block, stages, default_width, stem = RESNETS[arch]
        encoder = ResNet(block, stages, width or default_width, "small" if small_stem else stem)
        encoder.fc = heads.projector("resnet", encoder.num_features, hidden_dim, out_dim)
    elif arch.startswith(TIMM):
        encoder = build_timm(arch.removeprefix(TIMM), img_size, timm_kwargs, hidden_dim, out_dim)
    else:
        raise UsageError(f"unknown arch {arch!r}; known are {', '.join(ARCHS)} and {TIMM}NAME")
    return encoder
