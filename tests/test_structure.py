"""How the files of the package depend on each other: a file imports only files below it."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("datasets", "evaluation", "pictures", "running", "weights")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.glob("snclr/**/*.py"))
}
# the ground floor, which every file may import: errors, safe files, ranks, number formats, devices
GROUND = {
    f"snclr.running.{name}"
    for name in (
        "errors",
        "console",
        "safe_files",
        "distributed",
        "precision",
        "devices",
    )
}
# python -m snclr.NAME, and what the package itself offers: like the scripts, nothing imports them
COMMANDS = {
    f"snclr.{name}" for name in ("embed", "export", "mean_std", "report", "sweep", "visualize")
}
TOP = {"main_snclr", "main_lincls", "snclr.__init__"} | COMMANDS
# The longest chain of imports down to the ground floor, which is not counted. The model needs 4:
# builder, backbones, heads, batch_norm.
LONGEST_CHAIN = 4
# lines of a file; longer are lists of flags, models and layouts, and what is best read as a whole
LONGEST_FILE = 250
LONGER = {
    "snclr.augment": 260,
    "snclr.backbones": 395,
    "snclr.builder": 410,
    "snclr.datasets.images": 291,
    "snclr.datasets.sources": 280,
    "snclr.evaluation.options": 360,
    "snclr.objectives": 305,
    "snclr.operations": 280,
    "snclr.options": 619,
    "snclr.running.checkpoint": 275,
    "snclr.shared_options": 426,
    "snclr.weights.libraries": 315,
    "snclr.weights.load": 260,
}


@cache
def imports_of(name: str) -> frozenset[str]:
    """The files of the project that a file imports, at its top or inside a function."""
    package, names = name.split(".")[:-1], set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            # either a file (from .running import checkpoint) or a name in one
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(names & (FILES.keys() | TOP))


def chain(name: str, above: tuple = ()) -> tuple:
    """The longest chain of imports that begins with a file, without the ground floor."""
    assert name not in above, f"a circle of imports: {' -> '.join([*above, name])}"
    chains = [chain(other, (*above, name)) for other in imports_of(name) - GROUND]
    return (name, *max(chains, key=len, default=()))


def test_the_graph_has_edges():
    assert "snclr.running.safe_files" in imports_of("snclr.running.tensor_files")
    assert "snclr.heads" in imports_of("snclr.backbones")
    assert "snclr.weights.reading" not in imports_of("snclr.backbones")


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down_in_short_chains(name):
    longest = chain(name)
    assert name in TOP or len(longest) <= LONGEST_CHAIN, " -> ".join(longest)
    assert imports_of(name) & TOP == set()
    if name in GROUND:
        assert imports_of(name) <= GROUND


def test_commands_are_those_files_that_run():
    runs = {name for name, path in FILES.items() if '__name__ == "__main__"' in path.read_text()}
    assert runs - COMMANDS == {name for name in runs if name.endswith("options")}  # they only check
    assert runs >= COMMANDS


def test_rooms_are_the_folders():
    assert {name.split(".")[1] for name in FILES if name.count(".") > 1} == set(ROOMS)


@pytest.mark.parametrize("name", FILES)
def test_files_are_short(name):
    lines = len(FILES[name].read_text().splitlines())
    assert lines <= LONGER.get(name, LONGEST_FILE)
