"""Feed mutated files and command lines to the code that reads them.

Each must work, or end with one clear line, within 20 seconds.

python tests/faults/fuzz.py --cases 3000 --processes 20    minutes on one core
python -m pytest tests/faults/test_hostile.py -k mutated   a selection

--cases run in this process, --processes are whole runs through start.sh.
"""

import argparse
import collections
import contextlib
import copy
import importlib.util
import io
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import traceback
import zipfile
from pathlib import Path

sys.path[:0] = [str(folder) for folder in list(Path(__file__).resolve().parents)[:3]]

import attack
import numpy as np
import torch
from PIL import Image

from snclr import builder, optim, options
from snclr.choices import IMAGENET
from snclr.datasets import decoding, files, folders, hugging_face, shards, sources
from snclr.datasets.images import ResidentImages
from snclr.evaluation import embedding, linear
from snclr.evaluation import options as lincls_options
from snclr.evaluation.options import STATE_FILE
from snclr.evaluation.task import Task
from snclr.running import checkpoint, log
from snclr.running.errors import RunError, UsageError
from snclr.weights import load as weights

LIMIT = 20  # seconds
FLAGS = "--arch resnet8 --width 8 --snclr-dim 8 --snclr-mlp-dim 8 --bank-size 6 --topk 2"
FLAGS += " --batch-size 4 --img-size 32 --subset 10 --epochs 4 --eval-freq 0"  # 8 steps
ODD = (
    None,
    True,
    -1,
    0,
    3,
    2**70,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../etc/passwd",
    "%s%n",
    "\x00",
    "é" * 50,
)
ODD += (
    [],
    {},
    [[]],
    {"": {}},
    b"\x80\x04.",
    (1, "a"),
    {1: 2},
    [None] * 5,
    [["pretrained", True]],
    [["checkpoint_path", "x"]],
)


def bend(random, content: bytes) -> bytes:
    """The content with some bytes flipped, replaced, cut, doubled, overwritten or swapped."""
    content = bytearray(content)
    for _ in range(random.integers(1, 5)):
        if not content:
            break
        position, length = (
            int(random.integers(len(content))),
            int(random.integers(1, 1 + min(64, len(content)))),
        )
        kind = random.integers(7)
        if kind == 0:
            content[position] ^= 1 << int(random.integers(8))
        elif kind == 1:
            content[position : position + length] = random.integers(
                256, size=length, dtype=np.uint8
            ).tobytes()
        elif kind == 2:
            del content[position:]
        elif kind == 3:
            del content[position : position + length]
        elif kind == 4:
            content[position:position] = content[position : position + length]
        elif kind == 5:
            content[position : position + length] = bytes([int(random.choice([0, 255]))]) * length
        else:
            other = int(random.integers(len(content)))
            content[position : position + length], content[other : other + length] = (
                content[other : other + length],
                content[position : position + length],
            )
    return bytes(content)


def bend_value(random, value):
    """A copy of a nested value with one entry removed, renamed or replaced."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = list(value)[random.integers(len(value))]
        changed = dict(value)
        if random.random() < 0.15:
            del changed[key]
        elif random.random() < 0.1:
            changed[ODD[random.integers(9)]] = changed.pop(key)
        else:
            changed[key] = bend_value(random, value[key])
        return changed
    if isinstance(value, list) and value and random.random() < 0.9:
        changed, position = list(value), random.integers(len(value))
        changed[position] = bend_value(random, value[position])
        return changed
    if isinstance(value, torch.Tensor) and random.random() < 0.8:
        kinds = (
            value.flatten(),
            value[None],
            value.double(),
            value.to(torch.int8),
            value * float("nan"),
            value.bool(),
        )
        kinds += (
            torch.zeros(1).expand(1 << 40),
            value.to_sparse(),
            torch.empty(0),
            value.to(torch.complex64),
            value.to("meta"),
        )
        return kinds[random.integers(len(kinds))]
    return copy.deepcopy(ODD[random.integers(len(ODD))])


class Seeds:
    """Valid files of each kind, to be mutated in their own folder."""

    def __init__(self, folder):
        self.folder = folder
        torch.manual_seed(0)
        self.args = options.parse(FLAGS.split())
        self.model, self.optimizer, self.scaler = self.fresh()
        optim.set_learning_rate(self.optimizer, 0.01)
        loss, _ = self.model(list(torch.randn(2, 4, 3, 32, 32)), torch.arange(4), 0.9)
        loss.backward()
        self.optimizer.step()
        self.state = checkpoint.pack(
            self.model, self.optimizer, self.scaler, args=self.args, epoch=1, step=7, images=10
        )
        self.checkpoint = self.saved(self.state)
        self.encoder = checkpoint.pack_encoder(
            self.model.base_encoder, "online", args=self.args, epoch=1, step=7
        )
        self.images = {
            kind: self.picture(kind)
            for kind in ("jpeg", "png", "gif", "bmp", "tiff", "webp", "ppm")
        }
        self.tar = io.BytesIO()
        with tarfile.open(fileobj=self.tar, mode="w") as archive:
            for name, content in (
                ("a/0.jpg", self.images["jpeg"]),
                ("a/0.cls", b"3"),
                ("b/1.png", self.images["png"]),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        self.tar = self.tar.getvalue()
        self.zip = io.BytesIO()
        with zipfile.ZipFile(self.zip, "w") as archive:
            archive.writestr("train/a/0.jpg", self.images["jpeg"])
            archive.writestr("train/b/1.png", self.images["png"], zipfile.ZIP_DEFLATED)
            with archive.open("val/a/é.jpg", "w", force_zip64=True) as member:
                member.write(self.images["jpeg"])
        self.zip = self.zip.getvalue()
        pixels = np.random.default_rng(0).integers(256, size=(2100, 3, 2, 2), dtype=np.uint8)
        self.resident = ResidentImages(pixels, None, [], IMAGENET)
        self.recipes = [
            path.read_bytes() for path in sorted((attack.ROOT / "configs").glob("*.args"))
        ]
        self.names = [
            name for action in options.build_parser()._actions for name in action.option_strings
        ]
        self.lines = b"".join(
            b'{"epoch": 1, "step": %d, "loss": 0.5}\n' % step for step in range(5)
        )
        self.grid, self.sgd = self.fresh_probe()
        self.probe = {
            "epoch": 1,
            "model": self.grid.state_dict(),
            "optimizer": self.sgd.state_dict(),
        }
        settings = {"epochs": 3, "seed": 0, "lrs": [0.1, 1.0], "finetune": False}
        self.probe |= {"args": settings, "encoder_digest": "x", "history": [50.0]}

    def fresh(self):
        model = builder.build_model(self.args)
        return (
            model,
            optim.build_optimizer("adamw", model, 0.1),
            torch.amp.GradScaler("cpu", enabled=False),
        )

    def fresh_probe(self):
        grid = linear.LinearGrid({"pooled": 4}, 3, [0.1, 1.0], 0)
        return grid, torch.optim.SGD(grid.parameters(), lr=1.0, momentum=0.9)

    def saved(self, state):
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    def picture(self, kind):
        file = io.BytesIO()
        pixels = np.random.default_rng(0).integers(256, size=(24, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, kind)
        return file.getvalue()

    def write(self, name, content):
        path = self.folder / name
        path.write_bytes(content)
        return str(path)


# -- a function per kind of input: mutate it and read it -------------------------------------------


def checkpoint_bytes(seeds, random):
    path = seeds.write("checkpoint_last.pth.tar", bend(random, seeds.checkpoint))
    checkpoint.load(path)
    checkpoint.newest(str(seeds.folder))


def checkpoint_content(seeds, random):
    path = seeds.write("content.pth.tar", seeds.saved(bend_value(random, seeds.state)))
    model, optimizer, scaler = seeds.fresh()
    checkpoint.resume(
        path, model, optimizer, scaler, args=seeds.args, on_resume=options.ON_RESUME, images=10
    )
    loss, _ = model(list(torch.randn(2, 4, 3, 32, 32)), torch.arange(4), 0.9)
    loss.backward()
    optimizer.step()  # an accepted checkpoint can be trained


def encoder_bytes(seeds, random):
    weights.open_encoder(seeds.write("encoder.pth", bend(random, seeds.saved(seeds.encoder))))


def encoder_content(seeds, random):
    state = seeds.encoder if random.random() < 0.5 else seeds.state
    path = seeds.write("encoder.pth", seeds.saved(bend_value(random, bend_value(random, state))))
    weights.open_encoder(path, str(random.choice(["online", "momentum"])))


def probe_content(seeds, random):
    state = bend_value(random, seeds.probe) if random.random() < 0.9 else seeds.probe
    seeds.write(STATE_FILE, seeds.saved(state))
    settings = argparse.Namespace(**seeds.probe["args"], workdir=str(seeds.folder), resume="auto")
    grid, optimizer = seeds.fresh_probe()
    task = argparse.Namespace(args=settings, identity={"encoder_digest": "x"})
    Task.resume(task, STATE_FILE, grid, optimizer)
    grid.train_step(optimizer, torch.randn(4, 4), torch.arange(4) % 3)


def image(seeds, random):
    kind = list(seeds.images)[random.integers(len(seeds.images))]
    pixels = decoding.decode(np.frombuffer(bend(random, seeds.images[kind]), np.uint8).copy(), "x")
    assert pixels.dtype == torch.uint8 and pixels.shape[0] == 3 and pixels.numel() > 0


def shard(seeds, random):
    folder, kind = seeds.folder / "shards", str(random.choice(["tar", "zip"]))
    content = getattr(seeds, kind)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    directory = content.index(b"PK\1\2") if kind == "zip" else 0  # small, and most is read in it
    if random.random() < 0.5:
        content = bend(random, content)
    elif random.random() < 0.5:
        content = content[:directory] + bend(random, content[directory:])
    seeds.write(f"shards/a.{kind}", content)
    if random.random() < 0.5:  # its index, too
        shards.open_index(str(folder), folders.EXTENSIONS, None)
        path = folder / "snclr_index.npz"
        path.write_bytes(bend(random, path.read_bytes()))
    index = shards.open_index(str(folder), folders.EXTENSIONS, None)
    images = files.FileImages(index)
    for number in range(min(4, len(images))):
        images.image(number)


def features(seeds, random):
    """The parts of features that an interrupted command has left, some of them bent."""
    folder, out = seeds.folder / "x.npz.parts", seeds.folder / "x.npz"
    device = torch.device("cpu")
    settings = {"size": 2, "device": device, "workers": 0, "log": lambda line: None}

    def write():
        parts = embedding.encode_parts(
            lambda x: x.flatten(1)[:, :2], seeds.resident, str(folder), "key", **settings
        )
        embedding.join_parts(str(out), parts, seeds.resident)
        return parts, np.load(out)["features"]

    parts, expected = write()
    folder.mkdir()
    for path, content in zip(parts, np.split(expected, [1024, 2048]), strict=True):
        file = io.BytesIO()
        np.save(file, content)
        file = file.getvalue()
        bent = [bend(random, file[:128]) + file[128:], file[:-1], b"", file]
        Path(path).write_bytes(bent[random.integers(4)])
    out.unlink()
    np.testing.assert_array_equal(write()[1], expected)


def table(seeds, random):
    """A parquet file for --dataset hf."""
    import datasets  # optional

    folder = seeds.folder / "table"
    folder.mkdir()
    datasets.config.HF_DATASETS_CACHE = str(seeds.folder / "cache")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    rows = [{"bytes": seeds.images["png"], "path": f"{number}.png"} for number in range(8)]
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    sound = datasets.Dataset.from_dict(
        {"image": rows, "label": [0, 1] * 4}, features=datasets.Features(kinds)
    )
    sound.to_parquet(folder / "train.parquet")
    content = (folder / "train.parquet").read_bytes()
    start = len(content) - 1500 if random.random() < 0.6 else 0  # where its schema is
    (folder / "train.parquet").write_bytes(content[:start] + bend(random, content[start:]))
    hugging_face._load.cache_clear()
    flags = [f"hf:{folder}", "--on-bad-image", "skip", *FLAGS.split(), "--subset", "1.0"]
    images, _, _ = sources.open_data(options.parse(flags))
    assert len(images.paths) == len(images)


def recipe(seeds, random):
    path = seeds.write("x.args", bend(random, seeds.recipes[random.integers(len(seeds.recipes))]))
    options.parse([f"@{path}"])


def command_line(seeds, random):
    words = [seeds.names[random.integers(len(seeds.names))] for _ in range(random.integers(1, 5))]
    for position in range(len(words), 0, -1):
        words.insert(position, str(ODD[random.integers(len(ODD))]))
    if random.random() < 0.5:
        words = [
            bend(random, word.encode()).decode(errors="replace").replace("\0", "") for word in words
        ]
    parse = options.parse if random.random() < 0.7 else lincls_options.parse
    parse(words if random.random() < 0.5 else [*FLAGS.split(), *words])


def lists(seeds, random):
    seeds.write("0.jpg", seeds.images["jpeg"])
    seeds.write("1.jpg", seeds.images["png"])
    args = [
        "-a",
        "resnet8",
        "--img-size",
        "24",
        seeds.write("list.txt", bend(random, b"0.jpg\n1.jpg\n0.jpg\n")),
        "-b",
        "2",
    ]
    args += (
        ["--labels", seeds.write("labels.txt", bend(random, b"3\n4\n-1\n"))]
        if random.random() < 0.7
        else []
    )
    sources.open_data(options.parse(args))


def metrics(seeds, random):
    log.cut_back(seeds.write("metrics.jsonl", bend(random, seeds.lines)), 3)


KINDS = (
    checkpoint_bytes,
    checkpoint_content,
    encoder_bytes,
    encoder_content,
    probe_content,
    image,
    shard,
    features,
    recipe,
    command_line,
    lists,
    metrics,
)


ECHO = (
    recipe,
    command_line,
)  # messages repeat what was typed; one_clear_line prints that on one line


def raise_timeout(number, frame):
    raise TimeoutError(f"not done after {LIMIT} s")


def run(cases, seed, folder, kinds=KINDS):
    """Counts of each kind that worked and that was refused; all else as (case, kind, error)."""
    seeds, ends, wrong = Seeds(folder), collections.Counter(), []
    before = signal.signal(signal.SIGALRM, raise_timeout)
    for case in range(cases):
        kind, random = kinds[case % len(kinds)], np.random.default_rng([seed, case])
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        signal.alarm(LIMIT)
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                kind(seeds, random)
            end = "worked"
        except (UsageError, RunError) as error:
            end = "refused" if "\n" not in str(error) or kind in ECHO else error
        except SystemExit as error:  # --help
            end = error if error.code else "worked"
        except Exception as error:
            end = error
        finally:
            signal.alarm(0)
        ends[kind.__name__, end] += isinstance(end, str)
        wrong += [] if isinstance(end, str) else [(case, kind.__name__, end)]
    signal.signal(signal.SIGALRM, before)
    return ends, wrong


# -- whole processes -------------------------------------------------------------------------------

SETTINGS = (
    "--topk 1",
    "--method mocov3",
    "--form log_of_sum",
    "--optimizer lars",
    "--blur",
    "--snclr-t 0.5",
    "--keep 3",
    "--micro-batch 2",
    "--amp bf16",
    "--eval-freq 1",
    "--print-freq 1",
    "--lr nan",
    "--bank-size 0",
    "--arch ../x",
)


def one_of(random, *choices):
    return choices[random.integers(len(choices))]


def settings(seeds, random, folder, other):
    """Mostly valid settings; sometimes in the folder of another run."""
    flags = [word for _ in range(2) for word in one_of(random, *SETTINGS).split()]
    return [*FLAGS.split(), *flags, "--workdir", one_of(random, other, folder, folder, folder)]


def resumed(seeds, random, folder, other):
    """Resume from a checkpoint and a log, valid or mutated, with a valid older checkpoint."""
    folder.mkdir()
    bent = bend(random, seeds.checkpoint), seeds.saved(bend_value(random, seeds.state))
    (folder / attack.LAST).write_bytes(one_of(random, seeds.checkpoint, *bent))
    (folder / "checkpoint_last-1.pth.tar").write_bytes(seeds.checkpoint)
    (folder / "metrics.jsonl").write_bytes(bend(random, seeds.lines))
    resume_flags = one_of(
        random, ["--workdir", folder, "--resume", "auto"], ["--resume", folder / attack.LAST]
    )
    return [*FLAGS.split(), *resume_flags]


def started(seeds, random, folder, other):
    """Start from an encoder, valid or mutated."""
    bent = bend(random, seeds.saved(seeds.encoder)), seeds.saved(bend_value(random, seeds.encoder))
    path = seeds.write("encoder.pth", one_of(random, seeds.saved(seeds.encoder), *bent))
    return [*FLAGS.split(), "--init-from", path, "--workdir", folder]


def evaluated(seeds, random, folder, other):
    """Evaluate an encoder, valid or mutated."""
    command = [
        "main_lincls.py",
        "--pretrained",
        started(seeds, random, folder, other)[-3],
        "--workdir",
        folder,
    ]
    return [*command, "--subset", "200", "-b", "50", "--epochs", "1", "--heldout", "0.2"]


def pictures(seeds, random, folder, other):
    """A folder of images, or a tar, in which some are mutated."""
    path = seeds.folder / "images"
    shutil.rmtree(path, ignore_errors=True)
    for number in range(12):
        content = seeds.images[one_of(random, *seeds.images)]
        (path / "train" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (path / f"train/{'ab'[number % 2]}/{number}.jpg").write_bytes(
            one_of(random, content, content, bend(random, content))
        )
    if random.random() < 0.3:
        with tarfile.open(path / "x.tar", "w") as archive:
            archive.add(path / "train", "train")
        (path / "x.tar").write_bytes(
            one_of(
                random, bend(random, (path / "x.tar").read_bytes()), (path / "x.tar").read_bytes()
            )
        )
        path /= "x.tar"
    return [
        path,
        *FLAGS.split(),
        "--on-bad-image",
        one_of(random, "skip", "skip", "fail"),
        "-j",
        "1",
        "--workdir",
        folder,
    ]


PROCESSES = (settings, resumed, started, evaluated, pictures)


def whole_processes(cases, seed, folder):
    """Start whole runs through start.sh; counts by kind and exit code.

    With code 0 a run must leave its result; with 1 or 2 it must print one line of error. No run may
    print a traceback or change the folder of another run.
    """
    seeds, codes, other = Seeds(folder / "seeds"), collections.Counter(), folder / "other"
    other.mkdir()
    (other / attack.LAST).write_bytes(seeds.checkpoint)
    (other / "metrics.jsonl").write_bytes(seeds.lines)
    before = {path: path.read_bytes() for path in other.iterdir()}
    for case in range(cases):
        kind, random, workdir = (
            PROCESSES[case % len(PROCESSES)],
            np.random.default_rng([seed, case]),
            folder / f"run{case}",
        )
        code, output = attack.ended(
            attack.start(*kind(seeds, random, workdir, other), ranks=1), within=200
        )
        has_result = (workdir / ("results.json" if kind is evaluated else attack.LAST)).exists()
        errors = [
            line
            for line in output.splitlines()
            if " error: " in line or " stopped on rank " in line
        ]
        sound = has_result and not errors if code == 0 else code in (1, 2) and len(errors) == 1
        if (
            not sound
            or "Traceback" in output
            or {path: path.read_bytes() for path in other.iterdir()} != before
        ):
            raise SystemExit(
                f"whole process {case} ({kind.__name__}) of seed {seed}: code {code}\n{output}"
            )
        codes[kind.__name__, code] += 1
    return codes


if __name__ == "__main__":
    args = attack.numbers(__doc__, {"--cases": 3000, "--processes": 20, "--seed": 0})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("cases", "whole/seeds"):
            os.makedirs(os.path.join(temporary, name))
        kinds = KINDS + ((table,) if importlib.util.find_spec("datasets") else ())
        ends, wrong = run(args.cases, args.seed, Path(temporary) / "cases", kinds)
        for case, kind, error in wrong:
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            trace = " < ".join(
                f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames)
            )
            print(f"case {case} ({kind}): {error!r} at {trace}"[:400])
        for kind in kinds:
            worked, refused = (ends[kind.__name__, end] for end in ("worked", "refused"))
            print(f"{kind.__name__}: {worked} worked, {refused} refused in one line")
        codes = whole_processes(args.processes, args.seed, Path(temporary) / "whole")
        for kind in PROCESSES:
            counts = ", ".join(
                f"{codes[kind.__name__, code]} ended with code {code}" for code in (0, 1, 2)
            )
            print(f"whole processes, {kind.__name__}: {counts}")
    sys.exit(bool(wrong))
