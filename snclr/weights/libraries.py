"""What other libraries read: one function for each, from an encoder and its info to an Export.

info comes from snclr.weights.load.open_encoder. Each function raises UsageError if the library has
no such model.
"""

import io
import json
import os
import re
import warnings

import timm
import torch
import torchvision
from torch import nn

from ..backbones import RESNETS, TIMM, VITS, VisionTransformer, in_chans, timm_settings
from ..patches import ConvStem
from ..running.errors import UsageError, needed_by
from ..running.safe_files import json_object, read_text
from .exported import Export
from .layouts import read_encoder


def to_timm(encoder: nn.Module, info: dict, as_folder: bool = False) -> Export:
    """timm's names of tensors.

    as_folder: with the config.json that timm reads from the hub and from 'local-dir:'.
    """
    name, arguments = _timm_model(encoder, info)
    data = _timm_data(info)
    with_data = arguments | {"pretrained_cfg_overlay": data}
    if not as_folder:
        return _timm_file(encoder.state_dict(), name, with_data)
    if "embed_layer" in arguments:
        raise UsageError(
            f"timm has no model with the convolutional stem of {info['arch']}, so it cannot read a "
            "folder: choose a file, as in --out weights.safetensors"
        )
    original = timm.get_pretrained_cfg(name)
    copied = {
        key: getattr(original, key)
        for key in ("first_conv", "classifier", "pool_size", "fixed_input_size")
    }
    if info["channels"] != 3:  # timm before 1.0.31 takes the first filters for those of RGB
        copied["first_conv"] = None
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder.num_features,
        "model_args": arguments,
        "pretrained_cfg": copied | data | {"num_classes": 0},
    }
    try:
        json.dumps(config)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"--timm-kwargs {info['timm_kwargs']} cannot be written as JSON ({error}): "
            "choose a file, as in --out weights.safetensors"
        ) from error

    def read(path):
        saved = json_object(read_text(os.path.join(path, "config.json")))
        weights = {"file": os.path.join(path, "model.safetensors")}
        return timm.create_model(
            saved["architecture"],
            pretrained=True,
            pretrained_cfg=saved["pretrained_cfg"] | weights,
            **saved["model_args"],
        ).eval()

    return Export(
        encoder.state_dict(),
        build=lambda path: f"model = timm.create_model({'local-dir:' + path!r}, pretrained=True)",
        read=read,
        configs={"config.json": config},
        hint=lambda path: (
            "timm before 1.0.26 cannot read this folder: "
            + _call(name, with_data, os.path.join(path, "model.safetensors"))
        ),
    )


def to_deit(encoder: nn.Module, info: dict) -> Export:
    """DeiT's files: timm's names below 'model'."""
    if not isinstance(encoder, VisionTransformer):
        raise UsageError(f"--format deit is for ViTs, not for {info['arch']}")
    name, arguments = _timm_model(encoder, info)
    return _timm_file(
        {"model": encoder.state_dict()},
        name.replace("vit_", "deit_"),
        arguments | {"pretrained_cfg_overlay": _timm_data(info)},
    )


def to_torchvision(encoder: nn.Module, info: dict) -> Export:
    """The state dict of torchvision's ResNet without its classifier."""
    model, code = _torchvision_model(info, "torchvision")

    def build(path):
        is_safe = path.endswith(".safetensors")
        loader = "safetensors.torch.load_file({!r})" if is_safe else _TORCH_LOAD
        return f"{code}; model.load_state_dict({loader.format(path)})"

    return Export(
        encoder.state_dict(), build, lambda path: _loaded(model, read_encoder(path).tensors)
    )


def to_mocov3(encoder: nn.Module, info: dict) -> Export:
    """MoCo v3's checkpoints: its names under 'state_dict', of one encoder and without its head."""
    arch, prefix = info["arch"], "module.base_encoder."
    if arch in VITS and info["num_heads"] != VITS[arch][2]:
        raise UsageError(
            f"MoCo v3's {arch} has {VITS[arch][2]} attention heads, this one {info['num_heads']}: "
            "its readers would compute other features; choose another --format"
        )
    if arch in RESNETS:
        model, code = _torchvision_model(info, "MoCo v3")
    else:
        name, arguments = _timm_model(encoder, info)
        model, code = timm.create_model(name, **arguments), _call(name, arguments)

    def build(path):
        state = f"{_TORCH_LOAD.format(path)}['state_dict']"
        loaded = f"{{name[{len(prefix)}:]: tensor for name, tensor in {state}.items()}}"
        return f"{code}; model.load_state_dict({loaded})"

    tensors = {prefix + name: tensor for name, tensor in encoder.state_dict().items()}
    return Export(
        {"epoch": info["epoch"], "arch": arch, "state_dict": tensors},
        build,
        lambda path: _loaded(model, read_encoder(path).tensors),
        hint=lambda path: f"MoCo v3's own reader: main_lincls.py -a {arch} --pretrained {path}",
    )


def to_detectron2(encoder: nn.Module, info: dict) -> Export:
    """One file for detectron2 and mmdetection.

    detectron2 reads its own names under 'model', mmdetection torchvision's names under
    'state_dict'. The file holds the tensors once.
    """
    model, code = _torchvision_model(info, "detectron2")
    state = encoder.state_dict()
    names = {name: detectron2_name(name) for name in state}
    content = {
        "model": {names[name]: tensor for name, tensor in state.items()},
        "state_dict": state,
        "__author__": "snclr",
        "matching_heuristics": True,
    }

    def read(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)["model"]
        return _loaded(model, {name: saved[theirs] for name, theirs in names.items()})

    mean, std = ([round(255 * x, 3) for x in info[key]] for key in ("mean", "std"))
    pixels = f"MODEL.PIXEL_MEAN {mean} MODEL.PIXEL_STD {std}".replace(", ", ",")
    depth = info["arch"].removeprefix("resnet")
    # detectron2 refuses these two depths with its default, 256
    width = " MODEL.RESNETS.RES2_OUT_CHANNELS 64" if depth in ("18", "34") else ""
    return Export(
        content,
        lambda path: f"{code}; model.load_state_dict({_TORCH_LOAD.format(path)}['state_dict'])",
        read,
        hint=lambda path: (
            f"detectron2's settings: MODEL.WEIGHTS {path} MODEL.RESNETS.STRIDE_IN_1X1 False "
            f"MODEL.RESNETS.DEPTH {depth}{width} INPUT.FORMAT RGB {pixels}"
        ),
    )


def detectron2_name(name: str) -> str:
    """detectron2's name of a tensor of torchvision's ResNet: a norm is part of its convolution."""
    name = re.sub(r"bn(\d)\.", r"conv\1.norm.", name)
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    stage = re.match(r"layer(\d)\.", name)
    return f"res{int(stage[1]) + 1}.{name[stage.end() :]}" if stage else f"stem.{name}"


def to_onnx(encoder: nn.Module, info: dict) -> Export:
    """An ONNX file with input images (B, C, S, S), output features (B, F), any B, and the mean,
    standard deviation, input size and grey range of the images in its metadata.
    """
    with needed_by("--format onnx", "onnx", "onnxruntime"):
        import onnx
        import onnxruntime
    size = (info["channels"], info["img_size"], info["img_size"])
    file, batch = io.BytesIO(), {0: "batch"}
    with warnings.catch_warnings():  # about the tracer, which every version of torch has
        warnings.simplefilter("ignore")
        torch.onnx.export(
            encoder,
            (torch.zeros(2, *size),),
            file,
            input_names=["images"],
            output_names=["features"],
            dynamic_axes={"images": batch, "features": batch},
            dynamo=False,  # the other exporter needs onnxscript as well
        )
    model = onnx.load_from_string(file.getvalue())
    data = {"input_size": size} | {name: info[name] for name in ("mean", "std", "arch")}
    data |= {"grey_range": info["grey_range"]} if info["grey_range"] else {}
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in data.items()})

    def read(path):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    return Export(
        model.SerializeToString(),
        "model = onnxruntime.InferenceSession({!r})".format,
        read,
        features='model.run(None, {"images": images.numpy()})[0]',
    )


# -- timm's models ---------------------------------------------------------------------------------


def _timm_model(encoder, info):
    """timm's name of the model, and the arguments with which timm builds this backbone."""
    arch = info["arch"]
    if arch.startswith(TIMM):
        name = arch.removeprefix(TIMM)
        kwargs = dict(info["timm_kwargs"] or [])
        settings = timm_settings(name, info["img_size"], info["channels"], kwargs)
        return name, {**settings, "num_classes": 0}
    if not isinstance(encoder, VisionTransformer):
        return _plain_resnet(info, "timm"), {"num_classes": 0, **in_chans(info["channels"])}
    _, depth, _, embed_layer = VITS[arch]
    arguments = {"num_heads": info["num_heads"], "num_classes": 0, **in_chans(info["channels"])}
    sizes = {"img_size": 224, "patch_size": 16}  # of this model of timm
    arguments |= {name: info[name] for name, size in sizes.items() if info[name] != size}
    if embed_layer is ConvStem:
        arguments |= {"depth": depth, "embed_layer": ConvStem}
    return f"{arch.replace('_conv', '')}_patch16_224", arguments


def _timm_data(info):
    """The images that timm should expect: prepared as in this project (loader.whole_images)."""
    is_small = info["img_size"] <= 64  # such data sets have images of just this size: not cropped
    return {
        "input_size": (info["channels"], info["img_size"], info["img_size"]),
        "interpolation": "bilinear",
        "crop_pct": 1.0 if is_small else 0.875,
        "mean": tuple(info["mean"]),
        "std": tuple(info["std"]),
    }


def _timm_file(content, name, arguments) -> Export:
    return Export(
        content,
        lambda path: _call(name, arguments, path),
        lambda path: timm.create_model(name, **arguments, checkpoint_path=path).eval(),
    )


def _call(name, arguments, checkpoint_path=None) -> str:
    """The code that builds a timm model."""
    start = "from snclr.patches import ConvStem; " if "embed_layer" in arguments else ""
    arguments = arguments | ({"checkpoint_path": checkpoint_path} if checkpoint_path else {})
    parts = [f"{key}={'ConvStem' if x is ConvStem else repr(x)}" for key, x in arguments.items()]
    return f"{start}model = timm.create_model({name!r}, {', '.join(parts)})"


# -- torchvision's ResNets -------------------------------------------------------------------------


def _plain_resnet(info, library):
    """The arch, if torchvision has the same ResNet under this name. Raises UsageError if not."""
    arch = info["arch"]
    is_plain = (
        arch in RESNETS
        and RESNETS[arch][3] == "imagenet"
        and info["width"] in (None, RESNETS[arch][2])
        and not info["small_stem"]
    )
    if not is_plain:
        raise UsageError(
            f"{library} has no {arch} with the encoder's stem and width: "
            "its ResNets have 7x7 stems and full width; --format onnx has every encoder"
        )
    return arch


_TORCH_LOAD = "torch.load({!r}, weights_only=True)"


def _torchvision_model(info, library):
    """torchvision's ResNet without its classifier, and the code that builds it."""
    name = _plain_resnet(info, library)
    model = getattr(torchvision.models, name)()
    model.fc = nn.Identity()
    return model, f"model = torchvision.models.{name}(); model.fc = torch.nn.Identity()"


def _loaded(model, state):
    model.load_state_dict(state, strict=True)
    return model.eval()
