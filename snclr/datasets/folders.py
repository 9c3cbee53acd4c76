"""Images in files of their own."""

import os

import numpy as np

from ..running.errors import UsageError
from ..running.safe_files import open_text
from .reading import file_states, read_encoded

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".pgm", ".ppm", ".tif", ".tiff")


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
