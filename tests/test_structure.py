"""How the files of the package depend on each other: a file imports only files below it."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.glob("snclr/**/*.py"))
}
ROOMS = ("datasets", "evaluation", "pictures", "running", "weights")
# commands: python -m snclr.NAME
COMMANDS = {
    name
    for name, path in FILES.items()
    if '__name__ == "__main__"' in path.read_text() and not name.endswith("options")
}
SCRIPTS = {"main_snclr", "main_lincls"} | COMMANDS


@cache
def imports_of(name: str) -> frozenset[str]:
    """The files of the project that a file imports, at its top or inside a function."""
    path, found = FILES[name], set()
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            # from .running import checkpoint: a file of its own; from .errors import RunError: a name in it
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return frozenset(found & (FILES.keys() | SCRIPTS) - {name})


def longest_chain(name: str, above: tuple = ()) -> tuple:
    assert name not in above, f"a cycle of imports: {' -> '.join([*above, name])}"
    chains = [longest_chain(other, (*above, name)) for other in imports_of(name)]
    return (name, *max(chains, key=len, default=()))


if __name__ == "__main__":
    for name in FILES:
        chain = longest_chain(name)
        print(
            len(chain),
            " <- ".join(c.removeprefix("snclr.") for c in chain),
            "COMMAND" if name in COMMANDS else "",
        )
