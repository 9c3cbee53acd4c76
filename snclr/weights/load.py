"""Loads an encoder's named tensors into a backbone, and reports what was loaded."""

import math
from argparse import Namespace

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from ..backbones import (
    ARCHS,
    TIMM,
    TimmEncoder,
    VisionTransformer,
    backbone_tensors,
    build_encoder,
    projector_name,
    sincos_position_embedding,
)
from ..choices import IMAGENET
from ..options import OF_ENCODER
from ..running.errors import UsageError, first_few, first_line
from ..running.tensor_files import not_finite
from .fit import check_fit, missing, unknown
from .hf_names import from_hf_names
from .layouts import EncoderFile, choose_num_heads, read_encoder

# largest relative difference of features between two models with the same weights
TOLERANCE = 1e-3
# settings of an encoder, if neither the caller nor the file has them
DEFAULTS = OF_ENCODER | dict(arch=None, img_size=224, channels=3, mean=IMAGENET[0], std=IMAGENET[1])


@torch.inference_mode(False)  # also within torch.no_grad(): timm's models are built by a gradient
def open_encoder(path: str, branch: str = "online", **settings) -> tuple[nn.Module, dict]:
    """The backbone in a file, in eval mode on the CPU, and its info.

    The backbone maps images (B, C, S, S) to features (B, F).

    branch     'online' or 'momentum', for files with both encoders; 'untrained': the same
               architecture with random weights
    settings   by the names of DEFAULTS, for files that lack them (None: as in the file). img_size,
               num_heads, mean, std and grey_range replace those of the file; channels must be the
               same
    info       these settings, 'num_features', 'encoder', 'epoch', 'step', 'settings' (all those
               with which this project made the weights) and 'notes': lines that say what was loaded
               and assumed

    Raises UsageError if the file and the settings do not fit.
    """
    return _open(
        read_encoder(path, "online" if branch == "untrained" else branch), branch, settings
    )


def _open(file, branch, settings):
    is_trained, path = branch != "untrained", file.path
    info = _merge(file, {name: value for name, value in settings.items() if value is not None})
    info["num_heads"], notes = choose_num_heads(file, info["arch"], settings.get("num_heads"))
    encoder = _build(path, info)
    if is_trained:
        notes = load_backbone(encoder, file) + notes
    else:
        notes = [f"the architecture of {path} with random weights", *notes]
    if not len(info["mean"]) == len(info["std"]) == info["channels"]:
        raise UsageError(f"{path}: --mean and --std need {info['channels']} numbers each")
    if settings.get("mean") is None and file.settings.get("mean") is None:
        notes.append(
            "ImageNet's mean and std of images; the file does not say them, --mean and --std change"
            " them"
        )
    encoder.set_submodule(projector_name(encoder), nn.Identity())
    if is_trained and file.saved.get("encoder") == "momentum":  # a file with only a backbone
        branch = "momentum"
    epoch = file.saved.get("epoch")
    info |= {
        "num_features": encoder.num_features,
        "encoder": branch,
        "epoch": epoch if is_trained and isinstance(epoch, int) else None,
        "step": file.saved.get("step") if is_trained else None,
        "settings": file.settings,
        "notes": notes,
    }
    return encoder.eval(), info


def open_by_flags(args: Namespace, path: str, branch: str) -> tuple[nn.Module, dict]:
    """open_encoder by a command's flags; then `args` has the encoder's size and normalisation."""
    settings = {name: getattr(args, name) for name in DEFAULTS}
    encoder, info = open_encoder(path, branch, **settings)
    for name in ("img_size", "channels", "mean", "std", "grey_range"):
        setattr(args, name, info[name])
    return encoder, info


@torch.no_grad()
def check_start(
    file: EncoderFile, encoder: nn.Module, arch: str, img_size: int, num_heads: int | None
) -> None:
    """Raise UsageError if an encoder with the weights of a file computes other features than the
    architecture that the file names: other settings can fit its tensors.

    arch, img_size, num_heads: of the encoder. The file's number of heads may have been replaced.
    """
    if (own_arch := _known_arch(file)) is None:
        return
    settings = {"img_size": img_size, "num_heads": num_heads if arch == own_arch else None}
    with torch.random.fork_rng(devices=[]):
        own, info = _open(file, "online", settings)
        images = torch.randn(2, info["channels"], img_size, img_size)
    expected, actual = own.embed(images), encoder.eval().embed(images)
    encoder.train()
    if not (actual - expected).abs().max() <= TOLERANCE * expected.abs().max():
        raise UsageError(
            f"--init-from {file.path} holds {own_arch}, whose features are others than those of "
            f"{arch} here: give the settings of the file, such as --arch and --small-stem"
        )


def _merge(file, chosen):
    """Settings: the caller's (chosen), else those of the file, else DEFAULTS."""
    saved = {name: x for name, x in file.settings.items() if name in DEFAULTS and x is not None}
    info = DEFAULTS | saved
    info["arch"] = arch = _known_arch(file)
    if arch is None and "arch" not in chosen:
        raise UsageError(f"{file.path} does not say its architecture: give --arch")
    if arch not in (None, chosen.get("arch", arch)):
        raise UsageError(f"{file.path} holds {arch}, not --arch {chosen['arch']}: leave --arch out")
    return info | chosen


def _known_arch(file):
    """The architecture that a file names; None if it names none, or has another library's name."""
    arch = file.settings.get("arch", file.saved.get("arch"))
    is_known = isinstance(arch, str) and (arch in ARCHS or arch.startswith(TIMM))
    return arch if is_known else None


def _build(path, info):
    """The encoder that info describes, with a projector of width 1.

    The file may contain any settings, so every error becomes a UsageError.
    """
    try:
        info["mean"], info["std"] = ([float(x) for x in info[name]] for name in ("mean", "std"))
        if info["grey_range"] is not None:
            low, high = map(float, info["grey_range"])
            if not low < high:
                raise ValueError(f"grey_range {low:g} {high:g}")
            info["grey_range"] = [low, high]
        return build_encoder(
            info["arch"],
            img_size=info["img_size"],
            patch_size=info["patch_size"],
            width=info["width"],
            small_stem=info["small_stem"],
            stop_grad_conv1=False,
            timm_kwargs=dict(info["timm_kwargs"] or []),
            hidden_dim=1,
            out_dim=1,
            num_heads=info["num_heads"],
            channels=info["channels"],
        )
    except (TypeError, ValueError, AttributeError, RuntimeError, MemoryError) as error:
        raise UsageError(f"no encoder can be built for {path}: {first_line(error)}") from error


def load_backbone(encoder: nn.Module, file: EncoderFile) -> list[str]:
    """Load everything but the projector of `encoder` from a file.

    Returns lines that say what was loaded and what was ignored. A position embedding for another
    number of patches is interpolated, or computed again if it is this project's sin-cos embedding.
    timm's own function converts the weights of a timm: model if they have its authors' names.
    Raises UsageError if a tensor of the backbone is missing or has another shape, or if the file
    has weights inside the backbone's modules that the backbone lacks.
    """
    head = projector_name(encoder) + "."
    own = backbone_tensors(encoder)
    tensors, notes = _convert_names(encoder, dict(file.tensors), own, head)
    notes += _adapt_position_embedding(encoder, tensors, own)
    check_fit(file, tensors, own, head)
    loaded = {name: tensors[name] for name in own if name in tensors}
    if names := not_finite(loaded):
        raise UsageError(
            f"{file.path}: {len(names)} of {len(loaded)} tensors are not finite:"
            f" {first_few(names)}; take an earlier file"
        )
    encoder.load_state_dict(loaded, strict=False)
    ignored = [name for name in tensors if name not in own]
    heads = [name for name in ignored if name.startswith(head)]
    others = [name for name in ignored if name not in heads] + file.others
    notes = [
        f"{len(loaded)} of {len(own)} backbone tensors from {file.path}: {file.layout}",
        *notes,
    ]
    num_heads = {getattr(module, "num_heads", None) for module in encoder.modules()} - {None}
    if isinstance(encoder, TimmEncoder) and num_heads and not _known_arch(file):
        number = " or ".join(map(str, sorted(num_heads)))
        notes.append(f"{number} attention heads, as this model has in timm; no tensor shows it")
    if len(loaded) < len(own):
        notes.append("counters of batch norms are not in the file and start at 0")
    if heads:
        notes.append(f"ignored: {len(heads)} tensors of its head ({head}*)")
    if others:
        notes.append(f"ignored: {len(others)} other tensors: {first_few(others)}")
    return notes


def _convert_names(encoder, tensors, own, head):
    """The tensors under timm's names, if the weights of a timm: model have other names, and lines
    about it.
    """
    if not missing(tensors, own) and not unknown(tensors, own, head):
        return tensors, []
    renamed = from_hf_names(tensors, list(own))
    if renamed.keys() != tensors.keys():
        return renamed, ["names of transformers, converted"]
    if not isinstance(encoder, TimmEncoder):
        return tensors, []
    converted, notes = encoder.from_authors_names(tensors), []
    if converted.keys() != tensors.keys():
        notes.append("names of the model's authors, converted by timm's checkpoint_filter_fn")
    sizes = [[*named["pos_embed"].shape] for named in (tensors, converted) if "pos_embed" in named]
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        notes.append(f"pos_embed: interpolated from {sizes[0]} to {sizes[1]}")
    return converted, notes


def _adapt_position_embedding(encoder, tensors, own):
    """Adapt the position embedding in tensors to the number of patches; a line that says how."""
    name, saved = "pos_embed", tensors.get("pos_embed")
    if name not in own or saved is None or saved.shape == own[name].shape:
        return []
    if not hasattr(encoder, "num_prefix_tokens"):
        return []  # no ViT, as timm's PiT and Hiera; check_fit reports it
    only_patches = getattr(encoder, "no_embed_class", False)
    num_prefix_tokens = 0 if only_patches else encoder.num_prefix_tokens
    num_patches = saved.shape[1] - num_prefix_tokens if saved.ndim == 3 else 0
    side = math.isqrt(max(num_patches, 0))
    if not side or side**2 != num_patches or saved.shape[2] != own[name].shape[2]:
        return []  # check_fit reports it
    # Weights depend on the embedding that they were trained with. A learned one is interpolated,
    # and so is MoCo v3's sin-cos embedding, which exchanges rows and columns.
    if isinstance(encoder, VisionTransformer) and torch.allclose(
        saved.float(), sincos_position_embedding(side, side, saved.shape[2]), atol=1e-3
    ):
        tensors[name] = own[name]
        return [f"{name}: sin-cos, computed for this image size"]
    tensors[name] = resample_abs_pos_embed(
        saved, encoder.patch_embed.grid_size, num_prefix_tokens=num_prefix_tokens
    )
    return [f"{name}: interpolated from {saved.shape[1]} to {own[name].shape[1]} positions"]
