"""Ranks that die or hang: they are named, the others end, and MAX_RESTARTS starts them again."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import attack
import pytest
import torch

HOST = socket.gethostname()


def losing(images, workdir, number, *flags, **environment):
    """Send a signal to rank 1 after step 2; exit code, output and seconds until the end."""
    run = attack.start(images, *attack.FLAGS, "--workdir", workdir, *flags, **environment)
    attack.wait_for_step(workdir, 2, run)
    os.kill(attack.rank_pid(run, 1), number)
    begun = time.monotonic()
    code, output = attack.ended(run)
    return code, output, time.monotonic() - begun


def test_a_hanging_rank_is_named_after_the_time_out(images, tmp_path):
    flags = ["--timeout-minutes", "0.1", "--epochs", "100000", "--eval-freq", "0"]
    code, output, seconds = losing(
        images, tmp_path / "run", signal.SIGSTOP, *flags, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5"
    )
    assert code == 1 and seconds < 60 and "Traceback" not in output
    (line,) = re.findall("main_snclr.py: stopped.*", output)
    assert line.startswith(
        f"main_snclr.py: stopped on rank 0 ({HOST}): lost contact with rank 1 on {HOST}: "
    )
    assert "imed out" in line


def test_a_dead_rank_is_named_and_replaced_and_the_run_ends_the_same(images, undisturbed, tmp_path):
    code, output, _ = losing(images, tmp_path / "run", signal.SIGKILL, MAX_RESTARTS="1")
    assert code == 0 and "Traceback" not in output
    assert f"stopped on rank 0 ({HOST}): lost contact with rank 1 on {HOST}: " in output
    assert re.search(
        rf"start.sh: rank 1 \(process \d+ on {HOST}\) was ended by SIGKILL: out of memory\?", output
    )
    assert output.count("start.sh: starting again, 1 of 1 times") == 1
    assert attack.differences(undisturbed, tmp_path / "run") == []


def test_ranks_whose_launcher_is_killed_before_they_know_it_end_by_themselves(images, tmp_path):
    run = attack.start(images, *attack.FLAGS, "--workdir", tmp_path / "run")
    attack.wait_for(lambda: len(attack.ranks_of(run)) == 2, run)  # they have begun to import torch
    ranks = attack.ranks_of(run)
    run.kill()
    end = time.monotonic() + 60
    while any(map(attack.lives, ranks)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(attack.lives, ranks))
    assert run.communicate()[0].count("the launcher has ended") == 2


MEET = (
    "import os, time; from snclr.running import process_group; "
    "time.sleep(float(os.environ['LATE'])); process_group.start(0.5); os._exit(0)"
)


def test_ranks_that_torchrun_starts_again_do_not_look_for_those_that_died():
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(server.port),
    }
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    for attempt in "01":
        ranks = []
        for rank, late in (
            ("0", attempt),
            ("1", "0"),
        ):  # at the second start rank 1 is there before rank 0
            more = {
                "TORCHELASTIC_RESTART_COUNT": attempt,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "LATE": str(3 * int(late)),
            }
            ranks.append(
                subprocess.Popen([sys.executable, "-c", MEET], env=os.environ | common | more)
            )
        assert [rank.wait(60) for rank in ranks] == [0, 0]


@pytest.mark.slow
def test_restarts_by_torchrun_also_resume(images, undisturbed, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--max-restarts",
        "1",
    ]
    command += [
        str(attack.ROOT / "main_snclr.py"),
        str(images),
        *attack.FLAGS,
        "--workdir",
        str(tmp_path / "run"),
    ]
    run = subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    attack.wait_for_step(tmp_path / "run", 7, run)
    os.kill(attack.rank_pid(run, 0), signal.SIGKILL)
    code, output = attack.ended(run)
    assert code == 0 and "resumed from" in output, output
    assert attack.differences(undisturbed, tmp_path / "run") == []


def test_restarts_want_a_workdir(images):
    code, output = attack.ended(attack.start(images, *attack.FLAGS, MAX_RESTARTS="2"))
    assert code == 2 and output == "start.sh: error: MAX_RESTARTS needs --workdir\n"
