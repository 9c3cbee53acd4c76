"""start.sh with replacements for nvidia-smi, srun and scontrol."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_ranks import SMALL, free_port

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [*SMALL.split(), "--stop-after-steps", "2", "--eval-freq", "0"]

# runs its command once per node with the environment of a task, as srun does
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$STUB_LOG"
while [[ $1 == --* ]]; do shift; done
pids=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES=$SLURM_JOB_NUM_NODES \
    SLURM_STEP_NODELIST=$SLURM_JOB_NODELIST SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || exit $?; done
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1 $2 $3" = "show hostnames node[1-2]" ] && printf '127.0.0.1\\nnode2\\n'
"""
NVIDIA_SMI = """#!/usr/bin/env bash
for ((gpu = 0; gpu < STUB_GPUS; gpu++)); do echo "GPU $gpu: a name (UUID: GPU-0)"; done
"""
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_CPUS_ON_NODE": "6",
}


@pytest.fixture
def start(tmp_path):
    """Call start.sh with arguments and environment variables."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "nvidia-smi": NVIDIA_SMI}.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    keep = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("SLURM", "NNODES", "NODE_RANK", "MASTER", "CUDA", "WORLD"))
    }
    keep["PATH"] = os.pathsep.join(
        [str(stubs), str(Path(sys.executable).parent), os.environ["PATH"]]
    )

    def call(*arguments, script=ROOT / "start.sh", wait=True, **environment):
        environment = {
            "STUB_GPUS": "0",
            "STUB_LOG": str(tmp_path / "log"),
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        command = ["bash", str(script), *map(str, arguments)]
        process = subprocess.Popen(
            command,
            env=keep | environment,
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        if not wait:
            return process
        process.out, process.err = process.communicate(timeout=600)
        return process

    return call


def dry(start, *arguments, **environment):
    """The words of the command that a dry run prints."""
    done = start("--dry-run", *arguments, **environment)
    assert done.returncode == 0 and len(done.out.splitlines()) == 1, done.err
    return shlex.split(done.out)


MAIN = str(ROOT / "main_snclr.py")
TORCHRUN = str(ROOT / "tools/torchrun.py")
ODD = ["/data/my photos", "--workdir", "it's $HOME"]


def test_one_process_where_there_is_at_most_one_gpu(start):
    for gpus in ("0", "1"):
        assert dry(start, *ODD, STUB_GPUS=gpus)[1:] == [MAIN, *ODD]


def test_a_single_process_is_restarted_by_the_launcher(start):
    flags = ["--workdir", "w"]
    words = dry(start, *flags, STUB_GPUS="1", MAX_RESTARTS="2")
    assert words[1:] == [TORCHRUN, "--standalone", "--nproc_per_node", "1", MAIN, *flags]


@pytest.mark.parametrize(
    "environment, processes",
    [
        ({"STUB_GPUS": "8"}, "8"),
        ({"STUB_GPUS": "8", "CUDA_VISIBLE_DEVICES": "0,3,5"}, "3"),
        ({"STUB_GPUS": "0", "NPROC_PER_NODE": "2"}, "2"),
        ({"STUB_GPUS": "8", "NPROC_PER_NODE": "4"}, "4"),
    ],
)
def test_one_process_a_gpu_or_as_many_as_asked_for(start, environment, processes):
    assert dry(start, *ODD, **environment)[1:] == [
        TORCHRUN,
        "--standalone",
        "--nproc_per_node",
        processes,
        MAIN,
        *ODD,
    ]


def test_evaluation_starts_by_the_same_rules(start, tmp_path):
    script, flags = str(ROOT / "main_lincls.py"), ["--pretrained", "a file", "--finetune"]
    assert dry(start, "main_lincls.py", *flags, STUB_GPUS="1")[1:] == [script, *flags]
    assert dry(start, "main_lincls.py", *flags, STUB_GPUS="4")[1:] == [
        TORCHRUN,
        "--standalone",
        "--nproc_per_node",
        "4",
        script,
        *flags,
    ]
    assert dry(start, "main_lincls.py", *flags, **SLURM)[-5:] == [
        str(ROOT / "start.sh"),
        "main_lincls.py",
        *flags,
    ]
    done = start("main_lincls.py", *flags)
    assert (
        done.returncode == 2
        and done.err == "main_lincls.py: error: --pretrained a file: there is no such file\n"
    )
    assert (
        "--pretrained FILE" in start("main_lincls.py", "--help").out
        and "--snclr-t" in start("--help").out
    )


def test_hidden_gpus_are_not_used(start):
    assert dry(start, STUB_GPUS="8", CUDA_VISIBLE_DEVICES="")[1:] == [MAIN]


def test_several_machines(start):
    command = dry(start, *ODD, STUB_GPUS="8", NNODES="4", NODE_RANK="3", MASTER_ADDR="node1")
    address = ["--master_addr", "node1", "--master_port", "29500"]
    assert command[1:] == [
        TORCHRUN,
        "--nnodes",
        "4",
        "--node_rank",
        "3",
        "--nproc_per_node",
        "8",
        *address,
        MAIN,
        *ODD,
    ]


def test_inside_an_allocation_srun_starts_it_on_each_node(start):
    command = dry(start, *ODD, **SLURM)
    flags = [
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=6",
        "--kill-on-bad-exit=1",
    ]
    assert command == ["srun", *flags, "bash", str(ROOT / "start.sh"), "main_snclr.py", *ODD]


def test_inside_a_step_the_node_takes_its_part(start):
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_NODEID": "1",
    }
    command = dry(start, **SLURM, **step, SLURM_GPUS_ON_NODE="4")
    address = ["--master_addr", "127.0.0.1", "--master_port", "15077"]
    assert command[1:] == [
        TORCHRUN,
        "--nnodes",
        "2",
        "--node_rank",
        "1",
        "--nproc_per_node",
        "4",
        *address,
        MAIN,
    ]


def test_the_shell_of_salloc_starts_srun_also_if_it_is_a_step(start):
    command = dry(
        start, **SLURM, SLURM_STEP_ID="4294967290", SLURM_STEP_NUM_NODES="1", SLURM_NODEID="0"
    )
    assert command[:2] == ["srun", "--nodes=2"]


def test_an_interactive_step_on_one_node_is_one_machine(start):
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}
    assert dry(start, **{**SLURM, "SLURM_JOB_NUM_NODES": "1"}, **step)[1:] == [MAIN]


def test_sbatch_runs_a_copy_that_finds_the_repository_where_the_job_was_submitted(start, tmp_path):
    (tmp_path / "spool").mkdir()
    copy = shutil.copy(ROOT / "start.sh", tmp_path / "spool/slurm_script")
    command = dry(start, script=copy, SLURM_SUBMIT_DIR=str(ROOT), **SLURM)
    assert command[-3:] == ["bash", str(ROOT / "start.sh"), "main_snclr.py"]
    done = start(script=copy, SLURM_SUBMIT_DIR=str(tmp_path), **SLURM)
    assert done.returncode == 2 and "submit the job from the repository's folder" in done.err


def test_a_dry_run_neither_runs_nor_installs(start, tmp_path):
    (tmp_path / "stubs/python3").write_text(
        f'#!/usr/bin/env bash\n[ "$1" = - ] && exit 1\nexec {sys.executable} "$@"\n'
    )
    (tmp_path / "stubs/python3").chmod(0o755)
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "tools", clone / "tools")
    for name in ("start.sh", "main_snclr.py", "requirements.txt"):
        shutil.copy(ROOT / name, clone)
    done = start("--dry-run", script=clone / "start.sh")
    lines = [shlex.split(line) for line in done.out.splitlines()]
    python = str(clone / ".venv/bin/python")
    assert lines[0] == ["python3", "-m", "venv", str(clone / ".venv")]
    assert lines[1] == [python, "-m", "pip", "install", "-r", str(clone / "requirements.txt")]
    assert lines[2:] == [[python, str(clone / "main_snclr.py")]] and not (clone / ".venv").exists()


@pytest.mark.parametrize(
    "environment, named",
    [
        ({"NNODES": "2"}, "NODE_RANK must be 0 .. 1, different on each machine"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK must be 0 .. 1 with NNODES=2, found 2"),
        ({"NNODES": "2", "NODE_RANK": "-1"}, "NODE_RANK must be a whole number, found '-1'"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR must name the machine of NODE_RANK 0"),
        ({"NNODES": "two"}, "NNODES must be a whole number, found 'two'"),
        ({"NNODES": "0"}, "NNODES must be at least 1"),
        ({"NPROC_PER_NODE": "all"}, "NPROC_PER_NODE must be a whole number, found 'all'"),
        (
            {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "http"},
            "MASTER_PORT must be a whole number",
        ),
        (
            {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "65536"},
            "MASTER_PORT must be 1 .. 65535",
        ),
        (
            {"NNODES": "3", "NODE_RANK": "0", "MASTER_ADDR": "h", "NPROC_PER_NODE": "5"},
            "divisible by the 15 ranks",
        ),
    ],
)
def test_wrong_settings_are_answered_in_one_line(start, environment, named):
    done = start(**environment)
    assert (
        done.returncode == 2
        and named in done.err
        and len(done.err.splitlines()) == 1
        and not done.out
    )


def test_a_port_in_use_is_an_error(start):
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        done = start(NNODES="2", NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert (
        done.returncode == 2 and f"port {port} is in use: set MASTER_PORT to a free one" in done.err
    )


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def single_process(images, tmp_path_factory):
    """The losses of one process."""
    workdir = tmp_path_factory.mktemp("alone")
    command = [sys.executable, MAIN, str(images), *TRAIN, "--workdir", str(workdir / "run")]
    subprocess.run(command, check=True, capture_output=True)
    return losses(workdir / "run")


def test_two_machines_give_the_losses_of_one_process(start, images, tmp_path, single_process):
    environment = {
        "NNODES": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "NPROC_PER_NODE": "1",
    }
    nodes = [
        start(images, *TRAIN, "--workdir", "run", wait=False, NODE_RANK=str(n), **environment)
        for n in (1, 0)
    ]
    outputs = [node.communicate(timeout=600) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert losses(tmp_path / "run") == pytest.approx(single_process, rel=1e-4)
    assert json.loads((tmp_path / "run/args.json").read_text())["world_size"] == 2
    assert "step 2/10" in outputs[1][0] and "step" not in outputs[0][0]  # only node 0 prints


def test_a_slurm_job_of_two_nodes_gives_the_losses_of_one_process(
    start, images, tmp_path, single_process
):
    done = start(
        images,
        *TRAIN,
        "--workdir",
        "run",
        NPROC_PER_NODE="1",
        **{**SLURM, "SLURM_JOB_ID": str(os.getpid())},
    )
    assert done.returncode == 0, done.err
    assert losses(tmp_path / "run") == pytest.approx(single_process, rel=1e-4)
    assert (tmp_path / "log").read_text().count("srun") == 1 and done.out.count("step 2/10") == 1


def test_an_error_of_all_ranks_is_one_line_of_ours_and_exit_code_two(start, tmp_path):
    (tmp_path / "empty").mkdir()
    done = start("empty", "-b", "8", "--workdir", "run", NPROC_PER_NODE="2")
    assert (
        done.returncode == 2
        and done.err.count("no image in empty") == 1
        and "Traceback" not in done.err
    )
