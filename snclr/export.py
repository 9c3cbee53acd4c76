"""Weights for other libraries: python -m snclr.export FILE --format FORMAT --out OUT

Prints a line of Python that builds the library's model from the written file. The file gets its
name only after the library has read it and computed the same features as the encoder for a random
image.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import OrderedDict

from .arguments import new_parser, number
from .running.errors import RunError, UsageError, one_clear_line
from .running.safe_files import check_new_path, save_bytes, save_text, writing
from .shared_options import add_backbone_flags

FORMATS = ("timm", "torchvision", "deit", "hf", "mocov3", "detectron2", "onnx")
RGB_ONLY = ("torchvision", "mocov3", "detectron2")
SAFETENSORS = ".safetensors"
# for --format timm, which can be a file or a folder: any other ending means a folder
FILE_SUFFIXES = (SAFETENSORS, ".pth", ".pt", ".bin", ".tar", ".ckpt")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "python -m snclr.export FILE --format FORMAT --out OUT [flags]",
        "Writes the encoder of a checkpoint for another library, and checks that it can be read.",
    )
    parser.add_argument("file", metavar="FILE", help="checkpoint or state dict, any layout")
    parser.add_argument(
        "--format", choices=FORMATS, required=True, help="library that will read it"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="OUT",
        help="file to write; a folder for hf, and for timm unless it ends in .safetensors or .pth",
    )
    parser.add_argument(
        "--encoder",
        choices=("online", "momentum"),
        default="online",
        help="which encoder, for files with both",
    )
    group = add_backbone_flags(parser, default_arch=None)
    count = number(int, above_zero=True)
    group.add_argument(
        "--img-size",
        type=count,
        metavar="PX",
        help="side of an image (default: as the file says, else 224)",
    )
    group.add_argument("--channels", type=count, metavar="C", help="channels of an image")
    for name in ("mean", "std"):
        group.add_argument(
            f"--{name}", type=float, nargs="+", metavar="X", help=f"{name} of each channel"
        )
    args = parser.parse_args(argv)
    check_new_path(args.out)
    card = card_path(args.out, is_folder=False)
    if os.path.lexists(card):
        raise UsageError(f"the model card {card} exists: choose another --out or remove it")
    if args.out.endswith(SAFETENSORS) and args.format not in ("timm", "torchvision"):
        raise UsageError(
            f"--format {args.format} is more than safetensors can hold in one file: "
            "choose another --out"
        )
    return args


def card_path(out: str, is_folder: bool) -> str:
    """The model card of an export: in its folder, or beside its file and under its name, so that
    several exports can be in one folder.
    """
    return os.path.join(out, "README.md") if is_folder else f"{out}.md"


if __name__ == "__main__":
    with one_clear_line("snclr.export"):
        parse(sys.argv[1:])  # reports a wrong flag before the slow imports

import torch
from torch import Tensor, nn

from . import __version__
from .evaluation.features import digest
from .running import tensor_files
from .weights import libraries
from .weights.card import model_card, run_figures, run_settings
from .weights.exported import Export
from .weights.hf import to_hf
from .weights.layouts import SETTINGS_KEY
from .weights.load import DEFAULTS, open_encoder

TO_LIBRARY = {
    "timm": libraries.to_timm,
    "torchvision": libraries.to_torchvision,
    "deit": libraries.to_deit,
    "hf": to_hf,
    "mocov3": libraries.to_mocov3,
    "detectron2": libraries.to_detectron2,
    "onnx": libraries.to_onnx,
}
# largest relative difference of features; float32 rounding stays far below
TOLERANCE = 1e-5


def main(argv: list[str]) -> None:
    args = parse(argv)
    encoder, info = open_encoder(
        args.file, args.encoder, **{name: getattr(args, name, None) for name in DEFAULTS}
    )
    if info["channels"] != 3 and args.format in RGB_ONLY:
        raise UsageError(
            f"{args.format} has only models of RGB images, not of {info['channels']} channels: "
            "choose another --format, such as timm, hf or onnx"
        )
    is_folder = args.format == "timm" and not args.out.endswith(FILE_SUFFIXES)
    to_library = TO_LIBRARY[args.format]
    export = to_library(encoder, info, as_folder=True) if is_folder else to_library(encoder, info)
    # the metadata names the file without its folder, which differs from reader to reader
    name = os.path.basename(os.path.abspath(args.out))
    settings = {name: info[name] for name in (*DEFAULTS, "encoder", "epoch")}
    settings |= {"build": export.build(name), "version": __version__}
    difference = write_checked(export, settings, args.out, encoder)
    card = card_path(args.out, export.configs is not None)
    save_text(
        card,
        model_card(
            name,
            args.format,
            export.build(name),
            export.features,
            info,
            run_settings(args.file, info["settings"]),
            run_figures(args.file, info, lambda: digest(encoder)),
        ),
    )
    for note in info["notes"]:
        print(f"note: {note}")
    print(f"{args.out}: {info['arch']} ({info['encoder']} encoder) for {args.format}")
    print(f"checked: loaded back, features of a random image agree to {difference:.1e} (relative)")
    grey_range = f", grey range {info['grey_range']}" if info["grey_range"] else ""
    print(f"images: {info['img_size']} px, mean {info['mean']}, std {info['std']}{grey_range}")
    print(f"build: {export.line(args.out)}")
    if export.hint is not None:
        print(f"hint: {export.hint(args.out)}")
    print(f"model card: {card}")


@torch.no_grad()
def write_checked(export: Export, settings: dict, out: str, encoder: nn.Module) -> float:
    """Write `out`, but only if the library's model computes the encoder's features from it.

    Both encode one random image. Returns the largest difference of features, divided by the largest
    feature. Raises RunError above TOLERANCE. settings: as in write.
    """
    parent, name = os.path.split(os.path.abspath(out))
    with writing(out):
        folder = tempfile.TemporaryDirectory(prefix="unchecked_", dir=parent)
    with folder:
        unchecked = os.path.join(folder.name, name)
        write(export, settings, unchecked)
        shape = (1, settings["channels"], settings["img_size"], settings["img_size"])
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        expected = encoder.embed(x)
        features = export.read(unchecked)(x)
        difference = ((features - expected).abs().max() / expected.abs().max()).item()
        if not difference <= TOLERANCE:
            raise RunError(
                f"the exported weights give other features (relative difference {difference:.1e}): "
                f"{out} is not written"
            )
        os.replace(unchecked, out)
    return difference


def write(export: Export, settings: dict, out: str) -> None:
    """Write a folder if the export has configuration files, else one file in the format of its
    suffix. settings: plain values for the metadata, from which layouts.read_encoder reads them.
    """
    if export.configs:
        os.makedirs(out, exist_ok=True)
        for name, config in export.configs.items():
            save_bytes(os.path.join(out, name), json.dumps(config, indent=2).encode() + b"\n")
        out = os.path.join(out, "model.safetensors")
    if out.endswith(SAFETENSORS):
        from safetensors.torch import save  # optional

        tensors = {name: tensor.contiguous() for name, tensor in export.content.items()}
        line, text = settings["build"], json.dumps(settings, default=str)
        save_bytes(out, save(tensors, {"format": "pt", "build": line, SETTINGS_KEY: text}))
    elif isinstance(export.content, bytes):
        save_bytes(out, export.content)
    elif all(isinstance(value, Tensor) for value in export.content.values()):
        # torch stores such metadata with a state dict, and load_state_dict ignores unknown entries
        state = OrderedDict(export.content)
        state._metadata = OrderedDict({SETTINGS_KEY: settings})
        tensor_files.save(out, state)
    else:
        tensor_files.save(out, {**export.content, SETTINGS_KEY: settings})


if __name__ == "__main__":
    with one_clear_line("snclr.export"):
        main(sys.argv[1:])
