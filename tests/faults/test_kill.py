"""A handful of the kills of kill.py."""

import kill


def test_killed_runs_end_as_the_undisturbed_one(tmp_path):
    report = kill.main(kills=3, epochs=4, seed=1, folder=tmp_path)
    assert len(report) == 3 and not any("Traceback" in output for *_, output in report)
