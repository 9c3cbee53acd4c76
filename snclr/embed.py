"""Features of all images of a data set, in one file.

    python -m snclr.embed FILE DATA --out features.npz
    torchrun --standalone --nproc_per_node 8 -m snclr.embed FILE DATA --out features.npz

writes the arrays names, labels and classes (where there are any) and features. The same command
continues after an interruption: features are kept in parts beside OUT until all are done.
"""

import argparse
import importlib.util
import sys

from .arguments import new_parser, number
from .choices import AMP, TOKENS
from .running.errors import UsageError, check_packages, first_few, one_clear_line
from .running.safe_files import check_new_path
from .shared_options import add_backbone_flags, add_data_flags, resolve_data


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags, checked. Raises UsageError."""
    parser = new_parser(
        "python -m snclr.embed FILE [DATA] --out OUT [flags]",
        "Writes the features of all images of a data set.",
    )
    parser.add_argument("file", metavar="FILE", help="checkpoint or state dict, any layout")
    add_data_flags(parser)
    g = parser.add_argument_group("features")
    g.add_argument(
        "--out", required=True, metavar="OUT", help="file to write: NAME.npz or NAME.parquet"
    )
    g.add_argument(
        "--encoder", choices=("online", "momentum"), default="online", help="encoder of FILE"
    )
    g.add_argument(
        "--split", choices=("train", "val"), default="train", help="images of DATA to encode"
    )
    g.add_argument(
        "--tokens",
        choices=TOKENS,
        default="class",
        help="class: the class token of a ViT, or the pooled features of other encoders, as "
        "load_encoder gives them; mean: of the patch tokens; patch: all patch tokens",
    )
    g.add_argument(
        "--layers",
        type=number(int, above_zero=True),
        default=1,
        metavar="N",
        help="tokens of the last N blocks of a ViT, side by side",
    )
    g.add_argument("--amp", choices=AMP, default="off", help="precision of the encoder")
    add_backbone_flags(parser, default_arch=None)
    args = parser.parse_args(argv)
    resolve_data(args)
    args.format = args.out.rpartition(".")[2]
    if args.format not in ("npz", "parquet"):
        raise UsageError(f"--out must end in .npz or .parquet, found {args.out}")
    if args.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UsageError(f"--out {args.out} needs pyarrow: pip install pyarrow")
    check_new_path(args.out)
    return args


if __name__ == "__main__":
    with one_clear_line("snclr.embed"):
        parse(sys.argv[1:])  # reports a wrong flag before the slow imports
        check_packages()

import numpy as np

from .datasets import sources
from .evaluation.embedding import check_tokens, embedder, encode_parts, join_parts
from .evaluation.features import digest, key_of
from .running import distributed, process_group
from .running.precision import resolve_amp
from .weights.load import open_by_flags


@process_group.failures_named()
def main(argv: list[str]) -> None:
    args = parse(argv)
    device = process_group.start()
    amp, is_rank_zero = resolve_amp(args.amp, device), distributed.rank() == 0
    log = print if is_rank_zero else lambda line: None
    encoder, info = open_by_flags(args, args.file, args.encoder)
    check_tokens(encoder, args.tokens, args.layers)
    train, val, notes = sources.open_data(args)
    images = train if args.split == "train" else val
    if images is None:
        raise UsageError("--split val: there are no validation images with labels")
    for note in info["notes"] + notes:
        log(f"note: {note}")
    log(f"{len(images)} images of {args.dataset} at {info['img_size']} px, amp {amp}")
    facts = [digest(encoder), args.tokens, args.layers, amp, device.type]
    facts += sorted((name, value) for name, value in info.items() if name != "notes")
    parts = encode_parts(
        embedder(encoder.to(device), args.tokens, args.layers, amp, device),
        images.to(device),
        f"{args.out}.parts",
        key_of(images, *facts),
        size=info["img_size"],
        device=device,
        workers=args.workers,
        log=log,
    )
    process_group.stop()  # the other ranks need not wait for the file
    if is_rank_zero:
        if images.skip_bad and len(rows := _rows_of_nan(parts)):
            names = first_few(images.paths[rows].tolist())
            log(f"note: {len(rows)} images cannot be read, and their features are NaN: {names}")
        shape = join_parts(args.out, parts, images)
        log(f"{args.out}: features {' x '.join(map(str, shape))}, float32")


def _rows_of_nan(paths):
    """The numbers of the images whose features in the parts are NaN."""
    parts = [np.load(path, mmap_mode="r") for path in paths]
    first = [part.reshape(len(part), -1)[:, 0] for part in parts]
    return np.flatnonzero(np.isnan(np.concatenate(first)))


if __name__ == "__main__":
    with one_clear_line("snclr.embed"):
        main(sys.argv[1:])
