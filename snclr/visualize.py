"""See what is learned: pictures of a training step (main_snclr.py shows them in TensorBoard) and of finished encoders.

    python -m snclr.visualize runs/NAME/checkpoint_last.pth.tar DATA --against untrained --image photo.jpg

writes neighbours, attention maps (of ViTs), a map of the features and what is nearest to the photo, as PNG files. The same
flags and seed draw the same pictures.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from . import augment, options
from .builder import StepView
from .datasets import sources
from .evaluation import knn
from .loader import Batch, ImageFiles, ImageSet, whole_images
from .pictures.canvas import (
    BLUE,
    COLOURS,
    GREY,
    INK,
    MARGIN,
    ORANGE,
    Tile,
    fitting,
    font,
    page,
    sheet,
)
from .running import distributed
from .running.errors import RunError, UsageError, one_clear_line, writing
from .running.precision import unit
from .weights import load

SAME_OR_OTHER = ((BLUE, "same class"), (ORANGE, "another class"), (GREY, "no label"))
HEAT = np.array(
    [[0, 32, 76], [87, 93, 109], [165, 156, 116], [255, 234, 70]]
)  # of the map 'cividis', dark to bright
QUERIES, ACROSS = 8, 10  # rows of the pictures of a step, and the most neighbours in a row
MAP_SIDE, DOT = 460, 2.5  # pixels

# -- a training step -----------------------------------------------------------------------------------------------------


def of_step(
    batch: Batch, shown: StepView, images: ImageSet, args: argparse.Namespace, step: int
) -> tuple[dict[str, Image.Image], dict[str, Tensor]]:
    """Pictures and histograms by name of what this rank's part of a step was trained on; step: its number, from 1."""
    pictures = {"views": view_picture(batch, images, f"Views at step {step}")}
    valid = shown.neighbour_ids >= 0
    if not valid.any():
        return pictures, {}
    pictures["neighbours"] = neighbour_picture(
        batch.ids, shown, images, args.img_size, f"Soft neighbours at step {step}"
    )
    return pictures, {
        "positiveness": shown.weights[valid],
        "bank_age_steps": bank_ages(shown.counts, step, args.batch_size),
    }


def neighbour_picture(
    ids: Tensor, shown: StepView, images: ImageSet, size: int, title: str
) -> Image.Image:
    """Images of a step beside the bank's neighbours that served as their positives, those of largest weight first.

    ids (B,) data-set indices; shown: what the step showed of these images; size: side in px at which images are read.
    """
    rows, best = (
        [],
        shown.weights[:QUERIES].float().argsort(dim=1, descending=True, stable=True)[:, :ACROSS],
    )
    parts = [
        part[:QUERIES].gather(1, best).tolist()
        for part in (shown.neighbour_ids, shown.weights, shown.scores)
    ]
    for query, *found in zip(ids[:QUERIES].tolist(), *parts, strict=True):
        found = [
            (i, f"weight {weight:.3f}", f"cosine {cosine:.2f}")
            for i, weight, cosine in zip(*found, strict=True)
            if i >= 0
        ]
        rows.append(_row(images, query, images, found, size))
    told = (
        "Images of the batch, and their neighbours in the bank by falling weight (positiveness).\n"
    )
    told += "weight: what the online projection gives the neighbour; cosine: its similarity to the image's key."
    return sheet(rows, title, told, _key(rows), ("image", "neighbours"))


def view_picture(batch: Batch, images: ImageSet, title: str) -> Image.Image:
    """The two views of images of a batch as they entered the network, in the images' own colours again."""
    views = [
        denormalize(view[:QUERIES], images.mean, images.std) for view in (batch.view1, batch.view2)
    ]
    rows = [[Tile(image) for image in view] for view in views]
    return sheet(
        rows,
        title,
        "Above: view 1, below: view 2 of the same image, as the network sees them.",
        side=128,
    )


def bank_ages(counts: Tensor, step: int, batch_size: int) -> Tensor:
    """For each pick of a bank row by the global batch of a step, how many steps ago the row was written: (picks,) floats.

    counts (M,) picks of each row; step: its number, from 1. Key n of the run lies in row n modulo M; from 1, for the newest
    key of the step before, in fractions for the place in the batch.
    """
    rows = counts.nonzero()[:, 0]
    ages = ((step - 1) * batch_size - 1 - rows) % len(counts) / batch_size + 1
    return ages.repeat_interleave(counts[rows])


def denormalize(x: Tensor, mean: Tensor, std: Tensor) -> np.ndarray:
    """Network input (B, 3, S, S) as images (B, S, S, 3) uint8."""
    x = x.detach().float().cpu() * std.view(3, 1, 1) + mean.view(3, 1, 1)
    return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


# -- finished encoders ---------------------------------------------------------------------------------------------------


class Encoder(NamedTuple):
    """An encoder (snclr.weights.load.open_encoder), its info, and what it is called in pictures."""

    module: nn.Module
    info: dict
    name: str

    def batches(self, images: ImageSet, indices: np.ndarray, **data) -> Iterator[Tensor]:
        """Images `indices` at the size and normalisation that the encoder knows. data: as of whole_images."""
        images.mean, images.std = torch.tensor(self.info["mean"]), torch.tensor(self.info["std"])
        return whole_images(images, indices, size=self.info["img_size"], **data)

    @torch.no_grad()
    def features(self, images: ImageSet, indices: np.ndarray, **data) -> Tensor:
        """Unit features (n, C) of images `indices`, on the CPU."""
        return torch.cat(
            [
                unit(self.module.embed(batch)).cpu()
                for batch in self.batches(images, indices, **data)
            ]
        )


def retrieval_picture(
    queries: ImageSet,
    asked: np.ndarray,
    pool: ImageSet,
    offered: np.ndarray,
    features: dict[str, tuple[Tensor, Tensor]],
    topk: int,
    size: int,
    title: str,
) -> Image.Image:
    """Images `asked` of `queries` beside their nearest among images `offered` of `pool`, by one encoder or several.

    features: by the encoder's name, those of the asked (n, C) and the offered (m, C). An image is never its own neighbour.
    """
    rows, told, heads = [[] for _ in asked], [], []
    topk = min(topk, len(offered) - (queries is pool))
    for name, (of_asked, of_offered) in features.items():
        cosines = of_asked @ of_offered.T
        if queries is pool:
            cosines[torch.from_numpy(asked[:, None] == offered)] = -2
        found = (part.tolist() for part in cosines.topk(topk, dim=1))
        for row, query, values, places in zip(rows, asked, *found, strict=True):
            near = [
                (index, f"cosine {value:.2f}")
                for index, value in zip(offered[places], values, strict=True)
            ]
            row += _row(queries, query, pool, near, size)
        same = [tile.frame == BLUE for row in rows for tile in row[-topk:] if tile.frame != GREY]
        told.append(
            name
            + (
                f"; {100 * np.mean(same):.0f} % of the neighbours have the image's class"
                if same
                else ""
            )
        )
        heads += ["image", f"nearest by {name[0]}" if len(features) > 1 else "nearest"] + [""] * (
            topk - 1
        )
    return sheet(rows, title, "\n".join(told), _key(rows), heads)


@torch.no_grad()
def attention_maps(encoder: nn.Module, x: Tensor) -> Tensor:
    """How much the class token attends to each patch in each head of a ViT's last block: (B, heads, rows, columns).

    x: normalised images. Without a class token, the mean over the patches' queries.
    """
    attention, kept = encoder.blocks[-1].attn, []
    fused, attention.fused_attn = (
        attention.fused_attn,
        False,
    )  # timm's fused kernel never has the weights at hand
    hook = attention.attn_drop.register_forward_hook(
        lambda module, inputs, output: kept.append(inputs[0])
    )
    encoder.forward_features(x)
    hook.remove()
    attention.fused_attn = fused
    prefixes = encoder.num_prefix_tokens
    weights = kept[0][:, :, :1] if prefixes else kept[0].mean(dim=2, keepdim=True)
    return weights[:, :, 0, prefixes:].float().unflatten(2, encoder.patch_embed.grid_size)


def attention_picture(maps: Tensor, pixels: np.ndarray, name: str, side: int = 112) -> Image.Image:
    """Attention (B, heads, rows, columns) over its images (B, S, S, 3) uint8: the mean of the heads, then each head."""
    rows = []
    for image, heads in zip(
        pixels, torch.cat([maps.mean(dim=1, keepdim=True), maps], dim=1).numpy(), strict=True
    ):
        rows.append(
            [Tile(image), *(Tile(_heated(image, head / head.max(), 2 * side)) for head in heads)]
        )
    names = ["image", "mean", *(f"head {number + 1}" for number in range(maps.shape[1]))]
    told = f"Where the class token looks, in the last block of {name}"
    key = [(tuple(HEAT[-1]), "most"), (tuple(HEAT[0]), "least, each map for itself")]
    return sheet(rows, "Attention", told, key, names, side=side)


def _heated(image, heat, side):
    """The image in grey under the colours of a map (rows, columns) in 0..1."""
    where = np.linspace(0, 1, len(HEAT))
    smooth = np.asarray(
        Image.fromarray(heat.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    ).clip(0, 1)
    colours = np.stack([np.interp(smooth, where, HEAT[:, channel]) for channel in range(3)], axis=2)
    grey = np.asarray(Image.fromarray(image).convert("L").resize((side, side)), np.float32)[
        ..., None
    ]
    return (0.45 * grey + 0.55 * colours).astype(np.uint8)


def pca(features: Tensor) -> np.ndarray:
    """Features (n, C) on their first two principal components: (n, 2). The larger end of each component points upwards."""
    centred = (features - features.mean(dim=0)).double()
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(dim=1, keepdim=True)).sign()
    return (centred @ axes.T).numpy()


def projections(features: Tensor, seed: int) -> dict[str, np.ndarray]:
    """Features (n, C) in two dimensions by each method at hand: PCA, and t-SNE where scikit-learn is installed."""
    found = {"PCA": pca(features)}
    try:
        from sklearn.manifold import (
            TSNE,
        )  # the field's usual map; it has no place among the core dependencies
    except ImportError:
        return found
    tsne = TSNE(perplexity=min(30, (len(features) - 1) / 3), init="pca", random_state=seed)
    return {**found, "t-SNE": tsne.fit_transform(features.numpy())}


def map_picture(
    maps: dict[str, np.ndarray], labels: np.ndarray | None, classes: Sequence[str]
) -> Image.Image:
    """Maps (n, 2) of the same images side by side, by name, coloured by labels (n,), -1 for none."""
    told, key = f"each dot is one of {len(next(iter(maps.values())))} images", []
    if labels is not None and len(classes) <= len(COLOURS):
        told, key = (
            f"{told}, its colour its class",
            list(zip(COLOURS, map(str, classes), strict=False)),
        )
    elif labels is not None:
        told = f"{told}, its colour its class (colours repeat)"
    image, draw, top = page(
        (MAP_SIDE + MARGIN) * len(maps) - MARGIN, MAP_SIDE + 20, "Map of the features", told, key
    )
    for number, (name, points) in enumerate(maps.items()):
        left = MARGIN + number * (MAP_SIDE + MARGIN)
        low, high = points.min(axis=0), points.max(axis=0)
        span = max((high - low).max(), 1e-12)  # 0 at full collapse
        at = (points - low) / span + (1 - (high - low) / span) / 2
        fine = Image.new(
            "RGB", (3 * MAP_SIDE, 3 * MAP_SIDE), (250, 250, 250)
        )  # three times as fine: smooth dots
        pen = ImageDraw.Draw(fine)
        for index in augment.epoch_order(
            0, 0, len(at)
        ):  # else the last class would cover the others
            x, y = 3 * (8 + at[index] * (MAP_SIDE - 16))
            colour = (
                GREY
                if labels is None or labels[index] < 0
                else COLOURS[labels[index] % len(COLOURS)]
            )
            pen.ellipse((x - 3 * DOT, y - 3 * DOT, x + 3 * DOT, y + 3 * DOT), fill=colour)
        draw.text((left, top), fitting(name, MAP_SIDE), fill=INK, font=font())
        image.paste(fine.resize((MAP_SIDE, MAP_SIDE), Image.Resampling.LANCZOS), (left, top + 20))
    return image


def _row(queries, query, pool, found, size):
    """Tiles of an image and of what was found for it in a pool: (index, words ...) each, framed by whether classes agree."""
    name = _class_of(queries, query)
    tiles = [Tile(_pixels(queries, [query], size)[0], [name] if name else ())]
    for image, (index, *words) in zip(
        _pixels(pool, [index for index, *_ in found], size), found, strict=True
    ):
        other = _class_of(pool, index)
        frame = GREY if "" in (name, other) else BLUE if name == other else ORANGE
        tiles.append(Tile(image, [other, *words] if other else words, frame))
    return tiles


def _key(rows):
    frames = {tile.frame for row in rows for tile in row}
    return [(colour, name) for colour, name in SAME_OR_OTHER if colour in frames]


def _readable(images, indices):
    """Those of the indices whose images can be read, where --on-bad-image lets the others be."""
    for index in indices:
        try:
            if images.skip_bad:
                images.image(index)
        except RunError:
            continue
        yield index


def _pixels(images, indices, size):
    return (
        images.whole(np.array(indices, dtype=np.int64), size).permute(0, 2, 3, 1).cpu().numpy()
    )  # (n, S, S, 3) uint8


def _class_of(images, index):
    label = -1 if images.labels is None else int(images.labels[index])
    return str(images.classes[label]) if label >= 0 else ""


# -- the command ---------------------------------------------------------------------------------------------------------


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
    options.add_backbone_flags(parser, default_arch=None)
    parser.set_defaults(patch_size=None, small_stem=None)  # as FILE says
    args = parser.parse_args(argv)
    args.workdir = None  # where an index of shards goes that cannot lie beside them
    options.resolve_data(args)
    options.check_data(args, ("count", "topk", "pool"))
    if args.image is not None and not os.path.isfile(args.image):
        raise UsageError(f"--image {args.image}: there is no such file")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    device = distributed.own_device()
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
            for name in (
                "arch",
                "img_size",
                "patch_size",
                "num_heads",
                "width",
                "small_stem",
                "timm_kwargs",
                "mean",
                "std",
            )
            if letter == "A"
        }
        module, info = load.open_encoder(path, which, **said)
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


if __name__ == "__main__":
    with one_clear_line("snclr.visualize"):
        main(sys.argv[1:])
