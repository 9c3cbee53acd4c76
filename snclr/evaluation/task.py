"""What probe and fine-tuning share: encoder and images, saving and resuming, progress."""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import augment
from ..datasets.images import ImageSet
from ..running import distributed, tensor_files
from ..running.bad_images import record_bad_images
from ..running.errors import UsageError, first_line
from ..running.preemption import signals_wait
from ..running.settings import differ, versions_and_commit

# entries of a state file
KINDS = dict(epoch=int, model=dict, optimizer=dict, history=list, args=dict, encoder_digest=str)


class Task(NamedTuple):
    """An encoder and the labelled images on which it is evaluated."""

    args: argparse.Namespace
    encoder: nn.Module
    info: dict  # of snclr.weights.load.open_encoder
    identity: dict  # what a resumed evaluation must repeat: encoder_digest, and settings (args)
    embed: Callable[[Tensor], Tensor]  # images to frozen features, from linear.embedder
    load: Callable[..., Iterator[Tensor]]  # images and indices to batches: loader.whole_images
    train: ImageSet
    val: ImageSet
    device: torch.device
    amp: str  # precision of the encoder: 'off', 'bf16' or 'fp16'
    scaler: torch.amp.GradScaler  # of fine-tuning; disabled unless amp is 'fp16'
    log: Callable[[str], None]  # prints a line on rank 0; does nothing on other ranks

    @property
    def recipe(self) -> augment.Recipe:
        """The view on which a classifier is trained: a random crop, half of them flipped."""
        args = self.args
        return augment.Recipe(args.seed, (augment.View(args.img_size, args.crop_min),))

    def save(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        history: list[float],
    ) -> None:
        """Write the state after `epoch` completed epochs to workdir/name. All ranks call it.

        history: top-1 in percent after each epoch; empty when fine-tuning.
        """
        if distributed.rank() == 0:
            content = {
                "epoch": epoch,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "history": history,
                **self.identity,
                "provenance": versions_and_commit(),
            }
            with signals_wait():
                tensor_files.save(os.path.join(self.args.workdir, name), content)
        distributed.barrier()

    def resume(
        self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[int, list[float]]:
        """Load what `save` wrote, if --resume asks for it and the file exists.

        Returns the number of completed epochs and the history; 0 and [] if nothing was loaded.

        Raises UsageError if the file is of another evaluation, or does not fit.
        """
        args, path = self.args, os.path.join(self.args.workdir, name)
        if args.resume is None or not os.path.exists(path):
            return 0, []
        content = tensor_files.read(path)
        if tensor_files.wrong_entries(content, KINDS):
            raise UsageError(f"{path} is not the state of an evaluation; choose a new --workdir")
        saved = content["args"].items()
        changed = [str(name) for name, value in saved if differ(value, vars(args).get(name))]
        changed += ["the encoder"] * (content["encoder_digest"] != self.identity["encoder_digest"])
        if changed:
            raise UsageError(
                f"{path} is of another evaluation: {', '.join(changed)} changed; choose a new "
                "--workdir"
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
            if content.get("scaler") and self.scaler.is_enabled():
                self.scaler.load_state_dict(content["scaler"])
        except Exception as error:  # the file may hold anything, so torch may raise anything
            raise UsageError(
                f"{path} does not fit this evaluation: {first_line(error)}; choose a new --workdir"
            ) from error
        tensor_files.load_optimizer(path, content["optimizer"], optimizer)
        return epoch, history

    def report_epoch(
        self, images: ImageSet, replaced: set[int], epoch: int, text: str, start: float
    ) -> None:
        """Print progress about ten times during training, and report images that could not be read.
        All ranks call it.
        """
        epochs = self.args.epochs
        if note := record_bad_images(images.image, replaced, self.args.workdir):
            self.log(f"note: {note}")
        if epoch % max(1, epochs // 10) == 0 or epoch == epochs:
            self.log(f"epoch {epoch}/{epochs}  {text}  {time.perf_counter() - start:.0f} s")
