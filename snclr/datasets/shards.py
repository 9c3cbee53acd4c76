"""Tar shards read in place: an index of where each image lies, so that image number i is one read at an offset."""

import json
import os
import re
import tarfile
import zipfile
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..running.errors import UsageError
from .decoding import decode, unreadable
from .images import EncodedImages


class Index(NamedTuple):
    """Where n images lie: files (F,) paths; shard (n,), offset (n,), size (n,) in bytes; label (n,) into classes (C,), -1
    for none; ignored: number of members that are neither image nor label."""

    files: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    classes: np.ndarray
    ignored: np.ndarray


class ShardImages(EncodedImages):
    """Images inside tar files."""

    per_image = ("labels", "shard", "offset", "size")

    def __init__(
        self, index: Index, labels: np.ndarray | None, classes: list[str], mean_std: tuple
    ):
        super().__init__(labels, classes, mean_std)
        self.files, self.shard, self.offset, self.size = (
            index.files,
            index.shard,
            index.offset,
            index.size,
        )

    def __len__(self) -> int:
        return len(self.offset)

    def image(self, index: int) -> Tensor:
        path, offset, size = (
            str(self.files[self.shard[index]]),
            int(self.offset[index]),
            int(self.size[index]),
        )
        name = f"of {size} bytes at offset {offset} in {path}"
        try:
            encoded = np.fromfile(path, np.uint8, count=size, offset=offset)
        except OSError as error:
            raise unreadable(name, error.strerror) from error
        return decode(encoded, name)


def open_index(source: str, extensions: tuple[str, ...], fallback: str | None) -> Index:
    """The index of a tar file, or of all .tar files below a folder, in the order of their names.

    Made at the first call, and kept beside the shards, or in the folder `fallback` where one may not write there; made
    again when names, sizes or times of the shards have changed. Raises UsageError where there is no shard, or no whole one.
    """
    files = [source] if os.path.isfile(source) else _tars_below(source)
    state = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
    key = json.dumps([[os.path.relpath(path, source), *rest] for path, *rest in state])
    kept = [
        f"{source}.index.npz" if os.path.isfile(source) else os.path.join(source, "snclr_index.npz")
    ]
    if fallback is not None:
        kept.append(
            os.path.join(fallback, f"index_{os.path.basename(os.path.abspath(source))}.npz")
        )
    for path in kept:
        index = _load(path, key)
        if index is not None and _fits(index, np.array([size for _, size, _ in state])):
            return index._replace(files=np.array(files))
    index = _scan(files, extensions)
    for path in kept:
        if _save(path, key, index):
            break
    return index


def _tars_below(folder):
    files, compressed = [], []
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        subfolders.sort()
        files += [os.path.join(parent, name) for name in sorted(names) if name.endswith(".tar")]
        compressed += [name for name in names if re.search(r"\.(tgz|tar\.\w+)$", name)]
    if not files:
        told = (
            f"; {compressed[0]} is compressed and cannot be read at an offset: unpack it to .tar"
            if compressed
            else ""
        )
        raise UsageError(f"no .tar file in {folder}{told}")
    return files


def _scan(files, extensions) -> Index:
    images, given, ignored = (
        [],
        {},
        0,
    )  # (shard, offset, size, sample, stem) of each; labels of (shard, sample)
    for shard, path in enumerate(files):
        try:
            with open(path, "rb") as file:
                for name, offset, size, stem in _members(file, path):
                    folder, base = os.path.split(name)
                    sample = os.path.join(
                        folder, base.split(".")[0]
                    )  # whose members share the name up to its first dot
                    if base.lower().endswith(".cls"):
                        given[shard, sample] = (
                            os.pread(file.fileno(), size, offset).decode().strip()
                        )
                    elif base.lower().endswith(extensions) and not base.startswith("."):
                        images.append((shard, offset, size, sample, stem))
                    else:
                        ignored += 1
        except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"shard {path} cannot be read: {error}; it must be a whole, uncompressed tar file"
            ) from error
    if not images:
        raise UsageError(f"no image in the {len(files)} tar files of {os.path.dirname(files[0])}")
    shards, offsets, sizes, samples, stems = zip(*images, strict=True)
    names = [given.get(key) for key in zip(shards, samples, strict=True)]
    if not any(names) and _name_classes(samples, stems):
        names = stems
    classes = sorted({*names} - {None})
    numbers = {name: number for number, name in enumerate(classes)} | {None: -1}
    rows = (shards, offsets, sizes, [numbers[name] for name in names])
    columns = (np.array(row, dtype=np.int64) for row in rows)
    return Index(np.array(files), *columns, np.array(classes, dtype=str), np.array(ignored))


def _members(file, path, start=0):
    """(name, offset in the outermost file, size, stem of the innermost tar) of every regular file in a tar, also of those
    inside tars inside it, as ImageNet's training set is shipped."""
    stem = os.path.basename(path).removesuffix(".tar")
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # a million of them would fill the memory
            if member.isfile() and member.name.endswith(".tar"):
                yield from _members(
                    archive.extractfile(member), member.name, start + member.offset_data
                )
            elif member.isfile():
                yield member.name, start + member.offset_data, member.size, stem


def _name_classes(samples, stems):
    """Whether the tars are one a class: several, and not merely numbered - or their images repeat the number (n01440764)."""
    numbered = any(re.search(r"\d$", stem) for stem in stems)
    repeated = all(
        os.path.basename(sample).startswith(stem)
        for sample, stem in zip(samples, stems, strict=True)
    )
    return len(set(stems)) > 1 and (repeated or not numbered)


def _load(path, key) -> Index | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return (
                Index(np.empty(0), *(file[name] for name in Index._fields[1:]))
                if file["key"].item() == key
                else None
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent, of another version or damaged: it is made again


def _fits(index, sizes) -> bool:
    """Whether all images of a kept index lie inside the files, whose sizes in bytes these are."""
    rows = (index.shard, index.offset, index.size, index.label)
    if any(
        row.ndim != 1 or row.dtype != np.int64 or not 0 < len(row) == len(index.shard)
        for row in rows
    ):
        return False
    named = (
        (index.shard >= 0)
        & (index.shard < len(sizes))
        & (index.label >= -1)
        & (index.label < index.classes.size)
    )
    room = sizes[index.shard % len(sizes)] - index.offset
    return bool((named & (index.offset >= 0) & (index.size >= 0) & (index.size <= room)).all())


def _save(path, key, index) -> bool:
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(
                file,
                key=np.array(key),
                **{name: getattr(index, name) for name in Index._fields[1:]},
            )
        os.replace(temporary, path)
        return True
    except OSError:
        return False
