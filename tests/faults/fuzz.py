"""Feeds mutated files and command lines to whatever reads them: each must work, or end in one clear line, within 20 seconds.

python tests/faults/fuzz.py --cases 3000     minutes on one core; in this process but for a few whole ones
python -m pytest tests/faults/test_fuzz.py   a selection
"""

import argparse
import collections
import contextlib
import copy
import io
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import traceback
from pathlib import Path

sys.path[:0] = [str(folder) for folder in list(Path(__file__).resolve().parents)[:3]]

import attack  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from snclr import builder, checkpoint, data, lincls_options, monitor, optim, options, shards, sources, weights  # noqa: E402
from snclr.errors import RunError, UsageError  # noqa: E402

LIMIT = 20  # seconds
FLAGS = "--arch resnet8 --width 8 --snclr-dim 8 --snclr-mlp-dim 8 --bank-size 6 --topk 2 --batch-size 4 --img-size 32"
ODD = (None, True, -1, 0, 3, 2**70, 1e308, float("nan"), float("inf"), "", "x", "../../etc/passwd", "%s%n", "\x00", "é" * 50)
ODD += ([], {}, [[]], {"": {}}, b"\x80\x04.", (1, "a"), {1: 2}, [None] * 5, [["pretrained", True]], [["checkpoint_path", "x"]])


def bend(random, content: bytes) -> bytes:
    """A file with some of its bytes flipped, cut, doubled, emptied or exchanged."""
    content = bytearray(content)
    for _ in range(random.integers(1, 5)):
        if not content:
            break
        place, length = int(random.integers(len(content))), int(random.integers(1, 1 + min(64, len(content))))
        kind = random.integers(7)
        if kind == 0:
            content[place] ^= 1 << int(random.integers(8))
        elif kind == 1:
            content[place : place + length] = random.integers(256, size=length, dtype=np.uint8).tobytes()
        elif kind == 2:
            del content[place:]
        elif kind == 3:
            del content[place : place + length]
        elif kind == 4:
            content[place:place] = content[place : place + length]
        elif kind == 5:
            content[place : place + length] = bytes([int(random.choice([0, 255]))]) * length
        else:
            other = int(random.integers(len(content)))
            content[place : place + length], content[other : other + length] = (
                content[other : other + length],
                content[place : place + length],
            )
    return bytes(content)


def bend_value(random, value):
    """A nested value in which one thing is another."""
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
        changed, place = list(value), random.integers(len(value))
        changed[place] = bend_value(random, value[place])
        return changed
    if isinstance(value, torch.Tensor) and random.random() < 0.8:
        kinds = (value.flatten(), value[None], value.double(), value.to(torch.int8), value * float("nan"), value.bool())
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
    """Sound files of each kind, to be bent, in a folder of their own."""

    def __init__(self, folder):
        self.folder = folder
        torch.manual_seed(0)
        self.args = options.parse(FLAGS.split())
        self.model, self.optimizer, self.scaler = self.fresh()
        optim.set_learning_rate(self.optimizer, 0.01)
        loss, _ = self.model(*torch.randn(2, 4, 3, 32, 32), torch.arange(4), 0.9)
        loss.backward()
        self.optimizer.step()
        self.state = checkpoint.pack(self.model, self.optimizer, self.scaler, args=self.args, epoch=1, step=7, images=10)
        self.checkpoint = self.saved(self.state)
        self.encoder = checkpoint.pack_encoder(self.model.base_encoder, "online", args=self.args, epoch=1)
        self.images = {kind: self.picture(kind) for kind in ("jpeg", "png", "gif", "bmp", "tiff", "webp", "ppm")}
        self.tar = io.BytesIO()
        with tarfile.open(fileobj=self.tar, mode="w") as archive:
            for name, content in (("a/0.jpg", self.images["jpeg"]), ("a/0.cls", b"3"), ("b/1.png", self.images["png"])):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        self.tar = self.tar.getvalue()
        self.recipes = [path.read_bytes() for path in sorted((attack.ROOT / "configs").glob("*.args"))]
        self.names = [name for action in options.build_parser()._actions for name in action.option_strings]

    def fresh(self):
        model = builder.build_model(self.args)
        return model, optim.build_optimizer("adamw", model, 0.1), torch.amp.GradScaler("cpu", enabled=False)

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


# -- one function a kind of input: bend it, give it to its reader ------------------------------------------------------------


def checkpoint_bytes(seeds, random):
    path = seeds.write("checkpoint_last.pth.tar", bend(random, seeds.checkpoint))
    checkpoint.load(path)
    checkpoint.newest(str(seeds.folder))


def checkpoint_content(seeds, random):
    path = seeds.write("content.pth.tar", seeds.saved(bend_value(random, seeds.state)))
    model, optimizer, scaler = seeds.fresh()
    checkpoint.resume(path, model, optimizer, scaler, args=seeds.args, images=10)
    loss, _ = model(*torch.randn(2, 4, 3, 32, 32), torch.arange(4), 0.9)
    loss.backward()
    optimizer.step()  # what was accepted can be worked with


def encoder_bytes(seeds, random):
    weights.open_encoder(seeds.write("encoder.pth", bend(random, seeds.saved(seeds.encoder))))


def encoder_content(seeds, random):
    state = seeds.encoder if random.random() < 0.5 else seeds.state
    path = seeds.write("encoder.pth", seeds.saved(bend_value(random, bend_value(random, state))))
    weights.open_encoder(path, str(random.choice(["online", "momentum"])))


def image(seeds, random):
    kind = list(seeds.images)[random.integers(len(seeds.images))]
    pixels = data.decode(np.frombuffer(bend(random, seeds.images[kind]), np.uint8).copy(), "x")
    assert pixels.dtype == torch.uint8 and pixels.shape[0] == 3 and pixels.numel() > 0


def shard(seeds, random):
    folder = seeds.folder / "shards"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    seeds.write("shards/a.tar", bend(random, seeds.tar) if random.random() < 0.7 else seeds.tar)
    if random.random() < 0.5:  # its index, too
        shards.open_index(str(folder), sources.EXTENSIONS, None)
        path = folder / "snclr_index.npz"
        path.write_bytes(bend(random, path.read_bytes()))
    index = shards.open_index(str(folder), sources.EXTENSIONS, None)
    images = shards.ShardImages(index, None, [], sources.IMAGENET)
    for number in range(min(4, len(images))):
        images.image(number)


def recipe(seeds, random):
    path = seeds.write("x.args", bend(random, seeds.recipes[random.integers(len(seeds.recipes))]))
    options.parse([f"@{path}"])


def command_line(seeds, random):
    words = [seeds.names[random.integers(len(seeds.names))] for _ in range(random.integers(1, 5))]
    for place in range(len(words), 0, -1):
        words.insert(place, str(ODD[random.integers(len(ODD))]))
    if random.random() < 0.5:
        words = [bend(random, word.encode()).decode(errors="replace").replace("\0", "") for word in words]
    parse = options.parse if random.random() < 0.7 else lincls_options.parse
    parse(words if random.random() < 0.5 else [*FLAGS.split(), *words])


def lists(seeds, random):
    seeds.write("0.jpg", seeds.images["jpeg"])
    seeds.write("1.jpg", seeds.images["png"])
    args = ["-a", "resnet8", "--img-size", "24", seeds.write("list.txt", bend(random, b"0.jpg\n1.jpg\n0.jpg\n")), "-b", "2"]
    args += ["--labels", seeds.write("labels.txt", bend(random, b"3\n4\n-1\n"))] if random.random() < 0.7 else []
    sources.open_data(options.parse(args))


def metrics(seeds, random):
    lines = b"".join(b'{"epoch": 1, "step": %d, "loss": 0.5}\n' % step for step in range(5))
    monitor.cut_back(seeds.write("metrics.jsonl", bend(random, lines)), 3)


KINDS = (
    checkpoint_bytes,
    checkpoint_content,
    encoder_bytes,
    encoder_content,
    image,
    shard,
    recipe,
    command_line,
    lists,
    metrics,
)


ECHO = (recipe, command_line)  # messages repeat what was typed; one_clear_line prints that on one line


def late(number, frame):
    raise TimeoutError(f"not done after {LIMIT} s")


def run(cases, seed, folder):
    """How often each kind worked and was refused, and what ended otherwise: (case, kind, error)."""
    seeds, ends, wrong = Seeds(folder), collections.Counter(), []
    before = signal.signal(signal.SIGALRM, late)
    for case in range(cases):
        kind, random = KINDS[case % len(KINDS)], np.random.default_rng([seed, case])
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        signal.alarm(LIMIT)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
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


def whole_processes(cases, seed, folder):
    """The same of whole runs: exit code 0, 1 or 2, no traceback, and nothing of another run's folder changed."""
    seeds, codes = Seeds(folder / "seeds"), collections.Counter()
    for case in range(cases):
        random = np.random.default_rng([seed, case])
        workdir = folder / f"run{case}"
        workdir.mkdir()
        (workdir / "checkpoint_last.pth.tar").write_bytes(seeds.checkpoint)
        (workdir / "metrics.jsonl").write_bytes(b'{"epoch": 1, "step": 1, "loss": 1}\n')
        bent = seeds.write(f"bent{case}", bend(random, seeds.checkpoint))
        commands = (
            [f"@{seeds.write('x.args', bend(random, seeds.recipes[case % len(seeds.recipes)]))}", "--workdir", str(workdir)],
            [*FLAGS.split(), "--subset", "10", "--workdir", str(workdir), "--resume", bent],
            [
                *FLAGS.split(),
                "--subset",
                "8",
                "--epochs",
                "1",
                "--eval-freq",
                "0",
                "--init-from",
                bent,
                "--workdir",
                str(folder / f"new{case}"),
            ],
            [
                "main_lincls.py",
                "--pretrained",
                bent,
                "--workdir",
                str(folder / f"lincls{case}"),
                "--subset",
                "8",
                "-b",
                "4",
                "--epochs",
                "1",
            ],
        )
        before = {path: path.read_bytes() for path in workdir.iterdir()}
        done = attack.start(*commands[case % len(commands)], ranks=1)
        code, output = attack.ended(done, within=120)
        after = {path: path.read_bytes() for path in workdir.iterdir() if path.suffix != ".lock"}
        if code not in (0, 1, 2) or "Traceback" in output or after != before:
            raise SystemExit(f"whole process {case} of seed {seed}: code {code}\n{output}")
        codes[code] += 1
    return codes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--processes", type=int, default=20, help="whole processes besides")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        for place in ("cases", "whole/seeds"):
            os.makedirs(os.path.join(temporary, place))
        ends, wrong = run(args.cases, args.seed, Path(temporary) / "cases")
        for case, kind, error in wrong:
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
            print(f"case {case} ({kind}): {error!r} at {where}"[:400])
        for kind in KINDS:
            print(
                f"{kind.__name__}: {ends[kind.__name__, 'worked']} worked, {ends[kind.__name__, 'refused']} refused in one line"
            )
        codes = whole_processes(args.processes, args.seed, Path(temporary) / "whole")
        print(f"{args.processes} whole processes: exit codes {dict(codes)}")
    sys.exit(bool(wrong))
