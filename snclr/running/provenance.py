"""What produced a result: versions and git commit."""

import contextlib
import functools
import os
import platform
import subprocess
from importlib import metadata

from .. import __version__


@functools.cache  # the code as it was loaded, as its files may change while it runs
def versions_and_commit() -> dict:
    """Versions of python, torch, torchvision, timm, numpy and this package, and the git commit of
    the code (None without git).
    """
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy")}
    versions |= {"python": platform.python_version(), "snclr": __version__}
    command = ["git", "describe", "--always", "--dirty"]
    commit = None
    with contextlib.suppress(OSError):  # a container may have no git
        described = subprocess.run(
            command, cwd=os.path.dirname(__file__), capture_output=True, text=True, check=False
        )
        commit = described.stdout.strip() or None
    return {"versions": versions, "git": commit}
