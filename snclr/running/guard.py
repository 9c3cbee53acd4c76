"""What happens when numbers go wrong: steps that are not finite are skipped, then the run is stopped; collapse is told."""

import os

import torch
from torch import Tensor, nn

from .distributed import all_gather, rank
from .errors import RunError
from .safe_files import save_json

COLLAPSED, PATIENCE = (
    0.05,
    10,
)  # feature_std below this in so many logged steps; 1 is spread over the sphere


class Guard:
    """Keeps what is not finite out of the state of a run: decided on the device at every step, read when a step is logged.

    A step whose gradient (the ranks' mean, so the same on all) is not finite moves neither weights nor optimiser; the momentum
    encoder follows the weights, the bank refuses such keys (memory_bank.py), and running statistics of batch norms go back to
    those of the last logged step. With a scaler (fp16) a gradient that overflows is ordinary, and only the loss counts.
    """

    def __init__(
        self, model: nn.Module, optimizer, loader, workdir: str, *, limit: int, scaled: bool
    ):
        self.optimizer, self.loader, self.workdir, self.limit, self.scaled = (
            optimizer,
            loader,
            workdir,
            limit,
            scaled,
        )
        norms = [
            module
            for module in model.modules()
            if getattr(module, "running_mean", None) is not None
        ]
        self.statistics = [x for norm in norms for x in (norm.running_mean, norm.running_var)]
        self.kept = [x.clone() for x in self.statistics]
        self.seen = torch.tensor(
            [-1, -1, 0], device=loader.device
        )  # first step of a bad loss, of a bad gradient; bad steps since
        self.told, self.low = 0, 0  # bad steps that the log knows; logged steps of collapse

    def watch(self, loss: Tensor, grad_norm: Tensor, step: int) -> None:
        """Note loss () and norm () of the gradient of step `step`, and let the optimiser skip it if need be."""
        bad = ~torch.stack([loss.detach(), grad_norm]).isfinite()
        self.optimizer.found_inf = bad[1].float()
        bad[1] &= not self.scaled
        first = torch.where((self.seen[:2] < 0) & bad, step, self.seen[:2])
        self.seen = torch.cat([first, self.seen[2:] + bad.any()])

    def check(self) -> str | None:
        """Read what was seen: a line for the log where steps were skipped. Collective.

        Above the limit the images of the first bad step are left in workdir/non_finite.json, and RunError says all.
        """
        losses, gradients, counts = zip(*all_gather(self.seen[None]).tolist(), strict=True)
        count = max(counts)
        if count == self.told:
            torch._foreach_copy_(self.kept, self.statistics)
            self.seen[:], self.told = self.seen.new_tensor([-1, -1, 0]), 0
            return None
        for now, kept in zip(self.statistics, self.kept, strict=True):
            now.copy_(torch.where(now.isfinite(), now, kept))
        self.told = count
        step = min(number for number in losses + gradients if number > 0)
        ranks = [number for number, found in enumerate(losses) if found == step]
        where = (
            f"loss is not finite (on rank {', '.join(map(str, ranks))})"
            if ranks
            else "gradient is not finite"
        )
        told = f"step {step}: the {where}; {count} such steps were skipped"
        if count <= self.limit:
            return told
        path = os.path.join(self.workdir, "non_finite.json")
        if rank() == 0:
            images = self.loader.indices(step).tolist()
            try:
                save_json(path, {"step": step, "what": where, "ranks": ranks, "images": images})
            except RunError as error:
                path = f"no file: {error}"
        raise RunError(
            f"{told}, more than --skip-non-finite {self.limit}; the last checkpoint is sound, the images are in {path}"
        )

    def collapse(self, feature_std: float) -> str | None:
        """A warning, once, when the features have been the same for all images for a while."""
        self.low = self.low + 1 if feature_std < COLLAPSED else min(self.low, 0)
        if self.low < PATIENCE:
            return None
        self.low = -(2**63)
        return f"collapse: feature_std is below {COLLAPSED} for {PATIENCE} logged steps: all images look alike; lower --lr"
