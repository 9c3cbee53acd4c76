import copy
import os
from argparse import Namespace

import pytest
import torch
from torch.nn.functional import normalize

from snclr import builder, options
from snclr.loader import Batch
from snclr.running import forward
from snclr.running.errors import UsageError
from snclr.running.forward import compiled, resolve_compile
from snclr.running.guard import Guard

B = 8
FLAGS = "--img-size 32 --patch-size 16 --width 8 --snclr-dim 8 --snclr-mlp-dim 16 --blur"
FLAGS += " --bank-size 20 --topk 3"
pytestmark = pytest.mark.usefixtures("float64", "shallow")


def model_of(flags):
    """A model in float64 with a full bank; the same weights for the same arch and method."""
    torch.manual_seed(0)
    model = builder.build_model(
        options.parse(["@configs/embedded.args", *FLAGS.split(), *flags.split()])
    )
    if model.memory_bank is not None:
        model.memory_bank.enqueue(normalize(torch.randn(20, 8), dim=1), torch.arange(20))
    return model.train()


def step_of(model, side=32, local=0):
    """Loss, gradients and the state after one step."""
    torch.manual_seed(1)
    views = [*torch.randn(2, B, 3, side, side), *torch.randn(local, B, 3, side // 2, side // 2)]
    loss, _ = model(views, torch.arange(B) + 100, 0.9)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **gradients}, dict(model.state_dict())


def assert_close(actual, expected):
    for part, other in zip(actual, expected, strict=True):
        assert list(part) == list(other)
        for name, tensor in part.items():
            torch.testing.assert_close(
                tensor,
                other[name],
                rtol=1e-9,
                atol=1e-11,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize("method", options.METHODS)
@pytest.mark.parametrize("micro_batch", [1, 3, 8, 100])
def test_without_batch_norm_a_micro_batched_step_is_the_undivided_one(method, micro_batch):
    flags = f"--arch vit_tiny --method {method}"
    assert_close(
        step_of(model_of(f"{flags} --micro-batch {micro_batch}")), step_of(model_of(flags))
    )


@pytest.mark.parametrize("micro_batch", [3, 100])
def test_local_views_are_encoded_in_micro_batches_too(micro_batch):
    flags = "--arch vit_tiny --patch-size 8 --local-views 2 --local-size 16"
    actual = step_of(model_of(f"{flags} --micro-batch {micro_batch}"), local=2)
    assert_close(actual, step_of(model_of(flags), local=2))


def test_only_the_last_micro_batch_is_encoded_once():
    model, sizes = model_of("--arch vit_tiny --method nnclr --micro-batch 3"), []
    embed = model.embed
    model.embed = lambda encoder, x: sizes.append(len(x)) or embed(encoder, x)
    step_of(model)
    views = [3, 3, 2, 3, 3, 2]  # two views of 8 images
    assert sizes == views + views[-2::-1]  # backward repeats the others, the last one first


def test_batch_norms_see_a_micro_batch_at_a_time_and_count_it_once():
    actual = step_of(model_of("--arch resnet8 --micro-batch 4"))
    twin = model_of("--arch resnet8")
    # the same batches, without recomputation
    twin.embed = lambda encoder, x: torch.cat([encoder.embed(part) for part in x.split(4)])
    assert_close(actual, step_of(twin))
    assert twin.base_encoder.bn1.num_batches_tracked == 4  # two views of two micro-batches


@pytest.mark.parametrize(
    "flags", ["--arch resnet8", "--arch vit_tiny", "--arch vit_conv_small", "--arch timm:test_vit2"]
)
def test_grad_checkpointing_changes_neither_gradients_nor_batch_norms(flags):
    assert_close(step_of(model_of(f"{flags} --grad-checkpointing")), step_of(model_of(flags)))
    both = f"{flags} --grad-checkpointing --micro-batch {2 * B}"
    assert_close(step_of(model_of(both)), step_of(model_of(flags)))


@pytest.mark.parametrize("flags", ["--micro-batch 2", "--grad-checkpointing"])
@pytest.mark.parametrize("arch", ["vit_tiny", "resnet8"])
def test_less_memory_is_held_for_backward(arch, flags):
    held = []
    for more in ("", flags):
        model, size = model_of(f"--arch {arch} {more}"), []
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def note(x, size=size, weights=weights):
            if x.untyped_storage().data_ptr() not in weights:  # those are there anyway
                size.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            model(list(torch.randn(2, B, 3, 32, 32)), torch.arange(B), 0.9)
        held.append(sum(size))
    assert held[1] < 0.5 * held[0]


@pytest.mark.parametrize("flags", ["--micro-batch 3", "--grad-checkpointing"])
def test_stochastic_layers_draw_the_same_again(flags):
    arch = "--arch timm:test_vit --img-size 160 --timm-kwargs drop_path_rate=0.5 proj_drop_rate=0.3"
    model = model_of(f"{arch} {flags}")
    views = list(torch.randn(2, 6, 3, 160, 160))
    twin = copy.deepcopy(model)
    if model.args.micro_batch:
        twin.args.micro_batch, twin.embed = (
            None,
            lambda encoder, x: torch.cat([encoder.embed(p) for p in x.tensor_split(2)]),
        )
    else:
        twin.base_encoder.grad_checkpointing = False
    results = []
    for each in (model, twin):
        torch.manual_seed(5)
        loss, _ = each(views, torch.arange(6), 0.9)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in each.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_compiled_backbones_keep_keys_and_values(monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compile_(function, backend="aot_eager")
    )  # needs no C++ compiler
    arch = "--arch timm:test_vit --img-size 160"
    for flags in ("--micro-batch 3", "--grad-checkpointing"):
        actual, expected = (
            step_of(model_of(f"{arch} {flags} {more}"), side=160) for more in ("--compile", "")
        )
        assert_close(actual, expected)


def test_a_backbone_is_compiled_once_in_a_run(monkeypatch):
    graphs, compile_ = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def compile_and_count(function, *, dynamic, mode):
        return compile_(function, dynamic=dynamic, backend=backend)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile_and_count)
    model = model_of("--arch resnet8 --micro-batch 4 --compile")
    step_of(model)
    assert len(graphs) == 2  # the online encoder, also when backward repeats it, and the other one
    with torch.no_grad():  # an evaluation, or a picture
        model.eval().base_encoder.embed(torch.zeros(5, 3, 32, 32))
    model.train()
    batch = Batch(torch.arange(B), list(torch.randn(2, B, 3, 32, 32)))
    assert Guard.try_forward(None, model, batch, 0.9, "off")  # before a checkpoint
    step_of(model)
    assert len(graphs) == 2


def test_compiled_code_is_kept_for_the_next_run(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chosen = str(tmp_path / "chosen")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", chosen)
    compiled(abs, "graphs")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == chosen
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compiled(abs, "off")
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    compiled(abs, "on")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "snclr" / "inductor")


def test_where_auto_compiles(monkeypatch):
    gpu = torch.device("cuda")

    def resolved(choice="auto", dataset="cifar10", arch="resnet18", device=gpu):
        return resolve_compile(Namespace(compile=choice, dataset=dataset, arch=arch), device)

    def set_up(compiler="gcc", triton="triton", ranks=1):
        monkeypatch.setattr(forward.shutil, "which", lambda name: name == compiler)
        monkeypatch.setattr(forward.importlib.util, "find_spec", lambda name: triton)
        monkeypatch.setattr(forward, "world_size", lambda: ranks)

    set_up()
    assert resolved() == "on"
    assert resolved(device=torch.device("cpu")) == "off"
    assert resolved(dataset="embedded") == "off"
    assert resolved(arch="timm:resnet18") == "off"
    for choice in ("on", "off", "graphs"):
        assert resolved(choice, "embedded") == choice
    for missing in ({"compiler": None}, {"triton": None}, {"ranks": 2}):
        set_up(**missing)
        assert resolved() == "off"


def test_a_backbone_that_torch_cannot_compile_runs_as_it_is(monkeypatch, capsys):
    calls, compile_ = [], torch.compile

    def backend(graph, inputs):
        calls.append(graph)
        raise NotImplementedError("no such chip\nand more")

    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_(f, backend=backend))
    model = model_of("--arch resnet8 --compile")
    actual = [step_of(model), step_of(model)]
    assert capsys.readouterr().out == "note: the backbones are not compiled: no such chip\n"
    assert len(calls) == 1
    model = model_of("--arch resnet8")
    for one, other in zip(actual, [step_of(model), step_of(model)], strict=True):
        assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vit_tiny", "resnet8"])
def test_backbones_compiled_to_machine_code_keep_keys_and_values(arch):
    assert_close(step_of(model_of(f"--arch {arch} --compile")), step_of(model_of(f"--arch {arch}")))


def test_checkpointing_that_would_not_be_exact_is_refused():
    with pytest.raises(UsageError, match="count each batch twice: use --micro-batch"):
        model_of("--arch timm:test_efficientnet --grad-checkpointing")


def test_micro_batches_of_one_image_are_refused_where_batch_norms_would_see_them():
    with pytest.raises(UsageError, match="--micro-batch 1 lets the batch norms of --arch resnet8"):
        model_of("--arch resnet8 --micro-batch 1")
    model_of("--arch vit_tiny --micro-batch 1")
