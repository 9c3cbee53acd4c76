"""The settings of a run: saved at its start, compared when it is resumed."""

import os
import shlex
import sys
from argparse import Namespace

from ..options import NUM_HEADS
from .provenance import versions_and_commit
from .safe_files import save_json

# Settings of a run, in three kinds. Those in FIXED decide which images it sees and what its state
# means: a resumed run must not change them. Those in RUNNING say where and how it runs: changes are
# not reported. Changes of all others (a longer schedule, another temperature) are.
FIXED = tuple(
    """
    arch method optimizer batch_size seed dataset img_size crop_min blur small_stem timm_kwargs
    num_heads subset subset_seed
    """.split()
)
RUNNING = frozenset(
    """
    data val labels val_labels download workers workdir resume stop_after_epochs
    stop_after_steps save_freq save_every_minutes keep print_freq eval_freq eval_encoder
    viz_freq compile grad_checkpointing on_bad_image skip_non_finite timeout_minutes
    """.split()
)


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
    refused = [change for name, change in differing.items() if name in FIXED]
    return refused, [change for name, change in differing.items() if name not in RUNNING]


def differ(saved: object, now: object) -> bool:
    """Whether a saved setting differs. The file may hold any object, so comparison can raise."""
    try:
        return bool(saved != now)
    except Exception:  # as for a tensor of several values
        return True
