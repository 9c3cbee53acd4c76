"""Flags and variables at the edge of their types: they work, or are refused in one line."""

import pytest
from conftest import one_line

from snclr import options
from snclr.evaluation import options as evaluation_options
from snclr.running.errors import UsageError

EDGES = (
    "9" * 20,
    "9" * 39,
    "-" + "9" * 20,
    "1e308",
    "-0",
    "0",
    "1e-320",
    "nan",
    "inf",
    "",
    "\N{ARABIC-INDIC DIGIT ONE}",
    "1_0",
)
FREE = "--epochs 4 --batch-size 8 --topk 1 --bank-size 8 --warmup-epochs 0"


def numeric_flags():
    kinds = (int, float, str)
    return [
        action
        for action in options.build_parser()._actions
        if action.type not in (None, *kinds[2:]) and action.nargs is None
    ]


@pytest.mark.parametrize("flag", numeric_flags(), ids=lambda flag: flag.dest)
def test_every_number_is_accepted_with_a_bound_or_refused(flag):
    for text in EDGES:
        try:
            args = options.parse([*FREE.split(), flag.option_strings[0], text])
        except UsageError as error:
            assert "\n" not in str(error)
            continue
        value = getattr(args, flag.dest)
        assert not isinstance(value, int) or abs(value) < 2**63
        if isinstance(value, int) and "seed" not in flag.dest:
            assert value < 2**31, flag.dest


@pytest.mark.parametrize(
    "flag",
    ["--bank-size", "--img-size", "--width", "--snclr-dim", "--snclr-mlp-dim"]
    + ["--subset-seed", "--seed", "--keep"],
)
def test_numbers_beyond_their_bound_name_the_flag(flag):
    with pytest.raises(UsageError, match=f"{flag} must be .*, found 9+"):
        options.parse([flag, "9" * 20])


def test_the_longest_time_limit_works():
    with pytest.raises(UsageError, match="--timeout-minutes must be above 0 and at most 100000"):
        options.parse(["--timeout-minutes", "1e308"])


@pytest.mark.parametrize("parse", [options.parse, evaluation_options.parse])
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("WORLD_SIZE", "abc", "WORLD_SIZE must be 1 or more, found 'abc'"),
        ("WORLD_SIZE", "0", "WORLD_SIZE must be 1 or more, found '0'"),
        ("WORLD_SIZE", "-1", "WORLD_SIZE must be 1 or more"),
        ("WORLD_SIZE", "9" * 29, "WORLD_SIZE must be 1 or more"),
        ("RANK", "x", "RANK must be 0 or more, found 'x'"),
        ("RANK", "5", "RANK must be below WORLD_SIZE, 1, found 5"),
        ("LOCAL_RANK", "", "LOCAL_RANK must be 0 or more"),
        ("LOCAL_WORLD_SIZE", "0", "LOCAL_WORLD_SIZE must be 1 or more"),
    ],
)
def test_numbers_of_the_environment(monkeypatch, parse, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        parse(["--pretrained", __file__] if parse is evaluation_options.parse else [])


@pytest.mark.parametrize("variable", [{"WORLD_SIZE": "abc"}, {"RANK": "x"}, {"WORLD_SIZE": "0"}])
def test_a_program_with_odd_variables_ends_in_one_line(train, variable):
    one_line(train(**variable), 2, *variable)


def test_a_workdir_from_an_unset_variable_is_refused(train):
    one_line(train("--workdir", "", "--resume", "auto"), 2, "--workdir is empty")


def test_what_no_memory_can_hold_is_one_line(train):
    case = train("--bank-size", 2**31 - 1, "--snclr-dim", 4096, limits={"AS": 16 * 2**30})
    one_line(case, 1, "memory", "--bank-size")
