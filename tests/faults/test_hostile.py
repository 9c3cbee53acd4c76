"""Files that try to run code, leave their folder or exhaust memory; some cases of the fuzzer."""

import contextlib
import os
import pickle
import zipfile

import attack
import fuzz
import numpy as np
import pytest
import torch

import main_lincls
import main_snclr
import snclr
from snclr import export
from snclr.datasets import folders, shards
from snclr.evaluation.options import STATE_FILE
from snclr.running.errors import UsageError


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A short run, and a linear probe of it with its resumable state."""
    workdir = tmp_path_factory.mktemp("finished")
    main_snclr.main(
        [
            str(images),
            *attack.FLAGS,
            "--workdir",
            str(workdir),
            "--stop-after-steps",
            "1",
            "--eval-freq",
            "0",
        ]
    )
    return workdir


def lincls(images, pretrained, workdir, *flags):
    flags = ["--epochs", "1", "-b", "8", "--crop-min", "0.5", "--heldout", "0.2", *flags]
    main_lincls.main(
        [str(images), "--pretrained", str(pretrained), "--workdir", str(workdir), *map(str, flags)]
    )


READERS = {
    "--resume": lambda path, images, out: main_snclr.main(
        [str(images), *attack.FLAGS, "--workdir", str(out), "--resume", path]
    ),
    "--resume auto": lambda path, images, out: main_snclr.main(
        [str(images), *attack.FLAGS, "--workdir", os.path.dirname(path), "--resume", "auto"]
    ),
    "--init-from": lambda path, images, out: main_snclr.main(
        [str(images), *attack.FLAGS, "--workdir", str(out), "--init-from", path]
    ),
    "--pretrained": lambda path, images, out: lincls(images, path, out),
    "load_encoder": lambda path, images, out: snclr.load_encoder(path),
    "export": lambda path, images, out: export.main(
        [path, "--format", "timm", "--out", str(out / "x.pth")]
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["zip", "pickle", "legacy"])
def test_no_file_runs_code(reader, kind, images, finished, tmp_path):
    state = torch.load(finished / "checkpoint_last.pth.tar", weights_only=True)
    target, folder = tmp_path / "executed", tmp_path / "files"
    folder.mkdir()
    path = folder / "checkpoint_last.pth.tar"
    content = {**state, "args": {**state["args"], "evil": Malicious(target)}}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": {}, "x": Malicious(target)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UsageError) as caught:
        READERS[reader](str(path), images, tmp_path)
    assert "\n" not in str(caught.value) and not target.exists()
    with contextlib.suppress(RuntimeError):  # a bare pickle runs, and is refused only then
        torch.load(path, weights_only=False)
    assert target.is_dir()  # what an unguarded load would have done


def test_neither_the_state_of_a_probe_nor_a_feature_cache_nor_an_index_runs_code(
    images, finished, tmp_path
):
    target = tmp_path / "executed"
    work = tmp_path / "probe"
    work.mkdir()
    torch.save({"epoch": 1, "model": Malicious(target)}, work / STATE_FILE)
    with pytest.raises(UsageError, match="nothing else is loaded"):
        lincls(images, finished / "encoder_last.pth.tar", work, "--resume", "auto")
    # a cache is raw numbers, whatever its bytes are: it is mapped, never parsed
    lincls(
        images,
        finished / "encoder_last.pth.tar",
        tmp_path / "cached",
        "--cache-features",
        "--cache-limit-gb",
        "0",
    )
    (cache,) = (tmp_path / "cached").glob("features_*.f32")
    assert cache.stat().st_size % 4 == 0 and not zipfile.is_zipfile(cache)
    (tmp_path / "shards").mkdir()
    fuzz.Seeds(tmp_path).write("shards/a.tar", fuzz.Seeds(tmp_path).tar)
    good = shards.open_index(str(tmp_path / "shards"), folders.EXTENSIONS, None)
    np.savez(
        tmp_path / "shards/snclr_index.npz",
        key=np.array([Malicious(target)], dtype=object),
        allow_pickle=True,
    )
    again = shards.open_index(str(tmp_path / "shards"), folders.EXTENSIONS, None)
    assert (
        all(np.array_equal(a, b) for a, b in zip(good, again, strict=True)) and not target.exists()
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"arch": "timm:hf-hub:evil/model"},
        {"arch": "timm:test_vit", "args": {"timm_kwargs": [["checkpoint_path", "evil.pth"]]}},
        {"arch": "timm:test_vit", "args": {"timm_kwargs": [["pretrained", True]]}},
        {
            "arch": "timm:test_vit",
            "args": {"timm_kwargs": [["pretrained_cfg", {"url": "http://localhost"}]]},
        },
        {"arch": "../../etc/passwd"},
        {"arch": "vit_small", "args": {"img_size": 2**70}},
        {"arch": "resnet8", "args": {"width": "wide"}},
    ],
)
def test_a_file_cannot_name_other_files_to_load_nor_the_network(changed, tmp_path):
    torch.save({"state_dict": {"x": torch.zeros(1)}, **changed}, tmp_path / "x.pth")
    with pytest.raises(UsageError) as caught:
        snclr.load_encoder(str(tmp_path / "x.pth"))
    assert "\n" not in str(caught.value)


def test_paths_in_a_file_are_not_followed(images, finished, tmp_path):
    state = torch.load(finished / "checkpoint_last.pth.tar", weights_only=True)
    outside = tmp_path / "outside"
    elsewhere = {
        "workdir": str(outside),
        "resume": str(outside),
        "data": str(outside),
        "init_from": str(outside / "x"),
    }
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/checkpoint_last.pth.tar"
    torch.save({**state, "args": {**state["args"], **elsewhere, "../../escaped": "x"}}, path)
    flags = [
        "--workdir",
        str(tmp_path / "run"),
        "--resume",
        "auto",
        "--stop-after-steps",
        "2",
        "--eval-freq",
        "0",
    ]
    main_snclr.main([str(images), *attack.FLAGS, *flags])
    assert not outside.exists() and sorted(os.listdir(tmp_path)) == ["run"]


def test_an_index_that_points_to_other_files_is_rebuilt(tmp_path):
    (tmp_path / "shards").mkdir()
    seeds = fuzz.Seeds(tmp_path)
    seeds.write("shards/a.tar", seeds.tar)
    good = shards.open_index(str(tmp_path / "shards"), folders.EXTENSIONS, None)
    path = tmp_path / "shards/snclr_index.npz"
    with np.load(path) as file:
        kept = dict(file)
    for name, value in (
        ("shard", 7),
        ("shard", -1),
        ("offset", -5),
        ("size", 2**60),
        ("label", 9),
        ("size", -2),
    ):
        np.savez(path, **{**kept, name: np.full_like(kept[name], value)})
        again = shards.open_index(str(tmp_path / "shards"), folders.EXTENSIONS, None)
        assert all(np.array_equal(a, b) for a, b in zip(good, again, strict=True)), name


def test_a_selection_of_mutated_inputs(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "LIMIT", 300)  # seconds: a machine may be slow and busy
    ends, wrong = fuzz.run(480, seed=12345, folder=tmp_path)
    assert wrong == [] and sum(ends.values()) == 480
    assert all(
        ends[kind.__name__, "worked"] + ends[kind.__name__, "refused"] == 40 for kind in fuzz.KINDS
    )


@pytest.mark.slow
def test_many_mutated_inputs_and_whole_processes(tmp_path):
    for name in ("cases", "whole/seeds"):
        (tmp_path / name).mkdir(parents=True)
    assert fuzz.run(3000, seed=0, folder=tmp_path / "cases")[1] == []
    assert sum(fuzz.whole_processes(20, seed=0, folder=tmp_path / "whole").values()) == 20
