"""docs/MIGRATING.md: files of other projects are read, and its commands are understood."""

import re
import shlex

import pytest
import torch
import torchvision
from test_backbones import build
from test_ranks import ROOT

import main_lincls
import snclr
from snclr import augment, embed, export, optim, options, sweep, visualize
from snclr.evaluation import knn, probe
from snclr.evaluation import options as evaluation_options
from snclr.running.errors import UsageError

PAGE = (ROOT / "docs/MIGRATING.md").read_text()
COMMANDS = re.findall(r"^bash start\.sh (.*)$", PAGE.replace("\\\n", ""), re.MULTILINE)
(CONVERT,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# the two columns of each row of the tables
ROWS = re.findall(r"^\| (.+?) \| (.+) \|$", PAGE, re.MULTILINE)
COMMAND_PARSERS = {"embed": embed.parse, "export": export.parse, "sweep": sweep.parse}
COMMAND_PARSERS["visualize"] = visualize.parse
# values for flags that the page names without one, if they have neither choices nor a default
VALUES = {"--img-size": 64, "--crop-min": 0.2, "--micro-batch": 8, "--subset": 0.5, "--grey-p": 0.2}
VALUES |= {"--blur-p": "1 0.1", "--solarise-p": "0 0.2", "--flip-h": 0.5, "--flip-v": 0.5}
VALUES |= {"--jitter": "0.4 0.4 0.2 0.1 0 0 0 0", "--jitter-p": 0.8, "--rotate90": 0.75, "-j": 2}
VALUES |= {"--warmup-epochs": 5, "--num-heads": 6, "-a": "resnet50", "--arch": "resnet18"}
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


@pytest.mark.parametrize(
    "prefix, rename",
    [
        ("backbone", {}),  # solo-learn and lightly's benchmarks
        ("backbone", SEQUENTIAL),  # lightly's examples
        ("encoder", {}),  # solo-learn until 1.0.2
    ],
)
def test_files_of_solo_learn_and_of_lightly_are_read(tmp_path, resnet, prefix, rename):
    save_as_lightning(tmp_path / "last.ckpt", resnet, prefix, rename)
    assert_is_read(tmp_path / "last.ckpt", resnet)


def test_files_of_lightning_with_other_objects_are_read_after_the_conversion(
    tmp_path, resnet, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    save_as_lightning("last.ckpt", resnet, "backbone", {}, hyper_parameters=torch.nn.Identity())
    with pytest.raises(UsageError, match=r"last\.ckpt"):
        snclr.load_encoder("last.ckpt", arch="resnet18")
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


def flags_in(cell):
    """The command of each code span with flags, and its words; of all scripts, the flags only."""
    for span in re.findall(r"`([^`]+)`", cell):
        words = shlex.split(span.replace(" ...", ""))
        if words[:2] == ["python", "-m"]:
            yield words[2].removeprefix("snclr."), words[3:]
        elif words[0].startswith("-"):
            yield "script", words


def with_value(words, parser, files):
    """The words, with a value after a flag that stands alone."""
    action = parser._option_string_actions[words[0]]
    if len(words) > 1 or action.nargs == 0 or "BooleanOptional" in type(action).__name__:
        return words
    value = files.get(words[0]) or VALUES.get(words[0])
    if value is None:
        value = next(iter(action.choices)) if action.choices else action.default
    assert value is not None, words
    return [words[0], *str(value).split()]


@pytest.mark.docs
@pytest.mark.parametrize("left, right", ROWS, ids=range(len(ROWS)))
def test_the_flags_of_each_row_are_understood(left, right, images, tmp_path, monkeypatch):
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: name)
    (tmp_path / "file").touch()
    files = {"--workdir": f"{tmp_path}/run", "--val": images / "val", "--log": "wandb"}
    files |= {name: f"{tmp_path}/file" for name in ("--init-from", "--pretrained")}
    files["--resume"] = f"{tmp_path}/file"
    names = {"FILE": files["--pretrained"], "PATH": files["--resume"], "DATA": str(images)}
    names |= {"OUT": f"{tmp_path}/out.pth", "features.npz": f"{tmp_path}/features.npz"}
    names |= {"DIR": f"{tmp_path}/sweep", "RECIPE": "a=--topk 2", "timm:NAME": "timm:resnet18"}
    for command, found in flags_in(left + right if right.startswith("the same") else right):
        words = [names.get(word, word) for word in found]
        if command != "script":
            if words:
                COMMAND_PARSERS[command](words)
            continue
        is_evaluation = "main_lincls" in left + right or words[0] not in DEFINED
        module = evaluation_options if is_evaluation else options
        words = with_value(words, module.build_parser(), files)
        if is_evaluation and "--pretrained" not in words:
            words += ["--pretrained", files["--pretrained"]]
        if "auto" in words and "--resume" in words:
            words += ["--workdir", files["--workdir"]]
        module.parse([str(images), *words])


DEFINED = {string for action in options.FLAGS for string in action.option_strings}


def test_what_the_rows_say_about_values_is_so():
    args = options.parse(["x", "--dataset", "hf"])
    assert (args.arch, args.num_heads, args.method) == ("vit_small", 12, "snclr")
    for arch in ("vit_small", "vit_base", "vit_conv_small", "vit_conv_base"):
        assert options.parse(["x", "--dataset", "hf", "-a", arch]).num_heads == 12
    assert len(ROWS) > 90
    # augmentation of moco-v3, of DINO, and of solo-learn's asymmetric.yaml
    first, second = augment.build_views(args)
    for view in (first, second):
        assert (view.jitter_p, view.jitter, view.gray_p) == (0.8, (0.4, 0.4, 0.2, 0.1), 0.2)
        assert view.flip_p == 0.5
    assert [(view.blur_p, view.solarize_p) for view in (first, second)] == [(1, 0), (0.1, 0.2)]
    *_, local = augment.build_views(options.parse(["x", "--dataset", "hf", "--local-views", "1"]))
    assert (local.blur_p, local.solarize_p, local.crop_min) == (0.5, 0, 0.05)
    # optimiser: momentum 0.9; the rate falls to 0, and the momentum encoder's rises to 1
    layer = torch.nn.Linear(2, 2)
    for name in ("sgd", "lars"):
        assert optim.build_optimizer(name, layer, 0.1, {}).param_groups[0]["momentum"] == 0.9
    schedule = {"steps_per_epoch": 10, "warmup_epochs": 1, "epochs": 5}
    assert optim.learning_rate(50, peak=1, **schedule) == pytest.approx(0)
    assert optim.encoder_momentum(50, start=0.996, total_steps=50, cosine=True) == 1
    # kNN of DINO's eval_knn.py and of lightly's benchmarks, the published probe's rates
    assert main_lincls.KNN_K == (10, 20, 100, 200)
    assert knn.NAMED_VOTES == {"knn_top1": (20, 0.07), "knn200_top1": (200, 0.1)}
    assert probe.MOCOV3_RATES["vit"] == 3
    # the ViT with DINO's stochastic depth, and the stem for CIFAR
    timm_kwargs = {"drop_path_rate": 0.1, "dynamic_img_size": True}
    vit = build("timm:vit_small_patch16_224", img_size=32, timm_kwargs=timm_kwargs)
    assert vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert build("resnet18", img_size=32, small_stem=True).conv1.padding == (1, 1)
