"""Weights from files of any known layout into the backbones of this project, with a plain account of what was loaded."""

import math
import os
from typing import NamedTuple

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from ..backbones import ARCHS, TIMM, VisionTransformer, build_encoder, sincos_position_embedding
from ..options import IMAGENET
from ..running import tensor_files
from ..running.errors import UsageError, first_few, first_line

# where the layouts of MoCo and its descendants keep the two encoders
PREFIXES = {
    "online": ("module.base_encoder.", "base_encoder.", "module.encoder_q."),
    "momentum": ("module.momentum_encoder.", "momentum_encoder.", "module.encoder_k."),
}
# keys under which state dicts are wrapped; the first that is there is taken
WRAPPERS = ("state_dict", "model", "model_state_dict", "model_ema", "state_dict_ema")


class EncoderFile(NamedTuple):
    """What a file says of an encoder: tensors by the encoder's own names (with its head); the layout that was recognised; names
    of the other tensors; saved, everything else in the file ('arch', 'args', 'epoch' ...)."""

    path: str
    tensors: dict[str, Tensor]
    layout: str
    others: list[str]
    saved: dict


def read_encoder(path: str, which: str = "online") -> EncoderFile:
    """Read an encoder from a file of any known layout.

    Reads this project's checkpoints, MoCo v3's and the released SNCLR's files, MoCo's, and plain state dicts of timm and
    torchvision, also wrapped, from torch's files (weights_only) or safetensors. which: 'online' or 'momentum', where the
    file has both. Raises UsageError for a file that is missing, damaged or holds no tensors by name.
    """
    found, saved, layout, others = _read(path), {}, "a plain state dict", []
    while isinstance(found, dict) and (
        wrappers := [key for key in WRAPPERS if isinstance(found.get(key), dict)]
    ):
        saved |= {key: value for key, value in found.items() if key not in wrappers}
        others += [f"{key}.{name}" for key in wrappers[1:] for name in found[key]]
        found, layout = found[wrappers[0]], f"a plain state dict, {wrappers[0]!r}"
    tensors = tensor_files.plain_tensors(found)
    if not tensors:
        raise UsageError(
            f"{path} holds no tensors by name: a checkpoint or a state dict is expected"
        )
    for prefix in PREFIXES[which]:
        if any(name.startswith(prefix) for name in tensors):
            encoder = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            others += [name for name in tensors if not name.startswith(prefix)]
            return EncoderFile(path, encoder, f"the {which} encoder of {prefix}*", others, saved)
    has_other = any(
        name.startswith(prefix)
        for prefixes in PREFIXES.values()
        for name in tensors
        for prefix in prefixes
    )
    if has_other or (
        which == "momentum" and saved.get("encoder") != which
    ):  # a backbone alone says which one it is
        raise UsageError(f"{path} holds no {which} encoder: choose the other one")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return EncoderFile(path, tensors, layout, others, saved)


def open_encoder(path: str, which: str = "online", **settings) -> tuple[nn.Module, dict]:
    """The backbone in a file, in eval mode on the CPU: a module from images (B, 3, S, S) to features (B, C), and its info.

    which: 'online' or 'momentum', where the file has both; 'untrained': the same architecture as it starts. settings: arch,
    img_size, patch_size, width, small_stem, timm_kwargs, for files that do not say them (None: as the file says; only img_size
    may differ from it). info: these settings, 'num_features', 'encoder', 'epoch', 'mean', 'std' and 'grey_range' of the images it
    was trained on, and 'notes', what was loaded. Raises UsageError where the file does not fit.
    """
    learned = which != "untrained"
    file = read_encoder(path, which if learned else "online")
    known = dict(
        patch_size=16,
        width=None,
        small_stem=False,
        timm_kwargs=None,
        img_size=224,
        mean=IMAGENET[0],
        std=IMAGENET[1],
        grey_range=None,
    )
    epoch = file.saved.get("epoch")
    known |= {
        "arch": file.saved.get("arch"),
        "epoch": epoch if learned and isinstance(epoch, int) else None,
    }
    if known["arch"] not in ARCHS and not str(known["arch"]).startswith(TIMM):
        known["arch"] = None  # another library's name
    says = file.saved.get("args") if isinstance(file.saved.get("args"), dict) else {}
    known |= {name: says[name] for name in known if says.get(name) is not None}
    given = {name: value for name, value in settings.items() if value is not None}
    if known["arch"] is None and "arch" not in given:
        raise UsageError(f"{path} does not say its architecture: give --arch")
    if "arch" in given and known["arch"] not in (None, given["arch"]):
        raise UsageError(
            f"{path} holds {known['arch']}, not --arch {given['arch']}: leave --arch out"
        )
    known |= given
    shape = {name: known[name] for name in ("img_size", "patch_size", "width", "small_stem")}
    try:
        known["mean"], known["std"] = ([float(x) for x in known[name]] for name in ("mean", "std"))
        if known["grey_range"] is not None:
            low, high = map(float, known["grey_range"])
            if not low < high:
                raise ValueError(f"grey_range {low:g} {high:g}")
            known["grey_range"] = [low, high]
        shape["timm_kwargs"] = dict(known["timm_kwargs"] or [])
        encoder = build_encoder(
            known["arch"], **shape, stop_grad_conv1=False, hidden_dim=1, out_dim=1
        )
    except (
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        MemoryError,
    ) as error:  # a file may say anything
        told = (
            error
            if isinstance(error, UsageError)
            else f"{path} says what no encoder can be built from: {first_line(error)}"
        )
        raise UsageError(told) from error
    notes = (
        load_backbone(encoder, file)
        if learned
        else [f"the architecture of {path} at its random start"]
    )
    head = next(name for name, module in encoder.named_modules() if module is encoder.projector)
    encoder.set_submodule(head, nn.Identity())
    if learned and file.saved.get("encoder") == "momentum":  # a file of a backbone alone says it
        which = "momentum"
    return encoder.eval(), {
        **known,
        "num_features": encoder.num_features,
        "encoder": which,
        "notes": notes,
    }


def load_backbone(encoder: nn.Module, file: EncoderFile) -> list[str]:
    """Load all but the projector of `encoder` from a file; returns lines that say what was loaded, adapted and left out.

    A position embedding for another number of patches is recomputed where it is this project's sin-cos, else interpolated.
    Raises UsageError where anything else that the backbone needs is missing or of another shape.
    """
    path, tensors, layout, others, _ = file
    head = (
        next(name for name, module in encoder.named_modules() if module is encoder.projector) + "."
    )
    own = {
        name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith(head)
    }
    adapted = _adapt_position_embedding(encoder, tensors, own)
    missing = [
        name for name in own if name not in tensors and not name.endswith("num_batches_tracked")
    ]
    differing = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    problems = (
        [f"{len(missing)} of {len(own)} tensors are missing: {first_few(missing)}"]
        if missing
        else []
    )
    problems += (
        [f"{len(differing)} have another shape: {first_few(differing)}"] if differing else []
    )
    if problems:
        raise UsageError(
            f"{path} ({layout}) does not fit the backbone: {'; '.join(problems)}; is --arch the right one?"
        )
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
    found, fixed = (
        tensors.get(name),
        isinstance(encoder, VisionTransformer),
    )  # fixed: this encoder has computed its own
    if found is not None:
        if found.ndim != 3 or found.shape[2] != own[name].shape[2]:
            return []  # the check of names and shapes says it
        prefixes = 0 if getattr(encoder, "no_embed_class", False) else encoder.num_prefix_tokens
        old = found.shape[1]
        side = math.isqrt(max(old - prefixes, 0))
        if not side or side**2 + prefixes != old:
            return []
        # a learned one is what the weights know, and so are MoCo v3's sin-cos, whose rows and columns are swapped
        if not fixed or not torch.allclose(
            found.float(), sincos_position_embedding(side, side, found.shape[2]), atol=1e-3
        ):
            tensors[name] = resample_abs_pos_embed(
                found, encoder.patch_embed.grid_size, num_prefix_tokens=prefixes
            )
            return [f"{name}: interpolated from {old} to {own[name].shape[1]} positions"]
    elif not fixed:
        return []
    tensors[name] = own[name]
    return [f"{name}: sin-cos, computed for this image size"]


def _read(path):
    if not path.endswith(".safetensors"):
        return tensor_files.read(path)
    if not os.path.isfile(path):
        raise UsageError(f"{path} does not exist")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UsageError(
            f"{path} needs the package safetensors: pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is no whole safetensors file: {error}") from error
