"""Weights from files of any known layout into the backbones of this project, with a plain account of what was loaded."""

import math
import os

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from . import checkpoint
from .backbones import VisionTransformer, sincos_position_embedding
from .checkpoint import first_few
from .errors import UsageError

# where the layouts of MoCo and its descendants keep the two encoders
PREFIXES = {
    "online": ("module.base_encoder.", "base_encoder.", "module.encoder_q."),
    "momentum": ("module.momentum_encoder.", "momentum_encoder.", "module.encoder_k."),
}
# keys under which state dicts are wrapped; the first that is there is taken
WRAPPERS = ("state_dict", "model", "model_state_dict", "model_ema", "state_dict_ema")


def read_encoder(path: str, which: str = "online") -> tuple[dict[str, Tensor], str, list[str]]:
    """An encoder's tensors by the encoder's own names (with its head), the layout that was recognised, and what else there is.

    Reads this project's checkpoints, MoCo v3's and the released SNCLR's files, MoCo's, and plain state dicts of timm and
    torchvision, also wrapped, from torch's files (weights_only) or safetensors. which: 'online' or 'momentum', where the
    file has both. Raises UsageError for a file that is missing, damaged or holds no tensors by name.
    """
    found, layout, others = _read(path), "a plain state dict", []
    while isinstance(found, dict) and (wrappers := [key for key in WRAPPERS if isinstance(found.get(key), dict)]):
        others += [f"{key}.{name}" for key in wrappers[1:] for name in found[key]]
        found, layout = found[wrappers[0]], f"a plain state dict, {wrappers[0]!r}"
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)} if isinstance(found, dict) else {}
    if not tensors:
        raise UsageError(f"{path} holds no tensors by name: a checkpoint or a state dict is expected")
    for prefix in PREFIXES[which]:
        if any(name.startswith(prefix) for name in tensors):
            encoder = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            others += [name for name in tensors if not name.startswith(prefix)]
            return encoder, f"the {which} encoder of {prefix}*", others
    if any(name.startswith(prefix) for prefixes in PREFIXES.values() for name in tensors for prefix in prefixes):
        raise UsageError(f"{path} holds no {which} encoder: choose the other one")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors, layout, others


def load_backbone(encoder: nn.Module, path: str, which: str = "online") -> list[str]:
    """Load all but the projector of `encoder` from a file; returns lines that say what was loaded, adapted and left out.

    A position embedding for another number of patches is recomputed where it is this project's sin-cos, else interpolated.
    Raises UsageError where anything else that the backbone needs is missing or of another shape.
    """
    tensors, layout, others = read_encoder(path, which)
    head = next(name for name, module in encoder.named_modules() if module is encoder.projector) + "."
    own = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith(head)}
    adapted = _adapt_position_embedding(encoder, tensors, own)
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    differing = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    problems = [f"{len(missing)} of {len(own)} tensors are missing: {first_few(missing)}"] if missing else []
    problems += [f"{len(differing)} have another shape: {first_few(differing)}"] if differing else []
    if problems:
        raise UsageError(f"{path} ({layout}) does not fit the backbone: {'; '.join(problems)}; is --arch the right one?")
    loaded = {name: tensors[name] for name in own if name in tensors}
    encoder.load_state_dict(loaded, strict=False)
    left_out = [name for name in tensors if name not in own]
    heads = [name for name in left_out if name.startswith(head)]
    rest = [name for name in left_out if not name.startswith(head)] + others
    told = [f"{len(loaded)} of {len(own)} backbone tensors from {path}: {layout}"] + adapted
    if len(loaded) < len(own):
        told.append("counters of batch norms are not in the file and start at 0")
    told += [f"left out: {len(heads)} tensors of its head ({head}*)"] if heads else []
    told += [f"left out: {len(rest)} others: {first_few(rest)}"] if rest else []
    return told


def _adapt_position_embedding(encoder, tensors, own):
    name = "pos_embed"
    if name not in own or (name in tensors and tensors[name].shape == own[name].shape):
        return []
    found, fixed = tensors.get(name), isinstance(encoder, VisionTransformer)  # fixed: this encoder has computed its own
    if found is not None:
        if found.ndim != 3 or found.shape[2] != own[name].shape[2]:
            return []  # the check of names and shapes says it
        prefixes = 0 if getattr(encoder, "no_embed_class", False) else encoder.num_prefix_tokens
        old = found.shape[1]
        side = math.isqrt(max(old - prefixes, 0))
        if not side or side**2 + prefixes != old:
            return []
        # a learned one is what the weights know, and so are MoCo v3's sin-cos, whose rows and columns are swapped
        if not fixed or not torch.allclose(found.float(), sincos_position_embedding(side, side, found.shape[2]), atol=1e-3):
            tensors[name] = resample_abs_pos_embed(found, encoder.patch_embed.grid_size, num_prefix_tokens=prefixes)
            return [f"{name}: interpolated from {old} to {own[name].shape[1]} positions"]
    elif not fixed:
        return []
    tensors[name] = own[name]
    return [f"{name}: sin-cos, computed for this image size"]


def _read(path):
    if not path.endswith(".safetensors"):
        return checkpoint.read(path)
    if not os.path.isfile(path):
        raise UsageError(f"{path} does not exist")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UsageError(f"{path} needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is no whole safetensors file: {error}") from error
