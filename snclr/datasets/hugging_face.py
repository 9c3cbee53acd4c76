"""Data sets of Hugging Face's library `datasets`, by name or in a local folder: --dataset hf.

hf:NAME_OR_PATH, or hf:NAME_OR_PATH:CONFIGURATION for a data set that has several.
"""

import functools
import os

import numpy as np

from ..running.distributed import local_rank_zero_first
from ..running.errors import UsageError, first_few, first_line, needed_by
from .reading import file_states, read_encoded, unreadable

VALIDATION = ("validation", "val", "valid", "test")  # of these splits the first that exists


class Table:
    """The images in a column of a datasets.Dataset, which is memory-mapped, for FileImages."""

    names = None

    def __init__(self, table, column: str):
        from pyarrow import compute

        # in this format a row is read without decoding its image
        self.table = table.select_columns([column]).with_format("arrow")
        self.column, self.num_images = column, len(table)
        encoded = compute.struct_field(self.table.data.column(column), "bytes")
        self.size = compute.binary_length(encoded).fill_null(0).to_numpy().astype(np.int64)

    @property
    def paths(self) -> np.ndarray:
        """The path that the table gives for each image, or else its row."""
        from pyarrow import compute

        paths = compute.struct_field(self.table.data.column(self.column), "path")
        return np.array([path or str(row) for row, path in enumerate(paths.to_pylist())])

    def read(self, number: int) -> tuple[str, np.ndarray]:
        image, name = self.table[number][self.column][0].as_py(), f"in row {number} of the table"
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise unreadable(name, "there is none")
        if image["bytes"] is None:
            return image["path"], read_encoded(image["path"], image["path"])
        return name, np.frombuffer(bytearray(image["bytes"]), np.uint8)

    def states(self, numbers: np.ndarray) -> object:
        # the library writes a new file where the data have changed; an image may be in its own
        files = [file["filename"] for file in self.table.cache_files]
        return file_states(files), file_states(self.paths[numbers])


@functools.cache
def _load(source):
    with needed_by("--dataset hf", "datasets"):
        import datasets
    path, configuration = source.removeprefix("hf:"), None
    if not os.path.exists(path) and ":" in path:
        path, _, configuration = path.rpartition(":")
    try:
        with local_rank_zero_first():  # it fills the cache that the other ranks read
            return datasets.load_dataset(path, configuration)
    except Exception as error:  # any kind, depending on the files and the network
        reason = first_line(error)
        if reason.startswith("Config name is missing"):
            names = ", ".join(datasets.get_dataset_config_names(path))
            reason = f"choose one of its configurations, hf:{path}:NAME; NAME is one of {names}"
        raise UsageError(f"{source} cannot be opened by datasets.load_dataset: {reason}") from error


def validation_split(source: str) -> str | None:
    """The name of the split that is used for validation."""
    return next((name for name in VALIDATION if name in _load(source)), None)


def open_split(source: str, split: str) -> tuple[Table, list[str | None] | None, list[str]]:
    """Images for 'train' or 'val'; the class name of each, or None if there are no labels; notes.

    The columns are the first of images, and the first of class labels, else one named 'label'.
    Raises UsageError if there are no such images.
    """
    import datasets

    tables = _load(source)
    name = validation_split(source) if split == "val" else "train"
    if split == "train" and len(tables) == 1:
        (name,) = tables
    if name not in tables:
        raise UsageError(f"{source} has no split train, only {first_few(list(tables), 9)}")
    features = tables[name].features
    columns = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        raise UsageError(f"{source} has no column of images, only {first_few(list(features), 9)}")
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels += [name for name in ("label", "labels") if name in features]
    names, note = None, f"{source}: split {name}, images of column {columns[0]}"
    if labels:
        note += f", labels of column {labels[0]}"
        to_name = getattr(features[labels[0]], "int2str", str)
        try:
            names = [to_name(x) if x not in (None, -1) else None for x in tables[name][labels[0]]]
        except ValueError as error:  # of datasets, for a number without a name
            raise UsageError(f"{source}: column {labels[0]}: {first_line(error)}") from error
    return Table(tables[name], columns[0]), names, [note]
