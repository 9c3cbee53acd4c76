"""Whether this system and the installed packages can train."""

from importlib import metadata

from .errors import UsageError, first_line


def check_posix() -> None:
    """Raise UsageError on a system that is not POSIX: it lacks the locks and signals in use."""
    try:
        import fcntl  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(
            "this command needs POSIX: Linux, macOS, or WSL on Windows; loading and exporting"
            " weights does not"
        ) from error


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
        versions = []
        for name in ("torch", "torchvision", "timm"):
            try:
                versions.append(f"{name} {metadata.version(name)}")
            except metadata.PackageNotFoundError:
                versions.append(f"{name} (missing)")
        raise UsageError(
            f"{', '.join(versions)} cannot be imported together: {first_line(error)}; install"
            " builds that belong together: pip install --force-reinstall torch torchvision timm"
        ) from error
