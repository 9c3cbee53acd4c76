"""Ranks that die or hang: they are named, the others end, and MAX_RESTARTS starts them again."""

import os
import re
import signal
import socket
import subprocess
import sys

import attack
import pytest
import torch

HOST = socket.gethostname()


def test_a_hanging_rank_is_named_after_the_time_out(images, tmp_path):
    flags = ["--workdir", tmp_path / "run", "--timeout-minutes", "7", "--eval-freq", "0"]
    code, output = attack.ended(
        attack.start(
            images,
            *[*attack.FLAGS, *flags],
            TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1",
            **attack.in_step(1, 3, signal.SIGSTOP),
        )
    )
    assert code == 1 and "Traceback" not in output, output
    (line,) = re.findall("main_snclr.py: stopped.*", output)
    assert line.startswith(
        f"main_snclr.py: stopped on rank 0 ({HOST}): lost contact with rank 1 on {HOST}: "
    )
    assert "imed out" in line


def test_a_dead_rank_is_named_and_replaced_and_the_run_ends_the_same(images, undisturbed, tmp_path):
    flags = [*attack.FLAGS, "--workdir", tmp_path / "run"]
    killed = attack.in_step(1, 7, signal.SIGKILL)
    run = attack.start(images, *flags, MAX_RESTARTS="1", **killed)
    code, output = attack.ended(run)
    assert code == 0 and "Traceback" not in output, output
    assert "resumed from" in output and "after step 5 of 10" in output
    assert f"stopped on rank 0 ({HOST}): lost contact with rank 1 on {HOST}: " in output
    assert re.search(
        rf"start.sh: rank 1 \(process \d+ on {HOST}\) was ended by SIGKILL: out of memory\?", output
    )
    assert output.count("start.sh: starting again, 1 of 1 times") == 1
    assert attack.differences(undisturbed, tmp_path / "run") == []


def test_ranks_whose_launcher_is_killed_before_they_know_it_end_by_themselves(images, tmp_path):
    flags = [*attack.FLAGS, "--workdir", tmp_path / "run"]
    waits = {"PYTHONPATH": attack.IN_RANKS, "RANKS_WAIT": str(tmp_path / "killed")}
    run = attack.start(images, *flags, **waits)
    attack.wait_for(lambda: len(attack.ranks_of(run)) == 2, run)
    ranks = attack.ranks_of(run)
    run.kill()
    (tmp_path / "killed").touch()
    attack.wait_for(lambda: not any(map(attack.lives, ranks)))
    assert attack.ended(run)[1].count("the launcher has ended") == 2


MEET = """
import os, time
from snclr.running import process_group
while os.environ["WAIT_FOR"] and not os.path.exists(os.environ["WAIT_FOR"]):
    time.sleep(0.1)
open(os.environ["CREATE"], "x").close()
time.sleep(0.5 * bool(os.environ["WAIT_FOR"]))
process_group.start(5)
os._exit(0)
"""


def test_ranks_that_torchrun_starts_again_do_not_look_for_those_that_died(tmp_path):
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
        for rank in "01":
            more = {
                "TORCHELASTIC_RESTART_COUNT": attempt,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "CREATE": str(tmp_path / f"{attempt}{rank}"),
                # at the second start rank 1 is there before rank 0
                "WAIT_FOR": str(tmp_path / "11") if attempt + rank == "10" else "",
            }
            ranks.append(
                subprocess.Popen([sys.executable, "-c", MEET], env=os.environ | common | more)
            )
        assert [rank.wait(attack.PATIENCE) for rank in ranks] == [0, 0]


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
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", **attack.in_step(0, 7, signal.SIGKILL)},
    )
    code, output = attack.ended(run)
    assert code == 0 and "resumed from" in output, output
    assert attack.differences(undisturbed, tmp_path / "run") == []


def test_restarts_want_a_workdir(images):
    code, output = attack.ended(attack.start(images, *attack.FLAGS, MAX_RESTARTS="2"))
    assert code == 2 and output == "start.sh: error: MAX_RESTARTS needs --workdir\n"
