"""Kill a run of two ranks at random moments, resume it, and compare it with a run without kills.

    # half an hour on two cores, in runs of --epochs 100 of 5 steps
    python tests/faults/kill.py --kills 100
    # a few kills
    python -m pytest tests/faults/test_kill.py

SIGKILL goes to one rank, to the launcher or to all of them while the run starts, trains, writes or
evaluates. Then start.sh resumes it with `--resume auto`. The script fails unless weights, bank,
optimiser and metrics.jsonl are equal bit for bit in the end.
"""

import collections
import contextlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import attack
from test_ranks import write_images

VICTIMS = ("rank 0", "rank 1", "launcher", "all")
MOMENTS = ("starting", "training", "writing", "evaluating")
PATIENCE = 300  # seconds within which all other processes must end by themselves after a kill


def reached(moment, workdir, begun, process, chance):
    """Whether the run is at the moment to be killed."""
    lines = attack.lines_of(workdir)
    if moment == "starting":
        return time.monotonic() - begun > chance.delay
    if (
        moment == "evaluating"
    ):  # the last step of an epoch is logged and saved, its evaluation is not there yet
        return (
            lines
            and "loss" in lines[-1]
            and lines[-1]["step"] % 5 == 0
            and lines[-1]["step"] > chance.step
        )
    if moment == "writing":
        return any(workdir.glob("*.tmp")) and lines and lines[-1]["step"] > chance.step
    return lines and lines[-1]["step"] > chance.step and time.monotonic() > chance.at


Chance = collections.namedtuple("Chance", "delay step at")


def kill(process, victim):
    """Send SIGKILL to a rank, the launcher or all; seconds until the other processes ended."""
    pids = attack.ranks_of(process)
    if victim == "launcher":
        chosen = [process.pid]
    elif victim == "all":
        chosen = [process.pid, *pids]
    else:
        chosen = [pid for pid in pids if attack.is_rank(pid, int(victim[-1]))]
    for pid in chosen:
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.kill(pid, signal.SIGKILL)
    begun = time.monotonic()
    while any(map(attack.lives, pids)) or process.poll() is None:
        if time.monotonic() - begun > PATIENCE:
            raise SystemExit(f"after {victim} was killed the others still live after {PATIENCE} s")
        time.sleep(0.05)
    return time.monotonic() - begun


def attack_run(images, flags, workdir, kills, generator, report):
    """One run to its end, killed up to `kills` times; the number of kills."""
    done = 0
    while True:
        before = attack.lines_of(workdir)
        log = Path(f"{workdir}.{done}.log")
        process = attack.start(
            images, *flags, "--workdir", workdir, "--resume", "auto", output=log.open("w")
        )
        if done == kills:
            if process.wait(3600) != 0:
                raise SystemExit(log.read_text())
            return done
        victim, moment = generator.choice(VICTIMS), generator.choice(MOMENTS)
        step = before[-1]["step"] if before else 0
        begun = time.monotonic()
        chance = Chance(generator.uniform(0, 8), step + generator.randrange(8), begun + 2)
        while process.poll() is None and not reached(moment, workdir, begun, process, chance):
            time.sleep(0.003)
        if process.poll() is not None:
            if process.returncode != 0:
                raise SystemExit(log.read_text())
            return done
        if victim.startswith("rank") and len(attack.ranks_of(process)) < 2:
            victim = "launcher"
        step = max((line["step"] for line in attack.lines_of(workdir)), default=0)
        seconds = kill(process, victim)
        done += 1
        report.append((victim, moment, step, seconds, log.read_text()))
        print(
            f"kill {len(report)}: {victim} while {moment}, step {step}; "
            f"the others ended after {seconds:.1f} s",
            flush=True,
        )


def repeated(report):
    """Number of steps repeated after each kill, from the "resumed from" line of the next start."""
    starts = [re.search(r"resumed from .* after step (\d+) of", output) for *_, output in report]
    steps = [int(match[1]) if match else None for match in starts]
    known = [
        next((s for s in steps[number + 1 :] if s is not None), None)
        for number in range(len(steps))
    ]
    return [
        max(0, entry[2] - step)
        for entry, step in zip(report, known, strict=True)
        if step is not None
    ]


def main(kills, epochs, seed, folder):
    images = write_images(folder / "images")
    flags = [*attack.FLAGS, "--epochs", str(epochs), "--save-freq", "50"]
    code, output = attack.ended(
        attack.start(images, *flags, "--workdir", folder / "undisturbed"), within=3600
    )
    if code != 0:
        raise SystemExit(output)
    generator, report, runs = random.Random(seed), [], 0
    while len(report) < kills:
        workdir = folder / f"run{runs}"
        attack_run(images, flags, workdir, kills - len(report), generator, report)
        if wrong := attack.differences(folder / "undisturbed", workdir):
            raise SystemExit(
                f"run {runs} of seed {seed} differs from the undisturbed one: {', '.join(wrong)}"
            )
        runs += 1
        print(
            f"run {runs}: {len(report)} kills so far, equal to the undisturbed run bit for bit",
            flush=True,
        )
    for number, kinds in enumerate((VICTIMS, MOMENTS)):
        print(
            ", ".join(
                f"{sum(entry[number] == kind for entry in report)} x {kind}" for kind in kinds
            )
        )
    lost, seconds = repeated(report) or [0], sorted(entry[3] for entry in report)
    print(
        f"{len(report)} kills in {runs} runs of {5 * epochs} steps, "
        "each equal to the undisturbed one bit for bit;"
    )
    print(f"steps to repeat: {sum(lost) / len(lost):.1f} on average, {max(lost)} at most;")
    print(
        f"the other processes ended after {seconds[len(seconds) // 2]:.1f} s (median), "
        f"{seconds[-1]:.1f} s at most;"
    )
    print(f"tracebacks: {sum('Traceback' in entry[4] for entry in report)}")
    return report


if __name__ == "__main__":
    args = attack.numbers(__doc__, {"--kills": 100, "--epochs": 100, "--seed": 0})
    with tempfile.TemporaryDirectory() as temporary:
        main(**vars(args), folder=Path(temporary))
