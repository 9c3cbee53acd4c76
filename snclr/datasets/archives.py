"""What is in tar and zip files: their members, and what the names of files and folders say about
classes and about training and validation.
"""

import os
import re
import struct
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

SPLITS = ("train", "val", "test")  # parts of a data set; an index has their numbers here
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # those that are read in place
SPLIT_NAME = re.compile(r"(?:^|[^a-z])(train|val|test)(?:ing|id|idation)?(?:[^a-z]|$)")


# a file in a tar or zip file: its name there, its offset and size in bytes, its bytes there if it
# is compressed, else 0, and the name of the innermost tar or zip file without its ending. The
# offset is -1 for a link that is not read
Member = tuple[str, int, int, int, str]


def split_numbers(names: list[str]) -> list[int]:
    """The part of the data that each name of a file or folder names, as a number in SPLITS.

    All are 0, training, unless some name says `train` and another one `val` or `test`.
    """
    found = [SPLIT_NAME.search(name.lower()) for name in names]
    if not {"train"} < {match[1] for match in found if match}:
        return [0] * len(names)
    return [SPLITS.index(match[1]) if match else 0 for match in found]


def folders_of(names: Sequence[str]) -> list[list[str]]:
    """The folders of each name, without those that all names begin with."""
    folders = [name.split("/")[:-1] for name in names]
    common = len(os.path.commonprefix(folders))  # noqa: RUF071 - of lists, not of characters
    return [folder[common:] for folder in folders]


def tar_members(file: BinaryIO, path: str, start: int = 0, depth: int = 0) -> Iterator[Member]:
    """Each file and link in a tar file, with its offset in the outermost one.

    A hard link has the offset of its file. Tar files within a tar file are read too, as in
    ImageNet's training set.
    """
    if depth > 8:
        raise tarfile.ReadError("more than 8 tar files are nested")
    stem, positions = os.path.splitext(os.path.basename(path))[0], {}
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile would keep them all in memory
            if member.issparse():
                raise tarfile.ReadError(f"{member.name} is sparse: pack it without tar --sparse")
            if member.isfile() and member.name.lower().endswith(".tar"):
                inner = archive.extractfile(member)
                yield from tar_members(inner, member.name, start + member.offset_data, depth + 1)
            elif member.isfile():
                positions[member.name] = position = (start + member.offset_data, member.size)
                yield member.name, *position, 0, stem
            elif member.islnk():
                yield member.name, *positions.get(member.linkname, (-1, 0)), 0, stem
            elif member.issym():
                yield member.name, -1, 0, 0, stem


def zip_members(file: BinaryIO, path: str) -> Iterator[Member]:
    """Each file in a zip file. Raises ValueError for what an image cannot be read from in place."""
    stem = os.path.splitext(os.path.basename(path))[0]
    for info in zipfile.ZipFile(file).infolist():
        name = info.filename.replace("\\", "/")  # as some programs for Windows write
        if name.endswith("/"):
            continue  # a folder
        file.seek(info.header_offset)
        # the name and an extra field lie between the header and the content
        signature, lengths = struct.unpack("<4s22x4s", file.read(30))
        obstacles = {
            "is encrypted": info.flag_bits & 1,
            "is compressed by another method than deflate": info.compress_type not in METHODS,
            "leads out of it": ".." in name.split("/") or name.startswith("/"),
            "has no header": signature != b"PK\3\4",
            "has an impossible size": max(info.file_size, info.compress_size) >= 2**63,
        }
        for obstacle, is_met in obstacles.items():
            if is_met:
                raise ValueError(f"{name} {obstacle}")
        offset = info.header_offset + 30 + sum(struct.unpack("<2H", lengths))
        packed = info.compress_size if info.compress_type == zipfile.ZIP_DEFLATED else 0
        yield name, offset, info.file_size, packed, stem


def name_classes(samples: Sequence[str], stems: Sequence[str]) -> bool:
    """Whether tar or zip files are named by class.

    There must be several, and no name may end in a digit (shard-000001), unless all names of images
    start with the name of their tar file (n01440764).

    samples: the name of each image up to its first dot; stems: that of its file, as in Member.
    """
    numbered = any(re.search(r"\d$", stem) for stem in stems)
    repeated = all(
        os.path.basename(sample).startswith(stem)
        for sample, stem in zip(samples, stems, strict=True)
    )
    return len(set(stems)) > 1 and (repeated or not numbered)
