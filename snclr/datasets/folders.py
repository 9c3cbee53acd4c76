"""Images in files of their own: in a tree of folders, or in a list of paths."""

import os

import numpy as np

from ..running.errors import UsageError
from ..running.safe_files import open_text
from .reading import file_states, read_encoded

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".tif", ".tiff")


def extensions(channels: int) -> tuple[str, ...]:
    """Endings of the names of images. Beside RGB images, arrays are often other data."""
    return EXTENSIONS if channels == 3 else (*EXTENSIONS, ".npy")


class Paths:
    """Images in one file each, for FileImages."""

    def __init__(self, paths: list[str]):
        # arrays are one block of memory; every worker would copy a list page by page
        self.paths = np.array(paths)
        self.names = np.array([os.path.basename(path) for path in paths])
        self.num_images = len(paths)

    def read(self, number: int) -> tuple[str, np.ndarray]:
        path = str(self.paths[number])
        return path, read_encoded(path, path)

    def states(self, numbers: np.ndarray) -> object:
        return file_states(self.paths[numbers])


def images_below(root: str, channels: int) -> tuple[list[str], int]:
    """Sorted paths of all images in a tree, and the number of other files.

    What is an image depends on the number of channels, see extensions. Hidden files are in neither.
    A folder is read once, even if several links lead to it, or a link inside it leads back to it.
    """
    paths, others, seen, endings = [], 0, set(), extensions(channels)
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_unreadable_folder):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files = sorted(name for name in files if not name.startswith("."))
        images = [os.path.join(folder, name) for name in files if name.lower().endswith(endings)]
        paths += images
        others += len(files) - len(images)
    return paths, others


def _unreadable_folder(error):
    raise UsageError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def read_list(path: str) -> list[str]:
    """Paths in a text file, one per line, relative to the file's folder."""
    folder = os.path.dirname(path)
    with open_text(path, errors="surrogateescape") as file:
        paths = [os.path.join(folder, line.rstrip("\n")) for line in file if line.strip()]
    if not paths:
        raise UsageError(f"{path} lists no image: expected one path per line")
    # only about a hundred are checked, because a million files on a network disk take minutes
    for number in range(0, len(paths), -(-len(paths) // 100)):
        if not os.path.isfile(paths[number]):
            raise UsageError(
                f"{path} names {paths[number]}, which does not exist; "
                "relative paths start at the list's folder"
            )
    return paths
