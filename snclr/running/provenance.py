"""What produced a result: versions and git commit."""

import contextlib
import functools
import os
import platform
import subprocess
from importlib import metadata

from .. import __version__
from .safe_files import json_object


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
