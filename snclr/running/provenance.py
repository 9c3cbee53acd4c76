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


@functools.cache  # of the code that was loaded, which may change on the disk while it runs
def versions_and_commit() -> dict:
    """Where a result comes from: versions of python, torch, torchvision, timm and this package, and the git commit or None."""
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy")}
    versions |= {"python": platform.python_version(), "snclr": __version__}
    command = [
        "git",
        "-C",
        os.path.dirname(os.path.abspath(__file__)),
        "describe",
        "--always",
        "--dirty",
    ]
    git = None
    with contextlib.suppress(OSError):  # a container may have no git
        git = (
            subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
            or None
        )
    return {"versions": versions, "git": git}


def save_settings(workdir: str, args: Namespace, more: dict) -> None:
    """Leave args.json in workdir: every setting by its name, and the command, versions and git commit of this start."""
    os.makedirs(workdir, exist_ok=True)
    command = shlex.join([sys.executable, *sys.argv])
    save_json(
        os.path.join(workdir, "args.json"),
        {**vars(args), **more, "command": command, **versions_and_commit()},
    )
