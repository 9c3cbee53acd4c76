"""Files of tensors: written whole or not at all, verified before they are read, and their content checked."""

import contextlib
import os
import zipfile

import torch

from .errors import RunError, UsageError, first_line


def save(path: str, state: dict, keep: int = 1) -> None:
    """Write beside the target, flush to the disk, then rename: a crash at any moment leaves the old file or the new one.

    keep: how many of this name stay, itself included: NAME-1.pth.tar is the one before it.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        ages = [path] + [path.replace(".pth.tar", f"-{age}.pth.tar") for age in range(1, keep)]
        for age in range(keep - 1, 0, -1):
            if os.path.exists(ages[age - 1]):
                os.replace(ages[age - 1], ages[age])
        os.replace(temporary, path)
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        os.fsync(folder)  # makes the new name durable, not only the bytes
        os.close(folder)
    except (
        OSError,
        RuntimeError,
    ) as error:  # a full disk reaches us as torch's RuntimeError, the cause behind it
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or first_line(error)
        raise RunError(
            f"cannot write {path}: {reason}; the checkpoint before it is untouched"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)  # there after an error or a signal alone


def read(path: str) -> object:
    """What torch.load finds in a file, onto the CPU. Its checksums are verified first: torch.load accepts flipped bytes in
    silence.

    Raises UsageError for a file that is missing, damaged, or holds anything but tensors and plain values.
    """
    verify(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever the bytes lead to
        raise UsageError(
            f"checkpoint {path} is no dictionary of tensors and plain values; nothing else is loaded"
        ) from error


def verify(path: str) -> None:
    """Compare every record of a file with the zip's own checksum. Raises UsageError, as `read` does."""
    if not os.path.isfile(path):
        raise UsageError(f"checkpoint {path} does not exist")
    try:
        with open(path, "rb") as file:
            if (
                file.read(2) == b"\x80\x02"
            ):  # torch before 1.6: a plain pickle, which has no checksums
                return
        with zipfile.ZipFile(path) as archive:
            # attributes: torch writes none, and takes a record with the directory bit for one without content;
            # nor does it compress: a few bytes that unfold to terabytes are nobody's checkpoint
            odd = [
                record.filename
                for record in archive.infolist()
                if record.external_attr or record.compress_type
            ]
            damaged = next(iter(odd), None) or archive.testzip()
    except Exception as error:  # a damaged directory of the zip leads to anything
        raise UsageError(
            f"checkpoint {path} is truncated or no checkpoint ({first_line(error)}); take another one"
        ) from error
    if damaged:
        raise UsageError(
            f"checkpoint {path} is damaged (wrong checksum in {damaged}); take another one"
        )


def is_plain(value: object) -> bool:
    """Whether a value of a file is a tensor with content, as every weight is."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta


def differ(saved: object, now: object) -> bool:
    """Whether a setting is another one than a file says, which may say anything."""
    try:
        return bool(saved != now)
    except Exception:  # of a tensor
        return True
