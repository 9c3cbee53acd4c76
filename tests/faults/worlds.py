"""Compare runs with different numbers of ranks and workers, among them one from 4 ranks to 2 to 1.

    python tests/faults/worlds.py      a few minutes on two cores

Order, crops and augmentation are the same bit for bit (tests/test_loader.py), and batch norms see
the global batch on any number of ranks. Only the order of float32 sums differs.
"""

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import attack
import torch
from test_ranks import write_images


def run(images, workdir, ranks, *flags):
    code, output = attack.ended(
        attack.start(images, *attack.FLAGS, "--workdir", workdir, *flags, ranks=ranks), within=400
    )
    if code != 0:
        raise SystemExit(output)


def difference(one, other):
    """Text: largest relative difference of loss and weights; whether the bank's ids are equal."""
    losses = [
        [line["loss"] for line in attack.lines_of(workdir) if "loss" in line]
        for workdir in (one, other)
    ]
    a, b = (
        torch.load(workdir / attack.LAST, weights_only=True)["state_dict"]
        for workdir in (one, other)
    )
    weights = max(
        ((a[name] - b[name]).abs().max() / a[name].abs().max()).item()
        for name in a
        if "weight" in name
    )
    loss = max(abs(x - y) / x for x, y in zip(*losses, strict=True))
    ids = torch.equal(a["module.memory_bank.ids"], b["module.memory_bank.ids"])
    equality = "equal" if ids else "DIFFERENT"
    return f"loss {loss:.1e}, weights {weights:.1e} (relative), ids in the bank {equality}"


def main(folder):
    images = write_images(folder / "images")
    run(images, folder / "one", 1)
    run(images, folder / "again", 1, "-j", "3")
    names = attack.differences(folder / "one", folder / "again")
    print(f"1 rank, other number of workers: {', '.join(names) or 'nothing differs'}")
    for ranks in (2, 4):
        run(images, folder / f"{ranks}", ranks)
        print(
            f"{ranks} ranks throughout against 1: {difference(folder / 'one', folder / f'{ranks}')}"
        )
    for ranks, steps in ((4, 3), (2, 7), (1, 10)):
        run(
            images, folder / "changing", ranks, "--resume", "auto", "--stop-after-steps", str(steps)
        )
    changing = difference(folder / "one", folder / "changing")
    print(f"4 ranks for 3 steps, 2 for 4, 1 for 3, against 1: {changing}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
