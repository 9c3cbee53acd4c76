"""The flags of main_snclr.py: their groups, defaults that depend on others, and checks.

Imports neither torch nor anything slow, so that a wrong flag is answered at once.
`python -m snclr.options FLAGS` only checks the flags.
"""

import argparse
import importlib.util
import os
import sys

from .arguments import ROOT, flag, flags, new_parser, number, seed
from .choices import (
    AMP,
    CANDIDATES,
    COMPILE,
    FORMS,
    LOGGERS,
    METHODS,
    NUM_HEADS,
    OF_NEIGHBOURS,
    OPTIMIZERS,
    PUBLIC,
    UNUSED,
)
from .running.errors import UsageError, one_clear_line
from .shared_options import (
    add_backbone_flags,
    add_data_flags,
    check_backbone,
    check_batch_size,
    check_workdir,
    resolve_data,
    resolve_resume,
    resolve_views,
)
from .view_options import add_view_flags, check_views, default_local_size, resolve_view_flags

RUN_FILES = ("metrics.jsonl", "checkpoint_last.pth.tar")  # a run leaves at least one of them
EMBEDDED_RECIPE = os.path.join(ROOT, "configs", "embedded.args")


def build_parser() -> argparse.ArgumentParser:
    """All flags of main_snclr.py, in groups. A default of None is filled in by `parse`."""
    parser = new_parser(
        "main_snclr.py [DATA] [flags]",
        "Self-supervised pretraining with soft neighbours (SNCLR) and related methods.",
    )
    add_data_flags(parser)

    add_view_flags(parser)
    g = add_backbone_flags(parser, default_arch="vit_small")
    flag(
        g,
        "--init-from",
        metavar="FILE",
        help="start from the backbone weights in FILE, a checkpoint or a state dict of any "
        "known layout, or from public ones: timm:NAME, hf:REPO",
    )
    flag(
        g,
        "--stop-grad-conv1",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="freeze the randomly initialised patch embedding of a ViT",
        on_resume="fixed",
    )
    flag(
        g,
        "--snclr-dim",
        type=number(int, above_zero=True, most=2**20),
        default=256,
        metavar="D",
        help="output dimension of the projector and the predictor",
        on_resume="fixed",
    )
    flag(
        g,
        "--snclr-mlp-dim",
        type=number(int, above_zero=True, most=2**20),
        default=4096,
        metavar="N",
        help="hidden width of the projector and the predictor",
        on_resume="fixed",
    )

    g = parser.add_argument_group("objective")
    flag(
        g,
        "--method",
        choices=METHODS,
        default="snclr",
        help="training objective",
        on_resume="fixed",
    )
    flag(
        g,
        "--snclr-t",
        type=number(float, above_zero=True),
        default=0.2,
        metavar="T",
        help="temperature of the contrastive loss",
    )
    flag(
        g,
        "--snclr-m",
        type=number(float, most=1),
        default=0.99,
        metavar="M",
        help="momentum of the momentum encoder: the share of its old weights that each step keeps",
    )
    flag(
        g,
        "--snclr-m-cos",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="increase --snclr-m to 1 over the run, along half a cosine",
    )
    flag(
        g,
        "--bank-size",
        type=number(int, above_zero=True),
        default=128000,
        metavar="M",
        help="rows of the memory bank, which all ranks share",
        on_resume="fixed",
    )
    flag(
        g,
        "--topk",
        type=number(int),
        default=30,
        metavar="K",
        help="number of soft neighbours of each image",
    )
    flag(
        g,
        "--form",
        choices=FORMS,
        default="sum_of_logs",
        help="form of the loss: sum_of_logs as in the released code, log_of_sum as in the paper",
    )
    flag(
        g,
        "--weights",
        choices=("attention", "projected", "key", "uniform"),
        default="attention",
        help="weights of the neighbours: by attention as in the released code, by attention "
        "with the paper's trained layers f1 and f2 (projected), by their similarity to the key, "
        "without gradient (key), or all equal (uniform)",
    )
    flag(
        g,
        "--gamma",
        type=number(float, above_zero=True),
        default=1.0,
        metavar="G",
        help="divide the weights of the neighbours by G (the paper's scale)",
    )
    flag(
        g,
        "--nn-mass",
        type=number(float, above_zero=True),
        default=1.0,
        metavar="S",
        help="sum of the weights of an image's neighbours; its own key has the weight 1 "
        "(the same as --gamma 1/S)",
    )
    flag(
        g,
        "--normalise-positives",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="divide the weights of an image's positives, key and neighbours, by their sum",
    )
    flag(
        g,
        "--positiveness-t",
        type=number(float, above_zero=True),
        default=1.0,
        metavar="T",
        help="temperature of the softmax that gives the weights of the neighbours",
    )
    flag(
        g,
        "--detach-weights",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="pass no gradient through the weights of the neighbours",
    )
    flag(
        g,
        "--threshold",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="set the weight of a neighbour to 0 unless it is above the uniform weight",
    )
    flag(
        g,
        "--exclude-own-image",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="never use an older copy of the same image as its neighbour",
    )
    flag(
        g,
        "--candidates",
        choices=CANDIDATES,
        default="all",
        help="the denominator has the fresh keys, and each neighbour of the batch as often as it "
        "was picked (all), once (unique), or never (keys)",
    )
    flag(
        g,
        "--mix-neighbours",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="mix each neighbour with the image's key, in random shares, before it is a positive",
    )
    flag(
        g,
        "--nn-warmup-epochs",
        type=number(float),
        default=0,
        metavar="E",
        help="number of epochs at the start that use no neighbours",
    )
    flag(
        g,
        "--nn-ramp-epochs",
        type=number(float),
        default=0,
        metavar="E",
        help="number of epochs after --nn-warmup-epochs in which the weights of the neighbours "
        "rise from 0",
    )

    g = parser.add_argument_group("optimisation")
    flag(
        g,
        "--epochs",
        type=number(int, above_zero=True),
        default=300,
        metavar="N",
        help="length of the run and of its schedules, in epochs",
    )
    flag(
        g,
        "-b",
        "--batch-size",
        type=number(int, above_zero=True),
        default=4096,
        metavar="N",
        help="images in a global batch, over all ranks",
        on_resume="fixed",
    )
    flag(
        g,
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        metavar="NAME",
        help=f"optimiser: {', '.join(OPTIMIZERS)}",
        on_resume="fixed",
    )
    flag(
        g,
        "--lr",
        type=number(float, above_zero=True),
        default=1.5e-4,
        metavar="LR",
        help="base learning rate; the peak learning rate is LR times --batch-size / 256",
    )
    flag(
        g,
        "--wd",
        type=number(float),
        default=0.1,
        metavar="WD",
        help="weight decay of matrices and filters; biases and norms have none",
    )
    flag(
        g,
        "--warmup-epochs",
        type=number(float),
        metavar="E",
        help="epochs of linear learning-rate warm-up (default: 40, at most a fifth of --epochs)",
    )
    flag(
        g,
        "--freeze-backbone-epochs",
        type=number(int),
        default=0,
        metavar="E",
        help="train only the heads in the first E epochs, for a backbone of --init-from",
    )
    flag(
        g,
        "--lr-scale",
        type=number(float, above_zero=True, most=1),
        default=1.0,
        metavar="S",
        help="learning rate of each layer of the backbone, as a share of that of the next layer",
        on_resume="fixed",
    )
    flag(
        g,
        "--amp",
        choices=AMP,
        default="off",
        help="16-bit precision of the encoders; auto: bf16 where the hardware has it",
    )
    flag(
        g,
        "--micro-batch",
        type=number(int, above_zero=True),
        metavar="N",
        help="encode N images of a view at a time on each rank, with less memory: the same "
        "gradients, unless the backbone has batch norms, which then see N images of each rank",
    )
    flag(
        g,
        "--grad-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute the activations of each block in the backward pass, to save memory",
        on_resume="free",
    )
    flag(
        g,
        "--compile",
        nargs="?",
        choices=COMPILE,
        default="auto",
        const="on",
        help="compile the backbones with torch.compile; the first step of the first run then takes "
        "about a minute. graphs: also replay them as CUDA graphs. auto: on for a single GPU and "
        "the ResNets and ViTs of this project, if triton and a C compiler are installed; off for "
        "the embedded data set",
        on_resume="free",
    )
    flag(
        g,
        "--no-compile",
        action="store_const",
        const="off",
        dest="compile",
        help="the same as --compile off",
        on_resume="free",
    )
    flag(
        g,
        "--step-graph",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="on one GPU, replay the whole step as a CUDA graph, which saves the host's time on "
        "small images",
        on_resume="free",
    )
    flag(
        g,
        "--fused-augment",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="on a GPU, augment RGB views by four kernels of triton's; has never run on a GPU",
        on_resume="free",
    )
    flag(
        g,
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="random seed of the initial weights, the image order and the augmentations",
        on_resume="fixed",
    )

    g = parser.add_argument_group("run")
    flag(
        g,
        "--workdir",
        metavar="DIR",
        help="output folder (default: a new folder in runs/)",
        on_resume="free",
    )
    flag(
        g,
        "--resume",
        metavar="PATH",
        help="checkpoint to continue from; auto: the newest one in --workdir, if there is one",
        on_resume="free",
    )
    flag(
        g,
        "--stop-after-epochs",
        type=number(int, above_zero=True),
        metavar="N",
        help="stop after N epochs and save; the schedules stay those of --epochs",
        on_resume="free",
    )
    flag(
        g,
        "--stop-after-steps",
        type=number(int, above_zero=True),
        metavar="N",
        help="stop after N steps, counted from the start of the run, and save",
        on_resume="free",
    )
    flag(
        g,
        "--save-freq",
        type=number(int),
        default=0,
        metavar="E",
        help="every E epochs also save a numbered checkpoint that is never deleted; 0: never",
        on_resume="free",
    )
    flag(
        g,
        "--save-every-minutes",
        type=number(float),
        default=30,
        metavar="N",
        help="minutes between saves within an epoch; 0: save only at the end of an epoch",
        on_resume="free",
    )
    flag(
        g,
        "--keep",
        type=number(int, above_zero=True, most=1000),
        default=2,
        metavar="N",
        help="number of recent checkpoints to keep, not counting those of --save-freq",
        on_resume="free",
    )
    flag(
        g,
        "--skip-non-finite",
        type=number(int),
        default=3,
        metavar="N",
        help="skip up to N steps with a non-finite loss or gradient, then stop; a log line "
        "without such a step resets the count",
        on_resume="free",
    )
    flag(
        g,
        "--timeout-minutes",
        type=number(float, above_zero=True, most=10**5),
        default=30,
        metavar="N",
        help="stop if a rank has waited N minutes for another rank",
        on_resume="free",
    )
    flag(
        g,
        "--print-freq",
        type=number(int, above_zero=True),
        default=10,
        metavar="N",
        help="steps between log lines",
        on_resume="free",
    )
    flag(
        g,
        "--log",
        nargs="+",
        choices=LOGGERS,
        default=[],
        help="also log to these libraries, under the names of TensorBoard (pip install NAME)",
        on_resume="free",
    )
    flag(
        g,
        "--eval-freq",
        type=number(int),
        default=10,
        metavar="E",
        help="epochs between evaluations with kNN; 0: never evaluate",
        on_resume="free",
    )
    flag(
        g,
        "--viz-freq",
        type=number(int),
        default=10,
        metavar="E",
        help="epochs between pictures of a training step in TensorBoard; 0: no pictures",
        on_resume="free",
    )
    flag(
        g,
        "--eval-encoder",
        choices=("online", "momentum"),
        default="online",
        help="encoder that is evaluated and saved as a separate file",
        on_resume="free",
    )
    return parser


FLAGS = flags(build_parser())
ON_RESUME = {action.dest: action.on_resume for action in FLAGS}
# the settings by which an encoder is built and used
OF_ENCODER = {action.dest: action.default for action in FLAGS if action.describes_encoder}


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
    resolve_view_flags(args)
    if args.num_heads is None and args.init_from is None:
        args.num_heads = NUM_HEADS.get(args.arch)  # else that of the weights to start from
    check(args)
    return args


def _arch_is_changed(argv):
    """Whether the command line, without a width, replaces the recipe's architecture.

    The recipe's width belongs to the recipe's architecture.
    """
    recipes = build_parser().parse_args([word for word in argv if word.startswith("@")])
    own = [word for word in argv if not word.startswith("@")]
    own = build_parser().parse_args(own, argparse.Namespace(arch=None, width=None))
    return own.arch not in (None, recipes.arch) and own.width is None


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for combinations of flags that cannot work."""
    if args.batch_size < 2:
        raise UsageError(
            "--batch-size must be at least 2: batch norm and contrastive loss need other images"
        )
    for name in ("warmup_epochs", "nn_warmup_epochs", "freeze_backbone_epochs"):
        if getattr(args, name) > args.epochs:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(args, name):g} exceeds --epochs {args.epochs}"
            )
    if args.nn_warmup_epochs + args.nn_ramp_epochs > args.epochs:
        raise UsageError(
            f"--nn-warmup-epochs {args.nn_warmup_epochs:g} and --nn-ramp-epochs "
            f"{args.nn_ramp_epochs:g} together exceed --epochs {args.epochs}"
        )
    if args.gamma != 1 and args.nn_mass != 1:
        raise UsageError(
            "--gamma and --nn-mass set the same thing, the sum of the neighbours' weights "
            "(--gamma G is --nn-mass 1/G): use one of them"
        )
    check_batch_size(args.batch_size)
    check_backbone(args)
    check_views(args)
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
    if args.method == "nnclr" and (args.eval_encoder == "momentum" or args.key_view == "weak"):
        raise UsageError(
            "--method nnclr has no momentum encoder: use --eval-encoder online and "
            "--key-view strong"
        )
    for name in args.log:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"--log {name} needs the library: pip install {name}")
    is_local = args.init_from is not None and not args.init_from.startswith(PUBLIC)
    if is_local and args.resume is None and not os.path.isfile(args.init_from):
        raise UsageError(f"--init-from {args.init_from}: there is no such file")
    check_workdir(args.workdir, args.resume, RUN_FILES)


def unused_flags(args: argparse.Namespace) -> list[str]:
    """A line for each flag that does not have its default, but has no effect beside the others."""
    defaults = {action.dest: action.default for action in FLAGS}
    defaults["local_size"] = default_local_size(args.img_size)
    is_vit, is_resnet = args.arch.startswith("vit"), args.arch.startswith("resnet")
    has_plain_patches = is_vit and not args.arch.startswith("vit_conv")
    rules = (  # whether it applies, the reason, and the settings that have no effect then
        (True, f"with --method {args.method}", UNUSED.get(args.method, ())),
        (not args.topk, "with --topk 0", OF_NEIGHBOURS),
        (args.weights == "key", "with --weights key", ["detach_weights"]),
        (args.weights == "uniform", "with --weights uniform", ["detach_weights", "positiveness_t"]),
        (not is_resnet, f"with --arch {args.arch}", ["width", "small_stem"]),
        (not is_vit, f"with --arch {args.arch}", ["patch_size"]),
        (not has_plain_patches, f"with --arch {args.arch}", ["stop_grad_conv1"]),
        (not args.local_views, "without --local-views", ["local_size", "local_crop_max"]),
        (not args.subset, "without --subset", ["subset_seed"]),
        (not args.val_fraction, "without --val-fraction", ["val_seed"]),
    )
    reasons = {}
    for applies, reason, names in rules:
        for name in names:
            if applies and getattr(args, name) != defaults[name]:
                reasons.setdefault(f"--{name.replace('_', '-')}", reason)
    return [f"{name} has no effect {reason}" for name, reason in reasons.items()]


if __name__ == "__main__":
    with one_clear_line("main_snclr.py"):
        parse(sys.argv[1:])
