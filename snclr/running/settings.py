"""What a run was started with: its settings, which are compared when it is resumed, the versions of
its packages and the git commit of the code.
"""

import contextlib
import functools
import os
import platform
import shlex
import subprocess
import sys
from argparse import Namespace
from importlib import metadata

from .. import __version__
from ..choices import NUM_HEADS
from .safe_files import json_object, read_json, save_json


def save_settings(workdir: str, args: Namespace, more: dict) -> None:
    """Write args.json into workdir: every setting by name, `more`, and the command, versions and
    git commit of this start. Raises RunError.
    """
    start = {"command": command(), **versions_and_commit()}
    save_json(os.path.join(workdir, "args.json"), {**vars(args), **more, **start})


def saved_settings(workdir: str) -> dict:
    """What save_settings wrote into workdir; {} if there is no such file."""
    return read_json(os.path.join(workdir, "args.json"))


def command() -> str:
    """The command line of this process."""
    return shlex.join([sys.executable, *sys.argv])


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


@functools.cache  # the code as it was loaded, as its files may change while it runs
def versions_and_commit() -> dict:
    """Versions of python, torch, torchvision, timm, numpy and this package, and the git commit of
    the code (None if it is not known).
    """
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy")}
    versions |= {"python": platform.python_version(), "snclr": __version__}
    return {"versions": versions, "git": _commit()}


def _commit():
    """The commit of the repository that holds this file, or from which pip installed it."""
    with contextlib.suppress(OSError):  # a container may have no git
        # an installation can be in a folder of another repository, which does not track it
        if _git("ls-files", __file__):
            return _git("describe", "--always", "--dirty") or None
    with contextlib.suppress(metadata.PackageNotFoundError):
        origin = metadata.distribution("snclr").read_text("direct_url.json") or ""
        return json_object(origin).get("vcs_info", {}).get("commit_id")
    return None


def _git(*words):
    command, folder = ["git", *words], os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip()
