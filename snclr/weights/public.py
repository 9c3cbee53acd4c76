"""Public weights by name, for --init-from: timm:NAME and hf:REPO. Their libraries download them
into their own caches, and only here.
"""

import json
from collections.abc import Mapping

import timm
import torch
from torch import Tensor, nn

from ..choices import PUBLIC
from ..running.errors import UsageError, close_names, first_line
from ..running.safe_files import read_text
from .layouts import EncoderFile, read_encoder

TIMM, HF = PUBLIC
# largest relative difference of features between timm's model and the encoder
TOLERANCE = 1e-3


def read_start(source: str, img_size: int) -> tuple[EncoderFile, nn.Module | None]:
    """The weights of a file, timm:NAME or hf:REPO, and timm's model of them if they come from timm.

    timm adapts position embeddings to img_size. The number of attention heads is among the file's
    settings. Raises UsageError for an unknown NAME, before any network is used, and for weights
    that are neither in the cache nor downloaded, or of a kind that is not known here.
    """
    if not source.startswith(PUBLIC):
        return read_encoder(source), None
    try:
        return (_from_timm if source.startswith(TIMM) else _from_hub)(source, img_size)
    except UsageError:
        raise
    except Exception as error:  # each library has its own errors for a missing network
        raise UsageError(
            f"--init-from {source} cannot be downloaded or read ({first_line(error)}); "
            "without network, download it elsewhere and give the file"
        ) from error


def _from_timm(source, img_size):
    name, known = source.removeprefix(TIMM), timm.list_models(pretrained=True)
    if not any(f"{other}.".startswith(f"{name}.") for other in known):
        raise UsageError(
            f"--init-from {source}: timm has no weights of this name{close_names(name, known)}"
        )
    return _of_timm(source, name, timm.get_pretrained_cfg(name), img_size)


def _from_hub(source, img_size):
    import huggingface_hub  # timm needs it as well

    repo = source.removeprefix(HF)
    config = json.loads(read_text(huggingface_hub.hf_hub_download(repo, "config.json")))
    if "architecture" in config:
        known = timm.get_pretrained_cfg(config["architecture"])
        return _of_timm(source, f"hf-hub:{repo}", known, img_size)
    if config.get("model_type") not in ("vit", "resnet"):
        raise UsageError(
            f"--init-from {source} is a {config.get('model_type')!r}: of transformers' models "
            "only 'vit' and 'resnet' are known here; many others are timm's, as timm:NAME"
        )
    usual = {  # settings that no tensor shows
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "hidden_act": "gelu" if config["model_type"] == "vit" else "relu",
    }
    for name, value in usual.items():
        if config.get(name, value) != value:
            raise UsageError(
                f"--init-from {source} has {name} {config[name]!r}, not {value!r}: its features "
                "cannot be computed here"
            )
    try:
        path = huggingface_hub.hf_hub_download(repo, "model.safetensors")
    except huggingface_hub.utils.EntryNotFoundError:
        path = huggingface_hub.hf_hub_download(repo, "pytorch_model.bin")
    file = read_encoder(path)
    saved = {"args": {"num_heads": config.get("num_attention_heads"), **file.settings}}
    return file._replace(path=source, is_library=True, saved=file.saved | saved), None


def _of_timm(source, name, config, img_size):
    sized = {"img_size": img_size} if config and config.fixed_input_size else {}
    model = timm.create_model(name, pretrained=True, num_classes=0, **sized).eval()
    heads = {getattr(module, "num_heads", None) for module in model.modules()} - {None}
    saved = {"args": {"num_heads": heads.pop()} if len(heads) == 1 else {}}
    return EncoderFile(source, model.state_dict(), "weights of timm", True, [], saved), model


@torch.no_grad()
def check_features(source: str, model: nn.Module, encoder: nn.Module, images: Tensor) -> None:
    """Raise UsageError if the encoder computes other features of images (B, C, S, S) than timm's
    model of the same weights: names and shapes of tensors do not show every difference.
    """
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    actual = encoder.eval().embed(images)
    encoder.train()
    difference = ((actual - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise UsageError(
            f"--init-from {source}: this --arch computes other features from the same weights "
            f"(relative difference {difference:.1e}); use -a timm:NAME with the model's own name"
        )


def other_images(own: Mapping, mean: list[float], std: list[float]) -> list[str]:
    """A line if weights were trained with images normalised by other numbers.

    own: the 'mean' and 'std' of these images, if they are known.
    """
    own = {key: list(own[key]) for key in ("mean", "std") if own.get(key) is not None}
    if own in ({}, {"mean": list(mean), "std": list(std)}):
        return []
    flags = " ".join(f"--{key} {' '.join(map(str, values))}" for key, values in own.items())
    return [f"these weights were trained with {flags}: the same numbers here fit them better"]
