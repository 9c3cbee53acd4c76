"""The flags of main_lincls.py, checked before anything runs. Imports nothing slow."""

import argparse
import math
import os
import sys

from .. import options
from ..running.errors import UsageError, one_clear_line

# 0.001 to 10, three a decade
RATES = tuple(round(10 ** (-3 + step / 3), 6) for step in range(13))
PROTOCOLS = ("grid", "mocov3")
STATE_FILE = "lincls_last.pth.tar"  # in the workdir

# Settings that cannot change the features of the training images. All others are part of the key of
# --cache-features, and so are the encoder's weights and the precision in use.
NOT_IN_FEATURES = {"val", "val_labels", "download", "workers", "workdir", "resume", "retrain"}
NOT_IN_FEATURES |= {"pretrained", "amp", "epochs", "batch_size", "lrs"}
NOT_IN_FEATURES |= {"cache_features", "cache_limit_gb"}
NOT_IN_FEATURES |= {"finetune", "optimizer", "lr", "head_lr", "wd", "layer_decay", "warmup_epochs"}

# Defaults of the grid's settings that --protocol mocov3 fixes: there these flags are refused.
GRID = {"lrs": list(RATES), "select": "heldout", "heldout": 0.1}
GRID |= {"retrain": False, "cache_features": False, "cache_copies": 1}
SMALL = 64  # px; up to this size, the grid trains on whole images by default
CROP_MIN, SMALL_CROP_MIN = 0.08, 1.0


def build_parser() -> argparse.ArgumentParser:
    """All flags, in groups. A default of None is filled in by `parse` or `resolve_training`."""
    parser = options.new_parser(
        "main_lincls.py",
        "Evaluates an encoder: kNN and linear probes on its frozen features, or fine-tuning.",
    )
    on_off = argparse.BooleanOptionalAction
    count, positive = options.number(int, above_zero=True), options.number(float, above_zero=True)
    share = options.number(float, above_zero=True, most=1)
    g = parser.add_argument_group("encoder")
    text = "checkpoint or state dict in any layout (required)"
    # free: on resume the encoder's weights are compared
    options.flag(g, "--pretrained", metavar="FILE", help=text, on_resume="free")
    text = "encoder of the file; untrained: its architecture, random weights; pixels: no encoder"
    choices = ("online", "momentum", "untrained", "pixels")
    g.add_argument("--encoder", choices=choices, default="online", help=text)
    options.add_backbone_flags(parser, default_arch=None)
    parser.set_defaults(patch_size=None, small_stem=None)  # from the file, else load_encoder's
    options.add_data_flags(parser)

    g = parser.add_argument_group("labels")
    text = "share of each class's training images to use, chosen by --subset-seed"
    g.add_argument("--label-fraction", type=share, metavar="SHARE", help=text)
    text = "text file with the names of the training images to use, one a line"
    g.add_argument("--label-list", metavar="FILE", help=text)

    g = parser.add_argument_group("training")
    text = "passes over the images (default: 90; fine-tuning: 50)"
    g.add_argument("--epochs", type=count, metavar="N", help=text)
    text = "images a step, over all ranks (default: 1024, less for sets that give fewer than 16 "
    text += "steps an epoch; fine-tuning: 256)"
    g.add_argument("-b", "--batch-size", type=count, metavar="N", help=text)
    text = f"smallest training crop, as a share of the area (default: {CROP_MIN}; "
    text += f"for the grid up to {SMALL} px: {SMALL_CROP_MIN:g}, whole images)"
    g.add_argument("--crop-min", type=share, metavar="SHARE", help=text)
    text = "precision of the encoder (default: auto, 16 bits where native; mocov3: off)"
    g.add_argument("--amp", choices=options.AMP, help=text)
    text = "seed of initialisation, order, crops and held-out images"
    g.add_argument("--seed", type=options.seed, default=0, metavar="N", help=text)

    g = parser.add_argument_group("linear probe")
    text = "grid: many heads, the best on held-out training images; mocov3: as published, one head "
    text += "at one rate on all images, float32"
    g.add_argument("--protocol", choices=PROTOCOLS, default="grid", help=text)
    text = "learning rates of the grid, each times batch/256 (default: 0.001 to 10 in 13 steps)"
    g.add_argument("--lrs", type=positive, nargs="+", metavar="LR", help=text)
    text = "images that choose the head of the grid (default: heldout)"
    g.add_argument("--select", choices=("heldout", "val"), help=text)
    text = "share of each class that --select heldout holds out of training (default: 0.1)"
    g.add_argument("--heldout", type=share, metavar="SHARE", help=text)
    text = "then train the chosen head again, on all training images (default: off)"
    options.flag(g, "--retrain", action=on_off, help=text, on_resume="free")
    text = "encode the training images once, and train on these features (default: off)"
    g.add_argument("--cache-features", action=on_off, help=text)
    text = "1: the view used for testing; more: this many random crops of each image (default: 1)"
    g.add_argument("--cache-copies", type=count, metavar="N", help=text)
    text = "above this size, cached features are a file in --workdir"
    g.add_argument(
        "--cache-limit-gb", type=options.number(float), default=4, metavar="GB", help=text
    )

    g = parser.add_argument_group("fine-tuning")
    text = "train the encoder, too; with --encoder untrained: supervised training from scratch"
    g.add_argument("--finetune", action=on_off, default=False, help=text)
    text = "default: adamw for ViTs, sgd for others"
    g.add_argument("--optimizer", choices=("sgd", "adamw"), help=text)
    text = "peak rate of the encoder, times batch/256 (default: depends on the optimiser)"
    g.add_argument("--lr", type=positive, metavar="LR", help=text)
    text = "peak rate of the head (default: ten times --lr; untrained encoder: the same as --lr)"
    g.add_argument("--head-lr", type=positive, metavar="LR", help=text)
    text = "weight decay of matrices and filters (default: depends on the optimiser)"
    g.add_argument("--wd", type=options.number(float), metavar="WD", help=text)
    text = "rate of a layer, relative to the layer after it (default: 0.75 for ViTs, else 1)"
    g.add_argument("--layer-decay", type=share, metavar="F", help=text)
    text = "linear warm-up (default: a tenth of --epochs)"
    g.add_argument("--warmup-epochs", type=options.number(float), metavar="E", help=text)

    g = parser.add_argument_group("run")
    text = "folder of results and state (default: a new folder beside FILE)"
    options.flag(g, "--workdir", metavar="DIR", help=text, on_resume="free")
    text = "auto: continue the evaluation in --workdir, if there is one"
    options.flag(g, "--resume", choices=("auto",), help=text, on_resume="free")
    return parser


# settings that may change when an evaluation is resumed
FREE_ON_RESUME = {
    name
    for name, kind in options.flag_property(build_parser(), "on_resume").items()
    if kind == "free"
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags to settings, checked. Raises UsageError.

    The checkpoint decides arch, image size, mean and std later; `resolve_training` fills in what
    depends on the images.
    """
    args = build_parser().parse_args(argv)
    if args.pretrained is None:
        raise UsageError("--pretrained FILE is needed: the checkpoint to evaluate")
    if not os.path.isfile(args.pretrained):
        raise UsageError(f"--pretrained {args.pretrained}: there is no such file")
    _resolve_protocol(args)
    if args.epochs is None:
        args.epochs = 50 if args.finetune else 90
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 10
    options.resolve_resume(args)
    options.resolve_data(args)
    options.check_data(args)
    _check(args)
    if args.workdir is None:
        args.workdir = f"{os.path.splitext(args.pretrained)[0]}_lincls"
    if os.path.exists(os.path.join(args.workdir, "metrics.jsonl")):
        raise UsageError(
            f"--workdir {args.workdir} is the folder of a pretraining run, "
            "whose args.json would be lost: choose a new one"
        )
    options.check_workdir(args.workdir, args.resume, ("results.json", STATE_FILE))
    return args


def _resolve_protocol(args):
    """Fill in the defaults of the protocol; UsageError for flags that contradict it."""
    given = [name for name in (*GRID, "crop_min") if getattr(args, name) is not None]
    if args.protocol == "mocov3" and (given or args.amp not in (None, "off")):
        flag = (given or ["amp"])[0].replace("_", "-")
        raise UsageError(
            "--protocol mocov3 fixes rate, crops, training images and precision: "
            f"leave out --{flag}, or use --protocol grid"
        )
    if args.finetune and (args.protocol != "grid" or args.retrain):
        flag = "--retrain" if args.retrain else f"--protocol {args.protocol}"
        raise UsageError(f"{flag} is for the linear probe: leave it or --finetune out")
    if args.retrain and args.select == "val":
        raise UsageError("--retrain needs held-out images: with --select val there are none")
    for name, value in GRID.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.amp is None:
        args.amp = "off" if args.protocol == "mocov3" else "auto"


def _check(args):
    """Raises UsageError for values that cannot work."""
    if args.batch_size is not None:
        check_batch_size(args.batch_size)
    if args.heldout == 1:
        raise UsageError("--heldout must be below 1: it leaves no image to train on")
    if args.warmup_epochs >= args.epochs:
        raise UsageError(
            "--warmup-epochs must be less than --epochs, "
            f"found {args.warmup_epochs:g} and {args.epochs}"
        )
    if args.label_list is not None and not os.path.isfile(args.label_list):
        raise UsageError(f"--label-list {args.label_list}: there is no such file")
    if args.label_list is not None and args.label_fraction is not None:
        raise UsageError("--label-list and --label-fraction exclude each other")
    if args.finetune and args.encoder == "pixels":
        raise UsageError("--finetune cannot train --encoder pixels: it has no weights")


def resolve_training(args: argparse.Namespace, num_images: int) -> None:
    """Fill in --batch-size and --crop-min for num_images training images of args.img_size.

    Of a 32-px image the published crops (at least 8 % of the area) leave 9 px. A probe that is
    trained on them is worse on whole images than kNN (docs/RESULTS.md). Raises UsageError.
    """
    is_grid = args.protocol == "grid" and not args.finetune
    if args.batch_size is None:
        args.batch_size = 256 if args.finetune else 1024
        if is_grid and num_images < 16 * args.batch_size:
            args.batch_size = 2 ** max(3, int(math.log2(num_images / 16)))
        check_batch_size(args.batch_size)
    if args.crop_min is None:
        args.crop_min = SMALL_CROP_MIN if is_grid and args.img_size <= SMALL else CROP_MIN


def check_batch_size(batch_size: int) -> None:
    """Raises UsageError if the ranks cannot share a batch equally."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if batch_size % world_size:
        raise UsageError(
            f"--batch-size {batch_size} is global and must be divisible by the {world_size} ranks"
        )


if __name__ == "__main__":
    with one_clear_line("main_lincls.py"):
        parse(sys.argv[1:])
