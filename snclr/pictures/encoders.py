"""Pictures of what encoders have learned: neighbours, attention, a map of the features."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from .. import augment
from ..datasets.images import ImageSet
from ..loader import whole_images
from ..running.precision import unit
from .canvas import BLUE, COLOURS, GREY, INK, MARGIN, Tile, fitting, font, page, sheet
from .tiles import key_of, row_of

HEAT = np.array(
    [[0, 32, 76], [87, 93, 109], [165, 156, 116], [255, 234, 70]]
)  # of the map 'cividis', dark to bright
MAP_SIDE, DOT = 460, 2.5  # pixels


class Encoder(NamedTuple):
    """An encoder (snclr.weights.reading.open_encoder), its info, and what it is called in pictures."""

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
            row += row_of(queries, query, pool, near, size)
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
    return sheet(rows, title, "\n".join(told), key_of(rows), heads)


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
