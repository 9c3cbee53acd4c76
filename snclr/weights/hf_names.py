"""The names of tensors in Hugging Face transformers' ViTModel and ResNetModel."""

import re

import torch
from torch import Tensor

VIT_NAMES = (
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
LAYERS = {"conv": "convolution", "bn": "normalization"}
# of models with a classifier on top
PREFIXES = ("", "vit.", "resnet.")


def hf_names(name: str) -> list[str]:
    """transformers' names of a tensor of timm's ViT or torchvision's ResNet: three for queries,
    keys and values in one matrix, which transformers has in this order; else one.
    """
    if stem := re.match(r"(conv|bn)1\.", name):
        return [f"embedder.embedder.{LAYERS[stem[1]]}.{name[stem.end() :]}"]
    if block := re.match(r"layer(\d)\.(\d+)", name):
        name = name.replace(".downsample.0.", ".shortcut.convolution.")
        name = name.replace(".downsample.1.", ".shortcut.normalization.")
        name = re.sub(
            r"\.(conv|bn)(\d)\.", lambda m: f".layer.{int(m[2]) - 1}.{LAYERS[m[1]]}.", name
        )
        return [f"encoder.stages.{int(block[1]) - 1}.layers.{block[2]}{name[block.end() :]}"]
    for own, theirs in VIT_NAMES:
        name = name.replace(own, theirs)
    parts = ("query", "key", "value") if ".attn.qkv." in name else ("",)
    return [name.replace(".attn.qkv.", f".attention.attention.{part}.") for part in parts]


def to_hf_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a ViT or a ResNet under transformers' names."""
    return {
        new_name: part
        for name, tensor in tensors.items()
        for new_name, part in zip(
            hf_names(name), tensor.chunk(3) if ".attn.qkv." in name else (tensor,), strict=True
        )
    }


def from_hf_names(tensors: dict[str, Tensor], own_names: list[str]) -> dict[str, Tensor]:
    """The tensors with those of own_names that transformers has under other names."""
    renamed, used = {}, set()
    for name in own_names:
        for prefix in PREFIXES:
            theirs = [prefix + part for part in hf_names(name)]
            if name not in tensors and all(part in tensors for part in theirs):
                parts = [tensors[part] for part in theirs]
                renamed[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
                used |= {*theirs}
    return {name: tensor for name, tensor in tensors.items() if name not in used} | renamed
