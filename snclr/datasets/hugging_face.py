"""Data sets of Hugging Face's library `datasets`, by name or in a local folder: --dataset hf."""

import functools
from typing import TYPE_CHECKING

import numpy as np

from ..choices import IMAGENET
from ..running.distributed import local_rank_zero_first
from ..running.errors import UsageError, first_few, first_line
from .decoding import read_encoded, unreadable
from .images import FileImages

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

VALIDATION = ("validation", "val", "valid", "test")  # the first of these that there is


class HuggingFaceImages(FileImages):
    """The images in a column of a table, which is memory-mapped.

    rows (n,): the row of each image
    """

    per_image = ("labels", "rows", "size")

    def __init__(self, table: "Dataset", column: str):
        super().__init__(None, [], IMAGENET)
        import datasets
        from pyarrow import compute

        self.table = table.select_columns([column]).cast_column(
            column, datasets.Image(decode=False)
        )
        self.column, self.rows = column, np.arange(len(table))
        lengths = compute.binary_length(self._field("bytes"))
        self.size = lengths.fill_null(0).to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def _field(self, name):
        from pyarrow import compute

        return compute.struct_field(self.table.data.column(self.column), name)  # copies no images

    @property
    def paths(self) -> np.ndarray:
        """The path that the table gives for each image, or else its row."""
        paths = self._field("path").to_pylist()
        return np.array([paths[row] or str(row) for row in self.rows])

    def encoded(self, index: int) -> tuple[str, np.ndarray]:
        row = int(self.rows[index])
        image, name = self.table[row][self.column], f"in row {row} of the table"
        if image is None:
            raise unreadable(name, "there is none")
        if image["bytes"] is None:
            return image["path"], read_encoded(image["path"], image["path"])
        return name, np.frombuffer(bytearray(image["bytes"]), np.uint8)


@functools.cache
def _load(source: str) -> "DatasetDict":
    try:
        import datasets  # optional
    except ImportError as error:
        raise UsageError("--dataset hf needs datasets: pip install datasets") from error
    try:
        with local_rank_zero_first():  # it fills the cache that the other ranks read
            return datasets.load_dataset(source.removeprefix("hf:"))
    except Exception as error:  # any kind, depending on the files and the network
        raise UsageError(
            f"{source} cannot be opened by datasets.load_dataset: {first_line(error)}"
        ) from error


def validation_split(source: str) -> str | None:
    """The name of the split that is used for validation."""
    return next((name for name in VALIDATION if name in _load(source)), None)


def open_split(source: str, split: str) -> tuple[FileImages, list[str | None] | None, list[str]]:
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
    notes = [f"{source}: split {name}, images of column {columns[0]}"]
    images, names = HuggingFaceImages(tables[name], columns[0]), None
    if labels:
        notes[0] += f", labels of column {labels[0]}"
        to_name = getattr(features[labels[0]], "int2str", str)
        values = tables[name][labels[0]]
        names = [to_name(value) if value not in (None, -1) else None for value in values]
        names = names if any(names) else None
    return images, names, notes
