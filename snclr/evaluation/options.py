"""The flags of main_lincls.py, checked before anything runs. Like snclr/options.py, it imports
nothing slow.
"""

import argparse
import os
import sys

from .. import options
from ..running.errors import UsageError, one_clear_line

RATES = tuple(round(10 ** (-3 + step / 3), 6) for step in range(13))  # 1e-3 .. 1e1, three a decade
STATE_FILE = "lincls_last.pth.tar"  # in the workdir
POSITIVE = ("epochs", "batch_size", "cache_copies", "crop_min", "heldout", "patch_size", "width")
POSITIVE += ("label_fraction", "lr", "head_lr", "layer_decay")  # other numbers may be 0
# settings that may change when an evaluation is resumed
FREE_ON_RESUME = {"data", "val", "labels", "val_labels", "workers", "workdir", "resume"}
FREE_ON_RESUME |= {"pretrained"}  # the encoder's weights are compared, not the name of their file
# settings that features of the training images do not depend on; all others are part of the key of
# --cache-features
NOT_IN_FEATURES = {"val", "val_labels", "download", "workers", "workdir", "resume"}
NOT_IN_FEATURES |= {
    "pretrained",
    "amp",
}  # the key has the encoder's weights and the precision in use
NOT_IN_FEATURES |= {"epochs", "batch_size", "lrs", "cache_features", "cache_limit_gb"}
NOT_IN_FEATURES |= {"finetune", "optimizer", "lr", "head_lr", "wd", "layer_decay", "warmup_epochs"}


def build_parser() -> argparse.ArgumentParser:
    """All flags, in groups."""
    parser = options.new_parser(
        "main_lincls.py",
        "What a checkpoint is worth: kNN and a grid of linear probes on its frozen encoder.",
    )
    on_off = argparse.BooleanOptionalAction
    g = parser.add_argument_group("encoder")
    g.add_argument(
        "--pretrained", metavar="FILE", help="checkpoint or state dict, any layout (required)"
    )
    what = "which one, where the file has both; untrained: its architecture at a random start; pixels: no encoder"
    g.add_argument(
        "--encoder",
        choices=("online", "momentum", "untrained", "pixels"),
        default="online",
        help=what,
    )
    options.add_backbone_flags(parser, default_arch=None)
    parser.set_defaults(
        patch_size=None, small_stem=None
    )  # as the file says; else open_encoder's defaults
    options.add_data_flags(parser)

    g = parser.add_argument_group("labels")
    g.add_argument(
        "--label-fraction",
        type=float,
        metavar="SHARE",
        help="of each class's training images, by --subset-seed",
    )
    g.add_argument(
        "--label-list", metavar="FILE", help="file names of the training images to use, one a line"
    )

    g = parser.add_argument_group("training")
    g.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="passes over the images (default: 90; fine-tuning: 50)",
    )
    g.add_argument(
        "-b",
        "--batch-size",
        type=int,
        metavar="N",
        help="global batch (default: 1024; fine-tuning: 256)",
    )
    g.add_argument(
        "--crop-min",
        type=float,
        default=0.08,
        metavar="SHARE",
        help="smallest training crop, as share of the area",
    )
    g.add_argument("--amp", choices=options.AMP, default="auto", help="16-bit encoder")
    g.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of start, order, crops and held-out images",
    )

    g = parser.add_argument_group("linear probe")
    g.add_argument(
        "--lrs",
        type=float,
        nargs="+",
        default=list(RATES),
        metavar="LR",
        help="base rates; each times batch/256",
    )
    g.add_argument(
        "--select",
        choices=("heldout", "val"),
        default="heldout",
        help="images that choose the head",
    )
    g.add_argument(
        "--heldout",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of each class, for --select heldout",
    )
    g.add_argument(
        "--cache-features",
        action=on_off,
        default=False,
        help="encode once, then train on the features",
    )
    g.add_argument(
        "--cache-copies",
        type=int,
        default=1,
        metavar="N",
        help="1: the test view; more: N random crops each",
    )
    g.add_argument(
        "--cache-limit-gb",
        type=float,
        default=4,
        metavar="GB",
        help="larger caches go to disk, into --workdir",
    )

    g = parser.add_argument_group("fine-tuning")
    what = "train the encoder, too; of an untrained one: supervised from scratch"
    g.add_argument("--finetune", action=on_off, default=False, help=what)
    g.add_argument(
        "--optimizer", choices=("sgd", "adamw"), help="default: adamw for ViTs, sgd for others"
    )
    g.add_argument(
        "--lr",
        type=float,
        metavar="LR",
        help="peak of the encoder, times batch/256 (default: by optimiser)",
    )
    g.add_argument(
        "--head-lr",
        type=float,
        metavar="LR",
        help="that of the head (default: ten times --lr; untrained: as --lr)",
    )
    g.add_argument(
        "--wd",
        type=float,
        metavar="WD",
        help="weight decay of matrices and filters (default: by optimiser)",
    )
    g.add_argument(
        "--layer-decay",
        type=float,
        metavar="F",
        help="rate from layer to layer downwards (default: ViTs 0.75)",
    )
    g.add_argument(
        "--warmup-epochs",
        type=float,
        metavar="E",
        help="linear warm-up (default: a tenth of --epochs)",
    )

    g = parser.add_argument_group("run")
    g.add_argument(
        "--workdir",
        metavar="DIR",
        help="where everything is left (default: a new folder beside FILE)",
    )
    g.add_argument(
        "--resume", choices=("auto",), help="auto: go on from --workdir, if there is anything"
    )
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags to settings, checked. Raises UsageError. What the checkpoint decides (arch, sizes, mean
    and std) is still open.
    """
    args = build_parser().parse_args(argv)
    if args.pretrained is None:
        raise UsageError("--pretrained FILE is needed: the checkpoint to evaluate")
    if not os.path.isfile(args.pretrained):
        raise UsageError(f"--pretrained {args.pretrained}: there is no such file")
    if args.epochs is None:
        args.epochs = 50 if args.finetune else 90
    if args.batch_size is None:
        args.batch_size = 256 if args.finetune else 1024
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 10
    options.resolve_resume(args)
    options.resolve_data(args)
    options.check_data(args, POSITIVE)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world_size:
        raise UsageError(
            f"--batch-size {args.batch_size} is global and must be divisible by the {world_size} ranks"
        )
    if not all(0 < rate < float("inf") for rate in args.lrs):
        raise UsageError(f"--lrs must be above 0, found {args.lrs}")
    if not args.heldout < 1 or not args.crop_min <= 1:
        raise UsageError(
            f"--heldout must be below 1 and --crop-min at most 1, found {args.heldout} and {args.crop_min}"
        )
    if (
        (args.label_fraction or 0) > 1
        or (args.layer_decay or 0) > 1
        or args.warmup_epochs >= args.epochs
    ):
        raise UsageError(
            "--label-fraction and --layer-decay are at most 1, and --warmup-epochs below --epochs"
        )
    if args.label_list is not None and not os.path.isfile(args.label_list):
        raise UsageError(f"--label-list {args.label_list}: there is no such file")
    if args.label_list is not None and args.label_fraction is not None:
        raise UsageError("--label-list and --label-fraction exclude each other")
    if args.finetune and args.encoder == "pixels":
        raise UsageError("--finetune has nothing to train with --encoder pixels")
    if args.workdir is None:
        args.workdir = f"{os.path.splitext(args.pretrained)[0]}_lincls"
    if os.path.exists(os.path.join(args.workdir, "metrics.jsonl")):
        raise UsageError(
            f"--workdir {args.workdir} is that of a pretraining run, whose args.json would be lost: choose a new one"
        )
    options.check_workdir(args.workdir, args.resume, ("results.json", "lincls_last.pth.tar"))
    return args


if __name__ == "__main__":
    with one_clear_line("main_lincls.py"):
        parse(sys.argv[1:])
