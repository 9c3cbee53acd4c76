"""A rank that waits for images that do not come: it notices, says why in one line, and signals end
it.
"""

import multiprocessing
import os
import shutil
import signal
import time
from types import SimpleNamespace

import attack
import pytest
import torch
from conftest import needs_root, one_line

from snclr.running import workers
from snclr.running.errors import UsageError, describe_failure


@needs_root
def test_too_little_shared_memory_is_seen_at_the_start(train, tmp_path):
    case = train(shared_memory=2**16)
    one_line(case, 2, "/dev/shm has 0.1 MiB free", "--shm-size", "--workers")
    assert not (tmp_path / "run").exists()


@needs_root
def test_shared_memory_that_others_fill_ends_the_run_in_one_line(programs, photographs, tmp_path):
    # a probe's batches are not known at the start: they are found out when they do not fit
    flags = ["--pretrained", tmp_path / "run/encoder_last.pth.tar", "--workdir", tmp_path / "probe"]
    small = "-a resnet8 --width 8 --img-size 32 --snclr-dim 16 --snclr-mlp-dim 32 --bank-size 60"
    small += " --topk 3 -b 8 --epochs 1 --eval-freq 0 --viz-freq 0"
    train = ["main_snclr.py", photographs, *small.split(), "--workdir", tmp_path / "run"]
    assert programs.run(*train)[0] == 0
    case = programs.start(
        "main_lincls.py", photographs, *flags, "--epochs", 1, "-b", 20, "-j", 1, shared_memory=2**16
    )
    one_line(case, 1, "/dev/shm is full: enlarge it")


@pytest.mark.parametrize("files", [20, 28, 40])
def test_too_few_open_files_end_the_run_in_one_line(train, files):
    one_line(train(limits={"NOFILE": files}), 1, "ulimit -n")


def test_what_batches_need_is_compared_with_what_is_free(monkeypatch, tmp_path):
    free = 2**30
    monkeypatch.setattr(workers, "SHARED_MEMORY", str(tmp_path))
    # what is free now may change
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    workers.check_shared_memory(free // 5 - 1, 2, 1)
    workers.check_shared_memory(free, 0, 1)
    with pytest.raises(UsageError, match="2 workers per rank"):
        workers.check_shared_memory(free // 5 + 2**20, 2, 1)
    with pytest.raises(UsageError):
        workers.check_shared_memory(free // 5 - 1, 2, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_a_run_that_waits_for_images_and_nothing_is_lost(train, tmp_path, number):
    block = tmp_path / "block"
    case = train("--epochs", "500", blocked_by=block)
    case.wait_for("step 3/")
    block.touch()
    wait_until_it_waits(case)
    case.signal(number)
    code, output = case.ended()
    assert code == 75 and f"{number.name}: saved" in output and "Traceback" not in output, output
    done = [line.split()[3].split("/")[0] for line in output.splitlines() if "step" in line[:20]]
    path = tmp_path / "run/checkpoint_last.pth.tar"
    assert torch.load(path, weights_only=True)["step"] == int(done[-1])


def wait_until_it_waits(case):
    """Until a program prints nothing more; if it is only slow, a test checks less, and passes."""
    seen = None
    while seen != (seen := case.output):
        time.sleep(1)


def test_a_rank_gives_up_after_a_time_without_images(monkeypatch):
    monkeypatch.setattr(workers, "POLL", 0.1)
    batches = iter(workers.WorkerBatches(Sleeper(), [0, 3600], 1))
    assert next(batches) == 0
    monkeypatch.setattr(workers, "LIMIT", 0.5)
    with pytest.raises(workers.Stalled, match=r"no batch of images for \d+ s"):
        next(batches)


def test_a_worker_that_is_frozen_while_it_passes_memory_is_noticed(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 0.5)
    monkeypatch.setattr(workers, "POLL", 0.1)
    others = set(multiprocessing.active_children())
    loader = workers.WorkerBatches(Tensors(), range(9), 1)
    batches = iter(loader)
    next(batches)
    time.sleep(0.5)  # until it has announced the next batch, which it passes when it is asked
    (worker,) = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signal.SIGSTOP)
    loader.stop_waiting = lambda: True
    with pytest.raises(workers.Stalled, match="no batch of images"):
        next(batches)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    worker.join(attack.PATIENCE)
    assert worker.exitcode == -signal.SIGKILL


class Tensors(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return torch.full((1000,), index)


def test_a_signal_ends_a_run_whose_worker_is_frozen(train, tmp_path):
    case = train("--epochs", "500", blocked_by=tmp_path / "never")
    case.wait_for("step 3/")
    os.kill(attack.children_of(case.pid)[0], signal.SIGSTOP)
    wait_until_it_waits(case)
    case.signal(signal.SIGTERM)
    code, output = case.ended()
    assert code == 75 and "SIGTERM: saved" in output and "Traceback" not in output, output


class Sleeper(torch.utils.data.Dataset):
    def __getitem__(self, seconds):
        time.sleep(seconds)
        return seconds


@pytest.mark.parametrize("error", [MemoryError(), ValueError("a bug"), OSError("a bug")])
def test_errors_in_a_worker(error):
    class Faulty(torch.utils.data.Dataset):
        def __getitem__(self, index):
            raise error

    if isinstance(error, MemoryError):
        with pytest.raises(RuntimeError, match="no memory left"):
            next(iter(workers.WorkerBatches(Faulty(), [0], 1)))
    else:  # a bug keeps its traceback
        with pytest.raises(type(error), match="in DataLoader worker process 0"):
            next(iter(workers.WorkerBatches(Faulty(), [0], 1)))


def test_reasons_of_lost_workers():
    reason = describe_failure
    lost = "DataLoader worker (pid 7) exited unexpectedly with exit code {}. Details are lost."
    assert "/dev/shm is full" in reason(RuntimeError(lost.format(64 + 28)))
    assert "ulimit -n" in reason(RuntimeError(lost.format(64 + 24)))
    assert "out of memory?" in reason(RuntimeError(lost.format(1)))
    assert "out of memory?" in reason(ConnectionResetError(104, "Connection reset by peer"))
    assert "/dev/shm is full" in reason(EOFError(), [None, 64 + 28])
    assert "/dev/shm is full" in reason(EOFError(), [-signal.SIGBUS])
    assert reason(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_a_worker_that_is_lost_while_weights_are_loaded_is_named(monkeypatch):
    lost, layer = "DataLoader worker (pid 7) is killed by signal: Killed. ", torch.nn.Linear(2, 2)

    def copy(*_):
        raise RuntimeError(lost)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    with pytest.raises(RuntimeError, match="in loading state_dict") as wrapped:
        layer.load_state_dict(layer.state_dict())
    expected = "DataLoader worker (pid 7) is killed by signal: Killed: out of memory?"
    assert describe_failure(wrapped.value).startswith(expected)


@pytest.mark.parametrize("step", [1, 4])
def test_a_killed_worker_is_one_line(train, step):
    case = train("--epochs", "500")
    case.wait_for(f"step {step}/")
    os.kill(attack.children_of(case.pid)[0], signal.SIGKILL)
    one_line(case, 1, "DataLoader worker")


def test_no_process_is_left(train):
    case = train(limits={"NOFILE": 24})
    group = case.pid
    case.ended()
    attack.wait_for(lambda: not attack.living_in(group))
