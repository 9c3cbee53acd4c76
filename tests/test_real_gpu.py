"""On a real GPU: results are those of a CPU, and no step makes the host wait.

`bash benchmarks/gpu.sh` runs these tests. Without a GPU they are skipped.
"""

import argparse
import json

import numpy as np
import pytest
import torch
from sample_images import save_folder
from test_memory_bank import crowded
from torch.nn.functional import cosine_similarity, normalize

import main_snclr
from snclr import augment, operations, options
from snclr.datasets import sources
from snclr.loader import EpochLoader
from snclr.memory_bank import MemoryBank
from snclr.objectives import positiveness, snclr_loss
from snclr.running import checkpoint, process_group, step_graph, tensor_files
from snclr.running.devices import bank_products

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
RUN = (
    "--arch resnet8 --width 8 --img-size 32 --snclr-dim 16 --snclr-mlp-dim 32 --bank-size 1000 "
    "--topk 3 --epochs 2 -b 12 --optimizer lars --lr 0.1 --workers 2 --print-freq 1 "
    "--eval-freq 0 --viz-freq 0 --amp off --no-compile"
)  # 2 steps an epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 images of different sizes."""
    root = tmp_path_factory.mktemp("images")
    save_folder(root, [(40 + number, 50) for number in range(24)], "train")
    return str(root)


def train(folder, workdir, *flags):
    """The state after a run of main_snclr.py, and the losses of its log."""
    main_snclr.main([folder, *RUN.split(), *flags, "--workdir", str(workdir)])
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    state = tensor_files.read(str(workdir / checkpoint.LAST))["state_dict"]
    return state, [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("method", ["snclr", "mocov3", "nnclr", "mocov2"])
def test_a_resumed_run_is_that_of_a_cpu(method, folder, tmp_path, monkeypatch, float64):
    flags = ["--method", method]
    with monkeypatch.context() as patch:
        patch.setattr(process_group, "own_device", lambda: CPU)
        expected, _ = train(folder, tmp_path / "cpu", *flags)
    train(folder, tmp_path / "gpu", *flags, "--stop-after-steps", "3")
    actual, _ = train(folder, tmp_path / "gpu", *flags, "--resume", "auto")
    for name, tensor in expected.items():
        # absolute: some running means are 0 but for rounding
        torch.testing.assert_close(actual[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_objective_and_bank_are_those_of_float64_on_a_cpu(amp):
    generator = torch.Generator().manual_seed(0)
    centres = normalize(torch.randn(64, 256, generator=generator), dim=1)
    features, keys, queries = (crowded(generator, count, centres) for count in (32_000, 64, 64))
    bank = MemoryBank(32_000, 256, bank_products(amp, GPU)).to(GPU)
    bank.enqueue(features.to(GPU), torch.arange(32_000, device=GPU))
    _, rows = bank.search(keys.to(GPU), 30)
    true_rows = (keys.double() @ features.double().T).topk(30).indices
    pairs = zip(rows.cpu(), true_rows, strict=True)
    assert torch.stack([torch.isin(*pair) for pair in pairs]).double().mean() >= 0.999
    results = []
    for device, dtype in ((GPU, torch.float32), (CPU, torch.float64)):
        query = queries.to(device, dtype).requires_grad_()
        key, all_rows = keys.to(device, dtype), rows.to(device)
        products = bank.products if device == GPU else features.to(dtype)
        weights = positiveness(query, products, all_rows)
        loss = snclr_loss(query, key, products, all_rows, weights, temperature=0.2, tf32=bank.tf32)
        results.append((loss.item(), torch.autograd.grad(loss, query)[0].cpu().double()))
    (loss, gradient), (exact, exact_gradient) = results
    assert loss == pytest.approx(exact, rel=1e-5)
    assert cosine_similarity(gradient, exact_gradient).min() > 0.99999


@pytest.mark.parametrize(
    "flags",
    [
        "--nn-warmup-epochs 2",
        "--method nnclr --amp bf16",
        "--method mocov3 --amp bf16",
        "--method mocov2",
    ],
)
def test_replayed_steps_train_as_eager_ones(flags, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(step_graph, "WARM_UP", 2)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # to compare bit for bit
    flags = ["--epochs", "4", "--optimizer", "adamw", "--lr", "1e-3", *flags.split()]
    _, expected = train(folder, tmp_path / "eager", *flags)
    whole, actual = train(folder, tmp_path / "whole", *flags, "--step-graph")
    assert actual == pytest.approx(expected, rel=1e-3)
    train(folder, tmp_path / "parts", *flags, "--step-graph", "--stop-after-steps", "3")
    parts, _ = train(folder, tmp_path / "parts", *flags, "--step-graph", "--resume", "auto")
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("fused", [False, True])
def test_augmentation_is_that_of_a_cpu(size, fused):
    views = augment.moco_v3_views(size, 0.2, blur=True)
    recipe = augment.Recipe(0, (views[0]._replace(gray_p=0.5, solarize_p=0.5, blur_p=0.5),))
    sides = np.full(64, size)
    _, parameters = augment.draw(recipe, 0, np.arange(64), 0, sides, sides)
    crops = torch.randint(256, (64, 3, size, size), dtype=torch.uint8)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    apply = main_snclr.choose_augmentation(argparse.Namespace(fused_augment=fused, channels=3), GPU)
    actual = apply(crops.to(GPU), parameters, mean, std).cpu()
    expected = operations.apply(crops, parameters, mean, std)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("flags", [[], ["--fused-augment"]])
def test_batches_arrive_whole_while_the_gpu_is_busy(flags, folder):
    args = options.parse([folder, *RUN.split(), *flags])
    images, recipe = sources.open_data(args)[0], augment.Recipe(0, augment.build_views(args))
    seen = []
    for device in (GPU, CPU):
        augment_crops, batches = main_snclr.choose_augmentation(args, device), []
        loader = EpochLoader(images.to(device), recipe, 8, device, 2, augment_crops)
        for epoch in range(8):
            for batch in loader.epoch(epoch):
                if device == GPU:
                    torch.cuda._sleep(10**7)  # cycles, some milliseconds
                batches.append([batch.ids.clone(), *(view.clone() for view in batch.views)])
        seen.append(batches)
    assert len(seen[0]) == len(seen[1]) == 24
    for gpu, cpu in zip(*seen, strict=True):
        for one, other in zip(gpu, cpu, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("flags", ["", "--method nnclr", "--method mocov2", "--micro-batch 3"])
def test_no_step_makes_the_host_wait(flags, folder, tmp_path, monkeypatch):
    def in_mode(mode, function):
        def wrapped(*args, **kwargs):
            torch.cuda.set_sync_debug_mode(mode)
            return function(*args, **kwargs)

        return wrapped

    # an error from the first batch of an epoch to its log line, after its last step
    monkeypatch.setattr(main_snclr, "train_epoch", in_mode("error", main_snclr.train_epoch))
    monkeypatch.setattr(main_snclr, "step_metrics", in_mode("default", main_snclr.step_metrics))
    try:
        train(folder, tmp_path, *flags.split(), "--print-freq", "100")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_in_bfloat16_resumes_bit_for_bit(folder, tmp_path):
    flags = ["--amp", "bf16", "--optimizer", "adamw", "--lr", "1e-3"]
    expected, _ = train(folder, tmp_path / "whole", *flags)
    train(folder, tmp_path / "parts", *flags, "--stop-after-steps", "3")
    actual, _ = train(folder, tmp_path / "parts", *flags, "--resume", "auto")
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("flags", ["", "--method mocov2 --micro-batch 6"])
def test_compiled_backbones_in_graphs_train_as_eager_ones(flags, folder, tmp_path):
    _, expected = train(folder, tmp_path / "eager", *flags.split())
    _, actual = train(folder, tmp_path / "compiled", *flags.split(), "--compile", "graphs")
    assert actual == pytest.approx(expected, rel=1e-3)


def test_the_host_does_not_wait_for_replayed_steps(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_graph, "WARM_UP", 1)
    test_no_step_makes_the_host_wait("--epochs 3 --step-graph", folder, tmp_path, monkeypatch)
    assert "--step-graph has no effect" not in capsys.readouterr().out
