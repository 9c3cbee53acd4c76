"""The list of images that could not be read."""

import os

from ..loader import ViewLoader
from .distributed import rank, union
from .errors import RunError, one_line
from .safe_files import save_text


def record_bad_images(loader: ViewLoader, workdir: str) -> str | None:
    """Add the images that could not be read since the last call, on any rank, to workdir/bad_images.txt; a line for the log
    where there are new ones, or where they cannot be written down. Collective."""
    found = union(loader.replaced)
    loader.replaced.clear()
    path, known = os.path.join(workdir, "bad_images.txt"), set()
    if rank() != 0 or not found:
        return None
    if os.path.exists(path):
        with open(path) as file:
            known = set(file.read().splitlines())
    told = set()
    for index in found:
        try:
            loader.images.image(index)
            told.add(f"image {index} could not be read once")
        except RunError as error:
            told.add(one_line(error).partition("cannot read image ")[2].partition("; remove")[0])
    try:
        save_text(path, "".join(f"{line}\n" for line in sorted(known | told)))
    except RunError as error:  # a full disk: no reason to stop a run
        path = str(error)
    new = sorted(told - known)
    return (
        f"{len(new)} more images cannot be read and are replaced, see {path}: {new[0]}"
        if new
        else None
    )
