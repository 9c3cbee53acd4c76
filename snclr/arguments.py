"""How a command line is read: recipes, flags and bounded numbers. Imports nothing slow."""

import argparse
import ast
import glob
import math
import os
import re
import shlex
from collections.abc import Callable
from itertools import takewhile

from .running.errors import UsageError, close_names
from .running.safe_files import read_text

# the folder that holds configs/: in an installation the package, in the repository the one above
ROOT = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(ROOT, "configs")):
    ROOT = os.path.dirname(ROOT)


class _Parser(argparse.ArgumentParser):
    """Reads @FILE recipes: flags as on a command line, any number a line; # starts a comment.

    Every error becomes a UsageError.
    """

    def error(self, message):
        # "argument -b/--batch-size: must be" -> "--batch-size must be"
        message = re.sub(r"^argument (?:-\w/)?(--[\w-]+): must be", r"\1 must be", message)
        if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            message += close_names(unknown[1], [*self._option_string_actions], 0.75)
        raise UsageError(f"{message} (--help lists all flags)")

    def parse_args(self, args=None, namespace=None):
        check_environment()
        # intermixed: otherwise argparse refuses FILE --flag DATA
        return super().parse_intermixed_args(self._data_first(read_recipes(args, [])), namespace)

    def _data_first(self, words):
        """Move the words after a list of numbers, such as DATA in --std 0.2 0.2 0.2 DATA, to the
        beginning. argparse would take them as more numbers.
        """
        lists = {
            name
            for action in self._actions
            if action.nargs == "+" and action.type not in (None, key_value)
            for name in action.option_strings
        }
        for start in [i for i, word in enumerate(words) if word in lists]:
            numbers = [*takewhile(_is_number, words[start + 1 :])]
            end = start + 1 + len(numbers)
            others = [*takewhile(lambda word: not word.startswith("-"), words[end:])]
            if numbers:  # later lists keep their place
                words = others + words[:end] + words[end + len(others) :]
        return words


def read_recipes(words: list[str], opened: list[str]) -> list[str]:
    """Replace each @FILE of a command line by the flags in that recipe. Raises UsageError.

    A recipe that is not in the current folder is looked for among those of this project. opened:
    the recipes read so far. Their number is limited, since a recipe can name itself.
    """
    flags = []
    for word in words:
        if not word.startswith("@"):
            flags.append(word)
            continue
        path = word[1:]
        own = os.path.join(ROOT, path)
        if not os.path.exists(path) and os.path.isfile(own):
            path = own  # a recipe of this project
        opened.append(path)
        if len(opened) > 100:
            raise UsageError(f"recipe {path} cannot be read: more than 100 recipes name each other")
        if not os.path.lexists(path):
            names = glob.glob("configs/**/*.args", root_dir=ROOT, recursive=True)
            raise UsageError(f"there is no recipe {path!r}{close_names(path, names, 0.75)}")
        try:
            lines = read_text(path, limit=2**20).splitlines()
            inner = [part for line in lines for part in shlex.split(line, comments=True)]
        except ValueError as error:  # an open quote; a UsageError is a ValueError, too
            raise UsageError(f"recipe {path} cannot be read: {error}") from error
        flags += read_recipes(inner, opened)
    return flags


def check_environment() -> None:
    """Raise UsageError for numbers of ranks in the environment that no launcher sets."""
    for name, least in (("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        text = os.environ.get(name, str(least))
        if not re.fullmatch("[0-9]{1,7}", text) or int(text) < least:
            raise UsageError(f"the environment's {name} must be {least} or more, found {text!r}")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank >= world_size:
        raise UsageError(
            f"the environment's RANK must be below WORLD_SIZE, {world_size}, found {rank}"
        )


class _Help(argparse.HelpFormatter):
    """Shows the default of each flag that has one."""

    def _get_help_string(self, action):
        default = action.default
        if default in (None, [], argparse.SUPPRESS):
            return action.help
        if isinstance(default, bool):
            default = "on" if default else "off"
        elif isinstance(default, list):
            default = " ".join(map(str, default))
        return f"{action.help} (default: {default})"


def new_parser(usage: str, description: str) -> argparse.ArgumentParser:
    """A parser that reads @FILE recipes and turns every error into a UsageError."""
    return _Parser(
        usage=usage,
        description=description,
        epilog="@FILE reads flags from a recipe of configs/; flags after it override it.",
        formatter_class=_Help,
        allow_abbrev=False,
    )


def flag(
    group: argparse._ArgumentGroup,
    *names: str,
    on_resume: str = "reported",
    describes_encoder: bool = False,
    changes_features: bool = True,
    **arguments,
) -> None:
    """Add a flag to a group. arguments: those of argparse's add_argument.

    on_resume says whether a resumed run may have another value than its checkpoint. 'fixed': no,
    since the flag decides which images the run sees, or shapes or meaning of its state. 'reported':
    yes, and the log names the change. 'free': yes, since it does not change any result.

    describes_encoder: whether an encoder is built and used by this setting, so that a file of
    weights holds it. changes_features: whether the features that an evaluation caches depend on it.
    """
    if on_resume not in ("fixed", "reported", "free"):
        raise ValueError(f"on_resume must be fixed, reported or free, found {on_resume!r}")
    action = group.add_argument(*names, **arguments)
    action.on_resume, action.describes_encoder = on_resume, describes_encoder
    action.changes_features = changes_features


def flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The flags of a parser, with the facts that `flag` got as attributes; without --help."""
    return [action for action in parser._actions if hasattr(action, "on_resume")]


def number(kind: type, *, above_zero: bool = False, most: float = math.inf) -> Callable:
    """An argparse type: a finite int or float of at least 0 (or above 0) and at most `most`.

    An int must fit into 32 bits as well.
    """
    rule = "above 0" if above_zero else "0 or more"
    if most < math.inf:
        rule = f"above 0 and at most {most}" if above_zero else f"between 0 and {most}"

    def convert(text):
        value = kind(text)
        if not (math.isfinite(value) and 0 <= value <= most) or (above_zero and value == 0):
            raise argparse.ArgumentTypeError(f"must be {rule}, found {text}")
        if kind is int and value >= 2**31:
            raise argparse.ArgumentTypeError(f"must be below 2^31, found {text}")
        return value

    convert.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return convert


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def seed(text: str) -> int:
    """An argparse type: a random seed, which must fit into 64 bits."""
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be a number of 64 bits, found {text}")
    return value


def key_value(text: str) -> list:
    """An argparse type: 'key=value' as [key, value]. A Python literal is read as such."""
    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, found {text!r}")
    try:
        return [key, ast.literal_eval(value)]
    except (ValueError, SyntaxError):
        return [key, value]
