"""The code for GPUs, run on a pretended one: equal results, and no step makes the host wait."""

import contextlib
import importlib
import json
import shlex
import sys
import warnings
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import test_benchmarks
import torch
from accelerator import DEVICE, Accelerator, Remote, to_host
from PIL import Image
from sample_images import save_folder
from test_ranks import CLOCK, read_lines

import main_lincls
import main_snclr
from benchmarks import measure, step
from snclr import augment, memory_bank, objectives, optim, options, streamed, visualize
from snclr.evaluation import finetune, linear, probe
from snclr.evaluation.options import STATE_FILE
from snclr.running import (
    checkpoint,
    distributed,
    guard,
    process_group,
    step_graph,
    tensor_files,
)
from snclr.running.errors import RunError

RUN = (
    "--arch resnet8 --width 8 --img-size 32 --snclr-dim 16 --snclr-mlp-dim 32 --bank-size 1000 "
    "--topk 3 --epochs 2 -b 12 --optimizer lars --lr 0.1 --workers 0 --print-freq 100 "
    "--eval-freq 0 --viz-freq 0"
)  # 2 steps an epoch
VARIANTS = (
    "--eval-freq 1 --viz-freq 1",
    "--form log_of_sum --optimizer adamw --candidates unique --normalise-positives",
    "--weights projected --threshold --nn-ramp-epochs 1",
    "--weights uniform --detach-weights --nn-warmup-epochs 1 --no-exclude-own-image",
    "--key-view weak --candidates keys --weights key --mix-neighbours",
    "--method mocov3",
    "--method nnclr",
    "--method mocov2",
    "--micro-batch 3",
    "--grad-checkpointing",
    "--arch vit_tiny --patch-size 16",
    # larger than what a CPU augments in batches
    "--arch timm:test_efficientnet --img-size 80 --blur",
)
# flags of runs with --step-graph, and how many graphs they need
GRAPHS = {
    "--epochs 4 --optimizer adamw --nn-warmup-epochs 2 --nn-ramp-epochs 2 --snclr-m-cos": 2,
    "--epochs 4 --method nnclr --lr-scale 0.5 --freeze-backbone-epochs 2 --eval-freq 2": 2,
    "--method mocov2 --optimizer sgd": 1,
    "--arch timm:test_vit --timm-kwargs drop_path_rate=0.5 --key-view weak --candidates unique": 1,
}
NO_OP = "ignore:.*which is a no-op"  # a warning about copies to the meta device
PROBES = (
    ("vit", "--lrs 0.1 1"),
    ("resnet", "--lrs 0.1 1 --cache-features --cache-copies 2 --select val"),
    ("resnet", "--lrs 0.1 --encoder untrained"),
    ("vit", "--encoder momentum --finetune --optimizer adamw --label-fraction 0.7"),
)


@pytest.fixture(scope="module", autouse=True)
def doubles():
    """Use float64, so that the order of sums hardly matters."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 + 6 images in two classes, of different sizes."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 24), ("val", 6)):
        save_folder(root, [(40 + number, 50) for number in range(count)], split)
    return str(root)


@pytest.fixture
def accelerated(monkeypatch):
    """A context in which the programs find an accelerator; torch has no autocast for it, so there
    is none outside either.
    """
    for module in (main_snclr, guard, finetune, linear):
        monkeypatch.setattr(
            module, "autocast", lambda amp, device: torch.autocast("cpu", enabled=False)
        )

    @contextlib.contextmanager
    def block():
        save, is_plain = tensor_files.save, tensor_files.is_plain
        with monkeypatch.context() as patch, Accelerator() as accelerator:
            patch.setattr(process_group, "start", lambda *_: DEVICE)
            patch.setattr(process_group, "own_device", lambda: DEVICE)
            patch.setattr(
                tensor_files, "save", lambda path, state, keep=1: save(path, to_host(state), keep)
            )
            patch.setattr(tensor_files, "is_plain", lambda x: isinstance(x, Remote) or is_plain(x))
            patch.setattr(
                sys.modules["torch.optim.optimizer"],
                "_get_fused_kernels_supported_devices",
                lambda: ["cpu", DEVICE.type],
            )
            for sizes in (streamed.CHUNK_ELEMENTS, memory_bank.COSINES, memory_bank.CHUNK):
                patch.setitem(
                    sizes, DEVICE.type, 2**12
                )  # several blocks, as on a GPU with larger sizes
            yield accelerator

    return block


def watch(monkeypatch, accelerator, begin, ends):
    """What was waited for between each call of one function, and the next call of one of the
    others: lists in a list.
    """
    waited, (module, name) = [], begin
    own = getattr(module, name)

    def begun(*args, **kwargs):
        accelerator.waits.clear()
        waited.append(None)
        return own(*args, **kwargs)

    def ended(function, *args, **kwargs):
        if waited and waited[-1] is None:
            waited[-1] = list(accelerator.waits)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, begun)
    for module, name in ends:
        monkeypatch.setattr(module, name, partial(ended, getattr(module, name)))
    return waited


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.filterwarnings(NO_OP)
@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("flags", VARIANTS)
def test_a_run_is_that_of_a_cpu_and_its_steps_do_not_wait(
    flags, folder, tmp_path, monkeypatch, accelerated
):
    argv = [folder, *RUN.split(), *flags.split(), "--workdir"]
    main_snclr.main([*argv, str(tmp_path / "cpu")])
    with accelerated() as accelerator:
        waited = watch(
            monkeypatch, accelerator, (main_snclr, "train_epoch"), [(main_snclr, "step_metrics")]
        )
        main_snclr.main([*argv, str(tmp_path / "gpu"), "--stop-after-steps", "3"])
        main_snclr.main([*argv, str(tmp_path / "gpu"), "--resume", "auto"])
    assert waited == [[], [], []]
    cpu, gpu = (
        tensor_files.read(str(tmp_path / name / checkpoint.LAST)) for name in ("cpu", "gpu")
    )
    assert gpu["step"] == cpu["step"] == 4
    assert_close(gpu["state_dict"], cpu["state_dict"])
    cpu, gpu = (
        [x for x in read_lines(tmp_path / name, CLOCK) if x["step"] == 4] for name in ("cpu", "gpu")
    )
    for one, other in zip(
        gpu, cpu, strict=True
    ):  # of the last step, and of the evaluation after it if there is one
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == (
                pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            ), name


@pytest.mark.filterwarnings(NO_OP)
@pytest.mark.parametrize("flags, num_graphs", GRAPHS.items())
def test_replayed_steps_are_those_of_a_cpu(
    flags, num_graphs, folder, tmp_path, monkeypatch, accelerated
):
    argv = [folder, *RUN.split(), *flags.split(), "--print-freq", "1", "--workdir"]
    main_snclr.main([*argv, str(tmp_path / "cpu")])
    monkeypatch.setattr(step_graph, "WARM_UP", 1)
    with accelerated():
        monkeypatch.setattr(step_graph, "capture", Mock(side_effect=step_graph.capture))
        main_snclr.main([*argv, str(tmp_path / "gpu"), "--step-graph"])
        assert step_graph.capture.call_count == num_graphs
    cpu, gpu = (
        tensor_files.read(str(tmp_path / name / checkpoint.LAST)) for name in ("cpu", "gpu")
    )
    assert_close(gpu["state_dict"], cpu["state_dict"])
    assert gpu["optimizer"]["param_groups"] == cpu["optimizer"]["param_groups"]
    assert gpu["optimizer"]["state"].keys() == cpu["optimizer"]["state"].keys()
    for number, state in cpu["optimizer"]["state"].items():
        assert_close(gpu["optimizer"]["state"][number], state)
    cpu, gpu = (
        [line["loss"] for line in read_lines(tmp_path / name, CLOCK) if "loss" in line]
        for name in ("cpu", "gpu")
    )
    assert gpu == pytest.approx(cpu, rel=1e-4)


@pytest.mark.filterwarnings(NO_OP)
def test_a_step_that_reads_a_value_runs_without_a_graph(
    folder, tmp_path, monkeypatch, capsys, accelerated
):
    monkeypatch.setattr(step_graph, "WARM_UP", 1)
    step_if_finite = optim.step_if_finite

    def read_and_step(optimizer, scaler, grad_norm):
        assert grad_norm.item() > 0
        step_if_finite(optimizer, scaler, grad_norm)

    monkeypatch.setattr(optim, "step_if_finite", read_and_step)
    states = []
    for number, flags in enumerate([[], ["--step-graph"]]):
        workdir = tmp_path / str(number)
        with accelerated():
            main_snclr.main([folder, *RUN.split(), *flags, "--workdir", str(workdir)])
        states.append(tensor_files.read(str(workdir / checkpoint.LAST))["state_dict"])
    assert_close(*states)
    note = "note: --step-graph has no effect: a step reads a value (_local_scalar_d"
    assert capsys.readouterr().out.count(note) == 1


def read_in_capture(step_if_finite, optimizer, scaler, grad_norm):
    if Accelerator.active.captured is not None:
        grad_norm.item()
    step_if_finite(optimizer, scaler, grad_norm)


def send_in_capture(step_if_finite, optimizer, scaler, grad_norm):
    grad_norm = grad_norm + torch.zeros(1).to(DEVICE, non_blocking=True)[0]
    step_if_finite(optimizer, scaler, grad_norm)


@pytest.mark.filterwarnings(NO_OP)
@pytest.mark.parametrize("step", [read_in_capture, send_in_capture])
def test_a_capture_that_fails_ends_the_run(step, folder, tmp_path, monkeypatch, accelerated):
    monkeypatch.setattr(step_graph, "WARM_UP", 1)
    monkeypatch.setattr(optim, "step_if_finite", partial(step, optim.step_if_finite))
    with accelerated(), pytest.raises(RunError, match=r"captured.* \(.*permitted.*--no-step-graph"):
        main_snclr.main([folder, *RUN.split(), "--step-graph", "--workdir", str(tmp_path)])


def test_where_a_step_waits_is_noted(monkeypatch):
    modes = [2]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[0])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with step_graph.noted_waits() as waits:
        assert modes == [2, "warn"]
        warnings.warn("something else", stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert modes == [2, "warn", 2]
    assert len(waits) == 1 and waits[0].startswith("test_gpu.py, line ")


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--amp fp16", "with fp16"),
        ("--micro-batch 3", "--micro-batch and"),
        ("--grad-checkpointing", "--micro-batch and"),
        ("--mix-neighbours", "--mix-neighbours draws"),
        ("--compile graphs", "--compile graphs makes"),
    ],
)
def test_where_a_step_cannot_be_a_graph(flags, reason, monkeypatch):
    gpu, notes = torch.device("cuda"), []

    def build(flags, amp="bf16", device=gpu):
        return step_graph.build(options.parse(flags), device, amp, None, notes.append)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    flags = flags.split()
    assert build(flags) is None and notes == []
    assert build([*flags, "--step-graph"], device=torch.device("cpu")) is None and notes == []
    assert build([*flags, "--step-graph"], "fp16" if "fp16" in flags else "bf16") is None
    assert len(notes) == 1 and notes[0].startswith(f"note: --step-graph has no effect: {reason}")
    assert build(["--step-graph"]) is not None
    monkeypatch.setattr(step_graph, "world_size", lambda: 2)
    assert build(["--step-graph"]) is None


@pytest.mark.filterwarnings(NO_OP)
@pytest.mark.parametrize(
    "flags", ("--eval-freq 1 --viz-freq 1", "--method nnclr", "--method mocov2")
)
def test_ranks_exchange_what_is_on_the_device_and_do_not_wait(
    flags, folder, tmp_path, monkeypatch, accelerated
):
    exchanged = []

    def recorded(function, *args):
        exchanged.append(args[-1])
        function(*args)

    def all_gather_object(parts, x):
        parts[:] = [x] * len(parts)

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    for name in (
        "barrier",
        "broadcast_object_list",
        "destroy_process_group",
        "new_group",
    ):  # no group: no numbers of the host
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    monkeypatch.setattr(distributed, "replicate", lambda module, device: module)
    with measure.simulated_ranks(2), monkeypatch.context() as patch, accelerated() as accelerator:
        for name in ("all_gather", "all_reduce"):
            patch.setattr(
                torch.distributed, name, partial(recorded, getattr(torch.distributed, name))
            )
        waited = watch(
            monkeypatch, accelerator, (main_snclr, "train_epoch"), [(main_snclr, "step_metrics")]
        )
        main_snclr.main([folder, *RUN.split(), *flags.split(), "--workdir", str(tmp_path / "run")])
    assert waited == [[], []]
    assert len(exchanged) > 20 and all(isinstance(x, Remote) for x in exchanged)


def test_a_bank_in_bfloat16_equals_that_of_a_cpu_and_the_host_does_not_wait(accelerated):
    keys, queries = torch.randn(700, 16), torch.randn(8, 16)

    def found_on(device):
        bank = memory_bank.MemoryBank(1000, 16, products="bfloat16").to(device)
        query, ids = (
            queries.to(device, non_blocking=True).requires_grad_(),
            torch.zeros(8, dtype=torch.long, device=device),
        )
        bank.enqueue(
            keys.to(device, non_blocking=True), torch.ones(700, dtype=torch.long, device=device)
        )
        scores, rows = bank.search(query, 5, ids)
        weights = objectives.positiveness(query, bank.features, rows)
        loss = objectives.snclr_loss(
            query, query.detach(), bank.products, rows, weights, temperature=0.2
        )
        return scores, rows, loss.detach(), *torch.autograd.grad(loss, query)

    cpu = found_on("cpu")
    with accelerated() as accelerator:
        gpu = to_host(found_on(DEVICE))
    assert not [line for line in accelerator.waits if ".py" in line]  # this test moves the bank
    assert torch.equal(gpu[1], cpu[1])
    for one, other in zip(gpu, cpu, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@pytest.fixture(scope="module")
def pretrained(folder, tmp_path_factory):
    """A checkpoint of a ResNet and one of a ViT."""
    out = tmp_path_factory.mktemp("runs")
    for name, flags in {"resnet": "", "vit": "--arch vit_tiny --patch-size 8"}.items():
        main_snclr.main(
            [
                folder,
                *RUN.split(),
                *flags.split(),
                "--stop-after-steps",
                "2",
                "--workdir",
                str(out / name),
            ]
        )
    return {name: str(out / name / checkpoint.LAST) for name in ("resnet", "vit")}


@pytest.mark.parametrize("arch, flags", PROBES)
def test_an_evaluation_is_that_of_a_cpu_and_its_steps_do_not_wait(
    arch, flags, folder, pretrained, tmp_path, monkeypatch, accelerated
):
    argv = [
        folder,
        "--pretrained",
        pretrained[arch],
        *f"--epochs 2 -b 10 --workers 0 {flags} --workdir".split(),
    ]
    main_lincls.main([*argv, str(tmp_path / "cpu")])
    with accelerated() as accelerator:
        ends = [(probe, "accuracies"), (finetune, "evaluate_classifier")]
        waited = watch(monkeypatch, accelerator, (augment, "epoch_order"), ends)
        main_lincls.main([*argv, str(tmp_path / "gpu")])
    assert waited == [[], []]
    cpu, gpu = (tensor_files.read(str(tmp_path / name / STATE_FILE)) for name in ("cpu", "gpu"))
    assert_close(gpu["model"], cpu["model"])
    cpu, gpu = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("cpu", "gpu")
    )
    assert gpu["knn"] == pytest.approx(cpu["knn"])


@pytest.mark.parametrize(
    "arch, flags",
    (("resnet", "--against untrained"), ("vit", "--image {photo} --encoder momentum")),
)
def test_pictures_are_those_of_a_cpu(arch, flags, folder, pretrained, tmp_path, accelerated):
    flags = flags.format(photo=f"{folder}/val/ant/000.png")
    argv = [pretrained[arch], folder, "--workers", "0", *flags.split(), "--out"]
    visualize.main([*argv, str(tmp_path / "cpu")])
    with accelerated():
        visualize.main([*argv, str(tmp_path / "gpu")])
    drawn = {path.name: path for path in (tmp_path / "cpu").iterdir()}
    assert len(drawn) >= 2
    for name, path in drawn.items():
        cpu, gpu = (
            np.asarray(Image.open(file), dtype=float) for file in (path, tmp_path / "gpu" / name)
        )
        assert np.abs(cpu - gpu).mean() < 0.5, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ("objective", "step", "micro_batch", "images", "linear_probe"))
def test_a_benchmark_runs_there(name, folder, tmp_path, monkeypatch, capsys, accelerated):
    module, (flags, expected) = (
        importlib.import_module(f"benchmarks.{name}"),
        test_benchmarks.RUNS[name],
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *shlex.split(flags.format(folder=folder))])
    monkeypatch.setattr(step, "autocast", main_snclr.autocast)
    torch.set_default_dtype(torch.float32)
    try:
        with accelerated():
            module.main()
    finally:
        torch.set_default_dtype(torch.float64)
    output = capsys.readouterr().out
    # there the products with the bank are those of a GPU
    assert all(row.replace("bfloat16", "tf32") in output for row in expected)
