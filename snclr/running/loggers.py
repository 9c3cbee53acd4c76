"""Weights & Biases and MLflow beside TensorBoard: --log wandb mlflow.

Both libraries are optional. Their settings come from their own environment variables, such as
WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME.
"""

import os
import secrets
from collections.abc import Callable

from .errors import first_line
from .safe_files import json_object, read_text, save_json

IDS = "logger_ids.json"  # in the workdir: the id of the run in each library


class WandB:
    """A run of Weights & Biases."""

    def __init__(self, workdir: str, config: dict, run_id: str | None):
        import wandb

        self.id = run_id or secrets.token_hex(4)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "snclr"),
            name=os.path.basename(os.path.abspath(workdir)),
            dir=workdir,
            id=self.id,
            resume="allow",
            config=config,
        )
        # wandb's own counter would refuse the steps that a resumed run repeats
        self.run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of MLflow; without MLFLOW_TRACKING_URI its files are in the workdir."""

    def __init__(self, workdir: str, config: dict, run_id: str | None):
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri(f"file:{os.path.abspath(workdir)}/mlruns")
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "snclr"))
        name = os.path.basename(os.path.abspath(workdir))
        self.id = mlflow.start_run(run_id, run_name=name).info.run_id
        if run_id is None:  # the parameters of a run cannot change
            mlflow.log_params(config)
        self.library = mlflow

    def log(self, values: dict[str, float], step: int) -> None:
        self.library.log_metrics(values, step=step)

    def close(self) -> None:
        self.library.end_run()


KINDS = {"wandb": WandB, "mlflow": MLflow}


class Loggers:
    """The runs of the libraries `names`. A resumed training run continues them.

    If a library fails, `say` prints one line, and the library is not used again.
    """

    def __init__(self, names: list[str], workdir: str, config: dict, say: Callable[[str], None]):
        self.runs, self.say = {}, say
        path = os.path.join(workdir, IDS)
        ids = json_object(read_text(path)) if names and os.path.isfile(path) else {}
        for name in names:
            self._try(name, lambda name: self._start(name, workdir, config, ids.get(name)))
        if self.runs:
            save_json(path, ids | {name: run.id for name, run in self.runs.items()})

    def _start(self, name, workdir, config, run_id):
        self.runs[name] = KINDS[name](workdir, config, run_id)

    def _try(self, name, function):
        try:
            function(name)
        except Exception as error:  # of the network, the disk or the library; the run goes on
            self.runs.pop(name, None)
            self.say(f"note: nothing more is logged to {name}: {first_line(error)}")

    def log(self, values: dict[str, float], step: int) -> None:
        """Add values by name at a step."""
        for name in [*self.runs]:
            self._try(name, lambda name: self.runs[name].log(values, step))

    def close(self) -> None:
        """End the runs."""
        for name in [*self.runs]:
            self._try(name, lambda name: self.runs[name].close())
