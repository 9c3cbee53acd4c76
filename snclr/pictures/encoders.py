"""Pictures of what encoders have learned: nearest images, attention, a map of the features."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from .. import augment
from ..datasets.images import ImageSet
from ..running.precision import unit
from .canvas import (
    BLUE,
    COLOURS,
    GREY,
    INK,
    MARGIN,
    ORANGE,
    Tile,
    fitting,
    font,
    frame_key,
    neighbour_tiles,
    page,
    sheet,
)

# matplotlib's colour map 'cividis', dark to bright
HEAT = np.array([[0, 32, 76], [87, 93, 109], [165, 156, 116], [255, 234, 70]])
MAP_SIDE, DOT, SMALL = 460, 2.5, 36  # pixels; SMALL: side of an image on a map


class Encoder(NamedTuple):
    """An encoder, and how pictures show it."""

    module: nn.Module
    info: dict  # of snclr.weights.load.open_encoder
    name: str  # in the pictures
    load: Callable[[ImageSet, np.ndarray], Iterator[Tensor]]  # loader.whole_images in its size

    def batches(self, images: ImageSet, indices: np.ndarray) -> Iterator[Tensor]:
        """Batches of the images `indices`, in the size and normalisation of its training."""
        images.mean, images.std = torch.tensor(self.info["mean"]), torch.tensor(self.info["std"])
        return self.load(images, indices)

    @torch.no_grad()
    def features(self, images: ImageSet, indices: np.ndarray) -> Tensor:
        """Features (n, C) of the images `indices`, unit rows on the CPU."""
        batches = self.batches(images, indices)
        return torch.cat([unit(self.module.embed(batch)).cpu() for batch in batches])


def retrieval_picture(
    queries: ImageSet,
    query_indices: np.ndarray,
    pool: ImageSet,
    pool_indices: np.ndarray,
    features: dict[str, tuple[Tensor, Tensor]],
    topk: int,
    size: int,
    title: str,
) -> Image.Image:
    """Images of `queries` beside their nearest images of `pool`, for one encoder or several.

    features: for each encoder's name the features of the queries (n, C) and of the pool (m, C). An
    image is never its own neighbour. size: side in px at which images are read.
    """
    rows, lines, heads = [[] for _ in query_indices], [], []
    topk = min(topk, len(pool_indices) - (queries is pool))
    for name, (query_features, pool_features) in features.items():
        cosines = query_features @ pool_features.T
        if queries is pool:
            cosines[torch.from_numpy(query_indices[:, None] == pool_indices)] = -2
        nearest = (part.tolist() for part in cosines.topk(topk, dim=1))
        for row, query, values, positions in zip(rows, query_indices, *nearest, strict=True):
            neighbours = [
                (index, f"cosine {value:.2f}")
                for index, value in zip(pool_indices[positions], values, strict=True)
            ]
            row += neighbour_tiles(queries, query, pool, neighbours, size)
        frames = [tile.frame for row in rows for tile in row[-topk:]]
        same = [frame == BLUE for frame in frames if frame in (BLUE, ORANGE)]
        if same:  # some have labels
            name += f"; {100 * np.mean(same):.0f} % of the neighbours have the image's class"
        lines.append(name)
        head = f"nearest by {name[0]}" if len(features) > 1 else "nearest"
        heads += ["image", head, *[""] * (topk - 1)]
    return sheet(rows, title, "\n".join(lines), frame_key(rows), heads)


@torch.no_grad()
def attention_maps(encoder: nn.Module, x: Tensor) -> Tensor:
    """The attention of the class token to each patch, in each head of a ViT's last block:
    (B, heads, rows, columns).

    x: normalised images. Without a class token: the mean attention of all patches.
    """
    attention, weights = encoder.blocks[-1].attn, []
    # timm's fused kernel never holds the attention weights
    fused, attention.fused_attn = attention.fused_attn, False
    hook = attention.attn_drop.register_forward_hook(
        lambda module, inputs, output: weights.append(inputs[0])
    )
    encoder.forward_features(x)
    hook.remove()
    attention.fused_attn = fused
    prefixes, grid = encoder.num_prefix_tokens, encoder.patch_embed.grid_size
    rows = weights[0][:, :, :1] if encoder.cls_token is not None else weights[0][:, :, prefixes:]
    return rows[..., prefixes:].mean(dim=2).float().unflatten(2, grid)


def attention_picture(
    maps: Tensor, pixels: np.ndarray, name: str, of: str = "the class token"
) -> Image.Image:
    """Attention (B, heads, rows, columns) over its images (B, S, S, 3) uint8: the mean of the
    heads, then each head. of: the tokens whose attention it is.
    """
    rows, all_maps = [], torch.cat([maps.mean(dim=1, keepdim=True), maps], dim=1).numpy()
    for image, heads in zip(pixels, all_maps, strict=True):
        tiles = [Tile(_heated(image, head / head.max(), 224)) for head in heads]
        rows.append([Tile(image), *tiles])
    names = ["image", "mean", *(f"head {number + 1}" for number in range(maps.shape[1]))]
    return sheet(
        rows,
        "Attention",
        f"Attention of {of} in the last block of {name}",
        [(tuple(HEAT[-1]), "most, in each map"), (tuple(HEAT[0]), "none")],
        names,
        side=112,
    )


def _heated(image, heat, side):
    """The image in grey, mixed with the colours of a map (rows, columns) in 0..1."""
    heat = Image.fromarray(heat.astype(np.float32))
    smooth = np.asarray(heat.resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)
    stops = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(smooth, stops, channel) for channel in HEAT.T], 2)
    grey = np.asarray(Image.fromarray(image).convert("L").resize((side, side)), np.float32)
    return (0.45 * grey[..., None] + 0.55 * colours).astype(np.uint8)


def pca(features: Tensor) -> np.ndarray:
    """Features (n, C) projected on their first two principal components: (n, 2).

    The sign of a component is chosen so that its largest entry is positive.
    """
    centred = (features - features.mean(dim=0)).double()
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(dim=1, keepdim=True)).sign()
    return (centred @ axes.T).numpy()


def projections(features: Tensor, seed: int) -> dict[str, np.ndarray]:
    """Features (n, C) in two dimensions, by method: PCA, t-SNE if scikit-learn is installed, and
    UMAP if umap-learn is installed.
    """
    maps = {"PCA": pca(features)}
    if np.ptp(maps["PCA"][:, 0]) < 1e-6:
        return maps  # full collapse: the others divide by the spread, and scikit-learn crashes
    with contextlib.suppress(ImportError):
        from sklearn.manifold import TSNE  # optional: only this map needs it

        tsne = TSNE(perplexity=min(30, (len(features) - 1) / 3), init="pca", random_state=seed)
        maps["t-SNE"] = tsne.fit_transform(features.numpy())
    with contextlib.suppress(ImportError):
        from umap import UMAP  # optional; it compiles again in every process

        neighbours = min(15, len(features) - 1)
        umap = UMAP(n_neighbors=neighbours, init="pca", random_state=seed, n_jobs=1)
        maps["UMAP"] = umap.fit_transform(features.numpy())
    return maps


def map_picture(
    maps: dict[str, dict[str, np.ndarray]],
    labels: np.ndarray | None,
    classes: Sequence[str],
    small_image: Callable[[int], Image.Image] | None,
) -> Image.Image:
    """Maps (n, 2) of the same images: a row for each name, with a column for each method.

    The labels (n,), -1 for none, decide the colours. Without labels, or if there are more classes
    than colours, images of side SMALL, by their number in 0 .. n-1, lie on the dots where there is
    room.
    """
    count = len(next(iter(next(iter(maps.values())).values())))
    line, key = f"each dot is one of {count} images", []
    if labels is not None:
        line = f"{line}, its colour its class"
    if labels is None or len(classes) > len(COLOURS):
        line += "; some of them are shown" if labels is None else " (colours repeat)"
    else:
        key, small_image = list(zip(COLOURS, map(str, classes), strict=False)), None
    pitch, columns = MAP_SIDE + MARGIN, max(map(len, maps.values()))
    height = len(maps) * (pitch + 20) - MARGIN
    image, draw, top = page(pitch * columns - MARGIN, height, "Map of the features", line, key)
    for row, (name, by_method) in enumerate(maps.items()):
        for column, (method, points) in enumerate(by_method.items()):
            left, y = MARGIN + column * pitch, top + row * (pitch + 20)
            draw.text((left, y), fitting(f"{method} of {name}", MAP_SIDE), fill=INK, font=font())
            image.paste(_map(points, labels, small_image), (left, y + 20))
    return image


def _map(points, labels, small_image):
    low, high = points.min(axis=0), points.max(axis=0)
    span = max((high - low).max(), 1e-12)  # it is 0 at full collapse
    positions = (points - low) / span + (1 - (high - low) / span) / 2
    positions = 8 + positions * (MAP_SIDE - 16)
    # drawn three times as large and reduced, for smooth dots
    large = Image.new("RGB", (3 * MAP_SIDE, 3 * MAP_SIDE), (250, 250, 250))
    draw = ImageDraw.Draw(large)
    # in a random order: otherwise the last class could cover the others
    order = augment.epoch_order(0, 0, len(positions))
    for index in order:
        x, y = 3 * positions[index]
        label = -1 if labels is None else labels[index]
        colour = GREY if label < 0 else COLOURS[label % len(COLOURS)]
        draw.ellipse((x - 3 * DOT, y - 3 * DOT, x + 3 * DOT, y + 3 * DOT), fill=colour)
    picture = large.resize((MAP_SIDE, MAP_SIDE), Image.Resampling.LANCZOS)
    corners = np.empty((0, 2), int)
    for index in order if small_image else ():
        corner = (positions[index] - SMALL / 2).clip(0, MAP_SIDE - SMALL).astype(int)
        if (np.abs(corners - corner).max(axis=1) >= SMALL).all():
            corners = np.vstack([corners, corner])
            picture.paste(small_image(index), tuple(corner.tolist()))
    return picture
