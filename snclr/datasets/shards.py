"""Images in tar and zip files (shards), which are not unpacked.

An index lists the position of each image, so that an image takes one read at an offset. Each read
opens its file, so worker processes share no file handle.
"""

import contextlib
import json
import os
import struct
import tarfile
import zipfile
from typing import NamedTuple

import numpy as np

from ..running.errors import UsageError, first_line
from ..running.safe_files import new_file, open_regular
from .archives import (
    SPLITS,
    folders_of,
    name_classes,
    split_numbers,
    tar_members,
    zip_members,
)
from .reading import file_states, inflate, read_encoded
from .trees import shards_below

# what tarfile, zipfile and numpy raise for a damaged file, or for sizes that no file has
UNREADABLE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    OSError,
    ValueError,
    struct.error,
    NotImplementedError,
    OverflowError,
    MemoryError,
)


class Index(NamedTuple):
    """Where n images are in tar or zip files, and how FileImages reads them.

    files           (F,) paths of the tar or zip files
    shard           (n,) number of the image's file
    offset, size    (n,) in bytes; size: of the image
    packed          (n,) bytes in the zip file if the image is compressed there, else 0
    label           (n,) number of the image's class, -1 for none
    split           (n,) number of the image's part of the data in SPLITS
    member          (n,) at most 255 bytes of the image's name in its file
    classes         (C,) names
    ignored         number of members that are neither image nor label, or links without content
    """

    files: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    packed: np.ndarray
    label: np.ndarray
    split: np.ndarray
    member: np.ndarray
    classes: np.ndarray
    ignored: np.ndarray
    names = None  # the images are not in files of their own

    @property
    def num_images(self) -> int:
        return len(self.shard)

    @property
    def paths(self) -> np.ndarray:
        """FILE/MEMBER of each image."""
        pairs = zip(self.files[self.shard], self.member, strict=True)
        return np.array([f"{path}/{member.decode(errors='replace')}" for path, member in pairs])

    def read(self, number: int) -> tuple[str, np.ndarray]:
        path = str(self.files[self.shard[number]])
        offset, size, packed = (int(x[number]) for x in (self.offset, self.size, self.packed))
        name = f"of {size} bytes at offset {offset} in {path}"
        content = read_encoded(path, name, offset, packed or size)
        return name, inflate(content, size, name) if packed else content

    def states(self, numbers: np.ndarray) -> object:
        columns = (self.shard, self.offset, self.size, self.packed)
        return file_states(self.files), [column[numbers].tolist() for column in columns]


def open_index(source: str, extensions: tuple[str, ...], fallback: str | None) -> Index:
    """The index of one tar or zip file, or of all .tar files below a folder in the order of their
    names, or if there are none of its .zip files.

    The first call saves it beside the shards, or in the folder `fallback` if those are read-only.
    It is made again if extensions, or names, sizes or times of the shards have changed. Raises
    UsageError if there is no shard or one cannot be read.
    """
    files = [source] if os.path.isfile(source) else shards_below(source)
    for path in files:
        open_regular(path).close()
    stats = [os.stat(path) for path in files]
    facts = [
        [os.path.relpath(path, source), stat.st_size, stat.st_mtime_ns]
        for path, stat in zip(files, stats, strict=True)
    ]
    key = json.dumps([extensions, *facts])
    is_folder = os.path.isdir(source)
    index_paths = [os.path.join(source, "snclr_index.npz") if is_folder else f"{source}.index.npz"]
    if fallback is not None:
        source_name = os.path.basename(os.path.abspath(source))
        index_paths.append(os.path.join(fallback, f"index_{source_name}.npz"))
    sizes = np.array([stat.st_size for stat in stats])
    for path in index_paths:
        if (index := _load(path, key, np.array(files))) is not None and _fits(index, sizes):
            return index
    index = _scan(files, extensions)
    fields = {name: getattr(index, name) for name in Index._fields[1:]}
    for path in index_paths:
        with contextlib.suppress(OSError):  # such as a folder that is read-only
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            with new_file(path) as file:
                np.savez(file, key=np.array(key), **fields)
            break
    return index


def of_split(index: Index, split: str) -> Index:
    """The images of one of SPLITS. If all images are for training, because no name says otherwise,
    the whole index. Raises UsageError if there are only images of other parts.
    """
    if not index.split.any():
        return index
    is_chosen = index.split == SPLITS.index(split)
    if not is_chosen.any():
        raise UsageError(f"none of the images is for {split}, by the names of files and folders")
    rows = ("shard", "offset", "size", "packed", "label", "split", "member")
    return index._replace(**{name: getattr(index, name)[is_chosen] for name in rows})


def _scan(files, extensions) -> Index:
    """Read the headers of all members.

    The members of a sample have the same name up to the first dot: an image, and in WebDataset's
    layout a .cls file with its class.
    """
    images, ignored = [], 0
    class_names = {}  # by (shard, name up to the first dot)
    for shard, path in enumerate(files):
        try:
            with open(path, "rb") as file:
                read = zip_members if path.lower().endswith(".zip") else tar_members
                for member, offset, size, packed, stem in read(file, path):
                    folder, base = os.path.split(member)
                    sample = os.path.join(folder, base.split(".")[0])
                    if offset < 0:
                        ignored += 1
                    elif base.lower().endswith(".cls") and read is tar_members:
                        content = os.pread(file.fileno(), min(size, 2**16), offset)
                        class_names[shard, sample] = content.decode().strip()
                    elif base.lower().endswith(extensions) and not base.startswith("."):
                        images.append((shard, offset, size, packed, member, stem, sample))
                    else:
                        ignored += 1
        except UNREADABLE as error:
            raise UsageError(
                f"shard {path} cannot be read: {first_line(error)}; it must be a whole, "
                "uncompressed tar file, or a zip file without a password"
            ) from error
    if not images:
        raise UsageError(
            f"no image in the {len(files)} {files[0][-3:]} files of {os.path.dirname(files[0])}; "
            f"{ignored} files in them are no images, or links out of them"
        )
    *numbers, members, stems, samples = zip(*images, strict=True)
    shards, offsets, sizes, packed = np.array(numbers, np.int64)
    splits = np.array(split_numbers([os.path.basename(path) for path in files]))[shards]
    names = [class_names.get(key) for key in zip(numbers[0], samples, strict=True)]
    if files[0].lower().endswith(".zip"):
        folders = folders_of(members)
        if not splits.any():
            splits = np.array(split_numbers([(folder or [""])[0] for folder in folders]))
            folders = [folder[1:] for folder in folders] if splits.any() else folders
        if all(folders) and len({folder[0] for folder in folders}) > 1:
            names = [folder[0] for folder in folders]
    names, samples, stems = (np.array(x, object) for x in (names, samples, stems))
    for split in {*splits.tolist()}:
        rows = splits == split
        if not any(names[rows]) and name_classes(samples[rows], stems[rows]):
            names[rows] = stems[rows]
    classes = sorted({*names} - {None})
    labels = {name: label for label, name in enumerate(classes)} | {None: -1}
    return Index(
        np.array(files),
        shards,
        offsets,
        sizes,
        packed,
        np.array([labels[name] for name in names]),
        splits,
        np.array([member.encode(errors="replace")[:255] for member in members]),
        np.array(classes, dtype=str),
        np.array(ignored),
    )


def _load(path, key, files) -> Index | None:
    """A saved index; None if it is absent, damaged, or of other shards or another version."""
    with (
        contextlib.suppress(Exception),  # damaged bytes can raise any
        open_regular(path) as opened,
        np.load(opened, allow_pickle=False) as file,
    ):
        # this file writes no compressed index, and one could expand to terabytes
        is_plain = not any(record.compress_type for record in file.zip.infolist())
        if is_plain and file["key"].item() == key:
            return Index(files, *(file[name] for name in Index._fields[1:]))
    return None


def _fits(index, sizes) -> bool:
    """Whether a saved index has the layout of Index, with all images inside the files of these
    sizes in bytes.
    """
    rows = (index.shard, index.offset, index.size, index.packed, index.label, index.split)
    if any(row.dtype != np.int64 for row in rows) or index.member.dtype.kind != "S":
        return False
    if any(row.ndim != 1 or not 0 < len(row) == len(index.shard) for row in (*rows, index.member)):
        return False
    names, ignored = index.classes, index.ignored
    if (names.dtype.kind, names.ndim, ignored.dtype.kind, ignored.ndim) != ("U", 1, "i", 0):
        return False
    known = (
        (index.shard >= 0)
        & (index.shard < len(sizes))
        & (index.label >= -1)
        & (index.label < index.classes.size)
        & (index.split >= 0)
        & (index.split < len(SPLITS))
    )
    room = sizes[index.shard % len(sizes)] - index.offset
    is_inside = (index.packed >= 0) & (np.where(index.packed, index.packed, index.size) <= room)
    return bool((known & (index.offset >= 0) & (index.size >= 0) & is_inside).all())
