"""Reports non-finite steps, which end a run if there are many, and a collapse of the features."""

import os

import torch
from torch import Tensor, nn
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
    """Counts the non-finite steps on the device, and reports them when a step is logged.

    A step whose gradient is not finite changes neither weights nor optimiser (optim.step_if_finite;
    the gradient is the mean over the ranks, so all ranks skip the step). The momentum encoder
    follows the weights, and the bank refuses keys that are not finite (memory_bank.py). Running
    statistics of batch norms that are no longer finite are restored here, to those of the last
    clean check. With a scaler (fp16) an overflow of the gradient is normal, so only a non-finite
    loss counts.
    """

    def __init__(
        self, model: nn.Module, loader: EpochLoader, workdir: str, *, limit: int, scaled: bool
    ):
        self.loader, self.workdir, self.limit, self.scaled = loader, workdir, limit, scaled
        norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
        self.statistics = [x for norm in norms for x in (norm.running_mean, norm.running_var)]
        self.saved_statistics = [x.clone() for x in self.statistics]
        # since the last check without a bad step: the first step with a bad loss, the first with a
        # bad gradient (-1: none), the number of bad steps; and the last bad step of the run
        self.counters = torch.tensor([-1, -1, 0, -1], device=loader.device)
        self.last_bad_step = -1  # as of the last check
        self.unusable_step = -1  # the last step after which a forward pass was not finite
        self.saved_step: int | None = None  # of the newest checkpoint
        self.num_reported = 0  # how many of these bad steps are in the log
        self.num_collapsed = 0  # logged steps of collapse in a row

    def watch(self, loss: Tensor, grad_norm: Tensor, step: int) -> None:
        """Note whether loss () and grad_norm () of a step are finite; does not wait for the device.

        step: its number, from 1.
        """
        bad = ~torch.stack([loss.detach(), grad_norm]).isfinite()
        if self.scaled:
            bad[1] = False
        first, count, last = self.counters.split([2, 1, 1])
        first, is_bad = first.masked_fill((first < 0) & bad, step), bad.any()
        self.counters = torch.cat([first, count + is_bad, last.masked_fill(is_bad, step)])

    def check(self) -> str | None:
        """A line for the log if steps were skipped since the last call. Collective.

        Raises RunError if there were more than the limit; the indices of the images of the first
        bad step are then written to workdir/non_finite.json.
        """
        counters = all_gather(self.counters[None]).tolist()
        losses, gradients, counts, last_steps = zip(*counters, strict=True)
        count, self.last_bad_step = max(counts), max(last_steps)
        if count == self.num_reported:
            torch._foreach_copy_(self.saved_statistics, self.statistics)
            self.counters[:3], self.num_reported = self.counters.new_tensor([-1, -1, 0]), 0
            return None
        for current, saved in zip(self.statistics, self.saved_statistics, strict=True):
            current.copy_(torch.where(current.isfinite(), current, saved))
        self.num_reported = count
        step = min(number for number in losses + gradients if number > 0)
        ranks = [number for number, first in enumerate(losses) if first == step]
        what = "gradient is not finite"
        if ranks:
            what = f"loss is not finite (on rank {', '.join(map(str, ranks))})"
        message = f"step {step}: the {what}; {count} such steps were skipped"
        if count <= self.limit:
            return message
        path = os.path.join(self.workdir, "non_finite.json")
        if rank() == 0:
            images = self.loader.indices(step).tolist()
            try:
                save_json(path, {"step": step, "what": what, "ranks": ranks, "images": images})
            except RunError as error:
                path = f"no file: {error}"
        raise RunError(
            f"{message}, more than --skip-non-finite {self.limit};"
            f" {self.last_sound_checkpoint}{self._advice(step, count)};"
            f" the images are listed in {path}"
        )

    @torch.no_grad()
    def try_forward(
        self, step: int, model: nn.Module, batch: Batch, momentum: float, amp: str
    ) -> None:
        """Note whether the loss of the last batch is finite with the weights after step `step`:
        weights can be finite, but so large that nothing can be computed with them. Collective.

        Changes nothing in the model.
        """
        before = {name: x.clone() for name, x in model.state_dict().items()}
        # compiled backbones would be compiled once more, for a pass without gradients
        eager = torch.compiler.set_stance("force_eager")
        with eager, autocast(amp, batch.ids.device):
            loss, _ = model(batch.views, batch.ids, momentum)
        model.load_state_dict(before)
        if not all_gather(loss[None]).isfinite().all():
            self.unusable_step = step

    @property
    def last_sound_checkpoint(self) -> str:
        """A part of a message that says of which step the last sound checkpoint is."""
        if self.saved_step is None:
            return "there is no sound checkpoint yet"
        return f"the last sound checkpoint is of step {self.saved_step}"

    def _advice(self, first_bad_step, count):
        """What the user can do if that checkpoint does not help; else an empty text."""
        if self.saved_step is None:
            return ": start again with a lower --lr"
        if first_bad_step == self.saved_step + 1 and self.last_bad_step == self.saved_step + count:
            return ", but no step after it was finite: an older one may be needed"
        return ""

    def what_is_unsound(self, step: int, model: nn.Module, optimizer: Optimizer) -> str | None:
        """Why the state after step `step` must not become a checkpoint; None if it may.

        Call `check` and `try_forward` first.
        """
        if self.last_bad_step == step:
            return f"step {step} was not finite"
        tensors = dict(model.state_dict())
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name} of parameter {number}": value for name, value in state.items()}
        names = not_finite(tensors)
        if names:
            return f"not finite after step {step}: {first_few(names)}"
        if self.unusable_step == step:
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
