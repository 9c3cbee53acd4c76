"""Weights & Biases and MLflow get what TensorBoard gets, and a failure ends no run."""

import json
from argparse import Namespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_ranks import NO_EVALUATION

import main_snclr
from snclr import options
from snclr.running import loggers
from snclr.running.errors import UsageError
from snclr.running.log import Log

LINES = [
    {"epoch": 1, "step": 1, "loss": 2.5, "loss_ratio": None, "lr": 0.1},
    {"epoch": 1, "step": 2, "loss": 1.5, "loss_ratio": 0.5, "lr": 0.2},
    {"epoch": 1, "step": 3, "knn_top1": 50.0, "encoder": "online"},
]
EXPECTED = {
    "loss/loss": [(1, 2.5), (2, 1.5)],
    "loss/loss_ratio": [(2, 0.5)],
    "optim/lr": [(1, 0.1), (2, 0.2)],
    "eval/knn_top1": [(3, 50.0)],
}


def write_log(workdir, name):
    """Two lines, then the third by a resumed run."""
    args = Namespace(log=[name], epochs=3, mean=[0.5, 0.5, 0.5], init_from=None)
    for step, lines in ((0, LINES[:2]), (2, LINES[2:])):
        log = Log(str(workdir), step=step, enabled=True, args=args)
        for line in lines:
            log.line(line)
        log.close()
    return json.loads((workdir / "logger_ids.json").read_text())[name]


def tensorboard(workdir):
    events = EventAccumulator(str(workdir / "tensorboard")).Reload()
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_mlflow_has_the_scalars_and_settings_in_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run_id = write_log(tmp_path, "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("snclr").experiment_id])
    assert run.info.run_id == run_id and run.info.status == "FINISHED"
    assert run.data.params["epochs"] == "3" and run.data.params["mean"] == "[0.5, 0.5, 0.5]"
    logged = {
        name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)]
        for name in run.data.metrics
    }
    assert logged == EXPECTED == tensorboard(tmp_path)


def test_wandb_has_the_scalars_and_settings_under_one_id(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged, starts, init = {}, [], wandb.init

    def watched(**settings):
        run = init(**settings)
        starts.append((run.id, dict(run.config)))
        log = run.log

        def record(values):
            for name in values.keys() - {"step"}:
                logged.setdefault(name, []).append((values["step"], values[name]))
            log(values)

        monkeypatch.setattr(run, "log", record)
        return run

    monkeypatch.setattr(wandb, "init", watched)
    run_id = write_log(tmp_path, "wandb")
    assert [start[0] for start in starts] == [run_id, run_id]
    assert starts[0][1]["epochs"] == 3 and starts[0][1]["mean"] == [0.5, 0.5, 0.5]
    assert logged == EXPECTED
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert max(file.stat().st_size for file in files) > 500


@pytest.mark.parametrize("failing", ["start", "log"])
def test_a_logger_that_fails_ends_no_run_and_is_named_once(
    failing, images, tmp_path, monkeypatch, capsys
):
    class Failing:
        id = "1"

        def __init__(self, *arguments):
            if failing == "start":
                raise ConnectionError("no network\nand more")

        def log(self, values, step):
            raise ConnectionError("no network\nand more")

        def close(self):
            raise AssertionError("it is not used again")

    class Working(Failing):
        steps = []  # noqa: RUF012

        def __init__(self, *arguments):
            pass

        def log(self, values, step):
            self.steps.append(step)

        def close(self):
            pass

    monkeypatch.setitem(loggers.OPEN, "wandb", Failing)
    monkeypatch.setitem(loggers.OPEN, "mlflow", Working)
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: name)
    flags = f"{NO_EVALUATION} --log wandb mlflow --stop-after-steps 2 --workdir {tmp_path}"
    main_snclr.main([str(images), *flags.split()])
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("note: nothing more is logged to wandb: no network") == 1
    assert Working.steps == [1, 2]


def test_a_missing_library_and_an_unknown_one_are_named(monkeypatch):
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--log wandb needs the library: pip install wandb"):
        options.parse(["--log", "wandb"])
    with pytest.raises(UsageError, match="--log: invalid choice: 'comet'"):
        options.parse(["--log", "comet"])
    assert options.parse([]).log == []
