"""Files that are written whole or not at all, and files that are safe to read.

The content of a folder may come from someone else. So no link is followed when a file is written,
and only regular files of limited size are read: a fifo would block forever, and a device such as
/dev/zero would fill the memory.
"""

import contextlib
import io
import json
import os
import secrets
import stat
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO, TextIO

from .errors import RunError, UsageError, first_line

LIMIT = 2**28  # bytes of a file that is read whole
NONBLOCK, NOFOLLOW = (getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW"))  # not Windows


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn a full disk, or anything else that prevents writing to path, into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or first_line(error)}") from error


@contextlib.contextmanager
def new_file(path: str) -> Iterator[BinaryIO]:
    """A file that replaces `path` when the block ends without an error; else `path` stays as it is.

    It is created exclusively under a fresh name beside `path`. A link at `path` is replaced, not
    followed. Raises OSError, also where `path` is something else than a file.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise OSError("it exists and is not a regular file")
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    file = open(temporary, "xb")  # noqa: SIM115 - if it fails, there is nothing to remove
    try:
        with file:
            yield file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)  # present only after an error or a signal


def check_new_path(out: str) -> None:
    """Raise UsageError if `out` exists, or cannot be created."""
    if os.path.exists(out):
        raise UsageError(f"--out {out} exists: choose another name or remove it")
    if not os.access(os.path.dirname(os.path.abspath(out)), os.W_OK):
        raise UsageError(f"--out {out}: its folder does not exist or is not writable")


def descriptor_of(path: str, flags: int, *, follow: bool) -> int:
    """Open a file as os.open does. Raises OSError also if `path` is not a regular file and, unless
    `follow`, if it is a link.
    """
    # without O_NONBLOCK, opening a fifo waits for its other end
    descriptor = os.open(path, flags | NONBLOCK | (0 if follow else NOFOLLOW), 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a regular file")
    return descriptor


def open_to_append(path: str) -> BinaryIO:
    """Open a file, or create it, to write at its end without a buffer. Raises OSError, also if
    `path` is a link or not a regular file.
    """
    return open(path, "ab", buffering=0, opener=partial(descriptor_of, follow=False))


def save_bytes(path: str, content: bytes) -> None:
    """Write a file, whole or not at all. Raises RunError."""
    with writing(path), new_file(path) as file:
        file.write(content)


def save_text(path: str, text: str) -> None:
    """Write a text file, whole or not at all. Raises RunError."""
    # a file name in the text can contain bytes that are not UTF-8
    save_bytes(path, text.encode(errors="replace"))


def save_json(path: str, content: dict) -> None:
    """Write a JSON file for people, whole or not at all. Raises RunError."""
    save_text(path, json.dumps(content, indent=1))


def open_regular(path: str, *, follow: bool = True) -> BinaryIO:
    """Open a file for reading bytes. Raises UsageError if it is missing or not a regular file.

    follow: whether path may be a link.
    """
    try:
        return open(path, "rb", opener=partial(descriptor_of, follow=follow))
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UsageError(f"cannot read {path}: {reason}") from error


def read_bytes(path: str, limit: int = LIMIT, *, follow: bool = True) -> bytes:
    """The bytes of a file. Raises UsageError if it cannot be read or is longer than `limit`."""
    with open_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise UsageError(f"cannot read {path}: it has more than {limit} bytes")
        try:
            return file.read(size)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error


def open_text(path: str, *, errors: str = "replace") -> TextIO:
    """The lines of a UTF-8 file of at most 4 GiB. Raises UsageError as read_bytes does.

    errors: how to handle bytes that are not UTF-8, as in `open`.
    """
    # -sig: Windows programs write a mark at the beginning, which is no part of the first line
    content = io.BytesIO(read_bytes(path, 2**32))
    return io.TextIOWrapper(content, encoding="utf-8-sig", errors=errors)


def read_text(path: str, limit: int = LIMIT) -> str:
    """The text of a UTF-8 file; each invalid byte becomes U+FFFD. Raises as read_bytes does."""
    return read_bytes(path, limit).decode("utf-8-sig", errors="replace")


def json_object(text: str | bytes) -> dict:
    """The JSON object that a text consists of; an empty one if the text is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets
        return {}
    return value if isinstance(value, dict) else {}


def read_json(path: str) -> dict:
    """The JSON object in a file; an empty one if the file cannot be read, or is anything else."""
    try:
        return json_object(read_bytes(path))
    except UsageError:
        return {}


def read_json_lines(path: str) -> list[dict]:
    """The JSON objects of a file with one on each line, such as metrics.jsonl; other lines are
    ignored. Raises as read_bytes does.
    """
    with open_text(path) as file:
        return [line for line in map(json_object, file) if line]
