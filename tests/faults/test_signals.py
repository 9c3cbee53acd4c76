"""SIGTERM, SIGUSR1, SIGINT: finish the step, save, leave with code 75 on all ranks; go on from there exactly."""

import os
import shutil
import signal
import time
from pathlib import Path

import attack
import pytest
import torch
from torchvision.io import write_png

import main_snclr
from snclr import knn, monitor
from snclr.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def train(images, workdir, *flags):
    main_snclr.main([str(images), *attack.FLAGS, "--workdir", str(workdir), *flags])


def signal_in_step(monkeypatch, step, *numbers):
    """Send signals to this process while a run is in its step `step`."""
    calls, original = [], monitor.Log.advance

    def advance(self):
        calls.append(1)
        if len(calls) == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        original(self)

    monkeypatch.setattr(monitor.Log, "advance", advance)


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    train(images, workdir)
    return workdir


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("step", [1, 3, 5])
def test_the_step_is_finished_and_saved_and_the_run_goes_on_exactly(images, alone, tmp_path, monkeypatch, number, step):
    with monkeypatch.context() as patch:
        signal_in_step(patch, step, number)
        with pytest.raises(Interrupted, match=f"{number.name}: saved"):
            train(images, tmp_path)
    assert torch.load(tmp_path / "checkpoint_last.pth.tar", weights_only=True)["step"] == step
    train(images, tmp_path, "--resume", "auto")
    assert attack.differences(alone, tmp_path) == []


def test_a_signal_during_an_evaluation_ends_it_at_once_and_it_is_made_up_for(images, alone, tmp_path, monkeypatch):
    calls, original = [], knn.accuracy

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # raw pixels, untrained, epoch 1
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(knn, "accuracy", interrupted)
        with pytest.raises(Interrupted):
            train(images, tmp_path)
    assert [line["step"] for line in attack.lines_of(tmp_path)] == [0, 1, 2, 3, 4, 5]  # no evaluation of epoch 1
    train(images, tmp_path, "--resume", "auto")
    assert attack.differences(alone, tmp_path) == []


def test_every_so_many_minutes_it_saves_within_an_epoch(images, alone, tmp_path, monkeypatch):
    saved, original = [], main_snclr.save
    monkeypatch.setattr(main_snclr, "save", lambda *args: (saved.append(args[1]["step"]), original(*args)))
    train(images, tmp_path, "--save-every-minutes", "1e-9")
    assert saved == list(range(1, 11))
    assert attack.differences(alone, tmp_path) == []


SCONTROL = '#!/usr/bin/env bash\necho "$*" >> "$STUB_LOG"\n'
STEP = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}


def test_one_rank_gets_the_signal_and_all_leave_and_slurm_is_asked_to_start_the_job_again(images, undisturbed, tmp_path):
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {**STEP, "STUB_LOG": str(tmp_path / "log"), "path": [tmp_path]}
    flags, workdir = [images, *attack.FLAGS, "--workdir", tmp_path / "run"], tmp_path / "run"
    run = attack.start(*flags, **slurm)
    attack.wait_for_step(workdir, 2, run)
    os.kill(attack.rank_pid(run, 1), signal.SIGUSR1)
    sent = time.monotonic()
    code, output = attack.ended(run, within=60)
    assert code == 75 and "SIGUSR1: saved" in output and "as job 77 will" in output and "Traceback" not in output
    assert time.monotonic() - sent < 30 and (tmp_path / "log").read_text() == "requeue 77\n"
    code, output = attack.ended(attack.start(*flags, **slurm, SLURM_RESTART_COUNT="1"))
    assert code == 0 and "resumed from" in output
    assert attack.differences(undisturbed, workdir) == []


def test_launcher_passes_a_signal_on_waits_and_a_second_interrupt_ends_it_at_once(images, tmp_path):
    flags = [images, *attack.FLAGS, "--workdir", tmp_path / "run", "--epochs", "100000", "--eval-freq", "0"]
    run = attack.start(*flags)
    attack.wait_for_step(tmp_path / "run", 2, run)
    run.send_signal(signal.SIGTERM)
    code, output = attack.ended(run, within=60)
    assert code == 75 and output.count("SIGTERM: saved") == 1 and "Traceback" not in output
    step = torch.load(tmp_path / "run/checkpoint_last.pth.tar", weights_only=True)["step"]
    run = attack.start(*flags, "--resume", "auto")
    attack.wait_for_step(tmp_path / "run", step + 2, run)
    ranks = attack.ranks_of(run)
    assert len(ranks) == 2
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)  # so that they cannot finish their step
    run.send_signal(signal.SIGINT)
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    code, output = attack.ended(run, within=20)
    assert code == 130 and "Traceback" not in output
    time.sleep(1)
    assert not any(map(attack.lives, ranks))


def test_a_signal_to_the_whole_group_takes_no_images_from_the_step_that_is_finished(images, tmp_path):
    """As SLURM signals every process of a step, and a terminal those in front: the workers that load images, too."""
    root = Path(shutil.copytree(images, tmp_path / "images"))
    write_png(torch.zeros(3, 40, 40, dtype=torch.uint8), str(root / "train/a/00.png"))  # of another size: not held in memory
    flags = ["-j", "2", "--epochs", "100000", "--eval-freq", "0", "--workdir", tmp_path / "run"]
    run = attack.start(root, *attack.FLAGS, *flags, ranks=1)
    attack.wait_for_step(tmp_path / "run", 2, run)
    os.killpg(run.pid, signal.SIGTERM)
    code, output = attack.ended(run, within=60)
    assert code == 75 and "SIGTERM: saved" in output and "worker" not in output
