import json
import math

import numpy as np
import pytest
import torch
from test_ranks import write_images
from test_runs import train as run

from snclr import mean_std
from snclr.augment import Recipe, moco_v3_views
from snclr.datasets import sources
from snclr.evaluation import label_free
from snclr.loader import EpochLoader

CPU = torch.device("cpu")


def oracle_rank(features):
    """exp(-sum p log p) of the singular values' shares, by the eigenvalues of the Gram matrix."""
    values = np.sqrt(np.clip(np.linalg.eigvalsh(features.T @ features), 0, None))
    shares = values / values.sum()
    return math.exp(-sum(p * math.log(p) for p in shares if p > 1e-12))


def test_effective_rank_is_the_entropy_of_the_singular_values():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((40, 7)) * rng.uniform(0.1, 3, 7)
    assert label_free.effective_rank(torch.from_numpy(features)) == pytest.approx(
        oracle_rank(features), rel=1e-9
    )


def test_effective_rank_of_known_matrices():
    assert label_free.effective_rank(torch.eye(6)) == pytest.approx(6)
    assert label_free.effective_rank(torch.ones(6, 4)) == pytest.approx(1, abs=1e-4)
    assert label_free.effective_rank(torch.zeros(6, 4)) == pytest.approx(1)


def oracle_agreement(first, second, k):
    total = 0
    for i in range(len(first)):
        nearest = []
        for features in (first, second):
            cosines = features @ features[i] / np.linalg.norm(features, axis=1)
            others = [j for j in np.argsort(-cosines) if j != i]
            nearest.append(set(others[:k]))
        total += len(nearest[0] & nearest[1]) / k
    return total / len(first)


def test_view_agreement_is_the_overlap_of_the_nearest_others():
    rng = np.random.default_rng(1)
    first = rng.standard_normal((30, 5))
    second = first + 0.5 * rng.standard_normal((30, 5))
    value = label_free.view_agreement(torch.from_numpy(first), torch.from_numpy(second), 4)
    assert (
        value == pytest.approx(oracle_agreement(first, second, 4), abs=1e-9) and 0.2 < value < 0.9
    )
    assert label_free.view_agreement(
        torch.from_numpy(first), torch.from_numpy(3 * first), 4
    ) == pytest.approx(1)
    unrelated = rng.standard_normal((400, 5, 2))
    assert label_free.view_agreement(*torch.from_numpy(unrelated).unbind(2), 4) == pytest.approx(
        4 / 399, abs=0.02
    )


def test_the_sample_is_the_same_each_time_and_part_of_no_epoch(tmp_path):
    images, _, _ = sources.open_data(mean_std.parse([str(write_images(tmp_path))]))
    loader = EpochLoader(images, Recipe(0, moco_v3_views(16, 0.2, False)), 8, CPU, 0)
    first, again = (list(loader.sample(20)) for _ in range(2))
    assert sum(len(batch.ids) for batch in first) == 20
    assert all(
        torch.equal(x, y)
        for a, b in zip(first, again, strict=True)
        for x, y in zip(a.views, b.views, strict=True)
    )
    shown = {image.numpy().tobytes() for batch in loader.epoch(0) for image in batch.views[0]}
    assert not shown & {image.numpy().tobytes() for batch in first for image in batch.views[0]}


def test_a_run_without_labels_logs_only_what_needs_no_labels(tmp_path):
    write_images(tmp_path / "images")
    evaluations, steps = run(tmp_path / "images", tmp_path / "run", "--labels", "none")
    assert not evaluations  # of the kNN
    lines = [
        line
        for line in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
        if "loss" not in line
    ]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert 1 <= line["effective_rank"] <= 16 and 0 <= line["view_agreement"] <= 1
    needs_labels = {"knn_top1", "raw_pixels_knn_top1", "neighbour_purity"}
    assert (
        not any(needs_labels & line.keys() for line in [*lines, *steps])
        and "neighbour_similarity" in steps[-1]
    )
