"""The settings of a run: saved at its start, compared when it is resumed."""

import os
import shlex
import sys
from argparse import Namespace

from ..choices import NUM_HEADS
from .provenance import versions_and_commit
from .safe_files import save_json


def save_settings(workdir: str, args: Namespace, more: dict) -> None:
    """Write args.json into workdir: every setting by name, `more`, and the command, versions and
    git commit of this start. Raises RunError.
    """
    os.makedirs(workdir, exist_ok=True)
    start = {"command": shlex.join([sys.executable, *sys.argv]), **versions_and_commit()}
    save_json(os.path.join(workdir, "args.json"), {**vars(args), **more, **start})


def changes(saved: dict, args: Namespace, on_resume: dict[str, str]) -> tuple[list[str], list[str]]:
    """Settings that differ from the saved ones, as 'NAME OLD -> NEW': those that must not differ,
    and others to report in the log.

    on_resume: the rule of each setting, see arguments.flag.
    """
    # earlier versions did not save these, and had only the architecture's number of heads, and RGB
    saved = {"num_heads": NUM_HEADS.get(args.arch), "channels": 3, **saved}
    kinds = {"fixed": [], "reported": [], "free": []}
    for name, now in vars(args).items():
        if name in saved and differ(saved[name], now):
            kinds[on_resume.get(name, "reported")].append(f"{name} {saved[name]!r} -> {now!r}")
    return kinds["fixed"], kinds["reported"]


def differ(saved: object, now: object) -> bool:
    """Whether a saved setting differs. A file can contain any object, so comparison can raise."""
    try:
        return bool(saved != now)
    except Exception:  # as for a tensor of several values
        return True
