"""Whether this system and the installed packages can train."""

import os
from importlib import metadata

from .errors import UsageError, first_line


def check_posix() -> None:
    """Raise UsageError on a system that is not POSIX: it lacks the locks and signals in use."""
    if not hasattr(os, "lockf"):
        raise UsageError(
            "this command needs POSIX: Linux, macOS, or WSL on Windows; loading and exporting"
            " weights does not"
        )


def check_packages() -> None:
    """Raise UsageError on a system that is not POSIX, and if torch, torchvision or timm cannot be
    imported, as builds that do not belong together: pip does not see it, since it only compares
    version numbers.
    """
    check_posix()
    try:
        import timm  # noqa: F401
        import torch  # noqa: F401
        import torchvision  # noqa: F401
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        found = {
            name: [package.version for package in metadata.distributions(name=name)]
            for name in ("torch", "torchvision", "timm")
        }
        versions = [f"{name} {(known or ['(missing)'])[0]}" for name, known in found.items()]
        raise UsageError(
            f"{', '.join(versions)} cannot be imported together: {first_line(error)}; install"
            " builds that belong together: pip install --force-reinstall torch torchvision timm"
        ) from error
