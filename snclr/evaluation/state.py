"""Saves classifier and optimiser of an evaluation after each epoch, in one file of the workdir, and
resumes from it.
"""

import os
from argparse import Namespace

import torch
from torch import nn

from ..running import distributed, tensor_files
from ..running.errors import UsageError, first_line
from ..running.preemption import signals_wait
from ..running.settings import differ, versions_and_commit

KINDS = dict(epoch=int, model=dict, optimizer=dict, history=list, args=dict, encoder_digest=str)


def save(
    args: Namespace,
    identity: dict,
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    history: list[float],
) -> None:
    """Write the state after `epoch` completed epochs to workdir/name, by rank 0; all ranks wait.

    identity: what a resumed evaluation must repeat, see task.Task. history: top-1 in percent after
    each epoch; empty when fine-tuning.
    """
    if distributed.rank() == 0:
        content = {
            "epoch": epoch,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": history,
            **identity,
            "provenance": versions_and_commit(),
        }
        with signals_wait():
            tensor_files.save(os.path.join(args.workdir, name), content)
    distributed.barrier()


def resume(
    args: Namespace,
    identity: dict,
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, list[float]]:
    """Load what `save` wrote, if --resume asks for it and the file exists. Returns the number of
    completed epochs and the history, else 0 and [].

    Raises UsageError if the file is of another evaluation, or does not fit.
    """
    path = os.path.join(args.workdir, name)
    if args.resume is None or not os.path.exists(path):
        return 0, []
    content = tensor_files.read(path)
    if tensor_files.wrong_entries(content, KINDS):
        raise UsageError(f"{path} is not the state of an evaluation; choose a new --workdir")
    saved = content["args"].items()
    changed = [str(name) for name, value in saved if differ(value, vars(args).get(name))]
    changed += ["the encoder"] * (content["encoder_digest"] != identity["encoder_digest"])
    if changed:
        raise UsageError(
            f"{path} is of another evaluation: {', '.join(changed)} changed; choose a new --workdir"
        )
    try:
        epoch, history = content["epoch"], content["history"]
        if epoch not in range(args.epochs + 1):
            raise ValueError("its epoch is not between 0 and --epochs")
        if tensor_files.plain_tensors(content["model"]).keys() != content["model"].keys():
            raise ValueError("its weights are not tensors")
        if not all(type(top1) is float for top1 in history):
            raise ValueError("its history has entries that are not numbers")
        if len(history) != (0 if args.finetune else epoch):
            raise ValueError("its history does not have one number for each epoch")
        model.load_state_dict(content["model"])
    except Exception as error:  # the file may hold anything, so torch may raise anything
        raise UsageError(
            f"{path} does not fit this evaluation: {first_line(error)}; choose a new --workdir"
        ) from error
    tensor_files.load_optimizer(path, content["optimizer"], optimizer)
    return epoch, history
