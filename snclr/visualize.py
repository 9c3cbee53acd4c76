"""See what is learned: pictures of a training step (main_snclr.py shows them in TensorBoard) and of finished encoders.

    python -m snclr.visualize runs/NAME/checkpoint_last.pth.tar DATA --against untrained --image photo.jpg

writes neighbours, attention maps (of ViTs), a map of the features and what is nearest to the photo, as PNG files. The same
flags and seed draw the same pictures.
"""

import argparse
import os
import sys
from itertools import islice

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from . import augment, options
from .datasets import sources
from .datasets.images import ImageFiles
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
from .running.safe_files import writing
from .weights import reading as weights


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags, checked. Raises UsageError."""
    parser = options.new_parser(
        "snclr.visualize", "Draws what an encoder has learned, alone or beside another one."
    )
    parser.add_argument("file", metavar="FILE", help="checkpoint or state dict, any layout")
    options.add_data_flags(parser)
    g = parser.add_argument_group("pictures")
    g.add_argument(
        "--encoder",
        choices=("online", "momentum", "untrained"),
        default="online",
        help="untrained: as it started",
    )
    g.add_argument(
        "--against",
        metavar="FILE",
        help="a second encoder beside it; untrained: the same before training",
    )
    g.add_argument("-a", "--arch", help="architecture, where FILE does not say it")
    g.add_argument(
        "--image", metavar="PATH", help="an image file whose nearest training images are shown, too"
    )
    g.add_argument("--count", type=int, default=8, metavar="N", help="images in a picture")
    g.add_argument("--topk", type=int, default=6, metavar="K", help="nearest images of each")
    g.add_argument(
        "--pool",
        type=int,
        default=5000,
        metavar="N",
        help="training images among which they are looked for",
    )
    g.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of images")
    g.add_argument(
        "--out", metavar="DIR", help="folder of the pictures (default: pictures beside FILE)"
    )
    args = parser.parse_args(argv)
    args.workdir = None  # where an index of shards goes that cannot lie beside them
    options.resolve_data(args)
    options.check_data(args, ("count", "topk", "pool"))
    if args.image is not None and not os.path.isfile(args.image):
        raise UsageError(f"--image {args.image}: there is no such file")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    device = process_group.own_device()
    torch.manual_seed(args.seed)  # for the start of an untrained encoder
    wanted = [("A", args.file, args.encoder)]
    if args.against is not None:
        wanted.append(
            ("B", args.file, "untrained")
            if args.against == "untrained"
            else ("B", args.against, args.encoder)
        )
    encoders, data = [], {"device": device, "workers": args.workers}
    for letter, path, which in wanted:
        said = {
            name: getattr(args, name)
            for name in ("arch", "img_size", "mean", "std")
            if letter == "A"
        }
        module, info = weights.open_encoder(path, which, **said)
        if letter == "A":
            args.mean, args.std = info["mean"], info["std"]
            train, val, _ = sources.open_data(args)
        module = module.to(device)
        if which == "untrained":
            module = knn.calibrated_copy(module, train, size=info["img_size"], **data)
        epoch = f", epoch {info['epoch']}" if info["epoch"] else ""
        name = f"{info['arch']} ({which}{epoch}) of {os.path.join(*path.split(os.sep)[-2:])}"
        encoders.append(Encoder(module, info, f"{letter}: {name}" if len(wanted) > 1 else name))
    size, queries = encoders[0].info["img_size"], train if val is None else val
    offered, asked = (
        _readable(images, augment.epoch_order(args.seed, 0, len(images)))
        for images in (train, queries)
    )
    offered, asked = (
        np.array(sorted(islice(offered, args.pool))),
        np.array([*islice(asked, args.count)]),
    )
    if len(offered) < 3:
        raise UsageError(
            f"neighbours and a map need three training images at least, found {len(offered)}"
        )
    pools = {encoder.name: encoder.features(train, offered, **data) for encoder in encoders}

    def retrieval(images, indices, title):
        features = {
            encoder.name: (encoder.features(images, indices, **data), pools[encoder.name])
            for encoder in encoders
        }
        return retrieval_picture(images, indices, train, offered, features, args.topk, size, title)

    pictures = {
        "neighbours": retrieval(queries, asked, f"Nearest of {len(offered)} training images")
    }
    if args.image is not None:
        photo = ImageFiles([args.image], None, [], (args.mean, args.std))
        pictures["retrieval"] = retrieval(
            photo, np.array([0]), f"Nearest to {os.path.basename(args.image)}"
        )
    labels = None if train.labels is None else train.labels[offered].numpy()
    maps = {
        f"{method} of {name}": points
        for name in pools
        for method, points in projections(pools[name], args.seed).items()
    }
    pictures["map"] = map_picture(maps, labels, train.classes)
    for encoder, suffix in zip(encoders, ("", "_against"), strict=False):
        if isinstance(encoder.module, VisionTransformer):
            batch = next(encoder.batches(queries, asked, **data))
            maps = attention_maps(encoder.module, batch).cpu()
            images = denormalize(batch, queries.mean, queries.std)
            pictures[f"attention{suffix}"] = attention_picture(maps, images, encoder.name)
    out = args.out or os.path.join(os.path.dirname(os.path.abspath(args.file)), "pictures")
    with writing(out):
        os.makedirs(out, exist_ok=True)
        for name, picture in pictures.items():
            picture.save(os.path.join(out, f"{name}.png"))
            print(os.path.join(out, f"{name}.png"))


def _readable(images, indices):
    """Those of the indices whose images can be read, where --on-bad-image lets the others be."""
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
