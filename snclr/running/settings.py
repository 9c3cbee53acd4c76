"""The settings of a run: saved at its start, compared when it is resumed."""

import os
import shlex
import sys
from argparse import Namespace

from ..choices import NUM_HEADS
from ..options import ON_RESUME
from .provenance import versions_and_commit
from .safe_files import save_json


def save_settings(workdir: str, args: Namespace, more: dict) -> None:
    """Write args.json into workdir: every setting by name, `more`, and the command, versions and
    git commit of this start. Raises RunError.
    """
    os.makedirs(workdir, exist_ok=True)
    command = shlex.join([sys.executable, *sys.argv])
    content = {**vars(args), **more, "command": command, **versions_and_commit()}
    save_json(os.path.join(workdir, "args.json"), content)


def changes(saved: dict, args: Namespace) -> tuple[list[str], list[str]]:
    """Settings that differ from the saved ones, as 'NAME OLD -> NEW': those that must not differ,
    and the others that are worth a line in the log.
    """
    # files of earlier versions have no number of heads: it was always the architecture's own
    saved = {"num_heads": NUM_HEADS.get(args.arch), **saved}
    differing = {
        name: f"{name} {saved[name]!r} -> {now!r}"
        for name, now in vars(args).items()
        if name in saved and differ(saved[name], now)
    }
    kinds = {"fixed": [], "reported": [], "free": []}  # see arguments.flag
    for name, change in differing.items():
        kinds[ON_RESUME.get(name, "reported")].append(change)
    return kinds["fixed"], kinds["reported"]


def differ(saved: object, now: object) -> bool:
    """Whether a saved setting differs. The file may hold any object, so comparison can raise."""
    try:
        return bool(saved != now)
    except Exception:  # as for a tensor of several values
        return True
