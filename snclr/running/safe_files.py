"""Files that are written whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator

from .errors import RunError, first_line


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn a full disk, and whatever else keeps the block from writing to path, into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or first_line(error)}") from error


def save_text(path: str, text: str) -> None:
    """Write a file for people, whole or not at all. Raises RunError."""
    with writing(path):
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(f"{path}.tmp", path)


def save_json(path: str, content: dict) -> None:
    """Write a JSON file for people, as save_text does."""
    save_text(path, json.dumps(content, indent=1))
