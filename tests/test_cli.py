import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import main_snclr
from snclr import arguments, embed, export, mean_std, options, report, sweep, visualize
from snclr.evaluation import options as lincls_options
from snclr.running import tensor_files
from snclr.running.errors import Interrupted, RunError, UsageError, one_clear_line
from snclr.weights import load

ROOT = Path(main_snclr.__file__).resolve().parent
RECIPES = sorted(ROOT.glob("configs/**/*.args"))
ABLATIONS = [path for path in RECIPES if path.parent.name == "ablations"]
FLAGS = [action for action in options.build_parser()._actions if action.dest != "help"]
BOOLEANS = [action for action in FLAGS if isinstance(action, argparse.BooleanOptionalAction)]
TINY = "--arch resnet8 --width 8 --img-size 16 --snclr-dim 8 --snclr-mlp-dim 8 --bank-size 8 "
TINY += "--topk 2 -b 4 --epochs 2"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A new current folder, and the environment of a single process."""
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A data set of eight images of 16 px."""
    root = tmp_path_factory.mktemp("images")
    for number in range(8):
        folder = root / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def tiny(images, *flags):
    return [str(images), *TINY.split(), "--workers", "0", "--eval-freq", "0", *map(str, flags)]


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The workdir of a finished run. Tests must not change it."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    main_snclr.main(tiny(images, "--workdir", workdir))
    return workdir


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that workdir."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def parse(*flags):
    return options.parse([str(flag) for flag in flags])


def refused(*flags, by=options.parse):
    """The one line of the usage error."""
    with pytest.raises(UsageError) as caught:
        by([str(flag) for flag in flags])
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 300
    return message


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


# -- flags -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--bogus", "--bogus"),
        (
            "--top 4",
            "--top",
        ),  # no abbreviations: a new flag must not change what an old command means
        ("a b", "b"),
        ("--arch resnet51", "resnet50"),
        ("--arch resnet51", "timm:NAME"),
        ("--timm-kwargs drop_path_rate=0.1", "--timm-kwargs are for --arch timm:NAME"),
        ("-a timm:resnet18 --timm-kwargs drop_path_rate", "expected KEY=VALUE"),
        ("-a vit_conv_small --patch-size 8", "--patch-size 16, found 8"),
        ("--init-from nowhere.pth", "--init-from nowhere.pth: there is no such file"),
        ("--optimizer adam", "lars"),
        ("--method simclr", "snclr"),
        ("--form product", "log_of_sum"),
        ("--topk", "--topk"),
        ("--topk many", "'many'"),
        ("--epochs 1.5", "'1.5'"),
        ("--lr fast", "'fast'"),
        ("--flip-h often", "invalid float value: 'often'"),
        ("--flip-h 0.5 data images", "unrecognized arguments: images"),
        ("--epoch=3", "unrecognized arguments: --epoch=3; close names are --epochs (--help"),
        (
            "@configs/photo_small.args",
            "'configs/photo_small.args'; close names are configs/photos_",
        ),
        ("--flip-v 1.5", "must be between 0 and 1, found 1.5"),
        ("--grey-p 0 1 1", "--grey-p needs 1 or 2 numbers"),
        ("--jitter 0.4 0.4", "--jitter needs 4 or 8 numbers"),
        ("--jitter 0 0 0 0.3 0 0 0 0.4", "hue in turns, must be at most 0.33, found 0.4"),
        ("--no-blur --blur-p 0 0.1", "--no-blur contradicts --blur-p"),
        ("--lr -1", "--lr must be above 0, found -1"),
        ("--lr 0", "--lr must be above 0"),
        ("--lr nan", "--lr must be above 0"),
        ("--snclr-t 0", "--snclr-t must be above 0"),
        ("--positiveness-t -0.1", "--positiveness-t must be above 0"),
        ("--batch-size 0", "--batch-size must be above 0"),
        ("--batch-size -4", "--batch-size must be above 0"),
        ("--epochs 0", "--epochs must be above 0"),
        ("--bank-size 0", "--bank-size must be above 0"),
        ("--img-size -32", "--img-size must be above 0"),
        ("--patch-size 0", "--patch-size must be above 0"),
        ("--width 0", "--width must be above 0"),
        ("--print-freq 0", "--print-freq must be above 0"),
        ("--stop-after-epochs 0", "--stop-after-epochs must be above 0"),
        ("--stop-after-steps -1", "--stop-after-steps must be above 0"),
        ("--topk -1", "--topk must be 0 or more"),
        ("--wd -0.1", "--wd must be 0 or more"),
        ("--workers -1", "--workers must be 0 or more"),
        ("--save-freq -1", "--save-freq must be 0 or more"),
        ("--eval-freq -1", "--eval-freq must be 0 or more"),
        ("--warmup-epochs -1", "--warmup-epochs must be 0 or more"),
        ("--nn-warmup-epochs -1", "--nn-warmup-epochs must be 0 or more"),
        ("--snclr-m 1.01", "--snclr-m must be between 0 and 1"),
        ("--snclr-m -0.1", "--snclr-m must be between 0 and 1"),
        ("--snclr-m nan", "--snclr-m must be between 0 and 1"),
        ("--crop-min 1.5", "--crop-min must be above 0 and at most 1, found 1.5"),
        ("--crop-min 0", "--crop-min must be above 0"),
        ("--local-views 2 --method mocov2", "--method mocov2 compares one view with one other"),
        ("--local-views 2 --local-crop-max 0.01", "--local-crop-max must be at least 0.05"),
        ("--local-views 2 --local-size 0", "--local-size must be above 0"),
        (
            "--local-views 2 -a vit_tiny --local-size 20",
            "--local-size 20 is not a multiple of --patch-size 16",
        ),
        ("--epochs 5 --warmup-epochs 6", "--warmup-epochs 6 exceeds --epochs 5"),
        ("--epochs 5 --nn-warmup-epochs 5.5", "--nn-warmup-epochs 5.5 exceeds --epochs 5"),
        ("--topk 31 --bank-size 30", "--topk 31 exceeds --bank-size 30"),
        (
            "--arch vit_tiny --img-size 40 --patch-size 16",
            "--img-size 40 is not a multiple of --patch-size 16",
        ),
        ("--threshold --weights uniform", "--weights uniform"),
        ("--threshold --topk 1", "--topk 1"),
        ("--weights projected --detach-weights", "--detach-weights"),
        ("--weights projected --topk 1", "--topk 1"),
        ("--weights projected --topk 0", "--topk 0"),
        ("--gamma 0", "--gamma must be above 0"),
        ("--nn-mass 0", "--nn-mass must be above 0"),
        ("--gamma 2 --nn-mass 2", "--gamma G is --nn-mass 1/G"),
        (
            "--epochs 5 --nn-warmup-epochs 2 --nn-ramp-epochs 3.5",
            "--nn-warmup-epochs 2 and --nn-ramp-epochs 3.5 together exceed --epochs 5",
        ),
        ("--candidates none", "unique"),
        ("--method nnclr --key-view weak", "--method nnclr has no momentum encoder"),
        ("--method nnclr --eval-encoder momentum", "--eval-encoder online"),
        ("--dataset cifar10", "needs DATA"),
        ("--dataset folder", "needs DATA"),
        ("somewhere --dataset embedded", "somewhere"),
        ("--seed 99999999999999999999", "--seed"),
        ("--batch-size 1", "--batch-size"),
    ],
)
def test_wrong_flags_are_named_in_one_line(flags, named):
    assert named in refused(*flags.split())


@pytest.mark.parametrize(
    "flags, lines",
    [
        ("--topk 3", ""),
        ("--topk 0 --nn-mass 0.3", "--nn-mass has no effect with --topk 0"),
        ("--weights key --detach-weights", "--detach-weights has no effect with --weights key"),
        (
            "--weights uniform --positiveness-t 0.1",
            "--positiveness-t has no effect with --weights uniform",
        ),
        ("--method nnclr --topk 5 --gamma 2", "--topk has no effect with --method nnclr; --gamma"),
        ("-a resnet18 --patch-size 8", "--patch-size has no effect with --arch resnet18"),
        ("-a vit_tiny --width 8", "--width has no effect with --arch vit_tiny"),
        ("--local-size 32", "--local-size has no effect without --local-views"),
        ("--local-size 32 --local-views 1", ""),
        ("--subset-seed 2", "--subset-seed has no effect without --subset"),
    ],
)
def test_flags_without_effect_are_named(flags, lines):
    args = options.parse(["-a", "resnet8", "--topk", "30", *flags.split()])
    assert "; ".join(options.unused_flags(args)).startswith(lines)
    assert bool(lines) == bool(options.unused_flags(args))


def test_flags_of_a_gpu_are_named_on_a_cpu():
    flags = ["--bank-size", "64", "--compile", "graphs", "--step-graph", "--fused-augment"]
    without_bank = SimpleNamespace(memory_bank=None)
    notes = main_snclr.setting_notes(options.parse(flags), without_bank, 5000, torch.device("cpu"))
    assert [note.split()[0].rstrip(":") for note in notes] == [*flags[2:3], *flags[4:]]


@pytest.mark.parametrize(
    "flags",
    [
        "--topk 30 --bank-size 30",
        "--topk 0",
        "--method mocov3 --topk 31 --bank-size 30",
        "--arch resnet8 --img-size 40",
        "--threshold --topk 2",
        "--threshold --weights key",
        "--epochs 5 --nn-warmup-epochs 2 --nn-ramp-epochs 3",
        "--epochs 5 --warmup-epochs 5",
        "--warmup-epochs 0",
        "--snclr-m 0",
        "--snclr-m 1",
        "--crop-min 1",
        "--wd 0",
        "--seed -1",
    ],
)
def test_edges_are_allowed(flags):
    parse(*flags.split())


@pytest.mark.parametrize(
    "ranks, batch, fits", [(1, 6, True), (2, 6, True), (3, 6, True), (4, 6, False), (8, 6, False)]
)
def test_batch_must_divide_over_the_ranks(ranks, batch, fits, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    if fits:
        assert parse("-b", batch).batch_size == batch
    else:
        assert f"divisible by the {ranks} ranks" in refused("-b", batch)


def test_parsing_does_not_import_what_is_slow(process):
    code = "import sys; from snclr import options; options.parse([]); "
    code += "print({'torch', 'numpy', 'timm'} & set(sys.modules))"
    result = process(sys.executable, "-c", code, PYTHONPATH=str(ROOT))
    assert (result.stdout, result.stderr) == ("set()\n", "")


COMMANDS_BEFORE_THE_SLOW_IMPORTS = """
import runpy, sys
for module in sys.argv[1:]:
    for flag in ("--help", "--patch-size=-3"):
        sys.argv = [module, flag]
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            print("exit code", end.code)
print({"torch", "numpy", "timm"} & set(sys.modules))
"""


def test_commands_answer_help_and_a_wrong_flag_before_the_slow_imports(process):
    modules = [f"snclr.{name}" for name in ("embed", "export", "mean_std", "sweep", "visualize")]
    command = [sys.executable, "-c", COMMANDS_BEFORE_THE_SLOW_IMPORTS, *modules]
    result = process(*command, PYTHONPATH=str(ROOT))
    lines = result.stdout.splitlines()
    assert [x for x in lines if x.startswith("exit")] == ["exit code 0", "exit code 2"] * 5
    assert [line.split(": ")[0] for line in result.stderr.splitlines()] == modules
    assert lines[-1] == "set()"


DATA_FLAGS_ARE_READ_IN = [
    f"snclr/datasets/{name}.py" for name in ("sources", "files", "torchvision_sets")
]
PROGRAMS = {
    options.parse: [
        "main_snclr.py",
        *(
            str(path.relative_to(ROOT))
            for path in (ROOT / "snclr").rglob("*.py")
            if path.stem not in ("options", "shared_options")
        ),
    ],
    lincls_options.parse: [
        "main_lincls.py",
        *DATA_FLAGS_ARE_READ_IN,
        *(
            str(path.relative_to(ROOT))
            for path in (ROOT / "snclr/evaluation").glob("*.py")
            if path.stem != "options"
        ),
    ],
    visualize.parse: ["snclr/visualize.py", *DATA_FLAGS_ARE_READ_IN],
    embed.parse: ["snclr/embed.py", *DATA_FLAGS_ARE_READ_IN],
    export.main: ["snclr/export.py"],
    report.main: ["snclr/report.py"],
    sweep.parse: ["snclr/sweep.py"],
    mean_std.parse: ["snclr/mean_std.py", *DATA_FLAGS_ARE_READ_IN],
}


@pytest.mark.parametrize(
    "start", PROGRAMS, ids=lambda start: f"{start.__module__}.{start.__name__}"
)
def test_every_flag_is_read_by_its_program(start, monkeypatch):
    parsers = []

    def stop(parser, *arguments):
        parsers.append(parser)
        raise KeyboardInterrupt

    monkeypatch.setattr(arguments._Parser, "parse_args", stop)
    with pytest.raises(KeyboardInterrupt):
        start([])
    text = "".join((ROOT / name).read_text() for name in PROGRAMS[start])
    text = re.sub(r"\s+", " ", text)  # ignore line breaks
    flags = {action.dest for action in parsers[0]._actions} - {"help"}
    by_name = {
        name
        for names in re.findall(r"getattr\(args, name\)\s+for name in \(([^)]*)\)", text)
        for name in re.findall(r"\w+", names)
    }
    all_of_them = r"open_by_flags\(args|getattr\(args, name, None\) for name in DEFAULTS"
    if re.search(all_of_them, text):
        by_name |= {*load.DEFAULTS}
    assert {flag for flag in flags - by_name if not re.search(rf"\bargs\.{flag}\b", text)} == set()


def test_every_flag_is_explained():
    assert [flag.dest for flag in FLAGS if not flag.help] == []


def test_every_flag_states_what_a_resumed_run_does_with_it():
    assert set(options.ON_RESUME) == {flag.dest for flag in FLAGS}
    with pytest.raises(ValueError, match="must be fixed, reported or free, found 'never'"):
        arguments.flag(argparse.ArgumentParser(), "--new", on_resume="never")


@pytest.mark.parametrize(
    "kind, limits, text, expected",
    [
        (int, {}, "0", 0),
        (int, {}, "-1", "must be 0 or more, found -1"),
        (int, {"above_zero": True}, "0", "must be above 0, found 0"),
        (float, {"above_zero": True}, "1e-9", 1e-9),
        (float, {}, "inf", "must be 0 or more, found inf"),
        (float, {}, "nan", "must be 0 or more, found nan"),
        (float, {"most": 1}, "1.01", "must be between 0 and 1, found 1.01"),
        (float, {"above_zero": True, "most": 1}, "0", "must be above 0 and at most 1, found 0"),
        (float, {"above_zero": True, "most": 1}, "1", 1.0),
    ],
)
def test_a_number_has_limits(kind, limits, text, expected):
    convert = arguments.number(kind, **limits)
    if isinstance(expected, str):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{expected}$"):
            convert(text)
    else:
        assert convert(text) == expected and type(convert(text)) is kind


@pytest.mark.parametrize(
    "flags, width",
    [
        ("", 24),  # the embedded recipe's
        ("-a resnet8", 24),
        ("-a resnet18", None),
        ("-a resnet18 --width 24", 24),
        ("--width 8 --arch resnet18", 8),
        ("--arch timm:resnet18", None),
        ("@configs/cifar10_resnet18.args . -a resnet50", None),
    ],
)
def test_a_recipes_width_is_for_the_recipes_architecture(flags, width):
    assert parse(*flags.split()).width == width


def test_defaults_follow_from_the_data(images):
    large, small = parse(images), parse()
    assert (large.dataset, large.img_size, large.blur, large.warmup_epochs) == (
        "folder",
        224,
        True,
        40,
    )
    assert (small.dataset, small.img_size, small.blur) == ("embedded", 32, False)
    assert parse(images, "--dataset", "cifar10").img_size == 32
    assert parse(images, "--epochs", 20).warmup_epochs == 4
    assert parse(images, "--no-blur").blur is False and parse("--blur").blur is True
    assert parse(images, "--warmup-epochs", 0).warmup_epochs == 0
    assert (large.local_views, large.local_size, small.local_size) == (0, 96, 16)
    assert (large.crop_min, parse(images, "--method", "mocov2").crop_min) == (0.08, 0.2)
    assert parse(images, "--method", "mocov2", "--crop-min", 0.5).crop_min == 0.5


# -- recipes ---------------------------------------------------------------------------------------


def recipe(path, *flags):
    """Arguments of a run with a recipe; data is a folder if the recipe needs one."""
    dataset = options.build_parser().parse_args([f"@{path}"]).dataset
    return [f"@{path}", *([] if dataset == "embedded" else [os.getcwd()]), *map(str, flags)]


def test_there_are_recipes():
    assert Path(options.EMBEDDED_RECIPE) in RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_and_states_its_purpose(path):
    parse(*recipe(path))
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert path.read_text().startswith("#")
    header = " ".join(line[2:] for line in head)
    assert "Source: " in header and ("not measured" in header or "docs/RESULTS.md" in header)
    if path.parent.name == "configs":  # an ablation's are those of its base
        assert (
            "Hardware" in header
            and "memory" in header
            and ("hours" in header or "minutes" in header)
        )


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_an_ablation_changes_one_setting_of_the_recipe_before_it_or_of_the_embedded_one(path):
    for base in (
        [],
        ["@configs/cifar10_resnet18.args", os.getcwd()],
    ):  # paths in the repository work from any folder
        before, after = vars(parse(*base)), vars(parse(*base, f"@{path}"))
        assert sum(before[name] != after[name] for name in after) == (path.stem != "base")


def test_a_recipe_may_begin_with_another(tmp_path):
    (tmp_path / "mine.args").write_text("@configs/embedded.args\n--topk 9\n")
    (tmp_path / "yours.args").write_text("@mine.args --epochs 3")
    args = parse("@yours.args")
    assert (args.topk, args.epochs, args.bank_size) == (9, 3, parse().bank_size)


def test_a_recipe_here_is_preferred_to_the_repositorys(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/embedded.args").write_text("--topk 3")
    assert parse("@configs/embedded.args").topk == 3


def test_the_recipes_of_the_methods_differ_only_in_the_method():
    base = ROOT / "configs/cifar10_resnet18.args"
    for method in ("nnclr", "mocov3", "mocov2"):
        other = vars(parse(*recipe(base.with_stem(f"{base.stem}_{method}"))))
        # the graph of mocov2 has not run on a GPU
        own = {"method": method, "step_graph": method != "mocov2"}
        assert other == {**vars(parse(*recipe(base))), **own}


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains_when_it_is_made_small(path, images, tmp_path):
    """All settings of the recipe but the sizes: two steps on eight images."""
    flags = "--img-size 32 --snclr-mlp-dim 32 --bank-size 16 --topk 2 -b 4 --workers 0 "
    flags += "--eval-freq 0 --stop-after-steps 2 --dataset folder"
    if "--init-from timm:" in path.read_text():  # a file in place of timm's download
        weights = timm.create_model("vit_small_patch16_224", img_size=32, num_classes=0)
        torch.save(weights.state_dict(), tmp_path / "start.pth")
        flags += f" --init-from {tmp_path / 'start.pth'}"
    main_snclr.main([f"@{path}", str(images), *flags.split(), "--workdir", str(tmp_path / "run")])
    assert (tmp_path / "run/checkpoint_last.pth.tar").exists()


def test_an_unknown_timm_model_ends_with_close_names_and_leaves_nothing(images, tmp_path):
    message = refused(
        *tiny(images, "--workdir", tmp_path / "w", "-a", "timm:resnet1O1"), by=main_snclr.main
    )
    assert (
        "timm has no model resnet1O1; close names are resnet" in message
        and not (tmp_path / "w").exists()
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_later_flags_override_a_recipe(path):
    changes = {
        "lr": 0.125,
        "seed": 7,
        "print_freq": 3,
        "batch_size": 32,
        "method": "mocov3",
        "warmup_epochs": 0.5,
    }
    flags = [
        part for name, value in changes.items() for part in (f"--{name.replace('_', '-')}", value)
    ]
    args = vars(parse(*recipe(path, *flags)))
    assert {name: args[name] for name in changes} == changes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("flag", BOOLEANS, ids=lambda flag: flag.dest)
def test_later_flags_switch_each_boolean_of_a_recipe_on_and_off(path, flag):
    on, off = flag.option_strings
    read = (
        options.build_parser().parse_args
    )  # without the checks: not every recipe can be combined with every flag
    assert getattr(read([f"@{path}", on]), flag.dest) is True
    assert getattr(read([f"@{path}", on, off]), flag.dest) is False


def test_without_data_the_embedded_recipe_is_taken_and_can_be_overridden():
    assert vars(parse()) == vars(parse(f"@{options.EMBEDDED_RECIPE}"))
    changed = {"topk": 7, "snclr_m_cos": False}
    assert vars(parse("--topk", 7, "--no-snclr-m-cos")) == {**vars(parse()), **changed}


def test_recipes_take_comments_blank_lines_and_several_flags_a_line(tmp_path):
    lines = [
        "# --topk 1",
        "",
        "  --topk 2 --lr 0.5   # --topk 3",
        "--workdir 'a folder'",
        "   ",
        "--snclr-m-cos",
    ]
    (tmp_path / "my.args").write_text("\n".join(lines))
    args = parse("@my.args")
    assert (args.topk, args.lr, args.workdir, args.snclr_m_cos) == (2, 0.5, "a folder", True)


def test_data_may_follow_a_list_of_numbers(images, tmp_path):
    recipe = tmp_path / "mine.args"
    recipe.write_text("--mean 0.5 0.5 0.5 --std 0.2 0.2 0.2\n")
    args = options.parse([f"@{recipe}", str(images)])
    assert args.data == str(images) and args.std == [0.2] * 3
    args = options.parse(["--jitter", "0.4", "0.4", "0.2", "0.1", str(images), "--lr", "1"])
    assert args.data == str(images) and args.jitter == [0.4, 0.4, 0.2, 0.1] and args.lr == 1
    args = lincls_options.parse(["--lrs", "1", "2", str(images), "--pretrained", str(recipe)])
    assert args.data == str(images) and args.lrs == [1, 2]


def test_flags_before_a_recipe_are_overridden_by_it(tmp_path):
    (tmp_path / "my.args").write_text("--topk 2")
    assert parse("--topk", 9, "@my.args").topk == 2


@pytest.mark.parametrize(
    "text",
    [
        None,
        b"--topk 2 --bogus",
        b"--topk",
        b"--workdir 'a folder",
        b"\xff\xfe\x00binary",
        b"@my.args",
    ],
    ids=["missing", "unknown flag", "no value", "open quote", "binary", "itself"],
)
def test_recipe_that_cannot_be_read_is_answered_in_one_line(text, tmp_path):
    if text is not None:
        (tmp_path / "my.args").write_bytes(text)
    refused("@my.args")


def test_missing_recipe_is_named():
    message = refused("@configs/nothing.args")
    assert "configs/nothing.args" in message and "Errno" not in message


# -- data ------------------------------------------------------------------------------------------


def test_missing_data_folder_is_named():
    assert "nowhere" in refused("nowhere")


def test_file_as_data_folder_is_refused(tmp_path):
    (tmp_path / "images.mp4").touch()
    refused("images.mp4")


@pytest.mark.parametrize(
    "folders, expected", [([], "no image"), (["train"], "no image"), (["train/cats"], "no image")]
)
def test_folder_without_images_is_refused_and_nothing_is_left(folders, expected, tmp_path):
    data = tmp_path / "data"
    for folder in ("", *folders):
        (data / folder).mkdir(parents=True, exist_ok=True)
    assert expected in refused(data, "--workdir", "w", by=main_snclr.main)
    assert not Path("w").exists()


def test_batch_larger_than_the_data_set_is_refused_and_nothing_is_left(images):
    message = refused(*tiny(images, "-b", 9, "--workdir", "w"), by=main_snclr.main)
    assert "--batch-size 9 exceeds the 8 training images" in message
    assert not Path("w").exists()


# -- folders and checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--resume", "auto"]])
def test_a_probe_in_the_workdir_of_a_pretraining_run_is_refused_and_the_folder_is_not_changed(
    flags, images, run
):
    before, checkpoint = content(run), run / "checkpoint_last.pth.tar"
    probe = [
        str(images),
        "--dataset",
        "folder",
        "--pretrained",
        str(checkpoint),
        "--workdir",
        str(run),
        *flags,
    ]
    assert "whose args.json would be lost" in refused(*probe, by=lincls_options.parse)
    assert content(run) == before


@pytest.mark.parametrize("flags", [[], ["--resume", "elsewhere.pth.tar"]])
def test_workdir_of_another_run_is_refused_and_not_changed(flags, images, run):
    shutil.copy(run / "checkpoint_last.pth.tar", "elsewhere.pth.tar")
    before = content(run)
    assert "holds another run" in refused(
        *tiny(images, "--workdir", run, *flags), by=main_snclr.main
    )
    assert content(run) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint_last.pth.tar"])
def test_either_trace_of_a_run_protects_its_workdir(name, tmp_path):
    (tmp_path / "w").mkdir()
    parse("--workdir", "w")
    (tmp_path / "w" / name).touch()  # as of a run that failed before its first step
    parse("--workdir", "w")
    (tmp_path / "w" / name).write_text("{}")
    refused("--workdir", "w")
    parse("--workdir", "w", "--resume", "auto")


def test_file_as_workdir_is_refused(tmp_path):
    (tmp_path / "w").touch()
    assert "is a file" in refused("--workdir", "w")


def test_workdir_below_a_file_is_refused(images, tmp_path):
    (tmp_path / "w").touch()
    refused(*tiny(images, "--workdir", "w/x"), by=main_snclr.main)


def test_missing_checkpoint_is_named():
    assert "nothing.pth.tar" in refused("--resume", "nothing.pth.tar")


def test_resume_auto_without_workdir_is_refused():
    assert "--workdir" in refused("--resume", "auto")


def test_without_a_readable_checkpoint_the_run_is_refused_and_not_changed(images, run):
    for name in ("last", "last-1"):
        path = run / f"checkpoint_{name}.pth.tar"
        path.write_bytes(path.read_bytes()[:5000])
    before = content(run)
    assert "truncated" in refused(
        *tiny(images, "--workdir", run, "--resume", "auto"), by=main_snclr.main
    )
    assert content(run) == before


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--seed 3", "seed 0 -> 3"),
        ("--method mocov3", "method 'snclr' -> 'mocov3'"),
        ("--bank-size 9", "bank_size 8 -> 9"),
        ("--weights projected", "2 keys missing: module.attention.f1.weight"),
        ("-b 2", "batch_size 4 -> 2"),
        ("--crop-min 0.5", "crop_min 0.08 -> 0.5"),
    ],
)
def test_checkpoint_of_other_settings_is_refused_and_the_run_is_not_changed(
    flags, named, images, run
):
    before = content(run)
    assert named in refused(
        *tiny(images, "--workdir", run, "--resume", "auto", *flags.split()), by=main_snclr.main
    )
    assert content(run) == before


def test_resume_auto_starts_a_new_run_in_an_empty_folder(images):
    main_snclr.main(tiny(images, "--workdir", "new", "--resume", "auto", "--stop-after-steps", 1))
    assert Path("new/checkpoint_last.pth.tar").exists()


@pytest.mark.parametrize("flags", [[], ["--keep", "3"]])
def test_an_older_checkpoint_is_resumed_where_the_last_one_is_damaged(flags, images, run):
    (run / "checkpoint_last.pth.tar").write_bytes(b"damaged")
    main_snclr.main(tiny(images, "--workdir", run, "--resume", "auto", *flags))
    assert tensor_files.read(run / "checkpoint_last.pth.tar")["step"] == 4


def test_a_second_run_of_a_slurm_job_does_not_overwrite_the_first(images, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    flags = tiny(images, "--stop-after-steps", "1")
    main_snclr.main(flags)
    before = content(Path("runs"))
    message = refused(*flags, "--seed", "1", by=main_snclr.main)
    assert "77 holds another run" in message and content(Path("runs")) == before


def test_ranks_with_other_images_are_refused(images, monkeypatch):
    monkeypatch.setattr(main_snclr.distributed, "union", lambda kinds: kinds | {"9 images, abc"})
    message = refused(*tiny(images, "--workdir", "w"), by=main_snclr.main)
    assert "the ranks have different training images: 8 images, " in message
    assert "9 images, abc" in message


def test_checkpoint_named_without_a_folder_is_resumed_in_the_current_one(images, run, monkeypatch):
    monkeypatch.chdir(run)
    main_snclr.main(tiny(images, "--resume", "checkpoint_last.pth.tar"))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_restart_continues_what_an_older_checkpoint_began(
    elsewhere, images, run, tmp_path, monkeypatch, capsys
):
    """Not from that checkpoint again; the one of the course that was left is not taken either."""
    older = run / "checkpoint_last-1.pth.tar"  # of the first of two epochs
    workdir = tmp_path / "other" if elsewhere else run
    argv = tiny(images, "--resume", older, "--lr", 0.5, *["--workdir", workdir][: 2 * elsewhere])
    monkeypatch.setattr(sys, "argv", ["main_snclr.py", *argv])
    if not elsewhere:  # a restart before anything of this command was saved
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    main_snclr.main([*argv, "--stop-after-steps", "3"])
    assert tensor_files.read(workdir / "checkpoint_last.pth.tar")["step"] == 3
    assert elsewhere or (run / "checkpoint_last.pth.tar.abandoned").exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    capsys.readouterr()
    main_snclr.main(argv)
    assert f"resumed from {workdir / 'checkpoint_last.pth.tar'} after step 3" in (
        capsys.readouterr().out
    )
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line][-1] == 4


# -- whole processes -------------------------------------------------------------------------------


@pytest.fixture
def process(tmp_path):
    """Run a command in a process in which importing torch fails."""
    poison = tmp_path / "poison"
    poison.mkdir()
    (poison / "torch.py").write_text("raise ImportError('torch was imported')")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    more = {"PYTHONPATH": str(poison), "PATH": path, "NPROC_PER_NODE": "1", "PIP_NO_INDEX": "1"}

    def run(*command, **variables):
        environment = {**os.environ, **more, **variables}
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=600, check=False
        )

    return run


def assert_one_line(result, code=2):
    assert result.returncode == code
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith(
        "main_snclr.py: error: "
    )


def test_wrong_flag_is_one_line_and_exit_code_two_before_the_slow_imports(process):
    result = process(sys.executable, ROOT / "main_snclr.py", "--topk", "-3")
    assert_one_line(result)
    assert "--topk must be 0 or more, found -3" in result.stderr


def test_wrong_data_is_one_line_and_exit_code_two(process, tmp_path):
    (tmp_path / "train").mkdir()
    result = process(sys.executable, ROOT / "main_snclr.py", tmp_path, PYTHONPATH="")
    assert_one_line(result)
    assert "no image" in result.stderr


def test_help_lists_every_group(process):
    result = process(sys.executable, ROOT / "main_snclr.py", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    groups = {
        group.title for group in options.build_parser()._action_groups if group._group_actions
    }
    assert {"data", "model", "objective", "optimisation", "run"} <= groups
    assert [title for title in groups if f"\n{title}:" not in result.stdout] == []


def test_launcher_answers_a_wrong_flag_in_one_line(process):
    result = process("bash", ROOT / "start.sh", "--bogus")
    assert_one_line(result)
    assert "--bogus" in result.stderr


def test_launcher_checks_the_batch_for_the_processes_it_would_start(process):
    result = process("bash", ROOT / "start.sh", "--batch-size", "64", NPROC_PER_NODE="3")
    assert_one_line(result)
    assert "divisible by the 3 ranks" in result.stderr


@pytest.mark.parametrize(
    "error, rank, code, expected",
    [
        (UsageError("no such flag"), 0, 2, "prog: error: no such flag\n"),
        (UsageError("no such flag"), 1, 2, ""),  # the others would only repeat it
        (UsageError("RANK is 2"), 2, 2, "prog: error: RANK is 2\n"),  # no rank 0 has this error
        (
            RunError("loss is nan"),
            1,
            1,
            f"prog: stopped on rank 1 ({socket.gethostname()}): loss is nan\n",
        ),
        (Interrupted("SIGTERM: saved"), 0, 75, "prog: SIGTERM: saved\n"),
        (Interrupted("SIGTERM: saved"), 1, 75, ""),
        (KeyboardInterrupt(), 0, 130, "prog: interrupted\n"),
        (KeyboardInterrupt(), 1, 130, ""),
    ],
)
def test_own_errors_end_with_a_line_and_a_code(error, rank, code, expected, monkeypatch, capsys):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as caught, one_clear_line("prog"):
        raise error
    assert caught.value.code == code
    assert capsys.readouterr() == ("", expected)


def test_each_machine_prints_a_usage_error_that_rank_0_may_not_have(monkeypatch, capsys):
    monkeypatch.setattr(os, "_exit", sys.exit)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    for local_rank, line in (("0", "prog: error: no such folder\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit), one_clear_line("prog"):
            raise UsageError("no such folder")
        assert capsys.readouterr().err == line


def test_a_line_is_written_in_one_piece_so_that_those_of_several_ranks_do_not_run_into_each_other(
    monkeypatch,
):
    pieces = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=pieces.append, flush=lambda: None))
    with pytest.raises(SystemExit), one_clear_line("prog"):
        raise RunError("a disk is full")
    assert len(pieces) == 1 and pieces[0].endswith(": a disk is full\n")


def test_real_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), one_clear_line("prog"):
        _ = 1 / 0
