"""Files in a tree of folders: images, or tar and zip files."""

import os
import re
from collections import Counter

from ..running.errors import UsageError


def files_below(root: str, endings: tuple[str, ...]) -> tuple[list[str], Counter[str]]:
    """Sorted paths of all files in a tree with these endings, and the endings of the other files.

    Hidden files are in neither. Upper and lower case are the same in endings.
    A folder is read once, even if several links lead to it, or a link inside it leads back to it.
    """
    paths, others, seen = [], Counter(), set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_unreadable_folder):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files = sorted(name for name in files if not name.startswith("."))
        for name in files:
            if name.lower().endswith(endings):
                paths.append(os.path.join(folder, name))
            else:
                others[os.path.splitext(name)[1].lower() or name] += 1
    return paths, others


def shards_below(folder: str) -> list[str]:
    """All .tar files below a folder in the order of their names, or else its .zip files. Raises
    UsageError if there is none.
    """
    paths, _ = files_below(folder, ("",))  # all files
    for ending in (".tar", ".zip"):
        if shards := [path for path in paths if path.lower().endswith(ending)]:
            return shards
    packed = [path for path in paths if re.search(r"\.(tgz|tar\.\w+)$", path)]
    hint = f"; {os.path.basename(packed[0])} is compressed: unpack it to .tar" if packed else ""
    raise UsageError(f"no .tar or .zip file in {folder}{hint}")


def _unreadable_folder(error):
    raise UsageError(f"cannot read the folder {error.filename}: {error.strerror}") from error
