#!/usr/bin/env python3
"""Adds one part of gpu.sh to its report: prints it as Markdown, and appends it to gpu.md and
gpu.json.

    python benchmarks/gpu_report.py OUT NAME STATUS SECONDS COMMAND

OUT/NAME.txt and NAME.err hold what the command printed.
"""

import json
import sys
from pathlib import Path


def tables(text: str) -> list[list[dict[str, str]]]:
    """The Markdown tables in a text: for each the rows, by the heads of their columns."""
    found, lines = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("| "):
            lines.append([cell.strip() for cell in line.strip()[1:-1].split("|")])
        elif lines:
            head, _, *rows = lines
            found.append([dict(zip(head, row, strict=False)) for row in rows])
            lines = []
    return found


def main(out: str, name: str, status: str, seconds: str, command: str) -> None:
    text, errors = (
        Path(out, f"{name}.{kind}").read_text(errors="replace") for kind in ("txt", "err")
    )
    late = "stopped by its time limit"
    outcome = {"0": "", "124": late, "137": late}.get(status, f"exit status {status}")
    lines = [f"## {name} ({seconds} s)", "", f"`{command}`", "", text.strip(), ""]
    if outcome:
        lines += [f"**{outcome}**", "", "```", *errors.strip().splitlines()[-8:], "```", ""]
    with open(Path(out, "gpu.md"), "a") as file:
        print(*lines, sep="\n", file=file)
    print(*lines, sep="\n", flush=True)
    path = Path(out, "gpu.json")
    report = json.loads(path.read_text()) if path.exists() else {}
    report[name] = {
        "command": command,
        "status": int(status),
        "seconds": int(seconds),
        "tables": tables(text),
        "output": text,
        "errors": errors[-4000:],
    }
    path.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
