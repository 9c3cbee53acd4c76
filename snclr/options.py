"""The flags of main_snclr.py: definitions in groups, defaults that depend on other flags, and the checks before anything runs.

Imports neither torch nor anything slow, so that a wrong flag is answered at once; `python -m snclr.options FLAGS` only checks.
"""

import argparse
import ast
import math
import os
import shlex
import sys

from .running.errors import UsageError, one_clear_line

METHODS = ("snclr", "nnclr", "mocov3", "mocov2")
LOCAL_DATASETS = ("folder", "tree", "list", "shards")  # in the user's own files
TORCHVISION_DATASETS = (
    "cifar10",
    "cifar100",
    "stl10",
    "svhn",
    "flowers102",
    "pets",
    "food101",
    "dtd",
    "aircraft",
)
DATASETS = ("embedded", *LOCAL_DATASETS, *TORCHVISION_DATASETS)
IMG_SIZES = {
    "embedded": 32,
    "cifar10": 32,
    "cifar100": 32,
    "svhn": 32,
    "stl10": 96,
}  # all others: 224
ARCHS = ("vit_tiny", "vit_small", "vit_base", "vit_conv_small", "vit_conv_base")
ARCHS += ("resnet8", "resnet18", "resnet34", "resnet50", "resnet101")
OPTIMIZERS = {  # name: class, arguments beside parameter groups and rate (snclr/optim.py builds them)
    "adamw": ("torch.optim.AdamW", {"fused": True}),
    "lars": ("snclr.optim.LARS", {}),
    "sgd": ("torch.optim.SGD", {"momentum": 0.9, "fused": True}),
}
AMP = ("off", "auto", "bf16", "fp16")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MEAN_STD = {  # as commonly used; all others take ImageNet's (`python -m snclr.mean_std` measures a set's own)
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "embedded": ((0.587, 0.587, 0.587), (0.171, 0.171, 0.171)),
}
POSITIVE = (
    "patch_size",
    "width",
    "snclr_dim",
    "snclr_mlp_dim",
    "snclr_t",
    "bank_size",
    "positiveness_t",
    "gamma",
    "epochs",
)
POSITIVE += (
    "batch_size",
    "lr",
    "print_freq",
    "crop_min",
    "local_size",
    "stop_after_epochs",
    "stop_after_steps",
    "micro_batch",
    "keep",
)
POSITIVE += ("timeout_minutes",)  # other numbers may be 0
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EMBEDDED_RECIPE = os.path.join(ROOT, "configs", "embedded.args")


class _Parser(argparse.ArgumentParser):
    """Reads @file recipes: flags as on a command line, any number a line, # starts a comment; errors become UsageError."""

    def convert_arg_line_to_args(self, line):
        return [_where_it_lies(word) for word in shlex.split(line, comments=True)]

    def error(self, message):
        message = message.replace("[Errno 2] No such file or directory:", "there is no recipe")
        raise UsageError(f"{message} (--help lists all flags)")

    def parse_args(self, args=None, namespace=None):
        try:
            # else FILE --flag DATA would be refused: an optional argument would be looked for beside the one before it alone
            return super().parse_intermixed_args([_where_it_lies(word) for word in args], namespace)
        except UsageError:
            raise
        except (
            ValueError,
            RecursionError,
        ) as error:  # an open quote, a binary file, a recipe that reads itself
            raise UsageError(f"a recipe among {' '.join(args)} cannot be read: {error}") from error


def _where_it_lies(word: str) -> str:
    """An @FILE that is not here may be one of the repository's: recipes can name others, wherever they are started from."""
    there = os.path.join(ROOT, word[1:])
    return (
        f"@{there}"
        if word.startswith("@") and not os.path.exists(word[1:]) and os.path.isfile(there)
        else word
    )


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each flag that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def new_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser that reads @FILE recipes and turns every error into a UsageError."""
    return _Parser(
        prog=prog,
        description=description,
        epilog="@FILE reads flags from a recipe of configs/; flags after it override it.",
        fromfile_prefix_chars="@",
        formatter_class=_Help,
        allow_abbrev=False,
    )


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which images are opened (snclr/datasets/sources.py), the same for every command."""
    on_off = argparse.BooleanOptionalAction
    g = parser.add_argument_group("data")
    g.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="folder, list or tar file of the images; absent: the embedded set",
    )
    kinds = (
        f"what DATA is: {', '.join(DATASETS)} (default: what it looks like; embedded without DATA)"
    )
    g.add_argument("--dataset", choices=DATASETS, metavar="KIND", help=kinds)
    g.add_argument(
        "--val",
        metavar="PATH",
        help="validation images, of the same kind (default: DATA/val beside DATA/train)",
    )
    g.add_argument(
        "--labels",
        metavar="FILE",
        help="one label a line, in the order of the images; none: use no labels",
    )
    g.add_argument("--val-labels", metavar="FILE", help="the same for the validation images")
    g.add_argument(
        "--download",
        action=on_off,
        default=False,
        help="fetch a torchvision set into DATA where it is missing",
    )
    g.add_argument(
        "--subset",
        type=float,
        metavar="N",
        help="train on N images, or on this share of them if below 1",
    )
    g.add_argument(
        "--subset-seed",
        type=int,
        default=0,
        metavar="N",
        help="which ones; a smaller subset is part of a larger",
    )
    g.add_argument(
        "--mean",
        type=float,
        nargs=3,
        metavar="X",
        help="of the channels, in 0..1 (default: the set's)",
    )
    g.add_argument(
        "--std",
        type=float,
        nargs=3,
        metavar="X",
        help="as --mean; `python -m snclr.mean_std DATA` measures both",
    )
    g.add_argument(
        "--img-size",
        type=int,
        metavar="PX",
        help="side of a view (default: 224; 32 or 96 for sets of that size)",
    )
    bad = "at an image that cannot be read: end the run, or let others take its place and list it in bad_images.txt"
    g.add_argument("--on-bad-image", choices=("fail", "skip"), default="fail", help=bad)
    g.add_argument(
        "-j",
        "--workers",
        type=int,
        metavar="N",
        help="processes a rank that decode (default: one a core, up to 8)",
    )


def add_backbone_flags(
    parser: argparse.ArgumentParser, default_arch: str | None
) -> argparse._ArgumentGroup:
    """The flags that name a backbone (snclr/backbones.py); returns their group."""
    g = parser.add_argument_group("model")
    archs = f"backbone: {', '.join(ARCHS)}, or timm:NAME for any of timm's"
    g.add_argument("-a", "--arch", default=default_arch, help=archs)
    g.add_argument(
        "--timm-kwargs",
        nargs="+",
        type=_key_value,
        metavar="KEY=VALUE",
        help="arguments of a timm:NAME model",
    )
    g.add_argument("--patch-size", type=int, default=16, metavar="PX", help="side of a ViT's patch")
    g.add_argument(
        "--width",
        type=int,
        metavar="N",
        help="channels of a ResNet's first stage (default: the arch's own)",
    )
    stem = "ResNet stem for images of about 32 px: 3x3, no pool"
    g.add_argument("--small-stem", action=argparse.BooleanOptionalAction, default=False, help=stem)
    return g


def check_backbone(args: argparse.Namespace) -> None:
    """Backbone flags that cannot work. Raises UsageError."""
    if args.arch not in ARCHS and not args.arch.startswith("timm:"):
        raise UsageError(
            f"--arch {args.arch} is unknown; known are {', '.join(ARCHS)}, and timm:NAME for any model of timm"
        )
    if args.timm_kwargs and not args.arch.startswith("timm:"):
        raise UsageError(f"--timm-kwargs are for --arch timm:NAME, not for {args.arch}")
    if args.arch.startswith("vit_conv") and args.patch_size != 16:
        raise UsageError(
            f"--arch {args.arch} has a stem for --patch-size 16, found {args.patch_size}"
        )
    if args.arch.startswith("vit") and args.img_size % args.patch_size:
        raise UsageError(
            f"--img-size {args.img_size} is not a multiple of --patch-size {args.patch_size}"
        )


def _key_value(text: str) -> list:
    """'key=value' as [key, value], the value a Python literal where it is one."""
    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, found {text!r}")
    try:
        return [key, ast.literal_eval(value)]
    except (ValueError, SyntaxError):
        return [key, value]


def build_parser() -> argparse.ArgumentParser:
    """All flags of main_snclr.py, in groups."""
    parser = new_parser(
        "main_snclr.py",
        "Self-supervised pretraining with soft neighbours (SNCLR) and its relatives.",
    )
    on_off = argparse.BooleanOptionalAction

    add_data_flags(parser)
    g = parser.add_argument_group("views")
    g.add_argument(
        "--crop-min",
        type=float,
        metavar="SHARE",
        help="smallest crop, as a share of the area (default: 0.08; 0.2 with --method mocov2)",
    )
    g.add_argument("--blur", action=on_off, help="Gaussian blur (default: on above 32 px)")
    g.add_argument(
        "--local-views",
        type=int,
        default=0,
        metavar="N",
        help="small crops per image beside the two global views (multi-crop)",
    )
    g.add_argument(
        "--local-size",
        type=int,
        metavar="PX",
        help="side of a local view (default: 3/7 of --img-size, to a multiple of 16 px)",
    )
    g.add_argument(
        "--local-crop-max",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="largest crop of a local view; the smallest is 0.05",
    )

    g = add_backbone_flags(parser, default_arch="vit_small")
    g.add_argument(
        "--init-from",
        metavar="FILE",
        help="backbone weights to start from: a checkpoint or state dict, any layout",
    )
    g.add_argument(
        "--stop-grad-conv1",
        action=on_off,
        default=False,
        help="freeze a ViT's random patch embedding",
    )
    g.add_argument(
        "--snclr-dim",
        type=int,
        default=256,
        metavar="D",
        help="dimension of projection and prediction",
    )
    g.add_argument(
        "--snclr-mlp-dim",
        type=int,
        default=4096,
        metavar="N",
        help="hidden width of projector and predictor",
    )

    g = parser.add_argument_group("objective")
    g.add_argument("--method", choices=METHODS, default="snclr", help="what is learned")
    g.add_argument(
        "--snclr-t", type=float, default=0.2, metavar="T", help="temperature of the contrast"
    )
    g.add_argument(
        "--snclr-m", type=float, default=0.99, metavar="M", help="momentum of the encoder average"
    )
    g.add_argument(
        "--snclr-m-cos",
        action=on_off,
        default=False,
        help="raise that momentum to 1 by half a cosine",
    )
    g.add_argument(
        "--bank-size", type=int, default=128000, metavar="M", help="rows of the memory bank"
    )
    g.add_argument("--topk", type=int, default=30, metavar="K", help="soft neighbours of an image")
    g.add_argument(
        "--form",
        choices=("sum_of_logs", "log_of_sum"),
        default="sum_of_logs",
        help="loss: as released or as printed",
    )
    weights = "of the neighbours (positiveness): as released, with the paper's trained layers f1 and f2, or all alike"
    g.add_argument(
        "--weights",
        choices=("attention", "projected", "uniform"),
        default="attention",
        help=weights,
    )
    g.add_argument(
        "--gamma",
        type=float,
        default=1.0,
        metavar="G",
        help="divides the neighbours' weights (the paper's scale)",
    )
    g.add_argument(
        "--positiveness-t",
        type=float,
        default=1.0,
        metavar="T",
        help="temperature of the attention weights",
    )
    g.add_argument(
        "--detach-weights", action=on_off, default=False, help="no gradient through the weights"
    )
    g.add_argument(
        "--threshold", action=on_off, default=False, help="drop weights that are not above uniform"
    )
    g.add_argument(
        "--exclude-own-image",
        action=on_off,
        default=True,
        help="an older copy of an image is no neighbour of it",
    )
    g.add_argument(
        "--nn-warmup-epochs",
        type=float,
        default=0,
        metavar="E",
        help="epochs before neighbours are used",
    )

    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=int, default=300, metavar="N", help="length of the schedule")
    g.add_argument(
        "-b",
        "--batch-size",
        type=int,
        default=4096,
        metavar="N",
        help="global batch, over all ranks",
    )
    g.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        metavar="NAME",
        help=", ".join(OPTIMIZERS),
    )
    g.add_argument(
        "--lr",
        type=float,
        default=1.5e-4,
        metavar="LR",
        help="base rate; the peak is this times batch/256",
    )
    g.add_argument(
        "--wd", type=float, default=0.1, metavar="WD", help="weight decay of matrices and filters"
    )
    g.add_argument(
        "--warmup-epochs",
        type=float,
        metavar="E",
        help="linear warm-up (default: 40, at most a fifth of --epochs)",
    )
    g.add_argument(
        "--amp", choices=AMP, default="off", help="16-bit encoders; auto: where it is native"
    )
    g.add_argument(
        "--micro-batch",
        type=int,
        metavar="N",
        help="views a rank encodes at a time: same gradients, less memory",
    )
    g.add_argument(
        "--grad-checkpointing",
        action=on_off,
        default=False,
        help="recompute each block in backward: less memory",
    )
    g.add_argument(
        "--compile",
        action=on_off,
        default=False,
        help="compile the backbones: the first steps take minutes",
    )
    g.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of initialisation, order and augmentation"
    )

    g = parser.add_argument_group("run")
    g.add_argument(
        "--workdir", metavar="DIR", help="where everything is left (default: a new folder in runs/)"
    )
    g.add_argument(
        "--resume",
        metavar="PATH",
        help="checkpoint to go on from; auto: the newest of --workdir, if any",
    )
    g.add_argument(
        "--stop-after-epochs",
        type=int,
        metavar="N",
        help="save and stop early, the schedule unchanged",
    )
    g.add_argument(
        "--stop-after-steps", type=int, metavar="N", help="the same, after N steps in all"
    )
    g.add_argument(
        "--save-freq",
        type=int,
        default=0,
        metavar="E",
        help="epochs between checkpoints that are kept; 0: none",
    )
    g.add_argument(
        "--save-every-minutes",
        type=float,
        default=30,
        metavar="N",
        help="save within an epoch, too; 0: do not",
    )
    g.add_argument(
        "--keep",
        type=int,
        default=2,
        metavar="N",
        help="last checkpoints to keep, beside those of --save-freq",
    )
    g.add_argument(
        "--skip-non-finite",
        type=int,
        default=3,
        metavar="N",
        help="bad steps to skip before the run is stopped",
    )
    g.add_argument(
        "--timeout-minutes",
        type=float,
        default=30,
        metavar="N",
        help="wait for another rank before it is given up",
    )
    g.add_argument(
        "--print-freq", type=int, default=10, metavar="N", help="steps between log lines"
    )
    g.add_argument(
        "--eval-freq",
        type=int,
        default=10,
        metavar="E",
        help="epochs between kNN evaluations; 0: never",
    )
    g.add_argument(
        "--viz-freq",
        type=int,
        default=10,
        metavar="E",
        help="epochs between pictures in TensorBoard; 0: never",
    )
    g.add_argument(
        "--eval-encoder",
        choices=("online", "momentum"),
        default="online",
        help="encoder that is evaluated",
    )
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags to settings, with the defaults that depend on others filled in, checked. Raises UsageError."""
    args = build_parser().parse_args(argv)
    resolve_resume(args)
    resolve_data(args)
    resolve_views(args)
    base = f"@{EMBEDDED_RECIPE}"
    if args.dataset == "embedded" and argv[:1] != [base]:
        return parse([base, *argv])  # the general defaults are ImageNet's
    if args.warmup_epochs is None:
        args.warmup_epochs = min(40, args.epochs / 5)
    if args.crop_min is None:
        args.crop_min = 0.2 if args.method == "mocov2" else 0.08
    if args.local_size is None:
        args.local_size = max(16, 16 * round(args.img_size * 3 / 7 / 16))
    if args.blur is None:
        args.blur = args.img_size > 32
    check(args, world_size=int(os.environ.get("WORLD_SIZE", 1)))
    return args


def parse_data(argv: list[str]) -> argparse.Namespace:
    """The data flags alone, resolved and checked, for commands that only look at images. Raises UsageError."""
    parser = new_parser(
        "snclr.mean_std", "Measures the mean and standard deviation of the channels."
    )
    add_data_flags(parser)
    args = parser.parse_args(argv)
    args.workdir = None
    resolve_data(args)
    resolve_views(args)
    check_data(args)
    return args


def resolve_resume(args: argparse.Namespace) -> None:
    """A run that torchrun, start.sh or SLURM starts again goes on where it was."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SNCLR_RESTART_COUNT", "SLURM_RESTART_COUNT")
    if any(os.environ.get(name, "0") != "0" for name in counts) and args.resume is None:
        args.resume = "auto"


def resolve_views(args: argparse.Namespace) -> None:
    """Fill in the size of the views and the channels' mean and standard deviation."""
    if args.img_size is None:
        args.img_size = IMG_SIZES.get(args.dataset, 224)
    mean, std = MEAN_STD.get(args.dataset, IMAGENET)
    args.mean, args.std = args.mean or list(mean), args.std or list(std)


def resolve_data(args: argparse.Namespace) -> None:
    """Fill in what kind of data DATA is, and the number of workers. Raises UsageError for half a normalisation."""
    if (args.mean is None) != (args.std is None) or any(
        not 0 < value <= 1 for value in args.std or ()
    ):
        raise UsageError(
            "--mean and --std belong together, three numbers each, --std above 0 and in units of 0..1"
        )
    if args.dataset is None:
        args.dataset = _recognised(args.data)
    if args.workers is None:
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        args.workers = max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _recognised(data):
    if data is None:
        return "embedded"
    if os.path.isfile(data):
        return {".tar": "shards", ".txt": "list"}.get(os.path.splitext(data)[1], "folder")
    train = os.path.join(data, "train")
    place = train if os.path.isdir(train) else data
    entries = list(os.scandir(place)) if os.path.isdir(place) else []
    if any(entry.name.endswith(".tar") for entry in entries):
        return "shards"
    # a folder that is not there is called one with classes, too: it is refused as such
    has_classes = place == train and any(entry.is_dir() for entry in entries)
    return "folder" if has_classes or not os.path.isdir(data) else "tree"


def check_data(args: argparse.Namespace, positive: tuple[str, ...] = ()) -> None:
    """Data flags that cannot work, and numbers that are not finite, negative, or 0 where `positive` names them: UsageError."""
    positive = {"img_size", "subset", *positive}
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not name.endswith("seed"):
            least = "above 0" if name in positive else "0 or more"
            if not (math.isfinite(value) and value >= 0) or (value == 0 and name in positive):
                raise UsageError(f"--{name.replace('_', '-')} must be {least}, found {value}")
    if args.subset is not None and args.subset > 1 and args.subset % 1:
        raise UsageError(
            f"--subset must be a whole number of images or a share below 1, found {args.subset}"
        )
    if args.dataset == "embedded":
        if args.data is not None:
            raise UsageError(
                f"the embedded data set is drawn, not read: leave out {args.data} or choose another --dataset"
            )
    elif args.data is None:
        raise UsageError(f"--dataset {args.dataset} needs DATA, the place of the images")
    if args.download and args.dataset not in TORCHVISION_DATASETS:
        raise UsageError(
            f"--download is for torchvision's sets ({', '.join(TORCHVISION_DATASETS)}), not for {args.dataset}"
        )
    needs_file = args.dataset == "list" or (args.data is not None and args.data.endswith(".tar"))
    if (
        args.data is not None
        and not (os.path.isfile if needs_file else os.path.isdir)(args.data)
        and not args.download
    ):
        kind = "file" if needs_file else "folder"
        hint = "a folder of images or of .tar files, one .tar file, or a .txt file that lists paths"
        raise UsageError(
            f"--dataset {args.dataset}: there is no {kind} {args.data}; DATA is {hint}"
        )
    for flag, path in (
        ("--val", args.val),
        ("--labels", args.labels),
        ("--val-labels", args.val_labels),
    ):
        if path is None or (flag == "--labels" and path == "none"):
            continue
        if args.dataset not in LOCAL_DATASETS or (flag != "--val" and args.dataset == "folder"):
            raise UsageError(
                f"{flag} {path} has no meaning for --dataset {args.dataset}, which brings its own"
            )
        if not os.path.exists(path):
            raise UsageError(f"{flag} {path} does not exist")
    if args.val_labels and not args.labels:
        raise UsageError("--val-labels needs the training images' --labels as well")


def check(args: argparse.Namespace, world_size: int) -> None:
    """Combinations that cannot work, before anything slow or lasting is done. Raises UsageError."""
    for name in ("crop_min", "snclr_m"):
        if not 0 <= getattr(args, name) <= 1:
            raise UsageError(
                f"--{name.replace('_', '-')} must be between 0 and 1, found {getattr(args, name)}"
            )
    check_data(args, POSITIVE)
    if args.batch_size < 2:
        raise UsageError("--batch-size must be at least 2: batch norm and contrast need company")
    if not -(2**63) <= args.seed < 2**63:
        raise UsageError(f"--seed must fit into 64 bits, found {args.seed}")
    for name in ("warmup_epochs", "nn_warmup_epochs"):
        if getattr(args, name) > args.epochs:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(args, name):g} exceeds --epochs {args.epochs}"
            )
    if args.batch_size % world_size:
        raise UsageError(
            f"--batch-size {args.batch_size} is global and must be divisible by the {world_size} ranks"
        )
    check_backbone(args)
    if args.local_views:
        check_local_views(args)
    if args.method == "snclr" and args.topk > args.bank_size:
        raise UsageError(f"--topk {args.topk} exceeds --bank-size {args.bank_size}")
    if args.threshold and (args.weights == "uniform" or args.topk == 1):
        raise UsageError(
            "--threshold would remove every neighbour with --weights uniform or --topk 1: weights must differ"
        )
    if (
        args.weights == "projected"
        and args.method == "snclr"
        and (args.detach_weights or args.topk < 2)
    ):
        found = "--detach-weights" if args.detach_weights else f"--topk {args.topk}"
        raise UsageError(
            f"--weights projected has layers that {found} would leave without a gradient: leave one of them out"
        )
    if args.eval_encoder == "momentum" and args.method == "nnclr":
        raise UsageError("--method nnclr has no momentum encoder: use --eval-encoder online")
    if args.init_from is not None and not os.path.isfile(args.init_from):
        raise UsageError(f"--init-from {args.init_from}: there is no such file")
    check_workdir(args.workdir, args.resume, ("metrics.jsonl", "checkpoint_last.pth.tar"))


def check_local_views(args: argparse.Namespace) -> None:
    """Local views that cannot work. Raises UsageError."""
    if args.method == "mocov2":
        raise UsageError("--method mocov2 compares one view with one other: no --local-views")
    if not 0.05 <= args.local_crop_max <= 1:
        raise UsageError(
            f"--local-crop-max must be between 0.05 and 1, found {args.local_crop_max}"
        )
    if args.arch.startswith("vit") and args.local_size % args.patch_size:
        raise UsageError(
            f"--local-size {args.local_size} is not a multiple of --patch-size {args.patch_size}"
        )


def check_workdir(workdir: str | None, resume: str | None, leftovers: tuple[str, ...]) -> None:
    """That workdir can be written to, and holds no other run (one of the files `leftovers`) than the resumed one."""
    parent = os.path.abspath(workdir or ".")
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise UsageError(
            f"--workdir {workdir} cannot be made: {parent} is a file, or may not be written to"
        )
    if resume == "auto":
        if workdir is None and "SLURM_JOB_ID" not in os.environ:
            raise UsageError("--resume auto looks into --workdir, which is not given")
        return
    if resume is not None and not os.path.isfile(resume):
        raise UsageError(f"--resume {resume}: there is no such checkpoint")
    if workdir is not None and any(
        os.path.exists(os.path.join(workdir, name)) for name in leftovers
    ):
        home = os.path.dirname(os.path.abspath(resume)) if resume else None
        if home != os.path.abspath(workdir):
            raise UsageError(
                f"--workdir {workdir} holds another run: add --resume auto to go on, or choose a new one"
            )


if __name__ == "__main__":
    with one_clear_line("main_snclr.py"):
        parse(sys.argv[1:])
