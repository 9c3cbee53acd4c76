"""Reads an encoder's named tensors from a file, in any of the known layouts, and chooses what no
tensor shows: its number of attention heads.
"""

import argparse
import json
import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..choices import NUM_HEADS
from ..running import tensor_files
from ..running.errors import UsageError, needed_by
from ..running.safe_files import json_object, read_text

# prefixes of the two encoders in the files of MoCo and its descendants
PREFIXES = {
    "online": ("module.base_encoder.", "base_encoder.", "module.encoder_q."),
    "momentum": ("module.momentum_encoder.", "momentum_encoder.", "module.encoder_k."),
}
# keys under which files hold a state dict; the first one that is present is read
WRAPPERS = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_ema",
    "state_dict_ema",
    "teacher",  # of DINO: its momentum encoder
    "student",
)
# key of the settings that snclr.export adds to the files of other libraries
SETTINGS_KEY = "snclr"
# names of torchvision's ResNets, by their place in a Sequential of the network's children
SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
# attention heads in timm, DeiT and DINO, if NUM_HEADS has another number
LIBRARY_NUM_HEADS = {"vit_small": 6}


class EncoderFile(NamedTuple):
    """An encoder as it is saved in a file.

    tensors      by the encoder's own names, with its head
    layout       a description of the layout
    is_library   whether the weights are for a library's model: they have its names, and the file
                 has no settings of this project
    others       names of all other tensors
    saved        everything else in the file: 'arch', 'args', 'epoch' ...
    """

    path: str
    tensors: dict[str, Tensor]
    layout: str
    is_library: bool
    others: list[str]
    saved: dict

    @property
    def settings(self) -> dict:
        """The settings with which this project made the weights; empty in files of others."""
        settings = self.saved.get("args")
        return settings if isinstance(settings, dict) else {}


def read_encoder(path: str, branch: str = "online") -> EncoderFile:
    """Read an encoder from a file of any known layout.

    Known layouts: this project's checkpoints and exports; files of MoCo v3, MoCo and the released
    SNCLR; state dicts of timm, torchvision, DeiT, DINO and DINOv2, also under a key of WRAPPERS, or
    in Lightning's checkpoints of solo-learn and lightly.
    Known formats: torch.save (weights_only) and safetensors. branch: 'online' or 'momentum', for
    files with both encoders. Raises UsageError for a file that is missing or damaged, or has no
    named tensors.
    """
    content, settings = _read(path)
    saved, others, wrapper = {}, [], None
    while isinstance(content, dict) and (
        present := [key for key in WRAPPERS if isinstance(content.get(key), dict)]
    ):
        wrapper = present[0]
        saved |= {key: value for key, value in content.items() if key not in present}
        others += [f"{key}.{name}" for key in present[1:] for name in content[key]]
        content = content[wrapper]
    # torch keeps the metadata of a state dict with it
    attached = getattr(content, "_metadata", None)
    attached = attached.get(SETTINGS_KEY) if isinstance(attached, dict) else None
    for export_settings in (settings, saved.get(SETTINGS_KEY), attached):
        if isinstance(export_settings, dict):
            saved |= {**export_settings, "args": export_settings}
    tensors = tensor_files.plain_tensors(content)
    if not tensors:
        raise UsageError(f"{path} holds no named tensors: a checkpoint or a state dict is expected")
    for prefix in PREFIXES[branch]:
        encoder, rest = _select(tensors, prefix)
        if encoder:
            layout = f"the {branch} encoder of {prefix}*"
            return EncoderFile(path, encoder, layout, False, others + rest, saved)
    has_other = any(name.startswith(PREFIXES["online"] + PREFIXES["momentum"]) for name in tensors)
    is_own = isinstance(saved.get("args"), dict) and saved.get("encoder") in (*PREFIXES,)
    if wrapper == "teacher":
        saved["encoder"] = "momentum"
    # a file with only a backbone names its encoder in its settings
    if has_other or (branch == "momentum" and saved.get("encoder") != "momentum"):
        raise UsageError(f"{path} holds no {branch} encoder: choose the other one")
    layout = f"a plain state dict, {wrapper!r}" if wrapper else "a plain state dict"
    for wrapper_prefix in ("module.", "_orig_mod."):  # of DDP and of torch.compile
        if all(name.startswith(wrapper_prefix) for name in tensors):
            tensors, _ = _select(tensors, wrapper_prefix)
    # solo-learn until 1.0.2 has encoder.*, but encoder.layer.* is of a transformers' ViT
    is_encoder = {"encoder.conv1.weight", "encoder.patch_embed.proj.weight"} & tensors.keys()
    prefix = "encoder." if is_encoder else "backbone."
    if any(name.startswith(prefix) for name in tensors):
        tensors, rest = _select(tensors, prefix)
        layout, others = f"{layout}, {prefix}*", others + rest
    if "4.0.conv1.weight" in tensors:  # a ResNet as a Sequential, as in lightly's examples
        parts = [(name, *name.partition(".")) for name in tensors]
        tensors = {SEQUENTIAL.get(a, a) + dot + b: tensors[name] for name, a, dot, b in parts}
    saved = {"args": _library_settings(path), **saved}
    return EncoderFile(path, tensors, layout, not is_own, others, saved)


def _library_settings(path):
    """What the config.json of transformers or timm says, which is beside their files of weights."""
    folder, name = os.path.split(path)
    config_path = os.path.join(folder, "config.json")
    if name not in ("model.safetensors", "pytorch_model.bin") or not os.path.isfile(config_path):
        return {}
    config = json_object(read_text(config_path))
    arguments = config.get("model_args")
    num_heads = arguments.get("num_heads") if isinstance(arguments, dict) else None
    return {"num_heads": config.get("num_attention_heads", num_heads)}


def _select(tensors, prefix):
    """The tensors whose names start with prefix, under names without it, and the other names."""
    chosen = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    return chosen, [name for name in tensors if not name.startswith(prefix)]


def _read(path):
    """The content of a file, and the settings in its metadata (safetensors only)."""
    if not path.endswith(".safetensors"):
        # training checkpoints of DINO, DeiT and MAE hold a Namespace: attributes, no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            return tensor_files.read(path), None
    if not os.path.isfile(path):
        raise UsageError(f"{path} does not exist")
    with needed_by(path, "safetensors"):
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), json.loads(metadata.get(SETTINGS_KEY, "null"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a complete safetensors file: {error}") from error


def choose_num_heads(
    file: EncoderFile, arch: str, num_heads: int | None
) -> tuple[int | None, list[str]]:
    """The number of attention heads for the weights of a file, and a line with the reason.

    No tensor shows this number. In this order it is: num_heads, if the caller chose one; that of
    the file's settings; for weights with a library's names that of the library's model; that of
    this project, the same as MoCo v3's. If arch has no such setting: num_heads and no line.
    """
    if arch not in NUM_HEADS:
        return num_heads, []
    if num_heads is not None:
        reason = "as --num-heads asks for"
    elif file.settings.get("num_heads") is not None:
        num_heads = file.settings["num_heads"]
        reason = f"as {file.path} has" if file.is_library else "as the file says"
    else:
        num_heads, source = NUM_HEADS[arch], "MoCo v3 and this project"
        if file.is_library:
            num_heads, source = LIBRARY_NUM_HEADS.get(arch, num_heads), "timm, DeiT and DINO"
        reason = f"as {arch} has in {source}; the file does not say it, --num-heads changes it"
    return num_heads, [f"{num_heads} attention heads, {reason}"]
