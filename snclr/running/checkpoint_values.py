"""Values of a checkpoint that no run writes, with which training would fail or never end."""

from argparse import Namespace

from .errors import UsageError, first_few
from .tensor_files import not_finite

BANK = "module.memory_bank."


def check_values(path: str, state: dict, args: Namespace) -> None:
    """Raises UsageError for values that no run saves, with which training would fail or not end."""
    steps_per_epoch = state["images"] // args.batch_size
    epochs = state["args"].get("epochs")
    if type(epochs) is int and not 0 <= state["step"] <= epochs * steps_per_epoch:
        raise UsageError(
            f"{path} cannot be resumed: it is of step {state['step']} of {epochs * steps_per_epoch}"
        )
    tensors = state["state_dict"]
    if names := not_finite(tensors):
        raise UsageError(
            f"{path} cannot be resumed: {len(names)} tensors are not finite:"
            f" {first_few(names)}; take an older checkpoint"
        )
    bounds = {"ids": (-1, state["images"] - 1)}
    if (ids := tensors.get(f"{BANK}ids")) is not None:
        bounds |= {"filled": (0, len(ids)), "pointer": (0, len(ids) - 1)} if ids.dim() else {}
    for name, (low, high) in bounds.items():
        tensor = tensors.get(BANK + name)
        if tensor is not None and not bool(((tensor >= low) & (tensor <= high)).all()):
            raise UsageError(
                f"{path} cannot be resumed: {BANK}{name} must be {low} .. {high} in the memory bank"
            )
