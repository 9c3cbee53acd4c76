"""Unreadable images, a full disk, other images, a dying worker, two runs in one folder."""

import contextlib
import io
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import attack
import numpy as np
import pytest
import torch
from PIL import Image

import main_lincls
import main_snclr
from snclr import augment, options
from snclr.datasets import sources
from snclr.datasets.files import FileImages
from snclr.datasets.folders import Paths
from snclr.datasets.images import EncodedImages, ResidentImages
from snclr.loader import ViewLoader
from snclr.running import lock, tensor_files
from snclr.running.errors import RunError, UsageError, one_clear_line

RECIPE = augment.Recipe(0, augment.moco_v3_views(32, 0.2, False))


def train(images, workdir, *flags):
    """A small run; it has no workers unless flags ask for some."""
    main_snclr.main([str(images), *attack.FLAGS, "-j", "0", "--workdir", str(workdir), *flags])


@pytest.fixture(autouse=True)
def encoded(monkeypatch):
    """Images are decoded one by one, as those of large sets."""
    monkeypatch.setattr("snclr.datasets.images.RESIDENT_LIMIT", 0)


def jpeg(width, height, quality=75):
    file = io.BytesIO()
    Image.fromarray(
        np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    ).save(file, "jpeg", quality=quality)
    return file.getvalue()


def huge_png():
    """A small file of 10^10 pixels."""
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def huge_jpeg():
    """A small file that says it has 65500 x 65500 pixels, 13 GB."""
    whole = bytearray(jpeg(16, 16))
    frame = whole.index(b"\xff\xc0")
    whole[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    return bytes(whole)


BAD = {
    "zero-byte": b"",
    "truncated": jpeg(64, 64)[:500],
    "no image": b"hello, I am a text\n" * 100,
    "huge png": huge_png(),
    "huge jpeg": huge_jpeg(),
    "half a png head": b"\x89PNG\r\n\x1a\n\x00\x00",
}


@pytest.mark.parametrize("kind", BAD)
def test_every_kind_of_bad_file_is_one_clear_line(kind, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(BAD[kind])
    with pytest.raises(RunError, match=r"cannot read image .*x\.jpg") as caught:
        FileImages(Paths([str(path)])).image(0)
    assert "\n" not in str(caught.value)


def test_a_pipe_or_a_folder_named_like_an_image_is_one_line_of_error(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg"):
        with pytest.raises(RunError, match=f"cannot read image .*{name}: it is not a regular file"):
            FileImages(Paths([str(tmp_path / name)])).image(0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_without_permission_is_one_clear_line(tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(jpeg(64, 64))
    path.chmod(0)
    with pytest.raises(RunError, match="Permission denied"):
        FileImages(Paths([str(path)])).image(0)


@pytest.fixture
def spoilt(images, tmp_path):
    """The images, several of them bad in different ways."""
    root = Path(shutil.copytree(images, tmp_path / "spoilt"))
    for name, content in zip(("00", "03", "08", "11", "17"), BAD.values(), strict=False):
        (root / f"train/a/{name}.png").write_bytes(content)
    (root / "train/b/05.png").unlink()
    (root / "train/b/05.png").symlink_to("nowhere")
    (root / "val/a/02.png").write_bytes(b"")
    return root


def test_substitutes_are_drawn_alike_by_every_number_of_ranks_and_workers(spoilt):
    files = FileImages(Paths(sorted(map(str, spoilt.glob("train/*/*.png")))))
    files.skip_bad = True
    device, order = torch.device("cpu"), augment.epoch_order(0, 0, 40)[:16]
    one = [files.views(RECIPE, 0, order)]
    parts = [files.views(RECIPE, 0, part) for part in np.split(order, 4)]
    loaded = []
    for workers in (0, 2):
        loader = ViewLoader(files, RECIPE, device, workers)
        loaded.append([ids for ids, _ in loader.load([(0, part) for part in np.split(order, 2)])])
        assert loader.replaced == set(order.tolist()) & {0, 3, 8, 11, 17, 25} != set()
    ids = one[0].ids
    assert torch.equal(ids, torch.cat([part.ids for part in parts]))
    assert all(torch.equal(ids, torch.cat(parts)) for parts in loaded)
    assert torch.equal(one[0].crops[0][:16], torch.cat([part.crops[0][:4] for part in parts]))
    replaced = ids.numpy() != order
    assert (
        np.array_equal(replaced, np.isin(order, [0, 3, 8, 11, 17, 25]))
        and not np.isin(ids, [0, 3, 8, 11, 17, 25]).any()
    )


def test_a_run_skips_and_lists_unreadable_images_and_resumes_exactly(spoilt, tmp_path, capsys):
    flags = ["--on-bad-image", "skip", "-j", "2", "--eval-freq", "2"]
    train(spoilt, tmp_path / "whole", *flags)
    out = capsys.readouterr().out
    is_reported = [
        int(line.split()[1]) for line in out.splitlines() if "images cannot be read" in line
    ]
    assert sum(is_reported) == 6
    listed = (tmp_path / "whole/bad_images.txt").read_text().splitlines()
    assert [line.split("train/")[1].split(":")[0] for line in listed] == [
        f"a/{n}.png" for n in ("00", "03", "08", "11", "17")
    ] + ["b/05.png"]
    train(spoilt, tmp_path / "parts", *flags, "-j", "1", "--stop-after-steps", "3")
    train(spoilt, tmp_path / "parts", *flags, "--resume", "auto")
    assert attack.differences(tmp_path / "whole", tmp_path / "parts") == []


def test_by_default_a_bad_image_ends_the_run_naming_it(spoilt, tmp_path):
    with pytest.raises(
        (RunError, UsageError), match=r"cannot read image .*train/a/\d\d\.png|b/05.png"
    ):
        train(spoilt, tmp_path / "run", "-j", "2")


def test_the_search_for_a_substitute_ends_if_no_image_can_be_read(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    files = FileImages(Paths(sorted(map(str, tmp_path.iterdir()))))
    files.skip_bad = True
    with pytest.raises(RunError, match="cannot read image"):
        files.views(RECIPE, 0, np.arange(4))


def test_a_small_set_is_held_in_memory_although_some_of_it_cannot_be_read(
    spoilt, tmp_path, monkeypatch, capsys
):
    monkeypatch.undo()  # the limit
    args = options.parse([str(spoilt), *attack.FLAGS, "--on-bad-image", "skip"])
    train_set, val, _ = sources.open_data(args)
    assert isinstance(train_set, ResidentImages) and isinstance(val, ResidentImages)
    files = FileImages(Paths(sorted(map(str, spoilt.glob("train/*/*.png")))))
    files.skip_bad, order = True, np.arange(40)
    views = train_set.views(RECIPE, 0, order)
    assert torch.equal(views.ids, files.views(RECIPE, 0, order).ids)  # the same substitutes
    part = train_set.select(np.array([0, 1, 25]))  # 0 and 25 cannot be read
    assert part.views(RECIPE, 0, np.arange(3)).ids.tolist() == [1, 1, 1]
    assert (val.whole(np.array([2]), 32) == 127).all() and (
        val.whole(np.array([1]), 32) != 127
    ).any()
    train(spoilt, tmp_path / "run", "--on-bad-image", "skip")
    out = capsys.readouterr().out
    assert (
        f"note: 6 images in {spoilt}/train are replaced, by other images in training" in out
        and "note: 1 images in" in out
    )
    assert "6 images cannot be read and are replaced" in out
    listed = (tmp_path / "run/bad_images.txt").read_text().splitlines()
    assert len(listed) == 6 and "train/a/00.png: it is not an image" in listed[0]
    with pytest.raises(UsageError, match="or add --on-bad-image skip"):
        train(spoilt, tmp_path / "fail")


def test_a_probe_skips_and_lists_what_cannot_be_read_as_well(spoilt, tmp_path, capsys):
    train(
        spoilt,
        tmp_path,
        "--on-bad-image",
        "skip",
        "-j",
        "1",
        "--stop-after-steps",
        "1",
        "--eval-freq",
        "0",
    )
    flags = [
        "--on-bad-image",
        "skip",
        "-j",
        "1",
        "--epochs",
        "1",
        "-b",
        "4",
        "--heldout",
        "0.2",
        "--crop-min",
        "0.5",
    ]
    flags += [
        "--pretrained",
        str(tmp_path / "encoder_last.pth.tar"),
        "--workdir",
        str(tmp_path / "probe"),
    ]
    main_lincls.main([str(spoilt), *flags])
    assert "images cannot be read and are replaced" in capsys.readouterr().out
    assert len((tmp_path / "probe/bad_images.txt").read_text().splitlines()) > 2


def test_undecodable_names_and_an_unwritable_list_end_no_run(spoilt, tmp_path, capsys):
    os.rename(spoilt / "train/a/00.png", os.fsencode(spoilt / "train/a") + b"/\xff\n.png")
    (tmp_path / "run/bad_images.txt").mkdir(parents=True)
    flags = ["--on-bad-image", "skip", "--epochs", "1"]
    train(spoilt, tmp_path / "run", *flags)
    assert "cannot be read and are replaced, see cannot write" in capsys.readouterr().out
    train(spoilt, tmp_path / "again", *flags)
    assert "train/a/??.png: it is not an image" in (tmp_path / "again/bad_images.txt").read_text()


def test_links_in_a_circle_are_followed_once(images, tmp_path):
    root = Path(shutil.copytree(images, tmp_path / "images"))
    (root / "train/a/up").symlink_to("..")
    (root / "train/b/up").symlink_to("..")
    train_set, _, _ = sources.open_data(options.parse([str(root), *attack.FLAGS]))
    assert len(train_set) == 40


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_without_permission_is_one_clear_line(images, tmp_path):
    root = Path(shutil.copytree(images, tmp_path / "images"))
    (root / "train/a").chmod(0)
    with pytest.raises(UsageError, match=r"cannot read the folder .*train/a: Permission denied"):
        sources.open_data(
            options.parse([str(root), *attack.FLAGS, "--workdir", str(tmp_path / "run")])
        )


def test_images_exchanged_or_renamed_between_two_starts_are_reported(images, tmp_path):
    root = Path(shutil.copytree(images, tmp_path / "images"))
    train(root, tmp_path / "run", "--stop-after-steps", "2", "--eval-freq", "0")
    shutil.move(root / "train/a/00.png", root / "train/a/20.png")
    with pytest.raises(UsageError, match="with other names or in another order"):
        train(root, tmp_path / "run", "--resume", "auto", "--eval-freq", "0")
    shutil.move(root / "train/a/20.png", root / "train/a/00.png")
    shutil.move(root, tmp_path / "moved")  # the folder itself may go elsewhere
    train(tmp_path / "moved", tmp_path / "run", "--resume", "auto", "--eval-freq", "0")


# -- a full disk -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mount_point],
        capture_output=True,
        check=False,
    ).returncode:
        pytest.skip("mounting a small disk needs root")
    yield mount_point
    subprocess.run(["umount", "-l", mount_point], check=True)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # TensorBoard's, which starts anew
def test_on_a_full_disk_the_old_checkpoint_is_kept_and_the_run_tries_again(
    images, small_disk, tmp_path, monkeypatch, capsys
):
    """Full from the second save to the fourth; the run must end with the same files as without."""
    train(images, tmp_path / "alone", "--epochs", "6")
    saves, original, ballast, seen = [], main_snclr.write_files, small_disk / "ballast", []

    def write_files(run, state, *rest, **number):
        saves.append(state["step"])
        if len(saves) == 2:
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        if len(saves) == 5:
            ballast.unlink()
        try:
            original(run, state, *rest, **number)
        finally:
            seen.append(
                torch.load(small_disk / "run/checkpoint_last.pth.tar", weights_only=True)["step"]
            )

    monkeypatch.setattr(main_snclr, "write_files", write_files)
    train(images, small_disk / "run", "--epochs", "6")
    assert saves == [5, 10, 15, 20, 25, 30] and seen == [5, 5, 5, 5, 25, 30]
    out = capsys.readouterr().out
    assert out.count("TensorBoard's events are not written: No space left on device") == 1
    full = [line for line in out.splitlines() if "No space left on device" in line]
    assert len(full) == 4 and out.count("tries again at the next save") == 3
    assert attack.differences(tmp_path / "alone", small_disk / "run") == []


@pytest.mark.parametrize("room", [0, 1, 3])  # 4 KB pages: for nothing, the lock, the settings
def test_a_disk_that_is_full_at_the_start_is_one_clear_line(images, small_disk, room):
    (small_disk / "run").mkdir()
    with contextlib.suppress(OSError), open(small_disk / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(
        small_disk / "ballast", os.path.getsize(small_disk / "ballast") // 4096 * 4096 - room * 4096
    )
    with pytest.raises(RunError, match=r"cannot write .*: No space left on device"):
        train(images, small_disk / "run", "--stop-after-steps", "5", "--eval-freq", "0")


def test_a_last_save_that_fails_is_an_error(images, tmp_path, monkeypatch):
    def full(path, *rest):
        raise RunError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(tensor_files, "save", full)
    with pytest.raises(RunError, match="No space left"):
        train(images, tmp_path, "--stop-after-steps", "5", "--eval-freq", "0")


# -- workers and folders ---------------------------------------------------------------------------


class Killed(EncodedImages):
    """Images at the third of which the worker is killed, as a machine out of memory would."""

    def __len__(self):
        return 40

    def image(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 32, 32, dtype=torch.uint8)


def test_a_worker_that_dies_is_one_line(capsys):
    images = Killed(None, [], sources.IMAGENET)
    with pytest.raises(SystemExit) as caught, one_clear_line("main_snclr.py"):
        list(
            ViewLoader(images, RECIPE, torch.device("cpu"), 2).load(
                [(0, np.arange(4)), (0, np.arange(4, 8))]
            )
        )
    message = capsys.readouterr().err
    assert (
        caught.value.code == 1
        and "DataLoader worker" in message
        and "out of memory?" in message
        and message.count("\n") == 1
    )


HOLD = (
    "import sys, time; from snclr.running import lock; lock.hold(sys.argv[1], 'x'); "
    "print('held', flush=True); time.sleep(60)"
)


def test_a_second_run_in_a_workdir_is_refused_and_a_dead_one_leaves_no_lock(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match=rf"in use by pid {first.pid} on ") as caught:
        lock.hold(str(tmp_path), "x")
    assert "\n" not in str(caught.value)
    first.kill()
    first.wait()
    lock.hold(str(tmp_path), "x")
    assert (tmp_path / "x.lock").read_text().startswith(f"pid {os.getpid()} on ")


def test_the_second_run_is_refused_before_it_touches_anything(images, tmp_path):
    train(images, tmp_path, "--stop-after-steps", "5")
    before = {
        path: path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD.replace("'x'", "'main_snclr'"), tmp_path],
        stdout=subprocess.PIPE,
    )
    open(tmp_path / "main_snclr.lock").close()  # releases the lock of this process's own run
    holder.stdout.readline()
    with pytest.raises(UsageError, match="in use by pid"):
        train(images, tmp_path, "--resume", "auto")
    holder.kill()
    holder.wait()
    assert {
        path: path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    } == before
