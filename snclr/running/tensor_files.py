"""Files of tensors: written whole or not at all, verified before they are read, content checked.

A file may come from anyone, and torch.load(weights_only=True) only guarantees that no code runs.
The functions here check what it returns, also if it is the state of an optimiser.
"""

import contextlib
import copy
import glob
import itertools
import os
import zipfile

import torch
from torch import Tensor
from torch.optim import Optimizer

from .errors import RunError, UsageError, first_line
from .safe_files import new_file, open_regular


def save(path: str, state: dict, keep: int = 1) -> None:
    """Write beside the target, flush to the disk, then rename: after a crash at any moment there is
    either the old file or the new one. Raises RunError.

    keep: how many files remain, with this one; the previous one becomes NAME-1.pth.tar.
    """
    try:
        for leftover in glob.glob(f"{glob.escape(path)}.*.tmp"):  # by a process that was killed
            with contextlib.suppress(OSError):
                os.remove(leftover)
        with new_file(path) as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the bytes are on the disk before the file gets its name
            _rename_older(path, keep)
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        os.fsync(folder)  # makes the new name durable, not only the bytes
        os.close(folder)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError, with the cause as its context
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or first_line(error)
        raise RunError(
            f"cannot write {path}: {reason}; the checkpoint before it is untouched"
        ) from error


def _rename_older(path: str, keep: int) -> None:
    ages = [path] + [path.replace(".pth.tar", f"-{age}.pth.tar") for age in range(1, keep)]
    for newer, older in reversed(list(itertools.pairwise(ages))):
        if os.path.exists(newer):
            os.replace(newer, older)


def read(path: str) -> object:
    """The content of a file, on the CPU. Checksums are verified first, because torch.load does not
    notice changed bytes.

    Raises UsageError if the file is missing or damaged, or contains anything but tensors and plain
    values.
    """
    verify(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can make unpickling raise anything
        raise UsageError(
            f"checkpoint {path} is not a dictionary of tensors and plain values;"
            " nothing else is loaded"
        ) from error


def verify(path: str) -> None:
    """Compare every record of a file with its checksum in the zip. Raises UsageError as `read`."""
    with open_regular(path) as file:
        try:
            if file.read(2) == b"\x80\x02":  # torch before 1.6: a plain pickle without checksums
                return
            with zipfile.ZipFile(file) as archive:
                # torch writes neither: it would load a record with the attribute of a directory as
                # empty, and a few compressed bytes could expand to terabytes
                odd = [
                    record.filename
                    for record in archive.infolist()
                    if record.external_attr or record.compress_type
                ]
                damaged = next(iter(odd), None) or archive.testzip()
        except Exception as error:  # a damaged directory of the zip can raise anything
            raise UsageError(
                f"checkpoint {path} is truncated or not a checkpoint ({first_line(error)});"
                " take another one"
            ) from error
    if damaged:
        raise UsageError(
            f"checkpoint {path} is damaged (wrong checksum in {first_line(damaged)});"
            " take another one"
        )


def is_plain(value: object) -> bool:
    """Whether a value from a file is a tensor with ordinary content, as every weight is."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_quantized)
    )


def plain_tensors(content: object) -> dict[str, Tensor]:
    """The entries of a dictionary from a file that are plain tensors under a name."""
    entries = content.items() if isinstance(content, dict) else ()
    return {name: x for name, x in entries if isinstance(name, str) and is_plain(x)}


def wrong_entries(content: object, kinds: dict[str, type]) -> list[str]:
    """The names of `kinds` that a value from a file does not hold, or holds with another type. True
    and False do not count as int.
    """
    entries = content if isinstance(content, dict) else {}
    return [
        name
        for name, kind in kinds.items()
        if not isinstance(entries.get(name), kind) or isinstance(entries[name], bool)
    ]


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """The names of the tensors that contain a value that is not finite; ignores other entries."""
    finite = {name: x.isfinite().all() for name, x in tensors.items() if isinstance(x, Tensor)}
    if not finite:
        return []
    device = next(iter(finite.values())).device
    # one list: the host waits for a GPU once
    all_finite = torch.stack([x.to(device, non_blocking=True) for x in finite.values()]).tolist()
    return [name for name, is_finite in zip(finite, all_finite, strict=True) if not is_finite]


def load_optimizer(path: str, state: dict, optimizer: Optimizer) -> None:
    """Load an optimiser's state, but not its settings: those of this start apply.

    Raises UsageError if this optimiser keeps another state for these parameters.
    """
    trial = copy.deepcopy(optimizer)  # its state after a step is what is expected
    for group in trial.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    trial.step()
    expected, groups = trial.state_dict()["state"], optimizer.state_dict()["param_groups"]
    try:
        for number, values in state["state"].items():
            if _kinds(values) != _kinds(expected[number]):
                raise ValueError(f"parameter {number} has another state, by names, shapes or types")
        groups = [
            saved | {**group, "params": saved["params"]}
            for saved, group in zip(state["param_groups"], groups, strict=True)
        ]
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    except Exception as error:  # torch checks little, so wrong content can raise anything
        raise UsageError(f"{path} does not fit the optimiser: {first_line(error)}") from error


def _kinds(values):
    """The shape of each tensor of a state, and the type of each other value."""
    return {name: x.shape if is_plain(x) else type(x) for name, x in values.items()}
