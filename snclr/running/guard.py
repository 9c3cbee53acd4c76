"""Reports non-finite steps, which end a run if there are many, and a collapse of the features."""

import os

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from ..loader import Batch, EpochLoader
from .distributed import all_gather, rank
from .errors import RunError, first_few
from .precision import autocast
from .safe_files import save_json
from .tensor_files import not_finite

COLLAPSED = 0.05  # a feature_std below this is a collapse; 1 is spread over the sphere
PATIENCE = 10  # logged steps in a row


class Guard:
    """Notes loss and gradient of each step, and reports those that are not finite when a step is
    logged.

    A step whose gradient is not finite changes neither weights nor optimiser (optim.step_if_finite;
    the gradient is the mean over the ranks, so all ranks skip the step). The momentum encoder
    follows the weights, and the bank refuses keys that are not finite (memory_bank.py). Running
    statistics of batch norms that are no longer finite are restored here, to those of the last
    clean check. With a scaler (fp16) an overflow of the gradient is normal, so only a non-finite
    loss counts, until the scale has fallen below 1: then the gradient itself is not finite.
    """

    def __init__(
        self, model: nn.Module, loader: EpochLoader, workdir: str, *, limit: int, scaler: GradScaler
    ):
        self.loader, self.workdir, self.limit, self.scaler = loader, workdir, limit, scaler
        self.statistics = [
            x for name, x in model.named_buffers() if name.endswith(("running_mean", "running_var"))
        ]
        self.saved_statistics = [x.clone() for x in self.statistics]
        # loss and gradient norm (2,) of each step since the last check
        self.watched: dict[int, Tensor] = {}
        # the bad steps since the last check that found none, each with the ranks of a bad loss
        self.bad_steps: dict[int, list[int]] = {}
        self.saved_step: int | None = None  # of the newest checkpoint
        self.num_collapsed = 0  # logged steps of collapse in a row

    def watch(self, loss: Tensor, grad_norm: Tensor, step: int) -> None:
        """Keep loss () and grad_norm () of a step for the next check; does not wait for the device,
        unless there is a scaler.

        step: its number, from 1.
        """
        loss = loss.detach()
        may_overflow = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        self.watched[step] = torch.stack([loss, loss if may_overflow else grad_norm])

    def check(self) -> str | None:
        """A line for the log if steps were skipped since the last call. Collective.

        Raises RunError if there were more than the limit; the indices of the images of the first
        bad step are then written to workdir/non_finite.json.
        """
        if not self.watched:
            return None
        watched = torch.stack([*self.watched.values()])[None]  # (1, steps, 2)
        is_finite = all_gather(watched).isfinite().cpu()
        bad_steps = {
            step: (~of_ranks[:, 0]).nonzero().flatten().tolist()
            for step, of_ranks in zip(self.watched, is_finite.unbind(1), strict=True)
            if not of_ranks.all()
        }
        self.watched = {}
        if not bad_steps:
            if self.statistics:  # mocov2 adds no batch norm to a ViT
                torch._foreach_copy_(self.saved_statistics, self.statistics)
            self.bad_steps = {}
            return None
        for current, saved in zip(self.statistics, self.saved_statistics, strict=True):
            current.copy_(torch.where(current.isfinite(), current, saved))
        self.bad_steps |= bad_steps
        count, step = len(self.bad_steps), min(self.bad_steps)
        ranks = self.bad_steps[step]
        what = (
            f"loss is not finite (on rank {', '.join(map(str, ranks))})"
            if ranks
            else "gradient is not finite"
        )
        message = f"step {step}: the {what}; {count} such steps were skipped"
        if count <= self.limit:
            return message
        advice = ""  # what to do if the last sound checkpoint does not help
        if self.saved_step is None:
            advice = ": start again with a lower --lr"
        elif step == self.saved_step + 1 and max(self.bad_steps) == self.saved_step + count:
            advice = ", but no step after it was finite: an older one may be needed"
        path = os.path.join(self.workdir, "non_finite.json")
        if rank() == 0:
            images = self.loader.indices(step).tolist()
            try:
                save_json(path, {"step": step, "what": what, "ranks": ranks, "images": images})
            except RunError as error:
                path = f"no file: {error}"
        raise RunError(
            f"{message}, more than --skip-non-finite {self.limit};"
            f" {self.last_sound_checkpoint}{advice};"
            f" the images are listed in {path}"
        )

    @torch.no_grad()
    def try_forward(self, model: nn.Module, batch: Batch, momentum: float, amp: str) -> bool:
        """Whether the loss of a batch is finite with the model's weights: weights can be finite,
        but so large that nothing can be computed with them. Collective.

        Changes nothing in the model.
        """
        before = {name: x.clone() for name, x in model.state_dict().items()}
        # compiled backbones would be compiled once more, for a pass without gradients
        with torch.compiler.set_stance("force_eager"), autocast(amp, batch.ids.device):
            loss, _ = model(batch.views, batch.ids, momentum)
        model.load_state_dict(before)
        return bool(all_gather(loss[None]).isfinite().all())

    def finite_batch(self, step: int) -> Batch:
        """This rank's batch of the last step up to `step` that was finite; if there was none, that
        of step 1.
        """
        while step > 1 and step in self.bad_steps:
            step -= 1
        epoch, inside = divmod(step - 1, self.loader.steps_per_epoch)
        return next(self.loader.load(self.loader.requests(epoch, inside)[:1]))

    @property
    def last_sound_checkpoint(self) -> str:
        """A part of a message that says of which step the last sound checkpoint is."""
        if self.saved_step is None:
            return "there is no sound checkpoint yet"
        return f"the last sound checkpoint is of step {self.saved_step}"

    def what_is_unsound(
        self, step: int, model: nn.Module, optimizer: Optimizer, is_usable: bool
    ) -> str | None:
        """Why the state after step `step` must not become a checkpoint; None if it may.

        is_usable: what `try_forward` returned. Call `check` first.
        """
        tensors = dict(model.state_dict())
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name} of parameter {number}": value for name, value in state.items()}
        if names := not_finite(tensors):
            return f"not finite after step {step}: {first_few(names)}"
        if not is_usable:
            return f"with the weights after step {step} the loss is not finite"
        return None

    def collapse(self, feature_std: float) -> str | None:
        """A line for the log, once, if feature_std was low for PATIENCE logged steps in a row."""
        if self.num_collapsed < PATIENCE:  # else it was reported
            self.num_collapsed = self.num_collapsed + 1 if feature_std < COLLAPSED else 0
            if self.num_collapsed == PATIENCE:
                return (
                    f"collapse: feature_std is below {COLLAPSED} for {PATIENCE} logged steps: "
                    "all images look alike; lower --lr"
                )
        return None
