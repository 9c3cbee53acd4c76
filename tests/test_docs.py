"""The pages agree with the code: links, names, recipes and flags exist, and the examples work.

A fork changes the code before its pages, so plain `pytest` leaves these tests out;
`bash tests/run.sh` and `pytest -m docs` run them.
"""

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ranks import write_images

import main_snclr
from snclr import options

pytestmark = pytest.mark.docs
ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
EXTENDING = ROOT / "docs/EXTENDING.md"
OTHERS = {"help", "dry-run", "nodes", "gpus-per-node", "cpus-per-task", "logdir"}
OTHERS |= {"requeue", "signal", "time", "wrap", "gpus", "max-restarts"}  # flags of other programs
OTHERS |= {"quick"}  # of benchmarks/gpu.sh
OTHERS |= {"num-gpus", "config-file", "cfg-options"}  # of detectron2 and mmdetection
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def heading_anchor(heading):
    """The anchor that GitHub gives to a heading."""
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


def test_the_method_names_functions_of_the_files_that_it_links_to():
    links = re.findall(r"\[`(\w+)`\]\(([^)#\s]+\.py)\)", (ROOT / "docs/METHOD.md").read_text())
    assert len(links) > 25
    for name, path in links:
        source = (ROOT / "docs" / path).resolve().read_text()
        assert re.search(rf"^\s*(def|class) {name}\b", source, re.MULTILINE), f"{name}: {path}"


def test_lines_are_at_most_100_columns():
    """Rows of tables, images and formulas are exempt: they cannot be broken."""
    too_long = [
        f"{path.name}:{number}"
        for path in [*PAGES, *ROOT.glob("configs/**/*.*")]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100 and not line.startswith(("|", "![", "$$"))
    ]
    assert too_long == []


def test_no_page_has_an_open_figure():
    assert [path.name for path in PAGES if re.search(r"@[A-Z]+@|TODO", path.read_text())] == []


def test_plain_pytest_leaves_the_pages_out_and_the_test_command_does_not(pytestconfig):
    assert "not slow and not docs" in pytestconfig.getini("addopts")
    assert 'set -- -m "not slow"' in (ROOT / "tests/run.sh").read_text()
    assert "tests/run.sh" in (ROOT / ".ci/run").read_text()


def test_every_recipe_has_its_line():
    text = (ROOT / "docs/RECIPES.md").read_text()
    recipes = [path.stem for path in ROOT.glob("configs/**/*.args")]
    assert [name for name in recipes if f"`{name}`" not in text] == []
    sweeps = [f"`sweeps/{path.name}`" for path in ROOT.glob("configs/sweeps/*")]
    assert len(sweeps) > 5 and [name for name in sweeps if name not in text] == []
    assert [
        name for name in re.findall(r"^\| `(\w[\w.]*)`", text, re.MULTILINE) if name not in recipes
    ] == []


def test_the_guide_lists_every_flag_of_the_pretraining_script():
    flags = (ROOT / "docs/GUIDE.md").read_text().split("\n## Flags\n")[1]
    names = [a.option_strings[0] for a in options.build_parser()._actions if a.option_strings]
    missing = [name for name in names if not re.search(rf"[`\s/]{name}[`\s/]", flags)]
    assert missing == ["-h"]


def test_the_list_of_files_is_that_of_the_package():
    """The tree of EXTENDING.md: two columns of indentation a folder, then the job of each file."""
    tree = re.search(r"^snclr/\n(.*?)^```", EXTENDING.read_text(), re.MULTILINE | re.DOTALL)[1]
    listed, folder = [], ""
    for indent, name, job in re.findall(r"^( +)(\S+)(.*)$", tree, re.MULTILINE):
        if name.endswith("/"):
            folder = name
        else:
            listed.append(f"{folder if len(indent) == 4 else ''}{name}")
            assert job.strip(), f"{name} has no job"
    files = [path.relative_to(ROOT / "snclr").as_posix() for path in ROOT.glob("snclr/**/*.py")]
    assert sorted(listed) == sorted(name for name in files if "__init__" not in name)


def test_public_functions_have_type_annotations():
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
        if page.name == "MIGRATING.md":  # its first columns have flags of other projects
            text = re.sub(r"^\|[^|]*", "", text, flags=re.MULTILINE)
        for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)(?=[\s`*,.:;)/=])", text)):
            known = flag.removeprefix("no-") if f'"--{flag}"' not in sources else flag
            assert f'"--{known}"' in sources or flag in OTHERS, f"{page.name}: --{flag}"
        for name in set(
            re.findall(r"`((?:snclr|tests|docs|benchmarks|tools|configs)/[\w/.]+\.\w+)`", text)
        ):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


# -- the examples --------------------------------------------------------------------------------

REPLACE = re.compile(
    r"^In `([^`]+)`, replace\n+```python\n(.*?)\n```\n+by\n+```python\n(.*?)\n```$",
    re.MULTILINE | re.DOTALL,
)
ADD = re.compile(
    r"^In `([^`]+)`, before `([^`]+)`, add\n+```python\n(.*?)```$", re.MULTILINE | re.DOTALL
)
COMMAND = re.compile(r"^python main_snclr.py(.*)$", re.MULTILINE)
FLAGS = ["--stop-after-steps=2", "--print-freq=1", "--eval-freq=0", "--amp=off", "--workers=0"]
EXAMPLES = ("objective", "loss term", "augmentation", "optimiser", "backbone", "data set")


DRAW = """
import numpy as np, torch
from snclr import augment
recipe = augment.Recipe(0, augment.moco_v3_views(32, 0.2, True))
sides = np.full(2000, 32)
boxes, drawn = augment.draw(recipe, 3, np.arange(2000), np.arange(2000) % 2, sides, sides)
torch.save([torch.from_numpy(boxes), *drawn], "draws.pt")
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the repository with the edits of the page, in which its commands ran two steps.

    Returns the copy, which holds the workdir of each command under the name of its example, and
    what the commands printed.
    """
    copy = tmp_path_factory.mktemp("extended")
    for name in ("snclr", "configs", "main_snclr.py"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
    page = EXTENDING.read_text()
    edits = [(path, old, new) for path, old, new in REPLACE.findall(page)]
    edits += [(path, anchor, new + anchor) for path, anchor, new in ADD.findall(page)]
    assert len(edits) == len(re.findall(r"^In `", page, re.MULTILINE))  # no edit was missed
    for path, old, new in edits:
        source = (copy / path).read_text()
        assert source.count(old) == 1, f"{path} has {old!r} {source.count(old)} times"
        (copy / path).write_text(source.replace(old, new))
    (script,) = re.findall(r"^```python\n(import numpy.*?)```$", page, re.MULTILINE | re.DOTALL)
    script += "\nimport main_snclr\n"
    for name in EXAMPLES:
        section = re.split(rf"^### An? .*{name}$", page, flags=re.MULTILINE)[1].split("\n### ")[0]
        (command,) = COMMAND.findall(section)
        run = [*command.split(), *FLAGS, "--workdir", str(copy / name)]
        script += f"print('{name}:', flush=True)\nmain_snclr.main({run})\n"
    script += DRAW  # in the same process
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return copy, done.stdout


@pytest.mark.filterwarnings("error:Mean of empty slice")  # images without labels
def test_the_five_commands_for_ones_own_photographs(tmp_path, monkeypatch, capsys):
    guide = (ROOT / "docs/GUIDE.md").read_text()
    section = guide.split("## Your own photographs in five commands")[1].split("\n## ")[0]
    (commands,) = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (search,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    write_images(tmp_path / "classes")
    (tmp_path / "photos").mkdir()
    for number, path in enumerate(sorted((tmp_path / "classes/train").rglob("*.png"))):
        path.rename(tmp_path / f"photos/{number:02}.png")
    monkeypatch.chdir(tmp_path)
    for command in commands.replace("/data/photos", "photos").splitlines():
        words = shlex.split(command, comments=True)
        if words[:2] == ["bash", "start.sh"]:
            main_snclr.main([*words[2:], *FLAGS, "--img-size=32"])
        elif words[:2] == ["python", "-m"]:
            importlib.import_module(words[2]).main([*words[3:], "--workers=0"])
        elif words == ["python", "search.py"]:
            capsys.readouterr()
            exec(search, {})
    nearest = re.findall(r"\d\d\.png", capsys.readouterr().out)
    assert nearest[0] == "00.png" and len(set(nearest)) == 5
    assert (tmp_path / "runs/photos/pictures/neighbours.png").exists()


def checkpoint(extended, name):
    return torch.load(extended[0] / name / "checkpoint_last.pth.tar", weights_only=True)


def test_the_example_of_an_objective_trains(extended):
    names = checkpoint(extended, "objective")["state_dict"]
    assert any("predictor" in name for name in names)
    assert not any("memory_bank" in name for name in names)
    printed = extended[1].split("objective:")[1].split("loss term:")[0]
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)  lr", printed)]
    assert len(losses) == 2 and all(0 < loss < 8 for loss in losses)


def test_the_example_of_a_loss_term_is_logged_and_in_the_loss(extended):
    text = (extended[0] / "loss term" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == 2 and all(-0.8 < line["term_uniformity"] < 0 for line in lines)
    assert all(line["loss_ratio"] is None for line in lines)  # there is a term beside the objective


def test_the_example_of_an_augmentation_changes_no_other_draw(extended, tmp_path, monkeypatch):
    """It is drawn for a fifth of the second views, after all other draws."""
    monkeypatch.chdir(tmp_path)
    exec(DRAW, {})
    before, (*after, posterized) = torch.load("draws.pt"), torch.load(extended[0] / "draws.pt")
    assert all(map(torch.equal, before, after)) and len(before) == len(after)
    first, second = posterized.view(-1, 2).float().mean(dim=0)
    assert first == 0 and abs(second - 0.2) < 0.04


def test_the_example_of_an_optimiser_trains(extended):
    (state, *_) = checkpoint(extended, "optimiser")["optimizer"]["state"].values()
    assert set(state) == {"exp_avg"}  # Lion's only one


def test_the_example_of_a_backbone_trains(extended):
    names = checkpoint(extended, "backbone")["state_dict"]
    assert names["module.base_encoder.body.6.weight"].shape == (64, 32, 3, 3)


def test_the_example_of_a_data_set_trains(extended):
    assert checkpoint(extended, "data set")["images"] == 256
    assert "npz (256 images, 32 px)" in extended[1]
