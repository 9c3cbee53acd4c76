"""The flags and checks that several commands share: images, backbone, batch size and workdir.

Imports nothing slow.
"""

import argparse
import math
import os

from .arguments import flag, key_value, number, seed
from .choices import (
    ARCHS,
    DATASETS,
    IMAGENET,
    IMG_SIZES,
    LOCAL_DATASETS,
    MEAN_STD,
    TORCHVISION_DATASETS,
    check_num_heads,
    dataset_kind,
    recognise_dataset,
)
from .running.errors import UsageError

# -- images ----------------------------------------------------------------------------------------


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the images (snclr/datasets/sources.py)."""
    # the index of shards on a read-only disk is kept there; not every command has the flag
    parser.set_defaults(workdir=None)
    g = parser.add_argument_group("data")
    flag(
        g,
        "data",
        nargs="?",
        metavar="DATA",
        help="folder, list (.txt), .tar or .zip file of the training images, or "
        "hf:NAME_OR_PATH[:CONFIGURATION] for the library datasets (default: the embedded data set)",
        on_resume="free",
    )
    flag(
        g,
        "--dataset",
        type=dataset_kind,
        metavar="KIND",
        help=f"kind of DATA: {', '.join(DATASETS)} (default: recognised from DATA)",
        on_resume="fixed",
    )
    flag(
        g,
        "--val",
        metavar="PATH",
        help="validation images, of the same kind as DATA (default: DATA/val beside DATA/train)",
        on_resume="free",
        changes_features=False,
    )
    flag(
        g,
        "--val-fraction",
        type=number(float, above_zero=True, most=0.99),
        metavar="SHARE",
        help="validate on this share of each class's training images, which are taken out of "
        "training; the validation images of DATA are not read",
        on_resume="fixed",
    )
    flag(
        g,
        "--val-seed",
        type=seed,
        default=0,
        metavar="N",
        help="random seed of --val-fraction",
        on_resume="fixed",
    )
    flag(
        g,
        "--labels",
        metavar="FILE",
        help="text file with the label of each training image, one a line; none: ignore all labels",
        on_resume="free",
    )
    flag(
        g,
        "--val-labels",
        metavar="FILE",
        help="text file with the label of each validation image, one a line",
        on_resume="free",
        changes_features=False,
    )
    flag(
        g,
        "--download",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="download a torchvision data set to DATA if it is missing",
        on_resume="free",
        changes_features=False,
    )
    flag(
        g,
        "--subset",
        type=number(float, above_zero=True),
        metavar="N",
        help="train on N randomly chosen images, or on this share of all images if N is below 1",
        on_resume="fixed",
    )
    flag(
        g,
        "--subset-seed",
        type=seed,
        default=0,
        metavar="N",
        help="random seed of --subset; a smaller subset is part of a larger one of the same seed",
        on_resume="fixed",
    )
    flag(
        g,
        "--channels",
        type=number(int, above_zero=True, most=2**10),
        metavar="C",
        help="channels of an image: 3 is RGB, 1 is grey; with another number images are arrays "
        "(.npy) or TIFF files, whose pages together have so many (default: that of a trained "
        "encoder, else 3)",
        on_resume="fixed",
        describes_encoder=True,
    )
    flag(
        g,
        "--mean",
        type=float,
        nargs="+",
        metavar="X",
        help="mean of each channel, in units of 0..1, to normalise (default: that of a trained "
        "encoder, else of the data set; 0.5 if --channels is not 3; the same for --std)",
        describes_encoder=True,
    )
    flag(
        g,
        "--std",
        type=float,
        nargs="+",
        metavar="X",
        help="standard deviation of each channel; `python -m snclr.mean_std DATA` measures both",
        describes_encoder=True,
    )
    flag(
        g,
        "--img-size",
        type=number(int, above_zero=True, most=2**14),
        metavar="PX",
        help="height and width of the encoder's input (default: that of a trained encoder, else 32 "
        "for embedded, CIFAR and SVHN, 96 for STL-10, 224 for others)",
        on_resume="fixed",
        describes_encoder=True,
    )
    flag(
        g,
        "--grey-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="pixel values that become black and white in images of more than 8 bits (default: "
        "those of a trained encoder, else those of the pixel format: 0 65535, floating point 0 1)",
        on_resume="fixed",
        describes_encoder=True,
    )
    flag(
        g,
        "--on-bad-image",
        choices=("fail", "skip"),
        default="fail",
        help="if an image cannot be read: stop, or replace it and list it in bad_images.txt",
        on_resume="free",
    )
    flag(
        g,
        "-j",
        "--workers",
        type=number(int),
        metavar="N",
        help="processes of each rank that load images (default: one for each core, at most 8)",
        on_resume="free",
        changes_features=False,
    )


def resolve_data(args: argparse.Namespace) -> None:
    """Fill in the kind of DATA and the number of workers. Raises UsageError for data flags that
    cannot work.

    The image size and the channels' statistics follow later: for an evaluation the encoder's file
    has them, for all others see `resolve_views`.
    """
    has_bad_std = any(not 0 < value <= 1 for value in args.std or ())
    if (args.mean is None) != (args.std is None) or has_bad_std:
        raise UsageError(
            "--mean and --std must be given together, a number for each channel in units of 0..1, "
            "with --std above 0"
        )
    if args.dataset is None:
        args.dataset = recognise_dataset(args.data)
    elif args.dataset.startswith("hf:"):
        args.data, args.dataset = args.data or args.dataset, "hf"
    if args.workers is None:
        args.workers = max(1, min(8, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    _check_data(args)


def _check_data(args: argparse.Namespace) -> None:
    """Raise UsageError for data flags that cannot work."""
    low, high = args.grey_range or (0, 1)
    if not -math.inf < low < high < math.inf:
        raise UsageError(f"--grey-range needs LOW below HIGH, both finite, found {low:g} {high:g}")
    if args.subset is not None and args.subset > 1 and args.subset % 1:
        raise UsageError(
            f"--subset must be a whole number of images or a share below 1, found {args.subset}"
        )
    if args.dataset == "embedded" and args.data is not None:
        raise UsageError(
            f"the embedded data set is drawn by the program and needs no DATA: remove {args.data}, "
            "or choose another --dataset"
        )
    if args.dataset != "embedded" and args.data is None:
        raise UsageError(f"--dataset {args.dataset} needs DATA, the folder or file of the images")
    if args.download and args.dataset not in TORCHVISION_DATASETS:
        raise UsageError(
            f"--download is for torchvision's data sets ({', '.join(TORCHVISION_DATASETS)}), "
            f"not for {args.dataset}"
        )
    needs_file = args.dataset == "list" or (args.data or "").lower().endswith((".tar", ".zip"))
    exists = os.path.isfile if needs_file else os.path.isdir
    is_elsewhere = args.data is None or args.dataset == "hf" or args.download
    if not is_elsewhere and not exists(args.data):
        raise UsageError(
            f"--dataset {args.dataset}: there is no {'file' if needs_file else 'folder'} "
            f"{args.data}; DATA is a folder of images or of .tar files, one .tar or .zip file, or "
            "a .txt file that lists paths"
        )
    labels = None if args.labels == "none" else args.labels
    files = {"--val": args.val, "--labels": labels, "--val-labels": args.val_labels}
    for name, path in files.items():
        if path is None:
            continue
        if args.dataset not in LOCAL_DATASETS or (name != "--val" and args.dataset == "folder"):
            raise UsageError(
                f"{name} {path} cannot be used with --dataset {args.dataset}, which has its own"
            )
        if not os.path.exists(path):
            raise UsageError(f"{name} {path} does not exist")
    if args.val_fraction and (args.val or args.val_labels or args.labels == "none"):
        raise UsageError(
            "--val-fraction validates on labelled training images: leave out --val, --val-labels "
            "and --labels none"
        )
    if args.val_labels and not args.labels:
        raise UsageError("--val-labels needs --labels, the labels of the training images, as well")


def num_cores() -> int:
    """The number of cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # only Linux
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def resolve_views(args: argparse.Namespace) -> None:
    """Fill in the image size, the number of channels, and their mean and standard deviation.

    Raises UsageError if the flags have another number of means than channels.
    """
    if args.img_size is None:
        args.img_size = IMG_SIZES.get(args.dataset, 224)
    args.channels = args.channels or 3
    unknown = ([0.5] * args.channels,) * 2
    mean, std = MEAN_STD.get(args.dataset, IMAGENET) if args.channels == 3 else unknown
    args.mean, args.std = args.mean or list(mean), args.std or list(std)
    if not len(args.mean) == len(args.std) == args.channels:
        raise UsageError(
            f"--mean and --std need {args.channels} numbers each, one for each channel, found "
            f"{len(args.mean)} and {len(args.std)}"
        )


# -- backbone --------------------------------------------------------------------------------------


def add_backbone_flags(
    parser: argparse.ArgumentParser, default_arch: str | None
) -> argparse._ArgumentGroup:
    """Add the flags that describe a backbone (snclr/backbones.py); returns their group.

    default_arch None: by default a file says what the backbone is, so the other defaults are None.
    """
    g = parser.add_argument_group("model")
    flag(
        g,
        "-a",
        "--arch",
        default=default_arch,
        help=f"backbone: {', '.join(ARCHS)}, or timm:NAME for any model of timm",
        on_resume="fixed",
        describes_encoder=True,
    )
    flag(
        g,
        "--timm-kwargs",
        nargs="+",
        type=key_value,
        metavar="KEY=VALUE",
        help="arguments of a timm:NAME model",
        on_resume="fixed",
        describes_encoder=True,
    )
    flag(
        g,
        "--patch-size",
        type=number(int, above_zero=True),
        default=None if default_arch is None else 16,
        metavar="PX",
        help="side of a ViT's patch",
        on_resume="fixed",
        describes_encoder=True,
    )
    flag(
        g,
        "--num-heads",
        type=number(int, above_zero=True),
        metavar="N",
        help="attention heads of a ViT (default: those of the loaded weights, else 12; 3 for "
        "vit_tiny)",
        on_resume="fixed",
        describes_encoder=True,
    )
    flag(
        g,
        "--width",
        type=number(int, above_zero=True, most=2**14),
        metavar="N",
        help="channels of a ResNet's first stage (default: that of the architecture)",
        on_resume="fixed",
        describes_encoder=True,
    )
    flag(
        g,
        "--small-stem",
        action=argparse.BooleanOptionalAction,
        default=None if default_arch is None else False,
        help="ResNet stem for images of about 32 px: 3x3 convolution of stride 1, no pooling",
        on_resume="fixed",
        describes_encoder=True,
    )
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


# -- run -------------------------------------------------------------------------------------------


def is_restart() -> bool:
    """Whether torchrun, start.sh or SLURM has started this command again."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SNCLR_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(os.environ.get(name, "0") != "0" for name in counts)


def resolve_resume(args: argparse.Namespace) -> None:
    """Let a run continue if it was started again."""
    if is_restart() and args.resume is None:
        args.resume = "auto"


def check_batch_size(batch_size: int) -> None:
    """Raise UsageError if the ranks cannot share a batch equally."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if batch_size % world_size:
        raise UsageError(
            f"--batch-size {batch_size} is for all ranks together and must be divisible by the "
            f"{world_size} ranks"
        )


def check_workdir(workdir: str | None, resume: str | None, run_files: tuple[str, ...]) -> None:
    """Raise UsageError if workdir is not writable, or holds another run than the resumed one.

    run_files: names of files of which a run leaves at least one, not empty, after its first step.
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
    if resume == "auto" and workdir is None and "SLURM_JOB_ID" not in os.environ:
        raise UsageError("--resume auto needs --workdir, the folder of the run to continue")
    if resume == "auto" or is_restart():  # it may continue the run that is there
        return
    if resume is not None and not os.path.isfile(resume):
        raise UsageError(f"--resume {resume}: there is no such checkpoint")
    paths = [os.path.join(workdir or "", name) for name in run_files]
    if workdir is not None and any(map(os.path.getsize, filter(os.path.exists, paths))):
        resumed_workdir = os.path.dirname(os.path.abspath(resume)) if resume else None
        if resumed_workdir != os.path.abspath(workdir):
            advice = "add --resume auto to continue it, or choose a new folder"
            raise UsageError(f"--workdir {workdir} holds another run: {advice}")
