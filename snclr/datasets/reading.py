"""Reads the bytes of encoded images: of a file, or of a part of one, which may be compressed."""

import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..running.errors import RunError, UsageError, first_line
from ..running.safe_files import open_regular

LARGEST = 2**29  # bytes of an encoded image


def read_encoded(path: str, name: str, offset: int = 0, size: int | None = None) -> np.ndarray:
    """The `size` bytes (size,) uint8 from `offset` in a regular file; by default all from there.

    Raises RunError, which includes `name`, if they cannot be read or are more than LARGEST.
    """
    try:
        with open_regular(path) as file:
            available = os.fstat(file.fileno()).st_size - offset
            size = available if size is None else size
            if size > min(available, LARGEST):
                raise unreadable(name, f"{size} bytes are more than {min(available, LARGEST)}")
            file.seek(offset)
            return np.fromfile(file, np.uint8, count=size)
    except (UsageError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
        raise unreadable(name, reason) from error


def file_states(paths: Iterable[str]) -> list[tuple[str, int, int]]:
    """Path, size in bytes and time of the last change in ns of each file; -1 if there is none."""

    def states(part):
        return [state(path) for path in part]

    def state(path):
        try:
            found = os.stat(path)
        except OSError:
            return path, -1, -1
        return path, found.st_size, found.st_mtime_ns

    paths = [*map(str, paths)]
    parts = [paths[start : start + 1000] for start in range(0, len(paths), 1000)]
    with ThreadPoolExecutor(16) as threads:  # a million files on a network disk take minutes
        return [entry for part in threads.map(states, parts) for entry in part]


def inflate(content: np.ndarray, size: int, name: str) -> np.ndarray:
    """The `size` bytes (size,) uint8 of a compressed member of a zip file. Raises RunError, which
    includes `name`, if they are damaged.
    """
    if size > LARGEST:
        raise unreadable(name, f"{size} bytes are more than {LARGEST}")
    try:
        # never more than one byte too many, whatever the file claims
        image = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
    except zlib.error as error:
        raise unreadable(name, error) from error
    if len(image) != size:
        raise unreadable(name, f"it does not unpack to {size} bytes")
    return np.frombuffer(bytearray(image), np.uint8)


def unreadable(name: str, reason: object) -> RunError:
    """The error for an image that cannot be read."""
    advice = "remove or replace the file, or add --on-bad-image skip"
    return RunError(f"cannot read image {name}: {first_line(reason)}; {advice}")
