"""The flags that describe the views of an image (snclr/augment.py). Imports nothing slow."""

import argparse

from .arguments import flag, number
from .running.errors import UsageError

# flags with a probability: what happens with it, and the default
PROBABILITIES = {
    "--jitter-p": ("change the colours (--jitter)", "that of --method"),
    "--grey-p": ("convert to grey", "that of --method"),
    "--solarise-p": ("invert the brighter half of the values", "that of --method"),
    "--blur-p": ("blur", "that of --method and --blur"),
    "--flip-h": ("flip left to right", "0.5"),
    "--flip-v": ("flip upside down", "0"),
    "--rotate90": ("rotate by 90, 180 or 270 degrees, equally likely", "0"),
}
HUE_MAX = 1 / 3


def add_view_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the views. A default of None is filled in by `resolve_view_flags`, or is
    that of the method.
    """
    g = parser.add_argument_group("views")
    flag(
        g,
        "--crop-min",
        type=number(float, above_zero=True, most=1),
        metavar="SHARE",
        help="smallest area of a random crop, as a share of the image (default: 0.08; 0.2 with "
        "--method mocov2)",
        on_resume="fixed",
    )
    flag(
        g,
        "--blur",
        action=argparse.BooleanOptionalAction,
        help="blur some of the views (default: on for images above 32 px)",
        on_resume="fixed",
    )
    flag(
        g,
        "--jitter",
        nargs="+",
        type=number(float, most=1),
        metavar=("B C S H", "B C S H"),
        help="change brightness, contrast and saturation by factors of 1 - B to 1 + B (and so on), "
        f"and hue by up to H turns (at most {HUE_MAX:.2f}), in both global views or in each "
        "(default: those of --method)",
        on_resume="fixed",
    )
    for name, (action, default) in PROBABILITIES.items():
        flag(
            g,
            name,
            nargs="+",
            type=number(float, most=1),
            metavar=("P", "P"),
            help=f"probability to {action}, of both global views or of each (default: {default})",
            on_resume="fixed",
        )
    flag(
        g,
        "--local-views",
        type=number(int),
        default=0,
        metavar="N",
        help="small crops of each image, in addition to the two global views (multi-crop), with "
        "the other settings of the first global view",
        on_resume="fixed",
    )
    flag(
        g,
        "--local-size",
        type=number(int, above_zero=True),
        metavar="PX",
        help="height and width of a local view (default: 3/7 of --img-size, rounded to a "
        "multiple of 16)",
        on_resume="fixed",
    )
    flag(
        g,
        "--local-crop-max",
        type=number(float, above_zero=True, most=1),
        default=0.25,
        metavar="SHARE",
        help="largest area of a local view, as a share of the image; the smallest is 0.05",
        on_resume="fixed",
    )
    flag(
        g,
        "--key-view",
        choices=("strong", "weak"),
        default="strong",
        help="views of the momentum encoder: the two global views, each the target of the other "
        "(strong), or one more view of crop, flip and rotation only, the target of both (weak)",
        on_resume="fixed",
    )


def default_local_size(img_size: int) -> int:
    """3/7 of the size of a global view (96 of 224 px, as DINO), rounded to a multiple of 16."""
    return max(16, 16 * round(img_size * 3 / 7 / 16))


def resolve_view_flags(args: argparse.Namespace) -> None:
    """Fill in defaults that depend on other flags. Raises UsageError for --blur-p and --no-blur.

    Saturation, hue and grey are those of RGB images: for others they are off.
    """
    if args.channels != 3:
        args.jitter, args.grey_p = args.jitter or [0.4, 0.4, 0.0, 0.0], args.grey_p or [0.0]
    if args.crop_min is None:
        args.crop_min = 0.2 if args.method == "mocov2" else 0.08
    if args.local_size is None:
        args.local_size = default_local_size(args.img_size)
    if args.blur is False and any(args.blur_p or ()):
        raise UsageError("--no-blur contradicts --blur-p: leave one out")
    if args.blur is None:
        args.blur = args.img_size > 32


def check_views(args: argparse.Namespace) -> None:
    """Raise UsageError for views that cannot work."""
    for name in ("--jitter", *PROBABILITIES):
        values = getattr(args, name[2:].replace("-", "_"))
        count = 4 if name == "--jitter" else 1
        if values is not None and len(values) not in (count, 2 * count):
            raise UsageError(
                f"{name} needs {count} or {2 * count} numbers, for both global views or for each, "
                f"found {len(values)}"
            )
    if args.jitter and max(args.jitter[3::4]) > HUE_MAX:
        raise UsageError(
            f"the last number of --jitter, hue in turns, must be at most {HUE_MAX:.2f}, found "
            f"{max(args.jitter[3::4]):g}"
        )
    of_colours = [*(args.jitter or ())[2::4], *(args.jitter or ())[3::4], *(args.grey_p or ())]
    if args.channels != 3 and any(of_colours):
        raise UsageError(
            f"--channels {args.channels}: only images of red, green and blue have saturation, "
            "hue and grey: the last two numbers of --jitter, and --grey-p, must be 0"
        )
    if not args.local_views:
        return
    if args.method == "mocov2":
        raise UsageError("--method mocov2 compares one view with one other: no --local-views")
    if args.local_crop_max < 0.05:
        raise UsageError(f"--local-crop-max must be at least 0.05, found {args.local_crop_max}")
    if args.arch.startswith("vit") and args.local_size % args.patch_size:
        raise UsageError(
            f"--local-size {args.local_size} is not a multiple of --patch-size {args.patch_size}"
        )
