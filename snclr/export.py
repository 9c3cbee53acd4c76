"""Weights for other libraries: python -m snclr.export FILE --format FORMAT --out OUT

Prints the code that builds the library's model from what was written. The file gets its name only
after the library has read it and has computed the encoder's features of a random image.
"""

import argparse
import os
import sys

from .arguments import new_parser
from .running.errors import UsageError, one_clear_line
from .shared_options import add_backbone_flags
from .weights import files
from .weights.libraries import FORMATS
from .weights.load import open_encoder


def main(argv: list[str]) -> None:
    args = parse(argv)
    settings = {
        name: getattr(args, name)
        for name in (
            "arch",
            "img_size",
            "patch_size",
            "num_heads",
            "width",
            "small_stem",
            "timm_kwargs",
        )
    }
    encoder, info = open_encoder(args.file, args.encoder, **settings)
    is_folder = args.format == "timm" and not args.out.endswith(files.FILE_SUFFIXES)
    to_library = FORMATS[args.format]
    export = to_library(encoder, info, as_folder=True) if is_folder else to_library(encoder, info)
    # without its folder, which is another one for every reader
    build = export.build(os.path.basename(os.path.abspath(args.out)))
    about = files.settings_for_metadata(info, build)
    difference = files.write_checked(export, about, args.out, encoder, info["img_size"])
    for note in info["notes"]:
        print(f"note: {note}")
    print(f"{args.out}: {info['arch']} ({info['encoder']} encoder) for {args.format}")
    print(f"checked: loaded back, features of a random image agree to {difference:.1e} (relative)")
    print(f"images: {info['img_size']} px, mean {info['mean']}, std {info['std']}")
    print(f"build: {export.build(args.out)}")
    if export.hint is not None:
        print(f"hint: {export.hint(args.out)}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "snclr.export",
        "Writes the encoder of a checkpoint for another library, and checks that it can be read.",
    )
    parser.add_argument("file", metavar="FILE", help="checkpoint or state dict, any layout")
    parser.add_argument(
        "--format", choices=FORMATS, required=True, help="library that will read it"
    )
    out = "file to write; a folder for hf, and for timm unless it ends in .safetensors or .pth"
    parser.add_argument("--out", required=True, metavar="OUT", help=out)
    parser.add_argument(
        "--encoder",
        choices=("online", "momentum"),
        default="online",
        help="which encoder, for files with both",
    )
    group = add_backbone_flags(parser, default_arch=None)
    size = "side of an image (default: as the file says, else 224)"
    group.add_argument("--img-size", type=int, metavar="PX", help=size)
    parser.set_defaults(patch_size=None, small_stem=None)  # as the file says
    args = parser.parse_args(argv)
    if os.path.exists(args.out):
        raise UsageError(f"--out {args.out} exists: choose another name or remove it")
    if not os.access(os.path.dirname(os.path.abspath(args.out)), os.W_OK):
        raise UsageError(f"--out {args.out}: its folder does not exist, or may not be written to")
    if args.out.endswith(files.SAFETENSORS) and args.format not in ("timm", "torchvision"):
        raise UsageError(
            f"--format {args.format} is more than safetensors can hold in one file: "
            "choose another --out"
        )
    return args


if __name__ == "__main__":
    with one_clear_line("snclr.export"):
        main(sys.argv[1:])
