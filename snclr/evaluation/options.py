"""The flags of main_lincls.py, checked before anything runs. Imports nothing slow."""

import argparse
import math
import os
import sys

from ..arguments import flag, flags, new_parser, number, seed
from ..choices import AMP
from ..running.errors import UsageError, one_clear_line
from ..shared_options import (
    add_backbone_flags,
    add_data_flags,
    check_batch_size,
    check_workdir,
    resolve_data,
    resolve_resume,
)

# 0.001 to 10, three a decade
RATES = tuple(round(10 ** (-3 + step / 3), 6) for step in range(13))
STATE_FILE = "lincls_last.pth.tar"  # in the workdir

# Defaults of the grid's settings that --protocol mocov3 fixes: there these flags are refused.
GRID = {
    "lrs": list(RATES),
    "select": "heldout",
    "heldout": 0.1,
    "retrain": False,
    "cache_features": False,
    "cache_copies": 1,
}
OF_FINETUNING = ("optimizer", "lr", "head_lr", "wd", "layer_decay", "warmup_epochs")
SMALL = 64  # px; up to this size, the grid trains on whole images by default
CROP_MIN, SMALL_CROP_MIN = 0.08, 1.0


def build_parser() -> argparse.ArgumentParser:
    """All flags, in groups. A default of None is filled in by `parse` or `resolve_training`."""
    parser = new_parser(
        "main_lincls.py [DATA] --pretrained FILE [flags]",
        "Evaluates an encoder: kNN and linear probes on its frozen features, or fine-tuning.",
    )
    g = parser.add_argument_group("encoder")
    flag(
        g,
        "--pretrained",
        metavar="FILE",
        help="checkpoint or state dict in any layout (required)",
        on_resume="free",  # on resume the encoder's weights are compared
        changes_features=False,
    )
    flag(
        g,
        "--encoder",
        choices=("online", "momentum", "untrained", "pixels"),
        default="online",
        help="encoder of FILE; untrained: random weights in its architecture; pixels: no encoder",
    )
    add_backbone_flags(parser, default_arch=None)
    add_data_flags(parser)

    g = parser.add_argument_group("labels")
    flag(
        g,
        "--label-fraction",
        type=number(float, above_zero=True, most=1),
        metavar="SHARE",
        help="share of each class's training images to use, chosen by --subset-seed",
    )
    flag(
        g,
        "--label-list",
        metavar="FILE",
        help="text file with the names of the training images to use, one a line",
    )

    g = parser.add_argument_group("training")
    flag(
        g,
        "--epochs",
        type=number(int, above_zero=True),
        metavar="N",
        help="passes over the training images (default: 90; fine-tuning: 50)",
        changes_features=False,
    )
    flag(
        g,
        "-b",
        "--batch-size",
        type=number(int, above_zero=True),
        metavar="N",
        help="images in a global batch, over all ranks (default: 1024, less for a set that gives "
        "fewer than 16 steps an epoch; fine-tuning: 256)",
        changes_features=False,
    )
    flag(
        g,
        "--crop-min",
        type=number(float, above_zero=True, most=1),
        metavar="SHARE",
        help="smallest area of a training crop, as a share of the image "
        f"(default: {CROP_MIN}; for the grid up to {SMALL} px: {SMALL_CROP_MIN:g}, whole images)",
    )
    flag(
        g,
        "--amp",
        choices=AMP,
        help="precision of the encoder (default: auto, 16 bits where native; mocov3: off)",
        changes_features=False,
    )
    flag(
        g,
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="random seed of initial weights, image order, crops and held-out images",
    )

    g = parser.add_argument_group("linear probe")
    flag(
        g,
        "--protocol",
        choices=("grid", "mocov3"),
        default="grid",
        help="grid: train one head for each learning rate, and choose the best on held-out "
        "training images; mocov3: as published, one head at one rate on all images, in float32",
    )
    flag(
        g,
        "--lrs",
        type=number(float, above_zero=True),
        nargs="+",
        metavar="LR",
        help="learning rates of the grid, each times --batch-size / 256 (default: 0.001 to 10 in "
        "13 steps)",
        changes_features=False,
    )
    flag(
        g,
        "--select",
        choices=("heldout", "val"),
        help="images on which the head of the grid is chosen (default: heldout)",
    )
    flag(
        g,
        "--heldout",
        type=number(float, above_zero=True, most=0.99),
        metavar="SHARE",
        help="share of each class that --select heldout holds out of training (default: 0.1)",
    )
    flag(
        g,
        "--retrain",
        action=argparse.BooleanOptionalAction,
        help="train the chosen head again, on all training images (default: off)",
        on_resume="free",
        changes_features=False,
    )
    flag(
        g,
        "--cache-features",
        action=argparse.BooleanOptionalAction,
        help="encode the training images once, and train on these features (default: off)",
        changes_features=False,
    )
    flag(
        g,
        "--cache-copies",
        type=number(int, above_zero=True),
        metavar="N",
        help="cache N random crops of each image; 1: the view used for testing (default: 1)",
    )
    flag(
        g,
        "--cache-limit-gb",
        type=number(float),
        default=4,
        metavar="GB",
        help="keep cached features above this size in a file in --workdir",
        changes_features=False,
    )

    g = parser.add_argument_group("fine-tuning")
    flag(
        g,
        "--finetune",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train the encoder as well; with --encoder untrained: supervised from scratch",
        changes_features=False,
    )
    flag(
        g,
        "--optimizer",
        choices=("sgd", "adamw"),
        help="optimiser (default: adamw for ViTs, sgd for others)",
        changes_features=False,
    )
    flag(
        g,
        "--lr",
        type=number(float, above_zero=True),
        metavar="LR",
        help="peak learning rate of the encoder, times --batch-size / 256 (default: depends on the "
        "optimiser)",
        changes_features=False,
    )
    flag(
        g,
        "--head-lr",
        type=number(float, above_zero=True),
        metavar="LR",
        help="peak learning rate of the head (default: 10 times --lr; untrained encoder: --lr)",
        changes_features=False,
    )
    flag(
        g,
        "--wd",
        type=number(float),
        metavar="WD",
        help="weight decay of matrices and filters (default: depends on the optimiser)",
        changes_features=False,
    )
    flag(
        g,
        "--layer-decay",
        type=number(float, above_zero=True, most=1),
        metavar="F",
        help="learning rate of a layer, divided by that of the layer after it (default: 0.75 for "
        "ViTs, else 1)",
        changes_features=False,
    )
    flag(
        g,
        "--warmup-epochs",
        type=number(float),
        metavar="E",
        help="epochs of linear learning-rate warm-up (default: a tenth of --epochs)",
        changes_features=False,
    )

    g = parser.add_argument_group("run")
    flag(
        g,
        "--workdir",
        metavar="DIR",
        help="folder of results and state (default: a new folder beside FILE)",
        on_resume="free",
        changes_features=False,
    )
    flag(
        g,
        "--resume",
        choices=("auto",),
        help="auto: continue the evaluation in --workdir, if there is one",
        on_resume="free",
        changes_features=False,
    )
    return parser


FLAGS = flags(build_parser())
FREE_ON_RESUME = {action.dest for action in FLAGS if action.on_resume == "free"}
# All other settings are part of the key of --cache-features, and so are the encoder's weights and
# the precision in use.
NOT_IN_FEATURES = {action.dest for action in FLAGS if not action.changes_features}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check the flags. Raises UsageError.

    What depends on the checkpoint or on the images is filled in later (`resolve_training`).
    """
    args = build_parser().parse_args(argv)
    if args.pretrained is None:
        raise UsageError("--pretrained FILE is needed: the checkpoint to evaluate")
    if not os.path.isfile(args.pretrained):
        raise UsageError(f"--pretrained {args.pretrained}: there is no such file")
    _resolve_protocol(args)
    args.epochs = args.epochs or (50 if args.finetune else 90)
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 10
    resolve_resume(args)
    resolve_data(args)
    _check(args)
    if args.workdir is None:
        args.workdir = f"{os.path.splitext(args.pretrained)[0]}_lincls"
    if os.path.exists(os.path.join(args.workdir, "metrics.jsonl")):
        raise UsageError(
            f"--workdir {args.workdir} is the folder of a pretraining run, "
            "whose args.json would be lost: choose a new one"
        )
    check_workdir(args.workdir, args.resume, ("results.json", STATE_FILE))
    return args


def _resolve_protocol(args):
    """Fill in the defaults of the protocol. Raises UsageError for flags that contradict it."""
    given = [x for x in (*GRID, "crop_min", *OF_FINETUNING) if getattr(args, x) is not None]
    refused = [name for name in given if name not in OF_FINETUNING]
    if args.amp not in (None, "off"):
        refused.append("amp")
    if args.protocol == "mocov3" and refused:
        raise UsageError(
            "--protocol mocov3 fixes learning rate, crops, training images and precision: "
            f"leave out --{refused[0].replace('_', '-')}, or use --protocol grid"
        )
    unused = [name for name in given if name in (GRID if args.finetune else OF_FINETUNING)]
    unused += ["protocol"] * (args.finetune and args.protocol != "grid")
    if unused:
        use = "the linear probe, without" if args.finetune else "fine-tuning, with"
        raise UsageError(f"--{unused[0].replace('_', '-')} is for {use} --finetune")
    if args.retrain and args.select == "val":
        raise UsageError("--retrain needs held-out images: with --select val there are none")
    for name, value in GRID.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.amp = args.amp or ("off" if args.protocol == "mocov3" else "auto")


def _check(args):
    """Raise UsageError for values that cannot work."""
    if args.batch_size is not None:
        check_batch_size(args.batch_size)
    if args.batch_size == 1:
        raise UsageError("--batch-size must be at least 2: batch norm needs other images")
    if args.warmup_epochs >= args.epochs:
        raise UsageError(f"--warmup-epochs must be below --epochs, {args.epochs}")
    if args.label_list is not None and not os.path.isfile(args.label_list):
        raise UsageError(f"--label-list {args.label_list}: there is no such file")
    if args.label_list is not None and args.label_fraction is not None:
        raise UsageError("--label-list and --label-fraction exclude each other")
    if args.finetune and args.encoder == "pixels":
        raise UsageError("--finetune cannot train --encoder pixels: it has no weights")


def resolve_training(args: argparse.Namespace, num_images: int) -> None:
    """Fill in --batch-size and --crop-min for num_images training images of args.img_size.

    The published crops of at least 8 % of the area may leave 9 px of a 32-px image. A probe trained
    on such crops is worse on whole images than kNN (docs/RESULTS.md). Raises UsageError.
    """
    is_grid = args.protocol == "grid" and not args.finetune
    if args.batch_size is None:
        args.batch_size = 256 if args.finetune else 1024
        if is_grid and num_images < 16 * args.batch_size:
            # by default at most half of the images are held out: the others must be a whole batch
            args.batch_size = 2 ** int(math.log2(max(num_images / 16, min(8, num_images / 2), 2)))
        check_batch_size(args.batch_size)
    if args.batch_size > num_images:
        raise UsageError(f"--batch-size {args.batch_size} exceeds the {num_images} training images")
    if args.crop_min is None:
        args.crop_min = SMALL_CROP_MIN if is_grid and args.img_size <= SMALL else CROP_MIN


if __name__ == "__main__":
    with one_clear_line("main_lincls.py"):
        parse(sys.argv[1:])
