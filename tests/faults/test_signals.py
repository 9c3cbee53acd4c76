"""SIGTERM, SIGUSR1, SIGINT: finish the step, save, exit with code 75 on all ranks, resume."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import attack
import pytest
import torch
from torchvision.io import write_png

import main_lincls
import main_snclr
from snclr.datasets import decoding, sources
from snclr.evaluation import knn
from snclr.evaluation import probe as linear_probe
from snclr.evaluation.options import STATE_FILE
from snclr.running import preemption, settings
from snclr.running.errors import Interrupted, RunError
from snclr.running.log import Log

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def train(images, workdir, *flags):
    main_snclr.main([str(images), *attack.FLAGS, "--workdir", str(workdir), *flags])


def signalled(function, call, *numbers):
    """The function, before whose call number `call` this process gets signals."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    return wrapped


def signal_in_step(monkeypatch, step, *numbers):
    """Send signals to this process while a run is in its step `step`."""
    due = preemption.Interruptions.due  # called once in each step
    monkeypatch.setattr(preemption.Interruptions, "due", signalled(due, step, *numbers))


@pytest.fixture(scope="module")
def undisturbed_one(images, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    train(images, workdir)
    return workdir


@pytest.mark.parametrize(
    "number, step", [*itertools.product(SIGNALS, [1, 3, 5]), (signal.SIGHUP, 3)]
)
def test_the_step_is_finished_and_saved_and_the_run_resumes_exactly(
    images, undisturbed_one, tmp_path, monkeypatch, number, step
):
    with monkeypatch.context() as patch:
        signal_in_step(patch, step, number)
        with pytest.raises(Interrupted, match=f"{number.name}: saved"):
            train(images, tmp_path)
    assert torch.load(tmp_path / "checkpoint_last.pth.tar", weights_only=True)["step"] == step
    train(images, tmp_path, "--resume", "auto")
    assert attack.differences(undisturbed_one, tmp_path) == []


def test_a_signal_during_an_evaluation_ends_it_at_once_and_it_is_repeated_later(
    images, undisturbed_one, tmp_path, monkeypatch
):
    third = signalled(knn.accuracy, 3, signal.SIGTERM)  # raw pixels, untrained, epoch 1
    with monkeypatch.context() as patch:
        patch.setattr(knn, "accuracy", third)
        with pytest.raises(Interrupted):
            train(images, tmp_path)
    assert [line["step"] for line in attack.lines_of(tmp_path)] == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]  # no evaluation of epoch 1
    train(images, tmp_path, "--resume", "auto")
    assert attack.differences(undisturbed_one, tmp_path) == []


def test_a_signal_while_an_image_is_decoded_is_not_taken_for_one_that_cannot_be_read(
    images, tmp_path, monkeypatch
):
    monkeypatch.setattr("snclr.datasets.images.RESIDENT_LIMIT", 0)
    original = decoding._page

    def interrupted(*args):
        if (
            tmp_path / "checkpoint_last.pth.tar"
        ).exists():  # from the first evaluation after a save on
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(decoding, "_page", interrupted)
    with pytest.raises(Interrupted, match="SIGTERM: saved"):
        train(images, tmp_path, "-j", "0", "--on-bad-image", "skip")
    assert not (tmp_path / "bad_images.txt").exists()


def test_a_signal_to_one_rank_during_an_evaluation_ends_both(images, tmp_path):
    command = [
        sys.executable,
        attack.ROOT / "tools/torchrun.py",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command += [
        attack.ROOT / "tests/faults/signalled.py",
        images,
        *attack.FLAGS,
        "--workdir",
        tmp_path,
    ]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        timeout=attack.PATIENCE,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 75 and "Traceback" not in output, output


def test_several_ranks_of_which_one_gets_no_images_end_when_their_terminal_is_closed(
    photographs, tmp_path
):
    workdir = tmp_path / "run"
    command = [sys.executable, attack.ROOT / "tools/torchrun.py", "--standalone"]
    command += ["--nproc_per_node", 2, attack.ROOT / "tests/faults/stalled.py", 8]
    command += [photographs, *attack.FLAGS, "--workdir", workdir, "-j", 1, "--eval-freq", 0]
    run = subprocess.Popen(
        list(map(str, [*command, "--epochs", 100000])),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    attack.wait_for_step(workdir, 8, run)  # the ranks cannot agree on a signal that comes later
    os.killpg(run.pid, signal.SIGHUP)
    code, output = attack.ended(run)
    step = torch.load(workdir / attack.LAST, weights_only=True)["step"]
    message = "SIGHUP: not saved, because a rank got no images;"
    message += f" the last sound checkpoint is of step {step};"
    assert code == 75 and message in output and "Traceback" not in output, output


def test_a_signal_in_a_destructor_is_not_lost():
    class Loader:
        def __del__(self):
            self.shut_down()

        def shut_down(self):
            os.kill(os.getpid(), signal.SIGINT)

    with preemption.handlers_given_back():
        preemption.end_at_once()
        with pytest.raises(Interrupted, match="SIGINT: ended"):
            Loader()
            time.sleep(60)


def test_a_signal_during_the_start_ends_it_and_what_a_process_did_at_signals_it_does_again(
    images, tmp_path, monkeypatch
):
    before = [signal.getsignal(number) for number in SIGNALS]
    train(images, tmp_path / "whole", "--stop-after-steps", "1", "--eval-freq", "0")
    assert [signal.getsignal(number) for number in SIGNALS] == before
    monkeypatch.setattr(sources, "open_data", lambda args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(
        Interrupted, match="SIGTERM: ended; the same command with --resume auto goes on"
    ):
        train(images, tmp_path / "run")
    assert [signal.getsignal(number) for number in SIGNALS] == before


def probe(images, run, workdir, *flags):
    """What the heads of a linear probe of three epochs reach."""
    command = [
        str(images),
        "--pretrained",
        str(run / "encoder_last.pth.tar"),
        "--workdir",
        str(workdir),
        *flags,
    ]
    main_lincls.main(
        [*command, "--epochs", "3", "-b", "8", "--crop-min", "0.5", "--heldout", "0.2"]
    )
    return json.loads((workdir / "results.json").read_text())["heads"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_probe_ends_at_a_signal_and_resumes_from_its_last_complete_epoch(
    images, undisturbed_one, tmp_path, monkeypatch, number
):
    whole = probe(images, undisturbed_one, tmp_path / "whole")
    third = signalled(
        linear_probe.accuracies, 3, number
    )  # before the first, after it, after the second epoch
    with monkeypatch.context() as patch:
        patch.setattr(linear_probe, "accuracies", third)
        with pytest.raises(
            Interrupted, match=f"{number.name}: ended; the same command with --resume auto goes on"
        ):
            probe(images, undisturbed_one, tmp_path / "parts")
    assert torch.load(tmp_path / "parts" / STATE_FILE, weights_only=True)["epoch"] == 1
    assert not (tmp_path / "parts/results.json").exists()
    assert probe(images, undisturbed_one, tmp_path / "parts", "--resume", "auto") == whole


def test_a_probe_of_two_ranks_ends_at_a_signal_to_the_launcher(images, undisturbed, tmp_path):
    flags = [
        "--pretrained",
        undisturbed / "encoder_last.pth.tar",
        "--workdir",
        tmp_path,
        "--epochs",
        "100000",
        "-b",
        "8",
    ]
    run = attack.start("main_lincls.py", images, *flags, "--heldout", "0.2", "--crop-min", "0.5")
    attack.wait_for((tmp_path / STATE_FILE).exists, run)
    run.send_signal(signal.SIGTERM)
    code, output = attack.ended(run)
    assert code == 75 and output.count("SIGTERM: ended") == 1 and "Traceback" not in output, output
    assert torch.load(tmp_path / STATE_FILE, weights_only=True)["epoch"] > 0


def test_a_probe_finishes_the_file_that_it_writes_before_it_heeds_a_signal(
    images, undisturbed_one, tmp_path, monkeypatch
):
    original = os.fsync

    def signalled_fsync(number):
        if list(tmp_path.glob(f"{STATE_FILE}.*.tmp")):  # not while args.json is written
            os.kill(os.getpid(), signal.SIGTERM)
        return original(number)

    monkeypatch.setattr(os, "fsync", signalled_fsync)
    with pytest.raises(Interrupted):
        probe(images, undisturbed_one, tmp_path)
    assert torch.load(tmp_path / STATE_FILE, weights_only=True)["epoch"] == 1


def test_a_save_that_failed_is_not_called_saved(images, tmp_path, monkeypatch):
    def full(*args, **number):
        raise RunError("cannot write it: No space left on device")

    monkeypatch.setattr(main_snclr, "write_files", full)
    third = signalled(knn.accuracy, 3, signal.SIGTERM)  # raw pixels, untrained, epoch 1
    monkeypatch.setattr(knn, "accuracy", third)
    with pytest.raises(
        Interrupted, match="SIGTERM: not saved, the checkpoint before is whole; the same command"
    ):
        train(images, tmp_path)


def test_without_scontrol_the_job_is_not_requeued_and_a_note_is_printed(
    images, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("PATH", "")  # nor is there git
    monkeypatch.setattr(settings, "versions_and_commit", settings.versions_and_commit.__wrapped__)
    signal_in_step(monkeypatch, 1, signal.SIGUSR1)
    order, requeue, close = [], preemption.requeue, Log.close
    monkeypatch.setattr(preemption, "requeue", lambda x: order.append("requeue") or requeue(x))
    monkeypatch.setattr(Log, "close", lambda log: order.append("close") or close(log))
    with pytest.raises(
        Interrupted, match=r"SIGUSR1: saved; .* \(requeue of job 77 failed: .*scontrol.*\)"
    ):
        train(images, tmp_path)
    assert order == ["requeue", "close"]  # a logger may wait for its network until SLURM kills it
    for name in (attack.LAST, "encoder_last.pth.tar"):
        state = torch.load(tmp_path / name, weights_only=True)
        assert (
            state["provenance"]["git"] is None
            and state["provenance"]["versions"]["torch"]
            and state["args"]
        )


def test_every_so_many_minutes_it_saves_within_an_epoch(
    images, undisturbed_one, tmp_path, monkeypatch
):
    saved, original = [], main_snclr.save
    monkeypatch.setattr(
        main_snclr,
        "save",
        lambda run, step, batch: saved.append(step) or original(run, step, batch),
    )
    train(images, tmp_path, "--save-every-minutes", "1e-9")
    assert saved == list(range(1, 11))
    assert attack.differences(undisturbed_one, tmp_path) == []


SCONTROL = '#!/usr/bin/env bash\necho "$*" >> "$STUB_LOG"\n'
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_NODEID": "0",
}


def test_a_signal_to_one_rank_ends_all_and_requeues_the_slurm_job(images, undisturbed, tmp_path):
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {**STEP, "STUB_LOG": str(tmp_path / "log"), "path": [tmp_path]}
    flags = [images, *attack.FLAGS, "--workdir", tmp_path / "run"]
    in_step = attack.in_step(1, 3, signal.SIGUSR1)
    code, output = attack.ended(attack.start(*flags, **slurm, **in_step))
    assert (
        code == 75
        and "SIGUSR1: saved" in output
        and "as job 77 will" in output
        and "Traceback" not in output
    )
    assert "step 4/" in output and "step 5/" not in output
    assert (tmp_path / "log").read_text() == "requeue 77\n"
    code, output = attack.ended(attack.start(*flags, **slurm, SLURM_RESTART_COUNT="1"))
    assert code == 0 and "resumed from" in output
    assert attack.differences(undisturbed, tmp_path / "run") == []


def test_launcher_forwards_a_signal_and_a_second_interrupt_ends_it_at_once(images, tmp_path):
    flags = [
        images,
        *attack.FLAGS,
        "--workdir",
        tmp_path / "run",
        "--epochs",
        "100000",
        "--eval-freq",
        "0",
    ]
    run = attack.start(*flags, before=["nohup"])
    attack.wait_for_step(tmp_path / "run", 2, run)
    os.killpg(run.pid, signal.SIGHUP)  # ignored, by nohup
    attack.wait_for_step(tmp_path / "run", attack.lines_of(tmp_path / "run")[-1]["step"] + 5, run)
    run.send_signal(signal.SIGTERM)
    code, output = attack.ended(run)
    assert code == 75 and output.count("SIGTERM: saved") == 1 and "Traceback" not in output
    step = torch.load(tmp_path / "run/checkpoint_last.pth.tar", weights_only=True)["step"]
    run = attack.start(*flags, "--resume", "auto")
    attack.wait_for_step(tmp_path / "run", step + 2, run)
    ranks = attack.ranks_of(run)
    assert len(ranks) == 2
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)  # so that they cannot finish their step

    def interrupt():  # again and again: two signals that wait for the launcher are one
        run.send_signal(signal.SIGINT)
        return run.poll() is not None

    attack.wait_for(interrupt)
    code, output = attack.ended(run)
    assert code == 130 and "Traceback" not in output
    attack.wait_for(lambda: not any(map(attack.lives, ranks)))


def test_a_signal_to_the_whole_group_takes_no_images_from_the_step_that_is_finished(
    images, tmp_path
):
    """SLURM and terminals also signal the workers that load images."""
    root = Path(shutil.copytree(images, tmp_path / "images"))
    write_png(
        torch.zeros(3, 40, 40, dtype=torch.uint8), str(root / "train/a/00.png")
    )  # of another size: not held in memory
    flags = ["-j", "2", "--epochs", "100000", "--eval-freq", "0", "--workdir", tmp_path / "run"]
    run = attack.start(root, *attack.FLAGS, *flags, ranks=1)
    attack.wait_for_step(tmp_path / "run", 2, run)
    os.killpg(run.pid, signal.SIGTERM)
    code, output = attack.ended(run)
    assert code == 75 and "SIGTERM: saved" in output and "worker" not in output
