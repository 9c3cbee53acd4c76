"""The list of images of a run that could not be read."""

import contextlib
import os
from collections.abc import Callable

from torch import Tensor

from .distributed import rank, union
from .errors import RunError, UsageError, one_line
from .safe_files import read_text, save_text


def record_bad_images(
    image: Callable[[int], Tensor], replaced: set[int], workdir: str
) -> str | None:
    """Add images that could not be read to workdir/bad_images.txt; returns a line for the log if
    there are new ones. Collective.

    image: reads an image, by its index, or raises RunError. replaced: indices of the images that
    this rank replaced since the last call; it is emptied.
    """
    indices = union(replaced)
    replaced.clear()
    if rank() != 0 or not indices:
        return None
    path = os.path.join(workdir, "bad_images.txt")
    known = set()
    with contextlib.suppress(UsageError):  # not there yet, or unreadable
        known = set(read_text(path).splitlines())
    reasons = {_why_unreadable(image, index) for index in indices}
    try:
        save_text(path, "".join(f"{line}\n" for line in sorted(known | reasons)))
    except RunError as error:  # such as a full disk, which is no reason to stop a run
        path = str(error)
    if not (new := sorted(reasons - known)):
        return None
    more = " more" * bool(known)
    return f"{len(new)}{more} images cannot be read and are replaced, see {path}: {new[0]}"


def _why_unreadable(image: Callable[[int], Tensor], index: int) -> str:
    try:
        image(index)
    except RunError as error:
        return one_line(error).partition("cannot read image ")[2].partition("; remove")[0]
    return f"image {index} could not be read at first, but can now"
