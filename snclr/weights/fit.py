"""Whether the named tensors of a file fit a backbone."""

import re

from torch import Tensor

from ..running.errors import UsageError, first_few
from .layouts import EncoderFile

# single parameters besides cls_token that a ViT's features depend on, in the names of DINOv2, timm
# and DeiT
TOKENS = ("register_tokens", "reg_token", "dist_token")
# buffers that older versions of timm saved and that follow from the shapes
COMPUTED = ("attn_mask", "relative_coords_table")


def missing(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """Names of the backbone's tensors (own) that the file lacks. Batch norms' counters may be
    absent, as in old files.
    """
    return [
        name for name in own if name not in tensors and not name.endswith("num_batches_tracked")
    ]


def unknown(tensors: dict[str, Tensor], own: dict[str, Tensor], head: str) -> list[str]:
    """Names of weights of the file that are parts of the backbone's modules, but not of the
    backbone: those of more blocks, layer scales, squeeze and excitation. The file's own
    architecture has them, so this one computes other features.

    head: the first part of the projector's names.
    """
    modules = {name.partition(".")[0] for name in own if "." in name}
    modules |= {"encoder"}  # the blocks of transformers' models
    return [
        name
        for name, tensor in tensors.items()
        if name not in own
        and not name.startswith(head)
        and (name in TOKENS or re.sub(r"^(vit|resnet)\.", "", name).partition(".")[0] in modules)
        and tensor.is_floating_point()
        and not name.endswith(COMPUTED)
    ]


def check_fit(
    file: EncoderFile, tensors: dict[str, Tensor], own: dict[str, Tensor], head: str
) -> None:
    """Raise UsageError if tensors, those of the file by the backbone's names, are not the weights
    of a backbone with the tensors `own`. head: as in unknown.
    """
    problems = []
    stem = next((name for name, tensor in own.items() if tensor.ndim == 4), None)  # first filters
    filters = tensors.get(stem)
    if filters is not None and filters.ndim == 4 and filters.shape[1] != own[stem].shape[1]:
        raise UsageError(
            f"{file.path} is for images with {filters.shape[1]} channels, not "
            f"{own[stem].shape[1]}: give the same number as --channels"
        )
    differing = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if names := missing(tensors, own):
        problems.append(f"{len(names)} of {len(own)} tensors are missing: {first_few(names)}")
    if differing:
        problems.append(f"{len(differing)} have another shape: {first_few(differing)}")
    if names := unknown(tensors, own, head):
        problems.append(
            f"{len(names)} tensors of the file are not in the backbone: {first_few(names)}"
        )
    if problems:
        raise UsageError(
            f"{file.path} ({file.layout}) does not fit the backbone: {'; '.join(problems)}; "
            "is --arch the right one?"
        )
