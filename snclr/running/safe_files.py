"""Files of a run and of its user: written whole or not at all, read only where that can end.

What lies in a folder may come from someone else. A link that lies where a file is to be written
is never followed, and only regular files of a bounded size are read: a fifo would block for ever,
a device such as /dev/zero would fill the memory.
"""

import contextlib
import io
import json
import os
import secrets
import stat
from collections.abc import Iterator
from typing import BinaryIO, TextIO

from .errors import RunError, UsageError, first_line

LIMIT = 2**28  # bytes of a file that is read whole


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
            raise OSError("it exists and is no regular file")
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    file = open(temporary, "xb")  # noqa: SIM115 - its own block, so that a failed open removes nothing
    try:
        with file:
            yield file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)  # present only after an error or a signal


def open_to_append(path: str) -> BinaryIO:
    """Open a file, which is made if it is missing, to write at its end without a buffer. Raises
    OSError, also where `path` is a link, or something else than a file.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is no regular file")
    return open(descriptor, "ab", buffering=0)


def save_text(path: str, text: str) -> None:
    """Write a text file, whole or not at all. Raises RunError."""
    with writing(path), new_file(path) as file:
        file.write(text.encode(errors="replace"))  # a file name or a flag may hold half a character


def save_json(path: str, content: dict) -> None:
    """Write a JSON file for people, whole or not at all. Raises RunError."""
    save_text(path, json.dumps(content, indent=1))


def open_regular(path: str, *, follow: bool = True) -> BinaryIO:
    """Open a file for reading in binary; UsageError where it is missing or no regular file.

    follow: whether path may be a link.
    """
    try:
        # without O_NONBLOCK, opening a fifo waits for a writer
        flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UsageError(f"cannot read {path}: {reason}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"cannot read {path}: it is no regular file")
    return open(descriptor, "rb")


def open_text(path: str, *, errors: str = "replace", limit: int = 2**32) -> TextIO:
    """Open a UTF-8 file for reading line by line. UsageError as open_regular, and if it has more
    than `limit` bytes.

    errors: what becomes of bytes that are no UTF-8, as in `open`.
    """
    file = open_regular(path)
    if os.fstat(file.fileno()).st_size > limit:
        file.close()
        raise UsageError(f"cannot read {path}: it has more than {limit} bytes")
    return io.TextIOWrapper(file, encoding="utf-8", errors=errors)


def read_bytes(path: str, limit: int = LIMIT, *, follow: bool = True) -> bytes:
    """The bytes of a file. UsageError where it cannot be read or has more than `limit` bytes."""
    with open_regular(path, follow=follow) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > limit:
        raise UsageError(f"cannot read {path}: it has more than {limit} bytes")
    return content


def read_text(path: str, limit: int = LIMIT) -> str:
    """The text of a UTF-8 file; bytes that are no UTF-8 become question marks. As read_bytes."""
    return read_bytes(path, limit).decode(errors="replace")


def json_object(text: str | bytes) -> dict:
    """The JSON object in a text that may hold anything; empty where there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: brackets in brackets, thousands deep
        return {}
    return value if isinstance(value, dict) else {}


def read_json_lines(path: str) -> list[dict]:
    """The JSON objects of a file with one on each line, such as metrics.jsonl; other lines are
    ignored. As read_bytes."""
    return [line for line in map(json_object, read_text(path).split("\n")) if line]
