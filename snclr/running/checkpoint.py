"""Checkpoints: written whole or not at all, verified before they are loaded, strict about what they are loaded into.

A file is a dictionary that torch.load(weights_only=True) reads: 'format', 'epoch' and 'step' (both completed), 'arch',
'state_dict' (MoCo v3's layout: module.base_encoder.*, module.momentum_encoder.*, module.predictor.*, and
module.memory_bank.*), 'optimizer', 'scaler', 'args', 'images' and 'fingerprint' (of the training set: how many, and which),
'provenance'. checkpoint_last.pth.tar is the newest; the ones before it are checkpoint_last-1.pth.tar, -2 and so on.
"""

import contextlib
import functools
import os
import platform
import subprocess
import zipfile
from argparse import Namespace
from importlib import metadata

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from .. import __version__
from ..backbones import projector_name
from ..options import NUM_HEADS
from .errors import RunError, UsageError, first_line

FORMAT = 1
LAST = "checkpoint_last.pth.tar"
PREFIX = "module."

# A resumed run is the same run: these decide which images it sees and what its state means.
# Others may change on purpose (a longer schedule, another temperature); that is said. RUNNING ones are of no account.
FIXED = (
    "arch",
    "method",
    "optimizer",
    "batch_size",
    "seed",
    "dataset",
    "img_size",
    "crop_min",
    "blur",
    "small_stem",
)
FIXED += ("timm_kwargs", "num_heads", "subset", "subset_seed")
RUNNING = {
    "data",
    "val",
    "labels",
    "val_labels",
    "download",
    "workers",
    "workdir",
    "resume",
    "stop_after_epochs",
    "stop_after_steps",
}
RUNNING |= {
    "save_freq",
    "save_every_minutes",
    "keep",
    "print_freq",
    "eval_freq",
    "eval_encoder",
    "viz_freq",
}
RUNNING |= {"compile", "grad_checkpointing", "on_bad_image", "skip_non_finite", "timeout_minutes"}


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


def load(path: str) -> dict:
    """Read a checkpoint of this project, as `read` does. Raises UsageError, too, where it is something else."""
    state = read(path)
    kinds = dict(
        epoch=int, step=int, arch=str, state_dict=dict, optimizer=dict, args=dict, images=int
    )
    missing = [key for key in kinds if not isinstance(state, dict) or key not in state]
    if missing:
        raise UsageError(f"checkpoint {path} cannot be resumed: it has no {', '.join(missing)}")
    if state.get("format", 1) not in range(1, FORMAT + 1):
        raise UsageError(
            f"checkpoint {path} has format {state['format']}; this version reads up to {FORMAT}"
        )
    odd = [key for key, kind in kinds.items() if type(state[key]) is not kind]
    odd += (
        [
            str(name)
            for name, value in state["state_dict"].items()
            if not (isinstance(name, str) and is_plain(value))
        ]
        if not odd
        else []
    )
    if odd or state["step"] < 0:
        raise UsageError(
            f"checkpoint {path} cannot be resumed: no sensible {first_few(odd or ['step'])} in it"
        )
    return state


def is_plain(value: object) -> bool:
    """Whether a value of a file is a tensor with content, as every weight is."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta


def differ(saved: object, now: object) -> bool:
    """Whether a setting is another one than a file says, which may say anything."""
    try:
        return bool(saved != now)
    except Exception:  # of a tensor
        return True


def newest(workdir: str) -> tuple[str | None, list[str]]:
    """The checkpoint that --resume auto takes: the one of the latest step among the whole ones in workdir, None where there is
    no checkpoint at all; and a line about each later one that is damaged, which is renamed NAME.damaged.

    Raises UsageError where there are checkpoints, but no whole one.
    """
    names = os.listdir(workdir) if os.path.isdir(workdir) else []
    names = [name for name in names if name.startswith("checkpoint_") and name.endswith(".pth.tar")]
    names.sort(key=lambda name: (name != LAST, name))
    damaged = []
    for path in sorted((os.path.join(workdir, name) for name in names), key=_step, reverse=True):
        try:
            verify(path)
        except UsageError as error:
            damaged.append((path, error))
            continue
        for other, _ in damaged:
            os.replace(other, f"{other}.damaged")
        return path, [
            f"{str(error).partition('; take')[0]}: renamed to .damaged, {path} is taken"
            for _, error in damaged
        ]
    if damaged:
        raise UsageError(f"no whole checkpoint in {workdir}: {damaged[0][1]}")
    return None, []


def _step(path: str) -> float:
    """The step of a checkpoint; infinity where it cannot be read: the file was the newest for all we know."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception:  # whatever damaged bytes lead to
        return float("inf")


def pack(
    model: nn.Module,
    optimizer: Optimizer,
    scaler: GradScaler,
    *,
    args: Namespace,
    epoch: int,
    step: int,
    images: int,
    fingerprint: str | None = None,
) -> dict:
    """Everything a run needs to go on. model: without DDP; images, fingerprint: size and ImageSet.fingerprint of the training
    set."""
    return {
        "format": FORMAT,
        "epoch": epoch,
        "step": step,
        "arch": args.arch,
        "state_dict": {PREFIX + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "args": vars(args),
        "images": images,
        "fingerprint": fingerprint,
        "provenance": provenance(),
    }


def pack_encoder(encoder: nn.Module, which: str, *, args: Namespace, epoch: int) -> dict:
    """The backbone alone, under its own names, with what is needed to rebuild it: small, and read by snclr.load_encoder."""
    head = projector_name(encoder) + "."
    backbone = {
        name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith(head)
    }
    state = {
        "format": FORMAT,
        "epoch": epoch,
        "arch": args.arch,
        "args": vars(args),
        "encoder": which,
        "state_dict": backbone,
    }
    return state | {"provenance": provenance()}


def resume(
    path: str,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: GradScaler,
    *,
    args: Namespace,
    images: int,
    fingerprint: str | None = None,
) -> tuple[int, list[str]]:
    """Load a checkpoint into a run with the same settings: its completed steps, and the settings that changed on the way.

    UsageError names every setting that must not change, and every key or shape that differs.
    """
    state = load(path)
    # files of earlier versions do not say the number of heads: it was always the arch's own
    now, saved = vars(args), {"num_heads": NUM_HEADS.get(args.arch)} | state["args"]
    changed = [name for name in now if name in saved and differ(saved[name], now[name])]
    changes = {name: f"{name} {saved[name]!r} -> {now[name]!r}" for name in changed}
    refused = [change for name, change in changes.items() if name in FIXED]
    if state["images"] != images:
        refused.append(f"training images {state['images']} -> {images}")
    elif (
        None not in (fingerprint, state.get("fingerprint")) and state["fingerprint"] != fingerprint
    ):
        refused.append(
            "training images of the same number, but with other names or in another order"
        )
    if refused:
        raise UsageError(
            f"{path} is of another run: {', '.join(refused)}; repeat its settings or choose a new --workdir"
        )
    load_strictly(path, state["state_dict"], model)
    load_optimizer(path, state["optimizer"], optimizer)
    if state.get("scaler") and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    return state["step"], [change for name, change in changes.items() if name not in RUNNING]


def load_optimizer(path: str, state: dict, optimizer: Optimizer) -> None:
    """Load an optimiser's state; its settings stay those of this start. UsageError where it is not that of these parameters."""
    now = optimizer.state_dict()["param_groups"]
    try:
        groups = [
            saved | {**group, "params": saved["params"]}
            for saved, group in zip(state["param_groups"], now, strict=True)
        ]
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
        states = list(optimizer.state.items())
        if not all(
            is_plain(x) and tuple(x.shape) in (tuple(p.shape), ())
            for p, values in states
            for x in values.values()
        ):
            raise ValueError("no tensors, or of another shape")
        if any(values.keys() != states[0][1].keys() for _, values in states):
            raise ValueError("parameters with less state than others")
    except Exception as error:  # torch checks little, so that odd content leads to anything
        raise UsageError(f"{path} does not fit the optimiser: {first_line(error)}") from error


@functools.cache  # of the code that was loaded, which may change on the disk while it runs
def provenance() -> dict:
    """Where a result comes from: versions of python, torch, torchvision, timm and this package, and the git commit or None."""
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy")}
    versions |= {"python": platform.python_version(), "snclr": __version__}
    command = [
        "git",
        "-C",
        os.path.dirname(os.path.abspath(__file__)),
        "describe",
        "--always",
        "--dirty",
    ]
    git = None
    with contextlib.suppress(OSError):  # a container may have no git
        git = (
            subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
            or None
        )
    return {"versions": versions, "git": git}


def load_strictly(path: str, tensors: dict, model: nn.Module) -> None:
    """Copy tensors named module.* into model; UsageError lists missing and unexpected keys and shapes that differ."""
    expected = {PREFIX + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    told = [
        f"{len(names)} keys {kind}: {first_few(names)}" for kind, names in problems.items() if names
    ]
    if told:
        raise UsageError(f"{path} does not fit this model: {'; '.join(told)}")
    model.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})


def first_few(names: list[str], limit: int = 3) -> str:
    """The first names, for a message."""
    return ", ".join(names[:limit]) + (" ..." if len(names) > limit else "")
