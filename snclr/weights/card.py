"""The model card of an export: what the weights are, what was measured, how they are loaded."""

import contextlib
import json
import os
import shlex
from collections.abc import Callable

from ..choices import PUBLIC
from ..running.errors import one_line
from ..running.safe_files import json_object, read_json_lines, read_text
from .exported import packages_of

# settings of a run that a reader of its weights wants to know
SETTINGS = (
    "method",
    "arch",
    "patch_size",
    "num_heads",
    "width",
    "small_stem",
    "dataset",
    "subset",
    "init_from",
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "wd",
    "warmup_epochs",
    "seed",
    "freeze_backbone_epochs",
    "lr_scale",
    "crop_min",
    "snclr_t",
    "snclr_m",
    "bank_size",
    "topk",
    "form",
    "weights",
    "positiveness_t",
)
# metrics of an evaluation while training: the second and third need no labels
MEASURED = {
    "knn_top1": ("kNN top-1", "{:.2f} %"),
    "effective_rank": ("effective rank", "{:.1f}"),
    "view_agreement": ("view agreement", "{:.3f}"),
}
CARD = """---
pipeline_tag: image-feature-extraction
{library_line}tags:
- self-supervised
---

# {name}

Features of images: {arch}, {encoder} encoder, {num_features}
numbers an image. Written by `python -m snclr.export --format {library}`.

## Load

```python
{imports}

{build}
images = torch.rand(1, {channels}, {img_size}, {img_size})  # pixels between 0 and 1
mean, std = torch.tensor({mean}), torch.tensor({std})
images = (images - mean[:, None, None]) / std[:, None, None]
with torch.no_grad():
    features = {features}  # (1, {num_features})
```

## Images

{img_size} x {img_size} px, {kind}, divided by 255, then normalised.
{grey_range}Mean {mean}, standard deviation {std}. Of an image of another
size, take a central square of 7/8 of the shorter side and resize it.

## Training

{training}

## Results

{results}
"""


def model_card(
    name: str, library: str, build: str, features: str, info: dict, settings: dict, figures: dict
) -> str:
    """The text of the card, in Markdown.

    name      of the file or folder
    library   the --format
    build     Python code that builds the model; features: the expression for its features
    info      of snclr.weights.load.open_encoder
    settings  of the run, as run_settings returns them
    figures   a line about each measured figure, by its name
    """
    shown = {key: settings.get(key) for key in ("recipe", *SETTINGS)}
    if not str(settings.get("arch")).startswith("vit"):
        del shown["patch_size"]  # of ViTs
    training = {key: x for key, x in shown.items() if x is not None and x is not False}
    if info["epoch"] is not None:
        training["epochs of these weights"] = info["epoch"]
    grey_range = ""
    if info["grey_range"]:
        low, high = info["grey_range"]
        grey_range = (
            f"Images of more than 8 bits are scaled first: {low:g}..{high:g} becomes 0..255; other "
            "values are clipped.\n"
        )
    packages = packages_of(f"{build} {features}")
    hub_name = {"timm": "timm", "hf": "transformers"}.get(library)
    return CARD.format(
        **info | {"grey_range": grey_range},
        name=name,
        library=library,
        kind="RGB" if info["channels"] == 3 else f"{info['channels']} channels",
        library_line=f"library_name: {hub_name}\n" if hub_name else "",
        imports="\n".join(f"import {package}" for package in sorted({*packages, "torch"})),
        build=build,
        features=features,
        training=_table(training) or "Not known: the file does not say it.",
        results=_table(figures) or "Not measured.",
    )


def _table(entries):
    rows = [f"| {key} | {_cell(value)} |" for key, value in entries.items()]
    return "\n".join(["| | |", "|---|---|", *rows]) if rows else ""


def _cell(value):
    """A value from a file, which may be any text, as one short cell of a table."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return one_line(text)[:200].replace("|", "\\|")


def run_settings(path: str, settings: dict) -> dict:
    """The settings of the run that wrote the file at path, with its recipes as 'recipe'.

    settings: those in the file. Folders are left out: they mean nothing on another machine.
    """
    command = _json(os.path.join(os.path.dirname(path), "args.json")).get("command")
    words = []
    with contextlib.suppress(ValueError):  # an open quote
        words = shlex.split(command if isinstance(command, str) else "")
    recipes = " ".join(os.path.basename(word) for word in words if word.startswith("@"))
    start = settings.get("init_from")
    if isinstance(start, str) and not start.startswith(PUBLIC):
        settings = settings | {"init_from": os.path.basename(start)}
    return settings | {"recipe": recipes or None}


def run_figures(path: str, info: dict, digest: Callable[[], str]) -> dict[str, str]:
    """What was measured of exactly these weights, from files beside the one at path, by name.

    metrics.jsonl has kNN and label-free metrics of each evaluated epoch. results.json, also in the
    folder where main_lincls.py writes it by default, names the weights that it evaluated by their
    digest.
    """
    figures, folder = {}, os.path.dirname(path)
    if os.path.isfile(metrics := os.path.join(folder, "metrics.jsonl")):
        for line in read_json_lines(metrics):
            key = (line.get("epoch"), line.get("encoder"))
            # weights that were saved within an epoch have taken more steps than it
            is_theirs = info["step"] in (None, line.get("step"))
            if key != (info["epoch"], info["encoder"]) or not is_theirs:
                continue
            for metric, (name, text) in MEASURED.items():
                if type(line.get(metric)) in (int, float):
                    figures[f"{name} while training"] = text.format(line[metric])
    own_digest = digest()
    for parent in (folder, f"{os.path.splitext(path)[0]}_lincls"):
        results = _json(os.path.join(parent, "results.json"))
        if results.get("encoder_digest") != own_digest or results.get("label_fraction") is not None:
            continue
        for key, name in (("knn_top1", "kNN top-1"), ("linear_top1", "linear probe, top-1")):
            if type(results.get(key)) in (int, float):
                figures[name] = f"{results[key]:.2f} %, on {results.get('dataset')}"
    return figures


def _json(path):
    return json_object(read_text(path)) if os.path.isfile(path) else {}
