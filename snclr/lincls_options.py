"""The flags of main_lincls.py, checked before anything runs. As options.py, it imports nothing slow."""

import argparse
import os
import sys

from .errors import UsageError, one_clear_line
from .options import add_backbone_flags, add_data_flags, check_data, check_numbers, check_workdir, new_parser, resolve_data

RATES = tuple(round(10 ** (-3 + step / 3), 6) for step in range(13))  # 1e-3 .. 1e1, three a decade
POSITIVE = ("epochs", "batch_size", "cache_copies", "crop_min", "heldout", "patch_size", "width")


def build_parser() -> argparse.ArgumentParser:
    """All flags, in groups."""
    parser = new_parser("main_lincls.py", "What a checkpoint is worth: kNN and a grid of linear probes on its frozen encoder.")
    on_off = argparse.BooleanOptionalAction
    g = parser.add_argument_group("encoder")
    g.add_argument("--pretrained", metavar="FILE", help="checkpoint or state dict, any layout (required)")
    g.add_argument("--encoder", choices=("online", "momentum"), default="online", help="which one, where the file has both")
    add_backbone_flags(parser, default_arch=None)
    parser.set_defaults(patch_size=None, small_stem=None)  # as the file says; else open_encoder's defaults
    add_data_flags(parser)

    g = parser.add_argument_group("probe")
    g.add_argument("--lrs", type=float, nargs="+", default=list(RATES), metavar="LR", help="base rates; each times batch/256")
    g.add_argument("--epochs", type=int, default=90, metavar="N", help="passes over the training images")
    g.add_argument("-b", "--batch-size", type=int, default=1024, metavar="N", help="global batch, over all ranks")
    g.add_argument(
        "--crop-min", type=float, default=0.08, metavar="SHARE", help="smallest training crop, as a share of the area"
    )
    g.add_argument("--select", choices=("heldout", "val"), default="heldout", help="images that choose the head")
    g.add_argument("--heldout", type=float, default=0.1, metavar="SHARE", help="of each class, for --select heldout")
    g.add_argument("--cache-features", action=on_off, default=False, help="encode once, then train on the features")
    g.add_argument("--cache-copies", type=int, default=1, metavar="N", help="1: the test view; more: N random crops each")
    g.add_argument("--cache-limit-gb", type=float, default=4, metavar="GB", help="larger caches go to disk, into --workdir")
    g.add_argument("--amp", choices=("off", "auto", "bf16", "fp16"), default="auto", help="16-bit encoder")
    g.add_argument("--seed", type=int, default=0, metavar="N", help="of start, order, crops and held-out images")

    g = parser.add_argument_group("run")
    g.add_argument("--workdir", metavar="DIR", help="where everything is left (default: a new folder beside FILE)")
    g.add_argument("--resume", choices=("auto",), help="auto: go on from --workdir, if there is anything")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags to settings, checked. Raises UsageError. What the checkpoint decides (arch, sizes, mean and std) is still open."""
    args = build_parser().parse_args(argv)
    if args.pretrained is None:
        raise UsageError("--pretrained FILE is needed: the checkpoint to evaluate")
    if not os.path.isfile(args.pretrained):
        raise UsageError(f"--pretrained {args.pretrained}: there is no such file")
    resolve_data(args)
    check_data(args)
    check_numbers(args, POSITIVE, ("cache_limit_gb",))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world_size:
        raise UsageError(f"--batch-size {args.batch_size} is global and must be divisible by the {world_size} ranks")
    if not all(0 < rate < float("inf") for rate in args.lrs):
        raise UsageError(f"--lrs must be above 0, found {args.lrs}")
    if not args.heldout < 1 or not args.crop_min <= 1:
        raise UsageError(f"--heldout must be below 1 and --crop-min at most 1, found {args.heldout} and {args.crop_min}")
    if args.workdir is None:
        args.workdir = f"{os.path.splitext(args.pretrained)[0]}_lincls"
    check_workdir(args.workdir, args.resume, ("results.json", "probe_last.pth.tar"))
    return args


if __name__ == "__main__":
    with one_clear_line("main_lincls.py"):
        parse(sys.argv[1:])
