"""docs/MIGRATING.md: files of other projects are read, and its commands are understood."""

import re
import shlex

import pytest
import torch
import torchvision
from test_ranks import ROOT

import snclr
from snclr import options
from snclr.evaluation import options as evaluation_options

PAGE = (ROOT / "docs/MIGRATING.md").read_text()
COMMANDS = re.findall(r"^bash start\.sh (.*)$", PAGE.replace("\\\n", ""), re.MULTILINE)
(CONVERT,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# everything that their LightningModules save beside the backbone
HEADS = {"classifier.weight": (10, 512), "projector.0.weight": (8, 512), "queue": (16, 8)}
HEADS |= {"queue_ptr": (1,), "momentum_backbone.conv1.weight": (64, 3, 7, 7)}
SEQUENTIAL = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


@pytest.fixture(scope="module")
def resnet():
    network = torchvision.models.resnet18().eval()
    network.fc = torch.nn.Identity()
    return network


def save_as_lightning(path, resnet, prefix, rename, **more):
    """Lightning's checkpoint of a module that has the network under a name."""
    state = {}
    for name, tensor in resnet.state_dict().items():
        first, _, rest = name.partition(".")
        state[f"{prefix}.{rename.get(first, first)}.{rest}"] = tensor
    state |= {name: torch.zeros(shape) for name, shape in HEADS.items()}
    content = {"epoch": 399, "global_step": 1000, "pytorch-lightning_version": "2.1.0"}
    content |= {"loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}
    torch.save({**content, "state_dict": state, **more}, path)


def assert_is_read(path, resnet):
    encoder, _ = snclr.load_encoder(str(path), arch="resnet18")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), resnet(x))


def test_files_of_solo_learn_and_of_lightlys_benchmarks_are_read(tmp_path, resnet):
    save_as_lightning(tmp_path / "last.ckpt", resnet, "backbone", {})
    assert_is_read(tmp_path / "last.ckpt", resnet)


@pytest.mark.parametrize(
    "prefix, rename, more",
    [
        ("backbone", SEQUENTIAL, {}),  # lightly's examples
        ("encoder", {}, {}),  # solo-learn until 1.0.2
        ("backbone", {}, {"hyper_parameters": torch.nn.Identity()}),  # a class that is not plain
    ],
)
def test_other_files_of_lightning_are_read_after_the_conversion(
    tmp_path, resnet, prefix, rename, more, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    save_as_lightning("last.ckpt", resnet, prefix, rename, **more)
    exec(CONVERT, {})
    assert_is_read("backbone.pth", resnet)


@pytest.mark.docs
@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_the_commands_are_understood(command, images, tmp_path):
    (tmp_path / "file").touch()
    words = [str(images) if word.startswith("/data/") else word for word in shlex.split(command)]
    words = [re.sub(r"^[\w-]+\.(pth|ckpt|pth\.tar)$", str(tmp_path / "file"), w) for w in words]
    if words[0] == "main_lincls.py":
        evaluation_options.parse(words[1:])
    else:
        options.parse(words)
    assert len(COMMANDS) == 8
