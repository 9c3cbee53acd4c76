"""The names of tensors in Hugging Face transformers' ViTModel and ResNetModel."""

import torch
from torch import Tensor

# Parts of names of torchvision's ResNet and timm's ViT, and transformers' for them. They are
# replaced in this order: the stem's conv1 and bn1 after those of the blocks.
NAMES = (
    *((f"layer{n + 1}.", f"encoder.stages.{n}.layers.") for n in range(4)),
    *((f".conv{n + 1}.", f".layer.{n}.convolution.") for n in range(3)),
    *((f".bn{n + 1}.", f".layer.{n}.normalization.") for n in range(3)),
    (".downsample.0.", ".shortcut.convolution."),
    (".downsample.1.", ".shortcut.normalization."),
    ("conv1.", "embedder.embedder.convolution."),
    ("bn1.", "embedder.embedder.normalization."),
    ("norm.", "layernorm."),  # only the last norm: the blocks have norm1 and norm2
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.", "encoder.layer."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)
QKV = ".attn.qkv."
PREFIXES = ("", "vit.", "resnet.")  # the last two: of models with a classifier on top


def hf_names(name: str) -> list[str]:
    """transformers' names of a tensor of timm's ViT or torchvision's ResNet: one, or three for the
    matrix that holds queries, keys and values, in this order.
    """
    for own, theirs in NAMES:
        name = name.replace(own, theirs)
    parts = ("query", "key", "value") if QKV in name else ("",)
    return [name.replace(QKV, f".attention.attention.{part}.") for part in parts]


def to_hf_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a ViT or a ResNet under transformers' names."""
    return {
        new_name: part
        for name, tensor in tensors.items()
        for new_name, part in zip(
            hf_names(name), tensor.chunk(3) if QKV in name else (tensor,), strict=True
        )
    }


def from_hf_names(tensors: dict[str, Tensor], own_names: list[str]) -> dict[str, Tensor]:
    """The tensors, in which those of own_names that transformers names otherwise are renamed."""
    tensors = dict(tensors)
    for name in own_names:
        for prefix in PREFIXES:
            theirs = [prefix + part for part in hf_names(name)]
            if name not in tensors and all(part in tensors for part in theirs):
                parts = [tensors.pop(part) for part in theirs]
                tensors[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return tensors
