"""The folders of Hugging Face transformers' ViTModel and ResNetModel."""

import json

import torch
from torch import nn

from ..backbones import RESNETS, VITS, VisionTransformer
from ..running.errors import UsageError, needed_by
from .exported import Export
from .hf_names import to_hf_names


def to_hf(encoder: nn.Module, info: dict) -> Export:
    """The folder of Hugging Face transformers' ViTModel or ResNetModel, for its Auto classes.

    A ViT's pooler is the identity, so that pooler_output is the class token. Before 4.50
    transformers does not read its activation from the configuration, and applies tanh to it.
    """
    is_vit = isinstance(encoder, VisionTransformer) and not info["arch"].startswith("vit_conv")
    has_stem = info["arch"] in RESNETS and RESNETS[info["arch"]][3] == "imagenet"
    if not is_vit and (info["small_stem"] or not has_stem):
        raise UsageError(
            "--format hf is for ViTs with a plain patch embedding and ResNets with a 7x7 stem, not "
            f"for {info['arch']}" + (" with the small stem" if info["small_stem"] else "")
        )
    with needed_by("--format hf", "transformers"):
        from transformers import AutoModel, ResNetConfig, ViTConfig
    state = to_hf_names(encoder.state_dict())
    if is_vit:
        width, depth, _, _ = VITS[info["arch"]]
        state |= {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
        config = ViTConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=info["num_heads"],
            intermediate_size=4 * width,
            image_size=info["img_size"],
            patch_size=info["patch_size"],
            num_channels=info["channels"],
            layer_norm_eps=1e-6,
            pooler_act="linear",
            architectures=["ViTModel"],
        )
        features = "model(images).last_hidden_state[:, 0]"
        note = " (from transformers 4.50 on, pooler_output is the same)"
    else:
        block, depths, width, _ = RESNETS[info["arch"]]
        width = info["width"] or width
        config = ResNetConfig(
            num_channels=info["channels"],
            embedding_size=width,
            hidden_sizes=[width * 2**stage * block.expansion for stage in range(len(depths))],
            depths=list(depths),
            layer_type="basic" if block.expansion == 1 else "bottleneck",
            architectures=["ResNetModel"],
        )
        features, note = "model(images).pooler_output.flatten(1)", ""

    def read(path):
        model = AutoModel.from_pretrained(path).eval()
        if is_vit:
            return lambda x: model(x).last_hidden_state[:, 0]
        return lambda x: model(x).pooler_output.flatten(1)

    configs = {
        "config.json": json.loads(config.to_json_string(use_diff=False)),
        "preprocessor_config.json": {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": info["img_size"], "width": info["img_size"]},
            "resample": 2,  # bilinear, in PIL's numbers
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(info["mean"]),
            "image_std": list(info["std"]),
        },
    }
    return Export(
        state,
        "model = transformers.AutoModel.from_pretrained({!r})".format,
        read,
        configs,
        hint=lambda path: f"features: {features}{note}",
        features=features,
    )
