"""Loads the state of an optimiser, after checking that this optimiser keeps such a state."""

import copy

import torch
from torch.optim import Optimizer

from .errors import UsageError, first_line
from .tensor_files import is_plain


def load_optimizer(path: str, state: dict, optimizer: Optimizer) -> None:
    """Load an optimiser's state, but not its settings: those of this start apply.

    Raises UsageError if this optimiser keeps another state for these parameters.
    """
    expected, groups = _state_after_a_step(optimizer), optimizer.state_dict()["param_groups"]
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


def _state_after_a_step(optimizer):
    """The state of each parameter, by its number in the state_dict, after a step of a copy of the
    optimiser.
    """
    trial = copy.deepcopy(optimizer)
    for group in trial.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    trial.step()
    return trial.state_dict()["state"]


def _kinds(values):
    """The shape of each tensor of a state, and the type of each other value."""
    return {name: x.shape if is_plain(x) else type(x) for name, x in values.items()}
