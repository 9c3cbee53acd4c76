"""Pictures of what one encoder has learned, or two for comparison.

    python -m snclr.visualize runs/NAME/checkpoint_last.pth.tar DATA --against untrained

writes PNG files: nearest images, attention maps (of ViTs), a map of the features and, with --image
photo.jpg, the images nearest to the photo. The same flags and seed give the same pictures.
"""

import argparse
import contextlib
import importlib.util
import os
import sys
from functools import cache, partial

from .arguments import new_parser, number, seed
from .running.errors import RunError, UsageError, check_packages, one_clear_line
from .running.safe_files import new_file, writing
from .shared_options import add_backbone_flags, add_data_flags, resolve_data


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags, checked. Raises UsageError."""
    parser = new_parser(
        "python -m snclr.visualize FILE [DATA] [flags]",
        "Draws what one encoder has learned, or two for comparison.",
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
    args = parser.parse_args(argv)
    resolve_data(args)
    if args.image is not None and not os.path.isfile(args.image):
        raise UsageError(f"--image {args.image}: there is no such file")
    return args


if __name__ == "__main__":
    with one_clear_line("snclr.visualize"):
        parse(sys.argv[1:])  # reports a wrong flag before the slow imports
        check_packages()

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import Attention, VisionTransformer

from . import augment
from .datasets import sources
from .datasets.files import FileImages
from .datasets.folders import Paths
from .datasets.images import ImageSet
from .evaluation import knn
from .loader import whole_images
from .pictures.canvas import in_colour
from .pictures.encoders import (
    SMALL,
    Encoder,
    attention_maps,
    attention_picture,
    map_picture,
    projections,
    retrieval_picture,
)
from .pictures.steps import denormalize
from .running import process_group
from .weights import load


def main(argv: list[str]) -> None:
    args = parse(argv)
    device = process_group.own_device()
    torch.manual_seed(args.seed)  # decides the weights of an untrained encoder
    # the flags on architecture, size and normalisation concern only the first encoder
    opened = [(args.file, *load.open_by_flags(args, args.file, args.encoder))]
    if args.against == "untrained":
        opened.append((args.file, *load.open_by_flags(args, args.file, "untrained")))
    elif args.against is not None:
        opened.append((args.against, *load.open_encoder(args.against, args.encoder)))
        if (channels := opened[1][2]["channels"]) != args.channels:
            raise UsageError(
                f"{args.against} is for images with {channels} channels, not {args.channels}: "
                "these two cannot be compared"
            )
    train, val, notes = sources.open_data(args)
    notes = [note for _, _, info in opened for note in info["notes"]] + notes
    grey_range = opened[-1][2]["grey_range"]
    if grey_range not in (None, args.grey_range):
        low, high = grey_range
        notes.append(f"{args.against} has --grey-range {low:g} {high:g}; that of FILE is used")
    for note in notes:
        print(f"note: {note}")
    print(f"{len(train)} training images of {args.dataset} at {args.img_size} px")
    encoders = []
    for letter, (path, module, info) in zip("AB", opened, strict=False):
        whole = partial(whole_images, size=info["img_size"], device=device, workers=args.workers)
        module = module.to(device)
        if info["encoder"] == "untrained":
            # its batch norms get the statistics of the training images
            module = knn.calibrated_copy(module, train, whole)
        epoch = f", epoch {info['epoch']}" if info["epoch"] else ""
        short_path = os.path.join(*path.split(os.sep)[-2:])
        name = f"{info['arch']} ({info['encoder']}{epoch}) of {short_path}"
        name = f"{letter}: {name}" if len(opened) > 1 else name
        encoders.append(Encoder(module, info, name, whole))
    pictures = _draw(args, encoders, train, val)
    out = args.out or os.path.join(os.path.dirname(os.path.abspath(args.file)), "pictures")
    with writing(out):
        os.makedirs(out, exist_ok=True)
        for name, picture in pictures.items():
            path = os.path.join(out, f"{name}.png")
            with new_file(path) as file:
                picture.save(file, format="png")
            print(path)


def _draw(
    args: argparse.Namespace, encoders: list[Encoder], train: ImageSet, val: ImageSet | None
) -> dict[str, Image.Image]:
    """All pictures, by file name without suffix."""
    queries = train if val is None else val
    pool, chosen = _choose(train, args.pool, args.seed), _choose(queries, args.count, args.seed)
    pool.sort()
    if len(pool) < 3:
        raise UsageError(
            f"neighbours and a map need at least three training images, found {len(pool)}"
        )
    of_pool = {encoder.name: encoder.features(train, pool) for encoder in encoders}

    def retrieval(images, indices, title):
        pairs = {x.name: (x.features(images, indices), of_pool[x.name]) for x in encoders}
        return retrieval_picture(
            images, indices, train, pool, pairs, args.topk, args.img_size, title
        )

    pictures = {"neighbours": retrieval(queries, chosen, f"Nearest of {len(pool)} training images")}
    if args.image is not None:
        photo = FileImages(Paths([args.image]), None, [], (args.mean, args.std))
        photo.grey_range, photo.channels = args.grey_range, args.channels
        title = f"Nearest to {os.path.basename(args.image)}"
        pictures["retrieval"] = retrieval(photo, np.array([0]), title)
    if importlib.util.find_spec("umap"):
        print("drawing the map by UMAP takes about half a minute: its library compiles each time")
    maps = {name: projections(features, args.seed) for name, features in of_pool.items()}
    labels = None if train.labels is None else train.labels[pool].numpy()

    @cache  # the maps show many of the same images
    def small_image(number):
        return Image.fromarray(in_colour(train.whole(pool[number : number + 1], SMALL))[0])

    pictures["map"] = map_picture(maps, labels, train.classes, small_image)
    for encoder, suffix in zip(encoders, ("", "_against"), strict=False):
        # blocks that run in parallel have no single attention
        if isinstance(encoder.module, VisionTransformer) and isinstance(
            getattr(encoder.module.blocks[-1], "attn", None), Attention
        ):
            batch = next(encoder.batches(queries, chosen))
            attention = attention_maps(encoder.module, batch).cpu()
            pixels = denormalize(batch, queries.mean, queries.std)
            of = "all patches (mean)" if encoder.module.cls_token is None else "the class token"
            pictures[f"attention{suffix}"] = attention_picture(attention, pixels, encoder.name, of)
    return pictures


def _choose(images: ImageSet, count: int, seed: int) -> np.ndarray:
    """Indices of `count` random images, or of all if there are fewer.

    With --on-bad-image skip, an image that cannot be read is not chosen.
    """
    chosen = []
    for index in augment.epoch_order(seed, 0, len(images)):
        if len(chosen) == count:
            break
        with contextlib.suppress(RunError):
            if images.skip_bad:
                images.image(index)
            chosen.append(index)
    return np.array(chosen)


if __name__ == "__main__":
    with one_clear_line("snclr.visualize"):
        main(sys.argv[1:])
