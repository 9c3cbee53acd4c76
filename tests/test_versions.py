"""Files of earlier versions stay readable.

golden/checkpoint_format1.pth.tar was written by commit 87f771c with torch 2.14.
"""

import hashlib
import shutil
from pathlib import Path

import torch
from test_ranks import write_images

import main_snclr
import snclr
from snclr.running import checkpoint
from snclr.weights import load as weights

GOLDEN = Path(__file__).parent / "golden/checkpoint_format1.pth.tar"
DIGEST = "56c79d65d5a68a511ad52c43f4e67ee24d6903b552d397e1d5a5a1c5cbb04bb6"
FLAGS = "--arch resnet8 --width 2 --img-size 32 --snclr-dim 4 --snclr-mlp-dim 4 --bank-size 12"
FLAGS += " --topk 2 --lr 0.01 -b 8 --epochs 2"


def digest(tensors):
    """SHA-256 over names and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(
            name.encode() + tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return sha.hexdigest()


def test_a_checkpoint_of_format_one_has_its_content():
    state = checkpoint.load(str(GOLDEN))
    assert (state["format"], state["epoch"], state["step"], state["images"]) == (1, 0, 3, 40)
    assert digest(state["state_dict"]) == DIGEST
    assert {"versions", "git"} == set(state["provenance"]) and state["provenance"][
        "git"
    ] == "87f771c"


def test_a_run_of_format_one_can_be_resumed(tmp_path, capsys):
    images = write_images(tmp_path / "images")
    (tmp_path / "run").mkdir()
    shutil.copy(GOLDEN, tmp_path / "run/checkpoint_last.pth.tar")
    flags = [
        str(images),
        *FLAGS.split(),
        "--eval-freq",
        "0",
        "--workdir",
        str(tmp_path / "run"),
        "--resume",
        "auto",
    ]
    main_snclr.main(flags)
    assert "resumed from" in capsys.readouterr().out
    state = checkpoint.load(str(tmp_path / "run/checkpoint_last.pth.tar"))
    assert (
        state["step"] == 10
        and state["fingerprint"]
        and all(x.isfinite().all() for x in state["state_dict"].values())
    )
    assert {int(values["step"]) for values in state["optimizer"]["state"].values()} == {10}


def test_an_encoder_of_format_one_loads():
    for name in ("online", "momentum"):
        encoder, info = snclr.load_encoder(str(GOLDEN), name)
        assert info["encoder"] == name and info["arch"] == "resnet8"
        assert encoder(torch.zeros(2, 3, 32, 32)).isfinite().all()
    assert weights.read_encoder(str(GOLDEN)).layout == "the online encoder of module.base_encoder.*"
