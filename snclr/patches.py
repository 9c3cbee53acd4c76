"""Patch embeddings of ViTs: from an image to a grid of tokens."""

from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn.functional import linear

from .running.devices import on_host


class PatchProjection(nn.Conv2d):
    """The convolution of a plain patch embedding. Its stride is its kernel, so on a GPU it is one
    product over all patches, which is several times faster than a convolution of 3 channels.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, D, S / patch, S / patch)."""
        if on_host(x):
            return super().forward(x)
        height, width = self.kernel_size
        x = x.unflatten(3, (-1, width)).unflatten(2, (-1, height))
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, rows, columns, C * height * width)
        return linear(x, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Patches(PatchEmbed):
    """timm's plain patch embedding, with the projection above."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.proj.__class__ = PatchProjection


class ConvStem(PatchEmbed):
    """Patch embedding of four 3x3 convolutions with stride 2 and one 1x1 convolution.

    Source: Xiao et al. 2021. Layers are numbered as in MoCo v3.
    """

    def __init__(self, *args, embed_dim: int, **kwargs):
        super().__init__(*args, embed_dim=embed_dim, **kwargs)
        layers, channels = [], self.proj.in_channels
        for width in (embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim):
            layers += [
                nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(True),
            ]
            channels = width
        self.proj = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))
