"""The operations that a step asks a GPU for stay few (benchmarks/launches.py)."""

import argparse
from collections import Counter

import pytest
import torch

from benchmarks import launches

BOUNDS = {"ResNet-18": 1222, "ViT-S/16": 1525}  # with torch 2.6; 1220 and 1522 with 2.14


@pytest.mark.parametrize("recipe", BOUNDS)
def test_a_step_needs_few_operations(recipe):
    flags = next(flags for title, flags in launches.RECIPES.items() if recipe in title)
    counts = launches.count(flags)
    parts = {part: 0 for part in launches.PARTS}
    for (part, _), number in counts.items():
        parts[part] = parts.get(part, 0) + number
    assert all(parts.values()), parts
    assert parts["momentum average"] == 1
    assert parts["gradient norm and optimiser"] <= 15
    assert parts["objective and bank"] <= 217
    assert sum(parts.values()) - parts[launches.LOG_LINE] <= BOUNDS[recipe], parts


def test_a_replayed_step_leaves_the_host_only_what_is_around_it():
    parts = Counter()
    for (part, _), number in launches.count(launches.RECIPES[launches.IN_GRAPH]).items():
        parts[part] += number
    views = {"crops, if images are in memory", "augmentation"}
    assert parts.keys() == views | {launches.LOG_LINE, "rest"} and parts["rest"] <= 8


def test_views_and_allocations_are_no_operations():
    aten = torch.ops.aten
    assert not any(map(launches.launches, (aten.view.default, aten.empty.memory_format)))
    assert not launches.launches(aten.split.Tensor)
    assert all(map(launches.launches, (aten.add.Tensor, aten.add_.Tensor, aten._to_copy.default)))


def test_the_objective_reads_and_writes_less_than_the_dense_one():
    sizes = argparse.Namespace(batch=32, ranks=32, topk=30, bank=32_000, dim=64)
    (_, _, dense), (_, operations, ours) = launches.count_objective(sizes)
    assert operations <= 300 and float(ours) < 0.5 * float(dense)
