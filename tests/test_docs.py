"""What the pages say is so: links lead somewhere, names exist, recipes are listed, and the worked examples work."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from snclr import options

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
OTHERS = {"help", "dry-run", "nodes", "gpus-per-node", "cpus-per-task", "logdir"}
OTHERS |= {"requeue", "signal", "max-restarts"}  # flags of other programs
OTHERS |= {"num-gpus", "config-file", "cfg-options"}  # of detectron2 and mmdetection
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def heading_anchor(heading):
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for name, address in LINK.findall(page.read_text()):
        if "://" in address:
            continue
        path, _, anchor = address.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {name} -> {address}"
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(heading_anchor, headings), f"{page.name}: {name} -> {address}"


def test_the_method_names_functions_that_are_where_it_says():
    links = [
        (name.strip("`"), *path.split("#L"))
        for name, path in LINK.findall((ROOT / "docs/METHOD.md").read_text())
        if ".py" in path
    ]
    assert len(links) > 25
    for name, path, line in links:
        lines = (ROOT / "docs" / path).resolve().read_text().splitlines()
        places = [
            number
            for number, text in enumerate(lines, 1)
            if re.match(rf"\s*(def|class) {name}\b", text)
        ]
        assert places, f"{name} is not in {path}"
        # a screen away is near enough, so that small changes of the code need not change the page
        assert abs(places[0] - int(line)) < 40, (
            f"{name} has moved in {path}: python docs/figures.py renews the links"
        )


def test_every_recipe_has_its_line():
    text = (ROOT / "docs/RECIPES.md").read_text()
    recipes = [path.stem for path in ROOT.glob("configs/**/*.args")]
    assert [name for name in recipes if f"`{name}`" not in text] == []
    assert [
        name for name in re.findall(r"^\| `(\w[\w.]*)`", text, re.MULTILINE) if name not in recipes
    ] == []


def test_the_guide_lists_every_flag_of_the_pretraining_script():
    table = (ROOT / "docs/GUIDE.md").read_text().split("\n## Flags\n")[1]
    names = [
        action.option_strings[0]
        for action in options.build_parser()._actions
        if action.option_strings
    ]
    assert [
        name for name in names if name != "-h" and not re.search(rf"[`\s/]{name}[`\s/]", table)
    ] == []


def test_every_file_of_the_package_has_its_job_in_the_list():
    text = (ROOT / "docs/EXTENDING.md").read_text()
    assert [
        path.name
        for path in ROOT.glob("snclr/**/*.py")
        if path.name[0] != "_" and f"{path.name}`" not in text
    ] == []


def test_public_functions_say_their_types():
    bare = []
    for path in ROOT.glob("snclr/**/*.py"):
        top = ast.parse(path.read_text()).body
        scopes = [("", top)] + [
            (f"{c.name}.", c.body) for c in top if isinstance(c, ast.ClassDef) and c.name[0] != "_"
        ]
        for prefix, body in scopes:
            for function in body:
                if isinstance(function, ast.FunctionDef) and function.name[0] != "_":
                    arguments = [
                        a
                        for a in (*function.args.args, *function.args.kwonlyargs)
                        if a.arg not in ("self", "ctx")
                    ]
                    if function.returns is None or any(a.annotation is None for a in arguments):
                        bare.append(f"{path.name}: {prefix}{function.name}")
    assert bare == []


def test_flags_and_files_that_the_pages_name_exist():
    sources = "".join(
        path.read_text()
        for path in [
            *ROOT.glob("snclr/**/*.py"),
            *ROOT.glob("*.sh"),
            *ROOT.glob("benchmarks/*.py"),
            *ROOT.glob("tests/faults/*.py"),
        ]
    )
    for page in PAGES:
        text = page.read_text()
        for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)(?=[\s`*,.:;)/=])", text)):
            known = flag.removeprefix("no-") if f'"--{flag}"' not in sources else flag
            assert f'"--{known}"' in sources or flag in OTHERS, f"{page.name}: --{flag}"
        for name in set(
            re.findall(r"`((?:snclr|tests|docs|benchmarks|tools|configs)/[\w/.]+\.\w+)`", text)
        ):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


# -- the worked examples -------------------------------------------------------------------------------------------------

REPLACE = re.compile(
    r"^In `([^`]+)`, replace\n+```python\n(.*?)\n```\n+by\n+```python\n(.*?)\n```$",
    re.MULTILINE | re.DOTALL,
)
ADD = re.compile(
    r"^In `([^`]+)`, before `([^`]+)`, add\n+```python\n(.*?)```$", re.MULTILINE | re.DOTALL
)
RUNS = re.compile(r"^python main_snclr.py (.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the repository with the edits of the page, in which its commands have run for two steps."""
    copy = tmp_path_factory.mktemp("extended")
    for name in ("snclr", "configs", "main_snclr.py"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
    page = (ROOT / "docs/EXTENDING.md").read_text()
    edits = [(path, old, new) for path, old, new in REPLACE.findall(page)]
    edits += [(path, anchor, new + anchor) for path, anchor, new in ADD.findall(page)]
    assert len(edits) == page.count("\nIn `snclr/") == 13
    for path, old, new in edits:
        source = (copy / path).read_text()
        assert source.count(old) == 1, f"{path} has {old!r} {source.count(old)} times"
        (copy / path).write_text(source.replace(old, new))
    (script,) = re.findall(r"^```python\n(import numpy.*?)```$", page, re.MULTILINE | re.DOTALL)
    runs = [command.split() for command in RUNS.findall(page)]
    assert len(runs) == 3
    flags = [
        "--stop-after-steps",
        "2",
        "--print-freq",
        "1",
        "--eval-freq",
        "0",
        "--amp",
        "off",
        "--workers",
        "0",
    ]
    for number, run in enumerate(runs):
        script += f"\nimport main_snclr\nmain_snclr.main({[*run, *flags, '--workdir', str(copy / str(number))]})\n"
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return copy, done.stdout


def state(extended, number):
    return torch.load(extended[0] / str(number) / "checkpoint_last.pth.tar", weights_only=True)


def test_the_example_of_an_objective_trains(extended):
    names = state(extended, 0)["state_dict"]
    assert any("predictor" in name for name in names) and not any(
        "memory_bank" in name for name in names
    )
    losses = [
        float(loss) for loss in re.findall(r"loss (\d\.\d+)  lr", extended[1].split("allconv")[0])
    ]
    assert len(losses) == 2 and all(0 < loss < 8 for loss in losses)


def test_the_example_of_a_backbone_trains(extended):
    names = state(extended, 1)["state_dict"]
    assert names["module.base_encoder.body.6.weight"].shape == (64, 32, 3, 3)


def test_the_example_of_a_data_set_trains(extended):
    assert state(extended, 2)["images"] == 256 and "npz (256 images, 32 px)" in extended[1]
