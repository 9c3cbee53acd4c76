"""Writes an Export to a file or a folder, with the settings of the model in the metadata."""

import json
import os
import shutil
from collections import OrderedDict

import torch
from torch import Tensor, nn

from .. import __version__
from ..running import tensor_files
from ..running.errors import RunError, UsageError
from ..running.safe_files import new_file, writing
from .layouts import SETTINGS_KEY
from .libraries import Export

# an export is refused above this relative difference of features; float32 rounding stays far below
TOLERANCE = 1e-5
SAFETENSORS = ".safetensors"
# names that end otherwise are folders, in formats that have both
FILE_SUFFIXES = (SAFETENSORS, ".pth", ".pt", ".bin", ".tar", ".ckpt")


def settings_for_metadata(info: dict, build: str) -> dict:
    """Plain values for the metadata of a file, from which layouts.read_encoder reads them."""
    names = ("arch", "num_heads", "img_size", "patch_size", "width", "small_stem", "timm_kwargs")
    names += ("mean", "std", "grey_range", "encoder", "epoch")
    return {"build": build, **{name: info[name] for name in names}, "version": __version__}


def write(export: Export, settings: dict, out: str) -> None:
    """Write a folder if the export has configuration files, else one file: its suffix decides."""
    if export.configs:
        os.makedirs(out, exist_ok=True)
        for name, config in export.configs.items():
            _write_bytes(os.path.join(out, name), json.dumps(config, indent=2).encode() + b"\n")
        out = os.path.join(out, "model.safetensors")
    is_state_dict = all(isinstance(value, Tensor) for value in export.content.values())
    if out.endswith(SAFETENSORS):
        if not is_state_dict:
            raise UsageError("a safetensors file holds only a state dict: choose another --out")
        _write_bytes(out, _safetensors(export.content, settings))
    elif is_state_dict:
        # torch stores such metadata with a state dict, and load_state_dict ignores unknown entries
        state = OrderedDict(export.content)
        state._metadata = OrderedDict({SETTINGS_KEY: settings})
        tensor_files.save(out, state)
    else:
        tensor_files.save(out, {**export.content, SETTINGS_KEY: settings})


@torch.no_grad()
def write_checked(
    export: Export, settings: dict, out: str, encoder: nn.Module, img_size: int
) -> float:
    """Write `out`, but only if the library's model computes the encoder's features from it.

    Both encode one random image. Returns the largest difference of features, divided by the largest
    feature. Raises RunError above TOLERANCE.
    """
    folder, name = os.path.split(os.path.abspath(out))
    unchecked = os.path.join(folder, f"unchecked_{name}")
    try:
        write(export, settings, unchecked)
        x = torch.randn(1, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))
        expected = encoder.embed(x)
        features = export.read(unchecked)(x)
        difference = ((features - expected).abs().max() / expected.abs().max()).item()
        if not difference <= TOLERANCE:
            raise RunError(
                f"the exported weights give other features (relative difference {difference:.1e}): "
                f"{out} is not written"
            )
        os.replace(unchecked, out)
    finally:
        if os.path.isdir(unchecked):
            shutil.rmtree(unchecked)
        elif os.path.exists(unchecked):
            os.remove(unchecked)
    return difference


def _safetensors(state, settings):
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    metadata = {"format": "pt", "build": settings["build"]}
    return save(tensors, {**metadata, SETTINGS_KEY: json.dumps(settings, default=str)})


def _write_bytes(path, content):
    with writing(path), new_file(path) as file:
        file.write(content)
