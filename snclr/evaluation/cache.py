"""Keeps features that are encoded once: in memory or, if large, in a memory-mapped file."""

import math
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..running.distributed import barrier, local_rank_zero, union
from ..running.errors import RunError
from ..running.safe_files import new_file


def keep(
    chunks: Iterable[Tensor],
    shape: tuple[int, ...],
    folder: str,
    key: Callable[[], str],
    limit: float,
) -> Tensor:
    """The chunks (c, F), the same on every rank, one after another as one array `shape` float32.

    Above `limit` bytes the array is a memory-mapped file in `folder`, one for all ranks of a
    machine. The file gets its name only when it is complete, and a later start uses it again: so
    key(), which is part of the name, must differ if the features do. Raises RunError if the file
    cannot be written.
    """
    num_bytes = 4 * math.prod(shape)
    if num_bytes <= limit:
        array, done = torch.empty(shape), 0
        for chunk in chunks:
            array.flatten(0, 1)[done : done + len(chunk)] = chunk
            done += len(chunk)
        return array
    path = os.path.join(folder, f"features_{key()[:16]}.f32")
    is_missing = not os.path.exists(path) or os.path.getsize(path) != num_bytes
    if any(union({is_missing})):  # on one machine: the ranks of all encode together
        if local_rank_zero():
            _write(path, chunks)
        else:
            for _ in chunks:
                pass  # sends this rank's part to the rank that writes the file
        barrier()
    array = torch.from_file(path, shared=True, size=math.prod(shape), dtype=torch.float32)
    return array.view(shape)


def _write(path, chunks):
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with new_file(path) as file:
            for chunk in chunks:
                file.write(chunk.float().numpy())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(
            f"cannot write the features to {path}: {error.strerror or error};"
            " choose another --workdir"
        ) from error
