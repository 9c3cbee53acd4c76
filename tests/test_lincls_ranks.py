"""Evaluation on two ranks has the results of one; all runs share one start of the two ranks."""

import json

import numpy as np
import pytest
import torch
from test_embed import small_parts, write  # noqa: F401 - a fixture
from test_finetune import TUNE, state, tune
from test_linear import PROBE, comparable, probe
from test_ranks import start_ranks

ARCHS = ("resnet8", "vit_tiny")
PROBES = {"fresh": [], "cached": ["--cache-features"]}
UNTRAINED = "--encoder untrained --epochs 1 -b 8 -j 0 --lrs 0.1 --amp off"


@pytest.fixture(scope="module")
def two_ranks(images, pretrain, tmp_path_factory):
    """The folder with the results of each run, under the names of architecture and run."""
    out, jobs = tmp_path_factory.mktemp("two_ranks"), []
    for arch in ARCHS:
        command = f"main_lincls:float64:{images} --pretrained {pretrain(arch)}"
        for name, flags in PROBES.items():
            jobs.append(f"{command} {PROBE} --workdir {out}/{arch}/{name} {' '.join(flags)}")
        jobs.append(f"{command} {TUNE} --workdir {out}/{arch}/tuned")
    command = f"main_lincls:float64:{images} --pretrained {pretrain('resnet8')}"
    jobs.append(f"{command} {UNTRAINED} --workdir {out}/untrained")
    jobs.append(f"embed:{pretrain(ARCHS[0])} {images} --out {out}/embedded.npz --workers 1")
    start_ranks(2, out, jobs)
    return out


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_probe(images, pretrain, two_ranks, tmp_path, float64, arch, name):
    one = probe(images, pretrain(arch), tmp_path, *PROBES[name])
    two = json.loads((two_ranks / arch / name / "results.json").read_text())
    assert comparable(two) == comparable(one)
    actual = state(two_ranks / arch / name)
    for key, tensor in state(tmp_path).items():
        torch.testing.assert_close(actual[key], tensor, rtol=1e-9, atol=1e-9)


def test_an_untrained_encoder_has_the_batch_statistics_of_all_ranks(
    images, pretrain, two_ranks, tmp_path, float64
):
    probe(images, pretrain("resnet8"), tmp_path, *UNTRAINED.split())
    actual = state(two_ranks / "untrained")
    for name, tensor in state(tmp_path).items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("arch", ARCHS)
def test_fine_tuning(images, pretrain, two_ranks, tmp_path, float64, arch):
    tune(images, pretrain(arch), tmp_path)
    actual = state(two_ranks / arch / "tuned")
    for name, tensor in state(tmp_path).items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float64
            assert (actual[name] - tensor).norm() < 1e-8 * tensor.norm() + 1e-8, name


def test_features_in_a_file(images, pretrain, two_ranks, tmp_path, small_parts):  # noqa: F811
    one, two = write(pretrain(ARCHS[0]), images, tmp_path / "x.npz"), two_ranks / "embedded.npz"
    with np.load(two) as two:
        assert sorted(one) == sorted(two)
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
    assert not (two_ranks / "embedded.npz.parts").exists()
