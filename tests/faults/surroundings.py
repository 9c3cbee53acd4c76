"""Programs in a broken environment: each must end in time, with an exit code of the page
on reliability, in at most one line of an error, and touch no file outside its folder.

    python tests/faults/surroundings.py --cases 300     on two cores, about 4 s a case

A case is a program (pretraining, also on a zip file and from other weights, resuming, a probe, a
report, pictures, an export, features of a data set), with one or two things that are odd: files
that are fifos, devices, links, folders, holes or random bytes; limits of memory, descriptors, file
size and shared memory; consoles that vanish; flags at the edge of their types; signals; a folder
that is deleted.
"""

import collections
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(folder) for folder in list(Path(__file__).resolve().parents)[:2]]

import attack
import numpy as np
from conftest import SMALL, jpeg
from forked import Programs, may_mount

LIMIT = 20  # seconds, with the start
CODES = (0, 1, 2, 75, 129, 130, 143, 138)
EDGES = ("9" * 20, "-1", "0", "1e308", "1e-320", "nan", "", "x", "2147483647", "99999", "\udcff")
# fmt: off
NUMBERS = [
    "--bank-size", "--img-size", "--width", "--snclr-dim", "--snclr-mlp-dim", "--topk",
    "--epochs", "--batch-size", "--lr", "--wd", "--snclr-t", "--gamma", "--seed", "--subset",
    "--subset-seed", "--keep", "--print-freq", "--save-freq", "--eval-freq", "--viz-freq",
    "--micro-batch", "--stop-after-steps", "--timeout-minutes", "--crop-min",
    "--save-every-minutes", "--skip-non-finite", "--warmup-epochs", "--nn-warmup-epochs",
    "--patch-size", "--snclr-m", "--num-heads", "--val-fraction", "--val-seed", "--lr-scale",
    "--freeze-backbone-epochs", "--local-views", "--nn-mass", "--nn-ramp-epochs", "--layers",
]
# fmt: on
VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_JOB_ID")


class Case:
    """A program to start, the folder of its run, and a copy of the images to damage."""

    def __init__(self, folder, finished, photographs, random):
        self.random, self.folder = random, folder
        self.run = Path(shutil.copytree(finished, folder / "run", symlinks=True))
        self.data = Path(shutil.copytree(photographs, folder / "data"))
        self.victim = folder / "victim"
        self.victim.write_text("precious")
        self.how, self.more, self.afterwards = {}, [], None
        self.kind = str(random.choice(list(PROGRAMS)))

    def pick(self, choices):
        return choices[self.random.integers(len(choices))]

    def command(self):
        program, flags = PROGRAMS[self.kind](self)
        return [program, *flags]


def train(case):
    shutil.rmtree(case.run)
    return "main_snclr.py", [case.data, *SMALL.split(), "--viz-freq", 1, "--workdir", case.run]


def train_on_zip(case):
    packed = shutil.make_archive(case.folder / "images", "zip", case.data)
    for split in ("train", "val"):
        shutil.rmtree(case.data / split)
    data = shutil.move(packed, case.data / "images.zip")
    encoder = case.data / "encoder.pth.tar"
    (case.run / "encoder_last.pth.tar").rename(encoder)
    shutil.rmtree(case.run)
    flags = [*SMALL.split(), "--init-from", encoder, "--val-fraction", 0.2, "--workdir", case.run]
    return "main_snclr.py", [data, *flags]


def resume(case):
    flags = [*SMALL.split(), "--epochs", 2, "--eval-freq", 2, "--workdir", case.run]
    return "main_snclr.py", [case.data, *flags, "--resume", "auto"]


def probe(case):
    flags = ["--workdir", case.folder / "probe", "--epochs", 1, "-b", 8, "-j", 1]
    encoder = case.run / "encoder_last.pth.tar"
    return "main_lincls.py", [case.data, "--pretrained", encoder, *flags]


def report(case):
    return "snclr.report", [case.run]


def pictures(case):
    flags = ["--count", 2, "--topk", 2, "--out", case.folder / "drawn", "-j", 1]
    return "snclr.visualize", [case.run / "checkpoint_last.pth.tar", case.data, *flags]


def export(case):
    flags = ["--out", case.folder / "exported.pth"]
    return "snclr.export", [case.run / "encoder_last.pth.tar", *flags]


def embed(case):
    flags = ["--out", case.run / "features.npz", "-j", 1]
    return "snclr.embed", [case.run / "encoder_last.pth.tar", case.data, *flags]


FUNCTIONS = (train, train_on_zip, resume, probe, report, pictures, export, embed)
PROGRAMS = {function.__name__: function for function in FUNCTIONS}

# -- faults: each changes the case and returns a description ---------------------------------------


def odd_file(case):
    """Something else in place of a file, or where one will be written."""
    files = [path for root in (case.run, case.data) for path in root.rglob("*") if path.is_file()]
    new = ("report.html", "args.json", "bad_images.txt", "non_finite.json", "pictures")
    new += ("checkpoint_last.pth.tar.tmp", "encoder_last.pth.tar", "main_snclr.lock", "up")
    new += ("features.npz", "features.npz.parts")
    path = case.pick(files) if case.random.random() < 0.7 else case.run / case.pick(new)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = case.pick(("fifo", "zero", "full", "victim", "folder", "nowhere", "loop", "up", "holes"))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "holes":
        with open(path, "wb") as file:
            file.truncate(int(case.pick((1, 10**6, 200 * 2**30))))
    else:
        targets = {"zero": "/dev/zero", "full": "/dev/full", "victim": case.victim, "up": ".."}
        path.symlink_to(targets.get(kind, path.name if kind == "loop" else "nowhere"))
    return f"{kind} at {path.relative_to(case.folder)}"


def odd_bytes(case):
    """A file with a part of random bytes, or cut."""
    files = [path for root in (case.run, case.data) for path in root.rglob("*") if path.is_file()]
    path = case.pick(files)
    content = bytearray(path.read_bytes())
    start = int(case.random.integers(len(content) + 1))
    if case.random.random() < 0.5:
        content[start : start + 50] = case.random.integers(256, size=50, dtype=np.uint8).tobytes()
    else:
        del content[start:]
    path.write_bytes(content)
    return f"bytes of {path.relative_to(case.folder)} from {start}"


def limit(case):
    """A limit of the process."""
    name = case.pick(("NOFILE", "AS", "FSIZE"))
    low, high = {"NOFILE": (8, 64), "AS": (2**26, 4 * 2**30), "FSIZE": (0, 10**5)}[name]
    case.how["limits"] = {name: int(case.random.integers(low, high))}
    return str(case.how["limits"])


def shared_memory(case):
    """A small /dev/shm."""
    if may_mount():
        case.how["shared_memory"] = int(case.random.integers(1, 60)) * 4096
    return f"shared memory {case.how.get('shared_memory')}"


def console(case):
    """A console that is closed, full, or left by its reader."""
    for name in ("stdout", "stderr"):
        if case.random.random() < 0.7:
            case.how[name] = case.pick(("/dev/full", "-"))
    return f"console {case.how}"


def edge(case):
    """A flag at the edge of its type, or a variable."""
    value = str(case.pick(EDGES))
    if case.random.random() < 0.8:
        flag = case.pick(NUMBERS)
        case.more += [flag, value]
        return f"{flag} {value!r}"
    name = case.pick(VARIABLES)
    case.how[name] = value
    return f"{name}={value!r}"


def signalled(case):
    """A signal after a while."""
    number = case.pick((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP))
    case.afterwards = lambda running: running.signal(number)
    return number.name


def deleted(case):
    """The folder of the run is deleted after a while."""
    case.afterwards = lambda running: shutil.rmtree(case.run, ignore_errors=True)
    return "deleted"


ODD = (odd_file, odd_file, odd_bytes, limit, shared_memory, console, edge, edge, signalled, deleted)


def outside(case):
    """What must not change."""
    return case.victim.read_text(), sorted(os.listdir(case.folder))


def run(cases, seed, folder, programs, photographs, finished, first=0, limit=LIMIT):
    """How often each program ended with which code; ends the attack at the first wrong case.

    limit: seconds within which each must end.
    """
    ends, slowest = collections.Counter(), 0.0
    for number in range(first, first + cases):
        random = np.random.default_rng([seed, number])
        place = folder / f"case{number}"
        place.mkdir()
        case = Case(place, finished, photographs, random)
        command = case.command()  # before what is odd: training starts without a folder
        what = [case.pick(ODD)(case) for _ in range(random.integers(1, 3))]
        before = outside(case)
        start = time.monotonic()
        running = programs.start(*command, *case.more, **case.how)
        late = ""
        if case.afterwards is not None:
            time.sleep(random.random() * 4)
            with contextlib.suppress(ProcessLookupError):
                case.afterwards(running)
        try:
            code, output = running.ended(limit)
            code = 128 - code if code < 0 else code  # as a shell reports a signal
        except TimeoutError as error:
            code, output, late = None, str(error), "late"
        seconds = time.monotonic() - start
        slowest = max(slowest, seconds)
        errors = [x for x in output.splitlines() if " error: " in x or " stopped on rank " in x]
        sound = code in CODES and "Traceback" not in output and "Exception ignored" not in output
        sound = sound and len(errors) <= 1 and (code not in (1, 2) or errors or case.how)
        new = set(outside(case)[1]) - set(before[1]) - {"run", "probe", "drawn", "exported.pth"}
        gone = outside(case)[0] != before[0]
        if not sound or new or gone or late:
            told = f"case {number} of seed {seed} ({case.kind}; {'; '.join(what)}): code {code}"
            raise SystemExit(
                f"{told}, {seconds:.1f} s, new {new}, changed {gone}\n{output[-3000:]}"
            )
        ends[case.kind, code] += 1
        shutil.rmtree(place, ignore_errors=True)
        if (number + 1) % 20 == 0:
            print(f"{number + 1 - first} cases, the slowest took {slowest:.1f} s", flush=True)
    return ends, slowest


def prepare(folder, programs):
    """Photographs and a finished run, which each case gets a copy of."""
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for number in range(count):
            path = folder / "photographs" / split / "ab"[number % 2] / f"{number:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(random))
    flags = [folder / "photographs", *SMALL.split(), "--viz-freq", 1, "--workdir", folder / "run"]
    code, output = programs.run("main_snclr.py", *flags)
    assert code == 0, output
    return folder / "photographs", folder / "run"


if __name__ == "__main__":
    args = attack.numbers(__doc__, {"--cases": 300, "--seed": 0, "--first": 0, "--limit": LIMIT})
    with tempfile.TemporaryDirectory() as temporary:
        programs = Programs(Path(temporary) / "programs")
        prepared = prepare(Path(temporary), programs)
        (Path(temporary) / "cases").mkdir()
        ends, slowest = run(
            args.cases,
            args.seed,
            Path(temporary) / "cases",
            programs,
            *prepared,
            args.first,
            args.limit,
        )
        programs.close()
    for kind in PROGRAMS:
        codes = ", ".join(
            f"{count} with code {code}"
            for (name, code), count in sorted(ends.items())
            if name == kind
        )
        print(f"{kind}: {codes}")
    print(f"the slowest took {slowest:.1f} s")
