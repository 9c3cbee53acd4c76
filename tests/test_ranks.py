import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.io import write_png

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--arch resnet8 --width 8 --img-size 32 --snclr-dim 16 --snclr-mlp-dim 32 --bank-size 30 "
    "--topk 3 --lr 0.01 --epochs 2 --print-freq 1 --eval-freq 1 -b 8"  # 5 steps an epoch
)
NO_EVALUATION = SMALL.replace("--eval-freq 1", "--eval-freq 0")
TIMM = NO_EVALUATION.replace("resnet8", "timm:test_efficientnet")  # its norms have activations
VIT = NO_EVALUATION.replace("resnet8", "vit_tiny")
LEVERS = "--key-view weak --candidates unique --weights key --mix-neighbours --nn-mass 0.5 "
LEVERS += "--nn-ramp-epochs 1.5 --normalise-positives"
CLOCK = ("images_per_s", "data_wait", "slowest_step_s")  # metrics that differ between equal runs


def free_port():
    """A port that is free at the moment, and that the system gives no other socket unasked."""
    for port in range(20000 + os.getpid() % 10000, 32768):  # processes begin at different ports
        with contextlib.suppress(OSError), socket.socket() as server:
            server.bind(("127.0.0.1", port))
            return str(port)


def start_ranks(world_size, out, *starts):
    """Run tests/ranks.py, and wait: each start is a list of jobs, which new ranks run."""
    # the ranks meet as under torchrun, in the store of the process that starts them: no port that
    # was free a moment ago may be taken when the ranks need it
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if world_size > 1:
        environment |= {"WORLD_SIZE": str(world_size), "GROUP_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    words = [word for jobs in starts for word in (*jobs, "--")]
    ranks = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/ranks.py"), str(out), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = ranks.communicate(timeout=1800)
    except subprocess.TimeoutExpired:
        os.killpg(ranks.pid, signal.SIGKILL)
        raise
    assert ranks.returncode == 0, f"{world_size} ranks:\n{output.decode()[-5000:]}"


def write_images(root):
    """A folder of 40 + 10 small images in two classes."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("val", 5)):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                image = torch.randint(256, (3, 32, 32), generator=generator, dtype=torch.uint8)
                write_png(image, str(root / split / label / f"{number:02}.png"))
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory, images):
    """From a world size to the folder with the results of all jobs, which run once.

    Runs are resumed in new processes.
    """
    done = {}

    def get(world_size):
        if world_size not in done:
            out = done[world_size] = tmp_path_factory.mktemp(f"ranks{world_size}")
            short = f"--stop-after-steps 5 --workdir {out}"
            # DDP's buckets change the order in which 4 ranks are summed
            dtype = "float64:" if world_size == 4 else ""
            long = f"{dtype}{images} {SMALL} --local-views 1 {LEVERS} --workdir {out}"
            jobs = [
                "pieces",
                f"float64:{images} {SMALL} {short}/resnet",
                f"shallow:float64:{images} {VIT} {short}/vit",
                f"shallow:float64:{images} {VIT} --micro-batch 3 {short}/micro",
                f"float64:{images} {TIMM} {short}/timm",
                f"float64:{images} {NO_EVALUATION} --method mocov2 {short}/mocov2",
                f"float64:{images} {NO_EVALUATION} --local-views 2 {short}/local",
                f"float64:{images} {NO_EVALUATION} --weights projected --wd 0 {short}/projected",
                f"float64:{images} {NO_EVALUATION} --freeze-backbone-epochs 1 --lr-scale 0.5 "
                f"--stop-after-steps 7 --workdir {out}/frozen",
                f"float64:{images} {NO_EVALUATION} {LEVERS} {short}/levers",
                f"{long}/whole",
                f"{long}/parts --stop-after-steps 7",
                f"term:float64:{images} {NO_EVALUATION} {short}/term",  # last: it changes the class
            ]
            start_ranks(world_size, out, jobs, [f"{long}/parts --resume auto"])
        return done[world_size]

    return get


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(actual, expected, **tolerance):
    """Nested lists and dictionaries of tensors are equal, bit for bit without a tolerance."""
    assert type(actual) is type(expected)
    if isinstance(actual, dict):
        assert list(actual) == list(expected)
        for name in actual:
            assert_same(actual[name], expected[name], **tolerance)
    elif isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b, **tolerance)
    elif isinstance(actual, torch.Tensor):
        if tolerance and actual.is_floating_point():
            torch.testing.assert_close(actual, expected, **tolerance)
        else:
            assert torch.equal(actual, expected)
    else:
        assert actual == expected


@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_reduced_gradients_norms_bank_and_knn_do_not_depend_on_the_number_of_ranks(
    run, world_size
):
    expected = load(run(1) / "pieces_0.pt")
    for rank in range(world_size):
        assert_same(load(run(world_size) / f"pieces_{rank}.pt"), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "model", ["resnet", "vit", "micro", "timm", "mocov2", "local", "projected", "levers"]
)  # projected: while the bank is empty, too
@pytest.mark.parametrize("world_size", [2, 4])
def test_five_steps_of_training_do_not_depend_on_the_number_of_ranks(run, world_size, model):
    undivided = {"micro": "vit"}.get(
        model, model
    )  # nor on whether a rank encodes its views in parts
    one, many = (
        load(run(1) / undivided / "checkpoint_last.pth.tar"),
        load(run(world_size) / model / "checkpoint_last.pth.tar"),
    )
    assert one["step"] == many["step"] == 5
    assert_close_states(one, many)
    folders = run(1) / undivided, run(world_size) / model
    lines = [read_lines(folder, CLOCK) for folder in folders]
    for line, expected in zip(*lines, strict=True):
        assert line.pop("encoder", "") == expected.pop("encoder", "")
        undefined = {name for name, value in expected.items() if value is None}
        assert {name for name, value in line.items() if value is None} == undefined
        for name in undefined:  # approx takes no None
            del line[name], expected[name]
        assert line == pytest.approx(expected, rel=1e-5)  # six digits are written


def assert_close_states(one, many):
    for name, tensor in one["state_dict"].items():
        if tensor.is_floating_point():
            # A parameter without a true gradient (a key's bias, a bias before a batch norm) gets
            # rounding errors, which AdamW divides by its eps of 1e-8: hence the absolute part.
            error = (many["state_dict"][name] - tensor).norm()
            assert error < 1e-9 * tensor.norm() + 1e-10, (
                f"{name}: {error:.1e} of {tensor.norm():.1e}"
            )
        else:
            assert torch.equal(many["state_dict"][name], tensor), name


def test_a_frozen_backbone_and_what_follows_do_not_depend_on_the_number_of_ranks(run):
    one, many = (load(run(ranks) / "frozen/checkpoint_last.pth.tar") for ranks in (1, 2))
    assert one["step"] == many["step"] == 7
    assert_close_states(one, many)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_further_term_of_the_loss_is_logged_the_same_on_any_number_of_ranks(run, world_size):
    folders = run(1) / "term", run(world_size) / "term"
    one, many = (read_lines(folder, CLOCK) for folder in folders)
    for line, expected in zip(many, one, strict=True):
        assert line.pop("loss_ratio") is expected.pop("loss_ratio") is None
        assert line == pytest.approx(expected, rel=1e-5) and line["term_size"] > 0
    states = [load(folder / "checkpoint_last.pth.tar")["state_dict"] for folder in folders]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-8, atol=1e-9)
    events = EventAccumulator(str(folders[1] / "tensorboard")).Reload()
    assert {"loss/loss", "loss/term_size", "optim/lr"} <= set(events.Tags()["scalars"])
    assert "loss/loss_ratio" not in events.Tags()["scalars"]
    shown = [event.value for event in events.Scalars("loss/term_size")]
    assert shown == pytest.approx([line["term_size"] for line in many], rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_resumed_run_equals_the_uninterrupted_one(run, world_size):
    whole, parts = (
        load(run(world_size) / name / "checkpoint_last.pth.tar") for name in ("whole", "parts")
    )
    assert whole["step"] == parts["step"] == 10 and whole["epoch"] == 2
    tolerance = dict(rtol=1e-9, atol=1e-9) if world_size == 4 else {}
    for part in ("state_dict", "optimizer"):
        assert_same(parts[part], whole[part], **tolerance)
    lines = [read_lines(run(world_size) / name, CLOCK) for name in ("whole", "parts")]
    assert [line["step"] for line in lines[0]] == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]
    if world_size == 4:
        assert [line["step"] for line in lines[1]] == [line["step"] for line in lines[0]]
    else:
        assert lines[1] == lines[0]
        for name in ("views_0000010.png", "neighbours_0000010.png"):
            pictures = [
                (run(world_size) / workdir / "pictures" / name).read_bytes()
                for workdir in ("whole", "parts")
            ]
            assert pictures[0] == pictures[1]


def read_lines(workdir, drop):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in drop} for line in lines]


def test_the_launcher_starts_several_processes(tmp_path, images):
    environment = os.environ | {"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [
        "bash",
        str(ROOT / "start.sh"),
        str(images),
        *SMALL.split(),
        "--stop-after-steps",
        "2",
        "--eval-freq",
        "0",
    ]
    done = subprocess.run(
        [*command, "--workdir", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 x cpu" in done.stdout and done.stdout.count("step 2/10") == 1  # only rank 0 prints
    assert f"report: {tmp_path}/report.html" in done.stdout and (tmp_path / "report.html").exists()
    assert load(tmp_path / "checkpoint_last.pth.tar")["step"] == 2
    assert json.loads((tmp_path / "args.json").read_text())["world_size"] == 2
