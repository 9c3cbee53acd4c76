"""Checkpoints: the state of a run, and how a run continues from it.

A file is a dictionary that torch.load(weights_only=True) reads: 'format', 'epoch' and 'step' (how
many are completed), 'arch', 'state_dict' (MoCo v3's layout: module.base_encoder.*,
module.momentum_encoder.*, module.predictor.*, and module.memory_bank.*), 'optimizer', 'scaler',
'args', 'images' and 'fingerprint' (number and identity of the training images), 'provenance'.
checkpoint_last.pth.tar is the newest; older ones are checkpoint_last-1.pth.tar, -2 and so on.
"""

import glob
import os
from argparse import Namespace

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from ..backbones import backbone_tensors
from . import settings, tensor_files
from .errors import UsageError, first_few

FORMAT = 1
LAST = "checkpoint_last.pth.tar"
UNSOUND = "checkpoint_unsound.pth.tar"  # numbers are not finite; --resume auto ignores it
PREFIX = "module."
BANK = f"{PREFIX}memory_bank."


def load(path: str) -> dict:
    """Read a checkpoint of this project. Raises UsageError if tensor_files.read does, or if the
    file has other content.
    """
    state = tensor_files.read(path)
    kinds = dict(
        epoch=int, step=int, arch=str, state_dict=dict, optimizer=dict, args=dict, images=int
    )
    if wrong := tensor_files.wrong_entries(state, kinds):
        raise UsageError(f"checkpoint {path} cannot be resumed: it has no valid {', '.join(wrong)}")
    if state.get("format", 1) not in range(1, FORMAT + 1):
        raise UsageError(
            f"checkpoint {path} has format {state['format']}; this version reads up to {FORMAT}"
        )
    tensors = state["state_dict"]
    invalid = sorted(map(str, tensors.keys() - tensor_files.plain_tensors(tensors)))
    if invalid or state["step"] < 0:
        raise UsageError(
            f"checkpoint {path} cannot be resumed: invalid {first_few(invalid or ['step'])}"
        )
    return state


def newest(workdir: str) -> tuple[str | None, list[str]]:
    """The checkpoint for --resume auto, and lines for the log.

    That is the undamaged checkpoint of the latest step in workdir, None if there is no checkpoint.
    Damaged checkpoints of later steps are renamed to NAME.damaged, with a line about each. Raises
    UsageError if all checkpoints are damaged.
    """
    damaged = {}
    for path in sorted(_paths(workdir), key=lambda x: (-_step(x), os.path.basename(x) != LAST, x)):
        try:
            tensor_files.verify(path)
        except UsageError as error:
            damaged[path] = error
        else:
            for other in damaged:
                os.replace(other, f"{other}.damaged")
            return path, [
                f"{str(error).partition('; take')[0]}: renamed to .damaged, {path} is taken"
                for error in damaged.values()
            ]
    if damaged:
        raise UsageError(f"no whole checkpoint in {workdir}: {next(iter(damaged.values()))}")
    return None, []


def abandon_later(workdir: str, step: int) -> list[str]:
    """Rename the checkpoints in workdir of steps after `step` to NAME.abandoned, so that --resume
    auto takes none of them. Returns lines for the log.

    For a run that goes back to an older checkpoint: it trains those steps anew.
    """
    later = sorted(path for path in _paths(workdir) if _step(path) > step)
    for path in later:
        os.replace(path, f"{path}.abandoned")
    return [f"{path} is of a later step: renamed to .abandoned" for path in later]


def _paths(workdir):
    paths = glob.glob(os.path.join(glob.escape(workdir), "checkpoint_*.pth.tar"))
    return [path for path in paths if os.path.basename(path) != UNSOUND]


def _step(path: str) -> float:
    """The step of a checkpoint; infinity if it cannot be read, as it may have been the newest."""
    if not os.path.isfile(path):  # such as a fifo, which would block
        return float("inf")
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception:  # damaged bytes can raise anything
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
    """Everything that a run needs to continue.

    model: without DDP. images, fingerprint: size of the training set, and ImageSet.fingerprint.
    """
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
        "provenance": settings.versions_and_commit(),
    }


def pack_encoder(encoder: nn.Module, kind: str, *, args: Namespace, epoch: int, step: int) -> dict:
    """The content of a small file for snclr.load_encoder: only the backbone, under its own names,
    and the settings that rebuild it.

    kind: 'online' or 'momentum'; the file records it.
    """
    return {
        "format": FORMAT,
        "epoch": epoch,
        "step": step,
        "arch": args.arch,
        "args": vars(args),
        "encoder": kind,
        "state_dict": backbone_tensors(encoder),
        "provenance": settings.versions_and_commit(),
    }


def resume(
    path: str,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: GradScaler,
    *,
    args: Namespace,
    on_resume: dict[str, str],
    images: int,
    fingerprint: str | None = None,
) -> tuple[int, list[str]]:
    """Load a checkpoint into a run with the same settings; returns the number of completed steps
    and the changed settings.

    on_resume: the rule of each setting, see arguments.flag. Raises UsageError with every changed
    setting that must not change, or with the keys and shapes that differ.
    """
    state = load(path)
    refused, changes = settings.changes(state["args"], args, on_resume)
    if state["images"] != images:
        refused.append(f"training images {state['images']} -> {images}")
    elif state.get("fingerprint") not in (None, fingerprint):
        refused.append(
            "training images of the same number, but with other names or in another order"
        )
    if refused:
        raise UsageError(
            f"{path} is of another run: {', '.join(refused)};"
            " repeat its settings or choose a new --workdir"
        )
    load_strictly(path, state["state_dict"], model)
    _check_values(path, state, args)  # after the shapes: a few bytes can claim terabytes
    tensor_files.load_optimizer(path, state["optimizer"], optimizer)
    if state.get("scaler") and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    return state["step"], changes


def load_strictly(path: str, tensors: dict, model: nn.Module) -> None:
    """Copy tensors named module.* into model. Raises UsageError, which lists missing and unexpected
    keys and shapes that differ.
    """
    expected = {PREFIX + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = {
        "missing": [name for name in expected if name not in shapes],
        "unexpected": [name for name in shapes if name not in expected],
        "of another shape": [
            f"{name} {shapes[name]} instead of {shape}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ],
    }
    messages = [
        f"{len(names)} keys {kind}: {first_few(names)}" for kind, names in problems.items() if names
    ]
    if messages:
        raise UsageError(f"{path} does not fit this model: {'; '.join(messages)}")
    model.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})


def _check_values(path: str, state: dict, args: Namespace) -> None:
    """Raise UsageError for values that no run saves: training with them would fail or never end."""
    steps_per_epoch = state["images"] // args.batch_size
    epochs = state["args"].get("epochs")
    if type(epochs) is int and state["step"] > epochs * steps_per_epoch:
        raise UsageError(
            f"{path} cannot be resumed: it is of step {state['step']} of {epochs * steps_per_epoch}"
        )
    tensors = state["state_dict"]
    if names := tensor_files.not_finite(tensors):
        raise UsageError(
            f"{path} cannot be resumed: {len(names)} tensors are not finite:"
            f" {first_few(names)}; take an older checkpoint"
        )
    if (ids := tensors.get(f"{BANK}ids")) is None:
        return
    bounds = {
        "ids": (-1, state["images"] - 1),
        "filled": (0, len(ids)),
        "pointer": (0, len(ids) - 1),
    }
    for name, (low, high) in bounds.items():
        tensor = tensors[BANK + name]
        if not bool(((tensor >= low) & (tensor <= high)).all()):
            raise UsageError(
                f"{path} cannot be resumed: {BANK}{name} must be {low} .. {high} in the memory bank"
            )
