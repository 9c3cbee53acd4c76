"""Weights & Biases and MLflow beside TensorBoard: --log wandb mlflow.

Both libraries are optional. Their settings come from their own environment variables, such as
WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME.
"""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from .errors import first_line
from .safe_files import json_object, read_text, save_json

IDS = "logger_ids.json"  # in the workdir: the id of the run in each library


class Logger(NamedTuple):
    """A run in a library; a resumed training run continues it by its id."""

    id: str
    log: Callable[[dict[str, float], int], object]  # values by name, step
    close: Callable[[], object]


def open_wandb(workdir: str, config: dict, run_id: str | None) -> Logger:
    """A run of Weights & Biases, whose files are in the workdir."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "snclr"),
        name=os.path.basename(os.path.abspath(workdir)),
        dir=workdir,
        id=run_id or secrets.token_hex(4),
        resume="allow",
        config=config,
    )
    # wandb's own counter would refuse the steps that a resumed run repeats
    run.define_metric("*", step_metric="step")
    return Logger(run.id, lambda values, step: run.log({"step": step, **values}), run.finish)


def open_mlflow(workdir: str, config: dict, run_id: str | None) -> Logger:
    """A run of MLflow; without MLFLOW_TRACKING_URI its files are in the workdir."""
    import mlflow

    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow.set_tracking_uri(f"file:{os.path.abspath(workdir)}/mlruns")
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "snclr"))
    run = mlflow.start_run(run_id, run_name=os.path.basename(os.path.abspath(workdir)))
    if run_id is None:  # the parameters of a run cannot change
        mlflow.log_params(config)
    return Logger(run.info.run_id, mlflow.log_metrics, mlflow.end_run)


OPEN = {"wandb": open_wandb, "mlflow": open_mlflow}


class Loggers:
    """The runs of the libraries `names`. A resumed training run continues them.

    If a library fails, `say` prints one line, and the library is not used again.
    """

    def __init__(self, names: list[str], workdir: str, config: dict, say: Callable[[str], None]):
        self.runs, self.say = {}, say
        path = os.path.join(workdir, IDS)
        ids = json_object(read_text(path)) if names and os.path.isfile(path) else {}
        for name in names:
            with self._dropped_if_it_fails(name):
                self.runs[name] = OPEN[name](workdir, config, ids.get(name))
        if self.runs:
            save_json(path, ids | {name: run.id for name, run in self.runs.items()})

    @contextmanager
    def _dropped_if_it_fails(self, name) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the network, the disk or the library; the run goes on
            self.runs.pop(name, None)
            self.say(f"note: nothing more is logged to {name}: {first_line(error)}")

    def log(self, values: dict[str, float], step: int) -> None:
        """Add values by name at a step."""
        for name, run in [*self.runs.items()]:
            with self._dropped_if_it_fails(name):
                run.log(values, step)

    def close(self) -> None:
        """End the runs."""
        for name, run in [*self.runs.items()]:
            with self._dropped_if_it_fails(name):
                run.close()
