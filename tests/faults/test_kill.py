"""Some of the kills of kill.py."""

import random

import attack
import kill
import pytest


def test_a_killed_run_ends_as_the_undisturbed_one(images, undisturbed, tmp_path):
    report = []
    kills = kill.attack_run(images, attack.FLAGS, tmp_path / "run", 2, random.Random(1), report)
    assert kills == len(report) > 0  # a moment may pass before a busy machine sees it
    assert not any("Traceback" in output for *_, output in report)
    assert attack.differences(undisturbed, tmp_path / "run") == []


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    report = kill.main(kills=100, epochs=100, seed=0, folder=tmp_path)
    assert len(report) == 100 and not any("Traceback" in output for *_, output in report)
