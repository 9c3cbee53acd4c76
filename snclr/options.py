"""The flags of main_snclr.py: their groups, defaults that depend on others, and checks.

Imports neither torch nor anything slow, so that a wrong flag is answered at once.
`python -m snclr.options FLAGS` only checks the flags.
"""

import argparse
import ast
import math
import os
import re
import shlex
import sys
from collections.abc import Callable

from .running.errors import UsageError, one_clear_line
from .running.safe_files import read_text

METHODS = ("snclr", "nnclr", "mocov3", "mocov2")
FORMS = ("sum_of_logs", "log_of_sum")
ARCHS = ("vit_tiny", "vit_small", "vit_base", "vit_conv_small", "vit_conv_base")
ARCHS += ("resnet8", "resnet18", "resnet34", "resnet50", "resnet101")
# attention heads; vit_small has 12 as in MoCo v3, while timm's, DeiT's and DINO's ViT-S has 6
NUM_HEADS = {
    "vit_tiny": 3,
    "vit_small": 12,
    "vit_base": 12,
    "vit_conv_small": 12,
    "vit_conv_base": 12,
}
OPTIMIZERS = {  # name: class, and its arguments beside the parameter groups and the learning rate
    "adamw": ("torch.optim.AdamW", {"fused": True}),
    "lars": ("snclr.optim.LARS", {}),
    "sgd": ("torch.optim.SGD", {"momentum": 0.9, "fused": True}),
}
AMP = ("off", "auto", "bf16", "fp16")
LOCAL_DATASETS = ("folder", "tree", "list", "shards")  # the user's own files
TORCHVISION_DATASETS = ("cifar10", "cifar100", "stl10", "svhn", "flowers102", "pets", "food101")
TORCHVISION_DATASETS += ("dtd", "aircraft")
DATASETS = ("embedded", *LOCAL_DATASETS, *TORCHVISION_DATASETS)
# all others: 224
IMG_SIZES = {"embedded": 32, "cifar10": 32, "cifar100": 32, "svhn": 32, "stl10": 96}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# mean and standard deviation as commonly used; all others take ImageNet's
# (`python -m snclr.mean_std` measures those of a data set)
MEAN_STD = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "embedded": ((0.587, 0.587, 0.587), (0.171, 0.171, 0.171)),
}
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EMBEDDED_RECIPE = os.path.join(ROOT, "configs", "embedded.args")


class _Parser(argparse.ArgumentParser):
    """Reads @FILE recipes: flags as on a command line, any number a line; # starts a comment.

    Every error becomes a UsageError.
    """

    def error(self, message):
        # "argument -b/--batch-size: must be" -> "--batch-size must be"
        message = re.sub(r"^argument (?:-\w/)?(--[\w-]+): must be", r"\1 must be", message)
        raise UsageError(f"{message} (--help lists all flags)")

    def parse_args(self, args=None, namespace=None):
        check_environment()
        # intermixed: otherwise argparse refuses FILE --flag DATA
        return super().parse_intermixed_args(_read_recipes(args, []), namespace)


def _read_recipes(words: list[str], opened: list[str]) -> list[str]:
    """The words of a command line with those of its recipes in place of each @FILE. Raises
    UsageError.

    opened: the recipes that were read; their number is limited, since a recipe can name itself.
    """
    result = []
    for word in words:
        if not word.startswith("@"):
            result.append(word)
            continue
        path = _find_recipe(word[1:])
        opened.append(path)
        if len(opened) > 100:
            raise UsageError(f"recipe {path} cannot be read: more than 100 recipes name each other")
        if not os.path.lexists(path):
            raise UsageError(f"there is no recipe {path!r}")
        try:
            lines = read_text(path, limit=2**20).splitlines()
            inner = [part for line in lines for part in shlex.split(line, comments=True)]
        except ValueError as error:  # an open quote; a UsageError is a ValueError, too
            raise UsageError(f"recipe {path} cannot be read: {error}") from error
        result += _read_recipes(inner, opened)
    return result


def _find_recipe(path: str) -> str:
    """A recipe that is not in the current folder is looked for in this repository."""
    own = os.path.join(ROOT, path)
    return own if not os.path.exists(path) and os.path.isfile(own) else path


def check_environment() -> None:
    """Raise UsageError for numbers in the environment that no launcher sets."""
    numbers = {}
    for name, least in (("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        if (text := os.environ.get(name)) is None:
            continue
        if not re.fullmatch("[0-9]{1,7}", text) or int(text) < least:
            raise UsageError(f"the environment's {name} must be {least} or more, found {text!r}")
        numbers[name] = int(text)
    count = numbers.get("WORLD_SIZE", 1)
    if numbers.get("RANK", 0) >= count:
        raise UsageError(
            f"the environment's RANK must be below WORLD_SIZE, {count}, found {numbers['RANK']}"
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
        formatter_class=_Help,
        allow_abbrev=False,
    )


def flag(
    group: argparse._ArgumentGroup, *names: str, on_resume: str = "reported", **arguments
) -> None:
    """Add a flag to a group. arguments: those of argparse.

    on_resume: whether a resumed run may have another value than its checkpoint. 'fixed': no, since
    it decides which images the run sees, or what its state means; 'reported': yes, and the log
    names the change; 'free': yes, since it does not change any result.
    """
    if on_resume not in ("fixed", "reported", "free"):
        raise ValueError(f"on_resume must be fixed, reported or free, found {on_resume!r}")
    group.add_argument(*names, **arguments).on_resume = on_resume


def number(kind: type, *, above_zero: bool = False, most: float = math.inf) -> Callable:
    """An argparse type: a finite int or float of at least 0 (or above 0) and at most `most`; ints
    also fit into 32 bits.
    """
    rule = "above 0" if above_zero else "0 or more"
    if most < math.inf:
        rule = f"above 0 and at most {most}" if above_zero else f"between 0 and {most}"

    def convert(text):
        value = kind(text)
        if not (math.isfinite(value) and 0 <= value <= most) or (above_zero and value == 0):
            raise argparse.ArgumentTypeError(f"must be {rule}, found {text}")
        if kind is int and value >= 2**31:
            raise argparse.ArgumentTypeError(f"must be below 2^31, found {text}")
        return value

    convert.__name__ = kind.__name__  # argparse's messages name it
    return convert


def seed(text: str) -> int:
    """An argparse type: a random seed."""
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be a number of 64 bits, found {text}")
    return value


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that choose the images (snclr/datasets/sources.py), the same for every command."""
    on_off = argparse.BooleanOptionalAction
    g = parser.add_argument_group("data")
    text = "folder, list (.txt) or .tar file of the images; without it, the embedded data set"
    flag(g, "data", nargs="?", metavar="DATA", help=text, on_resume="free")
    text = f"kind of DATA: {', '.join(DATASETS)} (default: found from DATA)"
    flag(g, "--dataset", choices=DATASETS, metavar="KIND", help=text, on_resume="fixed")
    text = "validation images, of the same kind as DATA (default: DATA/val beside DATA/train)"
    flag(g, "--val", metavar="PATH", help=text, on_resume="free")
    text = "text file with one label a line, in the order of the images; none: ignore all labels"
    flag(g, "--labels", metavar="FILE", help=text, on_resume="free")
    text = "the same for the validation images"
    flag(g, "--val-labels", metavar="FILE", help=text, on_resume="free")
    text = "download a torchvision data set to DATA if it is missing"
    flag(g, "--download", action=on_off, default=False, help=text, on_resume="free")
    text = "train on a random subset: N images, or this share of all images if N is below 1"
    kind = number(float, above_zero=True)
    flag(g, "--subset", type=kind, metavar="N", help=text, on_resume="fixed")
    text = "random seed of --subset; with the same seed a smaller subset is part of a larger one"
    flag(g, "--subset-seed", type=seed, default=0, metavar="N", help=text, on_resume="fixed")
    text = "mean of the channels in units of 0..1, to normalise (default: that of the data set)"
    flag(g, "--mean", type=float, nargs=3, metavar="X", help=text)
    text = "standard deviation, as --mean; `python -m snclr.mean_std DATA` measures both"
    flag(g, "--std", type=float, nargs=3, metavar="X", help=text)
    text = "height and width of the encoder's input (default: 224; 32 or 96 for small data sets)"
    kind = number(int, above_zero=True, most=2**14)
    flag(g, "--img-size", type=kind, metavar="PX", help=text, on_resume="fixed")
    text = "values that become black and white in images of more than 8 bits, the same for all "
    text += "images (default: the range of the pixel format, 0 65535, or 0 1 for floating point)"
    kind = dict(type=float, nargs=2, metavar=("LOW", "HIGH"))
    flag(g, "--grey-range", help=text, on_resume="fixed", **kind)
    text = "what to do about an unreadable image: stop, or replace it and list it in bad_images.txt"
    flag(g, "--on-bad-image", choices=("fail", "skip"), default="fail", help=text, on_resume="free")
    text = "worker processes of each rank that load images (default: one a core, at most 8)"
    flag(g, "-j", "--workers", type=number(int), metavar="N", help=text, on_resume="free")


def add_backbone_flags(
    parser: argparse.ArgumentParser, default_arch: str | None
) -> argparse._ArgumentGroup:
    """The flags that describe a backbone (snclr/backbones.py); returns their group."""
    on_off = argparse.BooleanOptionalAction
    g = parser.add_argument_group("model")
    text = f"backbone: {', '.join(ARCHS)}, or timm:NAME for any model of timm"
    flag(g, "-a", "--arch", default=default_arch, help=text, on_resume="fixed")
    flag(
        g,
        "--timm-kwargs",
        nargs="+",
        type=_key_value,
        metavar="KEY=VALUE",
        help="arguments of a timm:NAME model",
        on_resume="fixed",
    )
    kind = number(int, above_zero=True)
    flag(g, "--patch-size", type=kind, default=16, metavar="PX", help="side of a ViT's patch")
    text = "attention heads of a ViT (default: 12, vit_tiny 3; those of weights that are loaded)"
    flag(g, "--num-heads", type=kind, metavar="N", help=text, on_resume="fixed")
    kind = number(int, above_zero=True, most=2**14)
    text = "channels of a ResNet's first stage (default: that of the architecture)"
    flag(g, "--width", type=kind, metavar="N", help=text)
    text = "ResNet stem for images of about 32 px: 3x3 convolution of stride 1, no pooling"
    flag(g, "--small-stem", action=on_off, default=False, help=text, on_resume="fixed")
    return g


def check_backbone(args: argparse.Namespace) -> None:
    """Raise UsageError for backbone flags that cannot work."""
    if args.arch not in ARCHS and not args.arch.startswith("timm:"):
        raise UsageError(
            f"--arch {args.arch} is unknown; known are {', '.join(ARCHS)}, and timm:NAME for any "
            "model of timm"
        )
    check_num_heads(args.num_heads, args.arch)
    if args.timm_kwargs and not args.arch.startswith("timm:"):
        raise UsageError(f"--timm-kwargs are for --arch timm:NAME, not for {args.arch}")
    if args.arch.startswith("vit_conv") and args.patch_size != 16:
        raise UsageError(f"--arch {args.arch} needs --patch-size 16, found {args.patch_size}")
    if args.arch.startswith("vit") and args.img_size % args.patch_size:
        raise UsageError(
            f"--img-size {args.img_size} is not a multiple of --patch-size {args.patch_size}"
        )


def check_num_heads(num_heads: int | None, arch: str) -> None:
    """Raise UsageError for a number of attention heads if the architecture has none to set."""
    if num_heads is not None and arch not in NUM_HEADS:
        hint = "; use --timm-kwargs num_heads=N" if arch.startswith("timm:") else ""
        raise UsageError(f"--num-heads is for {', '.join(NUM_HEADS)}, not for {arch}{hint}")


def _key_value(text: str) -> list:
    """'key=value' as [key, value]; the value is read as a Python literal if it is one."""
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
        "Self-supervised pretraining with soft neighbours (SNCLR) and related methods.",
    )
    on_off = argparse.BooleanOptionalAction

    add_data_flags(parser)

    g = parser.add_argument_group("views")
    text = (
        "smallest area of a random crop, as a share of the image "
        "(default: 0.08; 0.2 with --method mocov2)"
    )
    flag(
        g,
        "--crop-min",
        type=number(float, above_zero=True, most=1),
        metavar="SHARE",
        help=f"{text} (default: 0.08; 0.2 with --method mocov2)",
        on_resume="fixed",
    )
    text = "Gaussian blur of the views (default: on for images above 32 px)"
    flag(g, "--blur", action=on_off, help=text, on_resume="fixed")
    text = "small crops of each image, beside the two global views (multi-crop)"
    kind = number(int)
    flag(g, "--local-views", type=kind, default=0, metavar="N", help=text, on_resume="fixed")
    text = "side of a local view (default: 3/7 of --img-size, rounded to a multiple of 16 px)"
    kind = number(int, above_zero=True)
    flag(g, "--local-size", type=kind, metavar="PX", help=text, on_resume="fixed")
    text = "largest area of a local view, as a share of the image; the smallest is 0.05"
    flag(
        g,
        "--local-crop-max",
        type=number(float, above_zero=True, most=1),
        default=0.25,
        metavar="SHARE",
        help=text,
        on_resume="fixed",
    )

    g = add_backbone_flags(parser, default_arch="vit_small")
    text = "start from the backbone weights in FILE: a checkpoint or state dict of any known layout"
    flag(g, "--init-from", metavar="FILE", help=text)
    text = "freeze the randomly initialised patch embedding of a ViT"
    flag(g, "--stop-grad-conv1", action=on_off, default=False, help=text)
    positive = number(int, above_zero=True)
    kind = number(int, above_zero=True, most=2**20)
    text = "output dimension of the projector and the predictor"
    flag(g, "--snclr-dim", type=kind, default=256, metavar="D", help=text)
    text = "hidden width of the projector and the predictor"
    flag(g, "--snclr-mlp-dim", type=kind, default=4096, metavar="N", help=text)

    g = parser.add_argument_group("objective")
    text = "training objective"
    flag(g, "--method", choices=METHODS, default="snclr", help=text, on_resume="fixed")
    kind = number(float, above_zero=True)
    text = "temperature of the contrastive loss"
    flag(g, "--snclr-t", type=kind, default=0.2, metavar="T", help=text)
    text = "momentum of the momentum encoder: the share of its old weights kept at each step"
    flag(g, "--snclr-m", type=number(float, most=1), default=0.99, metavar="M", help=text)
    text = "increase --snclr-m to 1 over the run, along half a cosine"
    flag(g, "--snclr-m-cos", action=on_off, default=False, help=text)
    text = "rows of the memory bank, which all ranks share"
    flag(g, "--bank-size", type=positive, default=128000, metavar="M", help=text)
    text = "number of soft neighbours of each image"
    flag(g, "--topk", type=number(int), default=30, metavar="K", help=text)
    text = "form of the loss: sum_of_logs as in the released code, log_of_sum as in the paper"
    flag(g, "--form", choices=FORMS, default="sum_of_logs", help=text)
    text = (
        "weights of the neighbours: attention as in the released code, projected with the "
        "paper's trained layers f1 and f2, uniform for equal weights"
    )
    choices = ("attention", "projected", "uniform")
    flag(g, "--weights", choices=choices, default="attention", help=text)
    text = "the weights of the neighbours are divided by G (the paper's scale)"
    flag(g, "--gamma", type=kind, default=1.0, metavar="G", help=text)
    text = "temperature of the softmax that gives the weights of the neighbours"
    flag(g, "--positiveness-t", type=kind, default=1.0, metavar="T", help=text)
    text = "no gradient through the weights of the neighbours"
    flag(g, "--detach-weights", action=on_off, default=False, help=text)
    text = "set neighbour weights to 0 unless they are above the uniform weight"
    flag(g, "--threshold", action=on_off, default=False, help=text)
    text = "never use an older copy of the same image as its neighbour"
    flag(g, "--exclude-own-image", action=on_off, default=True, help=text)
    text = "number of epochs at the start that use no neighbours"
    flag(g, "--nn-warmup-epochs", type=number(float), default=0, metavar="E", help=text)

    g = parser.add_argument_group("optimisation")
    text = "length of the run and of its schedules, in epochs"
    flag(g, "--epochs", type=positive, default=300, metavar="N", help=text)
    text = "images in a global batch, over all ranks"
    flag(
        g,
        "-b",
        "--batch-size",
        type=positive,
        default=4096,
        metavar="N",
        help=text,
        on_resume="fixed",
    )
    text = f"optimiser: {', '.join(OPTIMIZERS)}"
    flag(
        g,
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        metavar="NAME",
        help=text,
        on_resume="fixed",
    )
    text = "base learning rate; the peak learning rate is LR times --batch-size / 256"
    kind = number(float, above_zero=True)
    flag(g, "--lr", type=kind, default=1.5e-4, metavar="LR", help=text)
    text = "weight decay of matrices and filters; biases and norms have none"
    flag(g, "--wd", type=number(float), default=0.1, metavar="WD", help=text)
    text = "epochs of linear learning-rate warm-up (default: 40, at most a fifth of --epochs)"
    flag(g, "--warmup-epochs", type=number(float), metavar="E", help=text)
    text = "16-bit precision of the encoders; auto: bf16 where the hardware has it"
    flag(g, "--amp", choices=AMP, default="off", help=text)
    text = "images of a view that a rank encodes at a time: the same gradients with less memory"
    flag(g, "--micro-batch", type=positive, metavar="N", help=text)
    text = "recompute the activations of each block in the backward pass, to save memory"
    flag(g, "--grad-checkpointing", action=on_off, default=False, help=text, on_resume="free")
    text = "compile the backbones with torch.compile; the first steps then take minutes"
    flag(g, "--compile", action=on_off, default=False, help=text, on_resume="free")
    text = "random seed of the initial weights, the image order and the augmentations"
    flag(g, "--seed", type=seed, default=0, metavar="N", help=text, on_resume="fixed")

    g = parser.add_argument_group("run")
    text = "output folder (default: a new folder in runs/)"
    flag(g, "--workdir", metavar="DIR", help=text, on_resume="free")
    text = "checkpoint to continue from; auto: the newest one in --workdir, if there is one"
    flag(g, "--resume", metavar="PATH", help=text, on_resume="free")
    text = "stop after N epochs and save; the schedules stay those of --epochs"
    flag(g, "--stop-after-epochs", type=positive, metavar="N", help=text, on_resume="free")
    text = "stop after N steps, counted from the start of the run, and save"
    flag(g, "--stop-after-steps", type=positive, metavar="N", help=text, on_resume="free")
    text = "every E epochs also save a numbered checkpoint that is never deleted; 0: never"
    flag(g, "--save-freq", type=number(int), default=0, metavar="E", help=text, on_resume="free")
    text = "minutes between saves within an epoch; 0: save only at the end of an epoch"
    flag(
        g,
        "--save-every-minutes",
        type=number(float),
        default=30,
        metavar="N",
        help=text,
        on_resume="free",
    )
    text = "number of recent checkpoints to keep, not counting those of --save-freq"
    kind = number(int, above_zero=True, most=1000)
    flag(g, "--keep", type=kind, default=2, metavar="N", help=text, on_resume="free")
    text = "non-finite steps to skip, without a clean log line between them, before the run stops"
    flag(
        g,
        "--skip-non-finite",
        type=number(int),
        default=3,
        metavar="N",
        help=text,
        on_resume="free",
    )
    text = "minutes that a rank waits for another rank before the run stops"
    flag(
        g,
        "--timeout-minutes",
        type=number(float, above_zero=True, most=10**5),
        default=30,
        metavar="N",
        help=text,
        on_resume="free",
    )
    text = "steps between log lines"
    flag(g, "--print-freq", type=positive, default=10, metavar="N", help=text, on_resume="free")
    text = "epochs between evaluations with kNN; 0: never evaluate"
    flag(g, "--eval-freq", type=number(int), default=10, metavar="E", help=text, on_resume="free")
    text = "epochs between pictures of a training step in TensorBoard; 0: no pictures"
    flag(g, "--viz-freq", type=number(int), default=10, metavar="E", help=text, on_resume="free")
    text = "encoder that is evaluated and saved as a separate file"
    flag(
        g,
        "--eval-encoder",
        choices=("online", "momentum"),
        default="online",
        help=text,
        on_resume="free",
    )
    return parser


def flag_property(parser: argparse.ArgumentParser, name: str) -> dict:
    """A property of each flag (see `flag`), by the name of its setting."""
    return {a.dest: getattr(a, name) for a in parser._actions if hasattr(a, name)}


ON_RESUME = flag_property(build_parser(), "on_resume")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check the flags, and fill in defaults that depend on others. Raises UsageError."""
    args = build_parser().parse_args(argv)
    resolve_resume(args)
    resolve_data(args)
    resolve_views(args)
    base = f"@{EMBEDDED_RECIPE}"
    if args.dataset == "embedded" and argv[:1] != [base]:
        return parse([base, *argv])  # the general defaults are ImageNet's
    if _arch_is_changed(argv):
        args.width = None
    if args.warmup_epochs is None:
        args.warmup_epochs = min(40, args.epochs / 5)
    if args.crop_min is None:
        args.crop_min = 0.2 if args.method == "mocov2" else 0.08
    if args.local_size is None:
        args.local_size = max(16, 16 * round(args.img_size * 3 / 7 / 16))
    if args.blur is None:
        args.blur = args.img_size > 32
    if args.num_heads is None and args.init_from is None:
        args.num_heads = NUM_HEADS.get(args.arch)  # else that of the weights to start from
    check(args, world_size=int(os.environ.get("WORLD_SIZE", 1)))
    return args


def _arch_is_changed(argv):
    """Whether the command line, without a width, replaces the recipe's architecture.

    The recipe's width belongs to the recipe's architecture.
    """
    recipes = build_parser().parse_args([word for word in argv if word.startswith("@")])
    own = [word for word in argv if not word.startswith("@")]
    own = build_parser().parse_args(own, argparse.Namespace(arch=None, width=None))
    return own.arch not in (None, recipes.arch) and own.width is None


def parse_data(argv: list[str]) -> argparse.Namespace:
    """The data flags alone, for commands that only look at images. Raises UsageError."""
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
    """A run that torchrun, start.sh or SLURM starts again continues, without a flag."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SNCLR_RESTART_COUNT", "SLURM_RESTART_COUNT")
    if any(os.environ.get(name, "0") != "0" for name in counts) and args.resume is None:
        args.resume = "auto"


def resolve_views(args: argparse.Namespace) -> None:
    """Fill in the size of the views, and the mean and standard deviation of the channels."""
    if args.img_size is None:
        args.img_size = IMG_SIZES.get(args.dataset, 224)
    mean, std = MEAN_STD.get(args.dataset, IMAGENET)
    args.mean, args.std = args.mean or list(mean), args.std or list(std)


def resolve_data(args: argparse.Namespace) -> None:
    """Fill in the kind of DATA and the number of workers. UsageError for half a normalisation."""
    has_bad_std = any(not 0 < value <= 1 for value in args.std or ())
    if (args.mean is None) != (args.std is None) or has_bad_std:
        raise UsageError(
            "--mean and --std must be given together, three numbers each in units of 0..1, with "
            "--std above 0"
        )
    if args.dataset is None:
        args.dataset = _recognise_dataset(args.data)
    if args.workers is None:
        if hasattr(os, "sched_getaffinity"):
            num_cores = len(os.sched_getaffinity(0))
        else:
            num_cores = os.cpu_count() or 1
        args.workers = max(1, min(8, num_cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _recognise_dataset(data):
    if data is None:
        return "embedded"
    if os.path.isfile(data):
        return {".tar": "shards", ".txt": "list"}.get(os.path.splitext(data)[1], "folder")
    train = os.path.join(data, "train")
    root = train if os.path.isdir(train) else data
    entries = list(os.scandir(root)) if os.path.isdir(root) else []
    if any(entry.name.endswith(".tar") for entry in entries):
        return "shards"
    has_classes = root == train and any(entry.is_dir() for entry in entries)
    # a missing folder counts as one with classes, and check_data refuses it as such
    return "folder" if has_classes or not os.path.isdir(data) else "tree"


def check_data(args: argparse.Namespace) -> None:
    """Raise UsageError for data flags that cannot work."""
    low, high = args.grey_range or (0, 1)
    if not -math.inf < low < high < math.inf:
        raise UsageError(f"--grey-range needs LOW below HIGH, both finite, found {low:g} {high:g}")
    if args.subset is not None and args.subset > 1 and args.subset % 1:
        raise UsageError(
            f"--subset must be a whole number of images or a share below 1, found {args.subset}"
        )
    if args.dataset == "embedded":
        if args.data is not None:
            raise UsageError(
                f"the embedded data set is drawn by the program and needs no DATA: remove "
                f"{args.data}, or choose another --dataset"
            )
    elif args.data is None:
        raise UsageError(f"--dataset {args.dataset} needs DATA, the folder or file of the images")
    if args.download and args.dataset not in TORCHVISION_DATASETS:
        raise UsageError(
            f"--download is for torchvision's data sets ({', '.join(TORCHVISION_DATASETS)}), "
            f"not for {args.dataset}"
        )
    needs_file = args.dataset == "list" or (args.data is not None and args.data.endswith(".tar"))
    exists = os.path.isfile if needs_file else os.path.isdir
    if args.data is not None and not exists(args.data) and not args.download:
        raise UsageError(
            f"--dataset {args.dataset}: there is no {'file' if needs_file else 'folder'} "
            f"{args.data}; DATA is a folder of images or of .tar files, one .tar file, or a .txt "
            "file that lists paths"
        )
    for name, path in (
        ("--val", args.val),
        ("--labels", args.labels),
        ("--val-labels", args.val_labels),
    ):
        if path is None or (name == "--labels" and path == "none"):
            continue
        if args.dataset not in LOCAL_DATASETS or (name != "--val" and args.dataset == "folder"):
            raise UsageError(
                f"{name} {path} cannot be used with --dataset {args.dataset}, which has its own"
            )
        if not os.path.exists(path):
            raise UsageError(f"{name} {path} does not exist")
    if args.val_labels and not args.labels:
        raise UsageError("--val-labels needs --labels, those of the training images, as well")


def check(args: argparse.Namespace, world_size: int) -> None:
    """Raise UsageError for combinations of flags that cannot work."""
    check_data(args)
    if args.batch_size < 2:
        raise UsageError(
            "--batch-size must be at least 2: batch norm and contrastive loss need other images"
        )
    for name in ("warmup_epochs", "nn_warmup_epochs"):
        if getattr(args, name) > args.epochs:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(args, name):g} exceeds --epochs {args.epochs}"
            )
    if args.batch_size % world_size:
        raise UsageError(
            f"--batch-size {args.batch_size} is for all ranks together and must be divisible by "
            f"the {world_size} ranks"
        )
    check_backbone(args)
    if args.local_views:
        check_local_views(args)
    if args.method == "snclr" and args.topk > args.bank_size:
        raise UsageError(f"--topk {args.topk} exceeds --bank-size {args.bank_size}")
    if args.threshold and (args.weights == "uniform" or args.topk == 1):
        raise UsageError(
            "--threshold would remove every neighbour with --weights uniform or --topk 1: it needs "
            "weights that differ"
        )
    has_no_gradient = args.detach_weights or args.topk < 2
    if args.weights == "projected" and args.method == "snclr" and has_no_gradient:
        cause = "--detach-weights" if args.detach_weights else f"--topk {args.topk}"
        raise UsageError(
            f"--weights projected trains layers that get no gradient with {cause}: change one of "
            "the two flags"
        )
    if args.eval_encoder == "momentum" and args.method == "nnclr":
        raise UsageError("--method nnclr has no momentum encoder: use --eval-encoder online")
    if args.init_from is not None and not os.path.isfile(args.init_from):
        raise UsageError(f"--init-from {args.init_from}: there is no such file")
    check_workdir(args.workdir, args.resume, ("metrics.jsonl", "checkpoint_last.pth.tar"))


def check_local_views(args: argparse.Namespace) -> None:
    """Raise UsageError for local views that cannot work."""
    if args.method == "mocov2":
        raise UsageError("--method mocov2 compares one view with one other: no --local-views")
    if args.local_crop_max < 0.05:
        raise UsageError(f"--local-crop-max must be at least 0.05, found {args.local_crop_max}")
    if args.arch.startswith("vit") and args.local_size % args.patch_size:
        raise UsageError(
            f"--local-size {args.local_size} is not a multiple of --patch-size {args.patch_size}"
        )


def check_workdir(workdir: str | None, resume: str | None, run_files: tuple[str, ...]) -> None:
    """Raise UsageError if workdir is not writable, or holds another run than the resumed one.

    run_files: names of files of which a run leaves at least one.
    """
    if workdir == "":
        raise UsageError("--workdir is empty: is it a variable of the shell that has no value?")
    if workdir is not None and workdir != os.fsencode(workdir).decode(errors="replace"):
        raise UsageError(f"--workdir must be UTF-8 text, found {os.fsencode(workdir)}")
    parent = os.path.abspath(workdir or ".")
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise UsageError(
            f"--workdir {workdir} cannot be created: {parent} is a file, or is not writable"
        )
    if resume == "auto":
        if workdir is None and "SLURM_JOB_ID" not in os.environ:
            raise UsageError("--resume auto needs --workdir, the folder of the run to continue")
        return
    if resume is not None and not os.path.isfile(resume):
        raise UsageError(f"--resume {resume}: there is no such checkpoint")
    if workdir is not None and any(os.path.exists(os.path.join(workdir, n)) for n in run_files):
        resumed_workdir = os.path.dirname(os.path.abspath(resume)) if resume else None
        if resumed_workdir != os.path.abspath(workdir):
            raise UsageError(
                f"--workdir {workdir} holds another run: add --resume auto to continue it, or "
                "choose a new folder"
            )


if __name__ == "__main__":
    with one_clear_line("main_snclr.py"):
        parse(sys.argv[1:])
