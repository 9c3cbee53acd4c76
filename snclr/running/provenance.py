"""Where a result comes from: versions, git commit, command and settings."""

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
from .safe_files import save_json


@functools.cache  # describes the code that was loaded; the files may change while it runs
def versions_and_commit() -> dict:
    """Versions of python, torch, torchvision, timm, numpy and this package, and the git commit of
    the code, None without git.
    """
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy")}
    versions |= {"python": platform.python_version(), "snclr": __version__}
    folder = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", folder, "describe", "--always", "--dirty"]
    commit = None
    with contextlib.suppress(OSError):  # a container may have no git
        described = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = described.stdout.strip() or None
    return {"versions": versions, "git": commit}


def save_settings(workdir: str, args: Namespace, more: dict) -> None:
    """Write args.json into workdir: every setting by name, `more`, and the command, versions and
    git commit of this start. Raises RunError.
    """
    os.makedirs(workdir, exist_ok=True)
    command = shlex.join([sys.executable, *sys.argv])
    content = {**vars(args), **more, "command": command, **versions_and_commit()}
    save_json(os.path.join(workdir, "args.json"), content)
