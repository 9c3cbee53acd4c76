"""Images in tar files (shards), which are not unpacked.

An index lists the position of each image, so that an image takes one read at an offset.
"""

import json
import os
import re
import tarfile
import zipfile
from typing import NamedTuple

import numpy as np

from ..running.errors import UsageError
from ..running.safe_files import new_file, open_regular
from .decoding import read_encoded
from .images import FileImages


class Index(NamedTuple):
    """The positions of n images in tar files.

    files           (F,) paths of the tar files
    shard           (n,) number of the image's tar file
    offset, size    (n,) in bytes
    label           (n,) number of the image's class, -1 for none
    classes         (C,) names
    ignored         number of tar members that are neither image nor label
    """

    files: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    classes: np.ndarray
    ignored: np.ndarray


class ShardImages(FileImages):
    """Images inside tar files."""

    per_image = ("labels", "shard", "offset", "size")

    def __init__(
        self, index: Index, labels: np.ndarray | None, classes: list[str], mean_std: tuple
    ):
        super().__init__(labels, classes, mean_std)
        self.files, self.shard = index.files, index.shard
        self.offset, self.size = index.offset, index.size

    def __len__(self) -> int:
        return len(self.offset)

    def encoded(self, index: int) -> tuple[str, np.ndarray]:
        path = str(self.files[self.shard[index]])
        offset, size = int(self.offset[index]), int(self.size[index])
        name = f"of {size} bytes at offset {offset} in {path}"
        return name, read_encoded(path, name, offset, size)


def open_index(source: str, extensions: tuple[str, ...], fallback: str | None) -> Index:
    """The index of one tar file, or of all .tar files below a folder in the order of their names.

    The first call saves it beside the shards, or in the folder `fallback` if those are read-only.
    It is made again if names, sizes or times of the shards have changed. Raises UsageError if there
    is no shard or one cannot be read.
    """
    files = [source] if os.path.isfile(source) else _tars_below(source)
    for path in files:
        open_regular(path).close()
    stats = [os.stat(path) for path in files]
    names = [os.path.relpath(path, source) for path in files]
    key = json.dumps(
        [[name, stat.st_size, stat.st_mtime_ns] for name, stat in zip(names, stats, strict=True)]
    )
    is_folder = os.path.isdir(source)
    index_paths = [os.path.join(source, "snclr_index.npz") if is_folder else f"{source}.index.npz"]
    if fallback is not None:
        source_name = os.path.basename(os.path.abspath(source))
        index_paths.append(os.path.join(fallback, f"index_{source_name}.npz"))
    for path in index_paths:
        index = _load(path, key)
        if index is not None and _fits(index, np.array([stat.st_size for stat in stats])):
            return index._replace(files=np.array(files))
    index = _scan(files, extensions)
    for path in index_paths:
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
        message = f"no .tar file in {folder}"
        if compressed:
            message += f"; {compressed[0]} is compressed: unpack it to .tar"
        raise UsageError(message)
    return files


def _scan(files, extensions) -> Index:
    """Read the headers of all tar members.

    The members of a sample have the same name up to the first dot: an image, and in WebDataset's
    layout a .cls file with its class. Without .cls files, the tar files may be named by class.
    """
    images, ignored = [], 0  # (shard, offset, size, sample, stem) of each image
    class_names = {}  # by (shard, sample)
    for shard, path in enumerate(files):
        try:
            with open(path, "rb") as file:
                for name, offset, size, stem in _members(file, path):
                    folder, base = os.path.split(name)
                    sample = os.path.join(folder, base.split(".")[0])
                    if base.lower().endswith(".cls"):
                        content = os.pread(file.fileno(), min(size, 2**16), offset)
                        class_names[shard, sample] = content.decode().strip()
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
    names = [class_names.get(key) for key in zip(shards, samples, strict=True)]
    if not any(names) and _name_classes(samples, stems):
        names = stems
    classes = sorted({*names} - {None})
    numbers = {name: number for number, name in enumerate(classes)} | {None: -1}
    labels = [numbers[name] for name in names]
    columns = np.array([shards, offsets, sizes, labels], dtype=np.int64)
    return Index(np.array(files), *columns, np.array(classes, dtype=str), np.array(ignored))


def _members(file, path, start=0, depth=0):
    """For each regular file in a tar file: its name, its offset in the outermost file, its size,
    and the stem of the innermost tar file.

    Tar files within a tar file are read too, as in ImageNet's training set.
    """
    if depth > 8:
        raise tarfile.ReadError("more than 8 tar files are nested")
    stem = os.path.basename(path).removesuffix(".tar")
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile would keep them all in memory
            if member.isfile() and member.name.endswith(".tar"):
                inner = archive.extractfile(member)
                yield from _members(inner, member.name, start + member.offset_data, depth + 1)
            elif member.isfile():
                yield member.name, start + member.offset_data, member.size, stem


def _name_classes(samples, stems):
    """Whether the tar files are named by class.

    There must be several, and no name may end in a digit (shard-000001), unless all names of images
    start with the name of their tar file (n01440764).
    """
    numbered = any(re.search(r"\d$", stem) for stem in stems)
    repeated = all(
        os.path.basename(sample).startswith(stem)
        for sample, stem in zip(samples, stems, strict=True)
    )
    return len(set(stems)) > 1 and (repeated or not numbered)


def _load(path, key) -> Index | None:
    try:
        with open_regular(path) as opened, np.load(opened, allow_pickle=False) as file:
            if any(record.compress_type for record in file.zip.infolist()):
                return None  # not ours: it may unfold to terabytes
            return (
                Index(np.empty(0), *(file[name] for name in Index._fields[1:]))
                if file["key"].item() == key
                else None
            )
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile):
        return None  # absent, damaged or of another version


def _fits(index, sizes) -> bool:
    """Whether all images of a saved index are inside the files of these sizes in bytes."""
    rows = (index.shard, index.offset, index.size, index.label)
    if any(
        row.ndim != 1 or row.dtype != np.int64 or not 0 < len(row) == len(index.shard)
        for row in rows
    ):
        return False
    known = (
        (index.shard >= 0)
        & (index.shard < len(sizes))
        & (index.label >= -1)
        & (index.label < index.classes.size)
    )
    room = sizes[index.shard % len(sizes)] - index.offset
    return bool((known & (index.offset >= 0) & (index.size >= 0) & (index.size <= room)).all())


def _save(path, key, index) -> bool:
    fields = {name: getattr(index, name) for name in Index._fields[1:]}
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with new_file(path) as file:
            np.savez(file, key=np.array(key), **fields)
        return True
    except OSError:
        return False
