"""Whole programs in odd surroundings (surroundings.py): a selection."""

import pytest
import surroundings


@pytest.mark.parametrize("cases", [5, pytest.param(300, marks=pytest.mark.slow)])
def test_programs_in_odd_surroundings_end_in_time_in_one_line(programs, tmp_path, cases):
    prepared = surroundings.prepare(tmp_path, programs)
    (tmp_path / "cases").mkdir()
    ends, _ = surroundings.run(cases, 1, tmp_path / "cases", programs, *prepared, limit=300)
    assert sum(ends.values()) == cases
