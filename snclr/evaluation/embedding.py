"""Features of a whole image set in one file. They are encoded in parts, each a file until all are
done: an interrupted run goes on, and the features may be larger than the memory.
"""

import contextlib
import inspect
import io
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..datasets.images import ImageSet
from ..loader import EVALUATION_BATCH, whole_images
from ..running.distributed import barrier, on_rank_zero, rank, world_size
from ..running.errors import RunError, UsageError, first_line
from ..running.precision import autocast, widen
from ..running.safe_files import new_file, open_regular, writing

PART_BYTES = 2**26  # most bytes of the features in a part, unless those of one image are more
PART_BATCHES = 4  # most batches of a part: what an interruption can lose


def check_tokens(encoder: nn.Module, tokens: str, layers: int) -> None:
    """Raise UsageError for tokens or layers that the encoder does not have."""
    if (tokens, layers) == ("class", 1):
        return
    if not hasattr(encoder, "num_prefix_tokens"):
        raise UsageError(
            f"--tokens {tokens} --layers {layers} is for ViTs; other encoders have only the "
            "features of --tokens class --layers 1"
        )
    if layers > len(encoder.blocks):
        raise UsageError(f"--layers {layers} exceeds the {len(encoder.blocks)} blocks")
    arguments = inspect.signature(encoder.forward_intermediates).parameters
    if tokens == "class" and (
        getattr(encoder, "cls_token", None) is None or "return_prefix_tokens" not in arguments
    ):  # CaiT and XCiT have a class token only in their last layers
        raise UsageError(
            "the blocks of this ViT have no class token: choose --tokens mean or patch"
        )


def embedder(
    encoder: nn.Module, tokens: str, layers: int, amp: str, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """A function from images (B, C, S, S) to features, in at least float32 and without gradient.

    They are (B, layers * C), or (B, P, layers * C) for all P patch tokens. Those of several layers
    are the outputs of the last blocks, the last one at the end, each after the final norm, as
    get_intermediate_layers of DINO and DINOv2 gives them.
    """

    @torch.no_grad()
    def embed(x):
        with autocast(amp, device):
            if (tokens, layers) == ("class", 1):
                return widen(encoder.embed(x))
            # timm's CaiT and XCiT do not know the argument
            prefix = {"return_prefix_tokens": True} if tokens == "class" else {}
            parts = encoder.forward_intermediates(
                x,
                layers,
                norm=True,
                output_fmt="NLC",
                intermediates_only=True,
                **prefix,
            )
            if tokens == "class":
                parts = [prefix_tokens[:, 0] for _, prefix_tokens in parts]
            features = widen(torch.cat(parts, dim=-1))
            return features.mean(dim=1) if tokens == "mean" else features

    return embed


def encode_parts(
    embed: Callable[[Tensor], Tensor],
    images: ImageSet,
    folder: str,
    key: str,
    *,
    size: int,
    device: torch.device,
    workers: int,
    log: Callable[[str], None],
) -> list[str]:
    """Encode all images, every rank its share. Returns the .npy files of the parts in `folder`, in
    the order of the images.

    Parts that exist already are not encoded again. key: hash of all that the features depend on, in
    the names of the parts. A part is encoded by one rank, in the same batches for any number of
    ranks, and has its name only when it is complete. The features of images that cannot be read
    (images.skip_bad) are NaN. Raises RunError if a part cannot be written.
    """
    one = embed(torch.zeros(1, len(images.mean), size, size, device=device)).cpu()
    batch = min(max(PART_BYTES // (4 * one.numel()), 1), EVALUATION_BATCH)
    length = min(max(PART_BYTES // (4 * one.numel() * batch), 1), PART_BATCHES) * batch
    ranges = np.split(np.arange(len(images)), range(length, len(images), length))
    paths = [os.path.join(folder, f"{key[:16]}_{part[0]:09}.npy") for part in ranges]
    todo = on_rank_zero(
        lambda: [
            number
            for number, (path, part) in enumerate(zip(paths, ranges, strict=True))
            if not _is_complete(path, one.new_empty(len(part), *one.shape[1:]).numpy())
        ]
    )
    if len(todo) < len(paths):
        log(f"{len(paths) - len(todo)} of {len(paths)} parts are in {folder} already")
    own = todo[rank() :: world_size()]
    indices = np.concatenate([np.arange(0), *(ranges[number] for number in own)])
    batches = whole_images(images, indices, size=size, device=device, workers=workers, chunk=batch)
    bar = tqdm(
        total=len(indices),
        unit="image",
        disable=rank() > 0 or len(indices) == 0,
        mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file gets few lines
    )
    for number in own:
        rows = []
        for start in range(0, len(ranges[number]), batch):
            x = next(batches)
            rows.append(embed(x).cpu())
            if images.skip_bad:
                chosen = ranges[number][start : start + batch]
                rows[-1][unreadable(images, chosen, x)] = torch.nan
            bar.update(len(x))
        with writing(paths[number]):
            os.makedirs(folder, exist_ok=True)
            with new_file(paths[number]) as file:
                np.save(file, torch.cat(rows).numpy())
    bar.close()
    barrier()
    return paths


def unreadable(images: ImageSet, indices: np.ndarray, x: Tensor) -> Tensor:
    """Which of the images `indices` cannot be read, (n,) bool. They are grey in x (n, C, S, S)."""
    uniform = (x.amax((2, 3)) == x.amin((2, 3))).all(dim=1).cpu()
    for row in uniform.nonzero().flatten().tolist():
        with contextlib.suppress(RunError):
            images.image(int(indices[row]))
            uniform[row] = False
    return uniform


def join_parts(out: str, paths: list[str], images: ImageSet) -> tuple[int, ...]:
    """Write `out` from the parts and remove their folder. Returns the shape of the features."""
    folder = os.path.dirname(paths[0])
    joined = os.path.join(folder, "joined")  # a killed process leaves no file beside `out`
    shape = (len(images), *_read(paths[0]).shape[1:])
    write = WRITERS[out.rpartition(".")[2]]
    with writing(out):
        with new_file(joined) as file:
            write(file, map(_read, paths), shape, images.paths, images)
        os.replace(joined, out)
    shutil.rmtree(folder, ignore_errors=True)
    return shape


def _is_complete(path, features):
    """Whether a part has the header and the size of these features: a machine that lost power may
    leave a file without its content.
    """
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(features))
    header = header.getvalue()
    with contextlib.suppress(UsageError), open_regular(path, follow=False) as file:
        size = os.fstat(file.fileno()).st_size
        return file.read(len(header)) == header and size == len(header) + features.nbytes
    return False


def _read(path):
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise RunError(
            f"the part {path} cannot be read: {first_line(error)}; all ranks must see its folder, "
            "and only one command may write into it"
        ) from error


def write_npz(
    file: BinaryIO,
    parts: Iterator[np.ndarray],
    shape: tuple[int, ...],
    names: np.ndarray,
    images: ImageSet,
) -> None:
    """Write names (n,), features (n, ...) and, with labels, labels (n,) (-1: none) and classes.

    shape: of the features, of which each part has some rows.
    """
    arrays = {"names": names}
    if images.labels is not None:
        arrays |= {"labels": images.labels.numpy(), "classes": np.array(images.classes, str)}
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.save(member, array)
        with archive.open("features.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for part in parts:
                member.write(part.astype("<f4", copy=False).tobytes())


def write_parquet(
    file: BinaryIO,
    parts: Iterator[np.ndarray],
    shape: tuple[int, ...],
    names: np.ndarray,
    images: ImageSet,
) -> None:
    """Write the columns names, features and, with labels, labels: the class, or null.

    shape: of the features, of which each part has some rows.
    """
    import pyarrow  # optional
    from pyarrow import parquet

    writer, start = None, 0
    for part in parts:
        chosen = slice(start, start := start + len(part))
        features = pyarrow.array(part.reshape(-1))
        for width in reversed(shape[1:]):
            features = pyarrow.FixedSizeListArray.from_arrays(features, width)
        columns = {"names": names[chosen], "features": features}
        if images.labels is not None:
            classes = [*map(str, images.classes), None]  # label -1 takes the last one
            labels = [classes[label] for label in images.labels[chosen].tolist()]
            columns["labels"] = pyarrow.array(labels, pyarrow.string())
        table = pyarrow.table(columns)
        writer = writer or parquet.ParquetWriter(file, table.schema)
        writer.write_table(table)
    writer.close()


WRITERS = {"npz": write_npz, "parquet": write_parquet}
