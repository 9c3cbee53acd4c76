"""Pictures of what an encoder has learned, alone or beside another one.

    python -m snclr.visualize runs/NAME/checkpoint_last.pth.tar DATA --against untrained

writes PNG files: nearest images, attention maps (of ViTs), a map of the features and, with --image
photo.jpg, the images nearest to the photo. The same flags and seed draw the same pictures.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from . import augment
from .arguments import new_parser, number, seed
from .datasets import sources
from .datasets.images import ImageFiles, ImageSet
from .evaluation import knn
from .pictures.encoders import (
    Encoder,
    attention_maps,
    attention_picture,
    map_picture,
    projections,
    retrieval_picture,
)
from .pictures.steps import denormalize
from .running import process_group
from .running.errors import RunError, UsageError, one_clear_line
from .running.safe_files import new_file, writing
from .shared_options import add_backbone_flags, add_data_flags, check_data, resolve_data
from .weights import load


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags, checked. Raises UsageError."""
    parser = new_parser(
        "snclr.visualize", "Draws what an encoder has learned, alone or beside another one."
    )
    parser.add_argument("file", metavar="FILE", help="checkpoint or state dict, any layout")
    add_data_flags(parser)
    g = parser.add_argument_group("pictures")
    g.add_argument(
        "--encoder",
        choices=("online", "momentum", "untrained"),
        default="online",
        help="encoder of FILE; untrained: the same architecture before training",
    )
    g.add_argument(
        "--against",
        metavar="FILE",
        help="second encoder, for comparison; untrained: the first one before training",
    )
    g.add_argument(
        "--image", metavar="PATH", help="image file; its nearest training images are shown as well"
    )
    positive = number(int, above_zero=True)
    g.add_argument("--count", type=positive, default=8, metavar="N", help="images in a picture")
    g.add_argument("--topk", type=positive, default=6, metavar="K", help="nearest images of each")
    g.add_argument(
        "--pool", type=positive, default=5000, metavar="N", help="training images that are searched"
    )
    g.add_argument("--seed", type=seed, default=0, metavar="N", help="seed that chooses the images")
    g.add_argument(
        "--out", metavar="DIR", help="folder of the pictures (default: pictures beside FILE)"
    )
    add_backbone_flags(parser, default_arch=None)
    parser.set_defaults(patch_size=None, small_stem=None)  # as FILE says
    args = parser.parse_args(argv)
    args.workdir = None  # a run's folder takes the index of shards on read-only disks; none here
    resolve_data(args)
    check_data(args)
    if args.image is not None and not os.path.isfile(args.image):
        raise UsageError(f"--image {args.image}: there is no such file")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    device = process_group.own_device()
    torch.manual_seed(args.seed)  # of an untrained encoder's weights
    loader_args = {"device": device, "workers": args.workers}
    encoders = [_open_encoder(args, args.file, args.encoder, letter="A")]
    args.mean, args.std = encoders[0].info["mean"], encoders[0].info["std"]
    args.grey_range = encoders[0].info["grey_range"]
    train, val, _ = sources.open_data(args)
    encoders[0] = _ready(encoders[0], args.encoder, train, loader_args)
    if args.against is not None:
        untrained = args.against == "untrained"
        path, which = (args.file, "untrained") if untrained else (args.against, args.encoder)
        second = _open_encoder(args, path, which, letter="B")
        encoders.append(_ready(second, which, train, loader_args))
    pictures = _draw(args, encoders, train, val, loader_args)
    out = args.out or os.path.join(os.path.dirname(os.path.abspath(args.file)), "pictures")
    with writing(out):
        os.makedirs(out, exist_ok=True)
        for name, picture in pictures.items():
            path = os.path.join(out, f"{name}.png")
            with new_file(path) as file:
                picture.save(file, format="png")
            print(path)


def _open_encoder(args: argparse.Namespace, path: str, which: str, letter: str) -> Encoder:
    """The encoder A or B; the flags on architecture, size and normalisation concern A."""
    settings = {
        "arch": args.arch,
        "img_size": args.img_size,
        "patch_size": args.patch_size,
        "num_heads": args.num_heads,
        "width": args.width,
        "small_stem": args.small_stem,
        "timm_kwargs": args.timm_kwargs,
        "mean": args.mean,
        "std": args.std,
        "grey_range": args.grey_range,
    }
    module, info = load.open_encoder(path, which, **(settings if letter == "A" else {}))
    epoch = f", epoch {info['epoch']}" if info["epoch"] else ""
    name = f"{info['arch']} ({which}{epoch}) of {os.path.join(*path.split(os.sep)[-2:])}"
    return Encoder(module, info, f"{letter}: {name}" if args.against is not None else name)


def _ready(encoder: Encoder, which: str, train: ImageSet, loader_args: dict) -> Encoder:
    """The encoder on its device; an untrained one with batch norms calibrated on train."""
    module = encoder.module.to(loader_args["device"])
    if which == "untrained":
        size = encoder.info["img_size"]
        module = knn.calibrated_copy(module, train, size=size, **loader_args)
    return encoder._replace(module=module)


def _draw(
    args: argparse.Namespace,
    encoders: list[Encoder],
    train: ImageSet,
    val: ImageSet | None,
    loader_args: dict,
) -> dict[str, Image.Image]:
    """All pictures, by file name without suffix."""
    size, queries = encoders[0].info["img_size"], train if val is None else val
    pool, chosen = (
        _readable(images, augment.epoch_order(args.seed, 0, len(images)))
        for images in (train, queries)
    )
    pool, chosen = (
        np.array(sorted(islice(pool, args.pool))),
        np.array([*islice(chosen, args.count)]),
    )
    if len(pool) < 3:
        raise UsageError(
            f"neighbours and a map need three training images at least, found {len(pool)}"
        )
    features = {encoder.name: encoder.features(train, pool, **loader_args) for encoder in encoders}

    def retrieval(images, indices, title):
        pairs = {
            encoder.name: (
                encoder.features(images, indices, **loader_args),
                features[encoder.name],
            )
            for encoder in encoders
        }
        return retrieval_picture(images, indices, train, pool, pairs, args.topk, size, title)

    pictures = {"neighbours": retrieval(queries, chosen, f"Nearest of {len(pool)} training images")}
    if args.image is not None:
        photo = ImageFiles([args.image], None, [], (args.mean, args.std))
        photo.grey_range = args.grey_range
        title = f"Nearest to {os.path.basename(args.image)}"
        pictures["retrieval"] = retrieval(photo, np.array([0]), title)
    maps = {
        f"{method} of {name}": points
        for name in features
        for method, points in projections(features[name], args.seed).items()
    }
    labels = None if train.labels is None else train.labels[pool].numpy()
    pictures["map"] = map_picture(maps, labels, train.classes)
    for encoder, suffix in zip(encoders, ("", "_against"), strict=False):
        if isinstance(encoder.module, VisionTransformer):
            batch = next(encoder.batches(queries, chosen, **loader_args))
            maps = attention_maps(encoder.module, batch).cpu()
            pixels = denormalize(batch, queries.mean, queries.std)
            pictures[f"attention{suffix}"] = attention_picture(maps, pixels, encoder.name)
    return pictures


def _readable(images: ImageSet, indices: np.ndarray) -> Iterator[int]:
    """The indices of images that can be read; all of them, without a test, unless --on-bad-image
    allows bad ones.
    """
    for index in indices:
        try:
            if images.skip_bad:
                images.image(index)
        except RunError:
            continue
        yield index


if __name__ == "__main__":
    with one_clear_line("snclr.visualize"):
        main(sys.argv[1:])
