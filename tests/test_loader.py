"""Loaders and image sets: two-view batches, unreadable files, whole images, workers."""

import contextlib
import ctypes
import errno
import gc
import inspect
import multiprocessing
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import levels_apart, picture, rgb, save_folder
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

import snclr.loader
from snclr import augment, choices, mean_std, operations
from snclr.augment import Recipe, View, moco_v3_views
from snclr.datasets import sources
from snclr.datasets.files import FileImages
from snclr.datasets.folders import Paths
from snclr.datasets.images import ResidentImages
from snclr.loader import EpochLoader, whole_images
from snclr.running.errors import RunError, UsageError
from snclr.running.workers import WorkerBatches, keep_freed_memory

CPU = torch.device("cpu")
RECIPE = Recipe(5, moco_v3_views(size=16, crop_min=0.2, blur=True))
MOMENTS = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def open_folder(root):
    """The training images of a folder."""
    return sources.open_data(mean_std.parse([str(root)]))[0]


MIXED = [(20 + 3 * (n % 7), 18 + 5 * (n % 4)) for n in range(30)]
EQUAL = [(20, 26)] * 30


@pytest.fixture(scope="module")
def image_sets(tmp_path_factory):
    """'resident', and 'files' of mixed sizes, with 30 images each."""
    sets = {}
    for name, sizes in {"resident": EQUAL, "files": MIXED}.items():
        sets[name] = open_folder(save_folder(tmp_path_factory.mktemp(name), sizes))
    assert isinstance(sets["resident"], ResidentImages) and isinstance(sets["files"], FileImages)
    return sets


# -- two views -------------------------------------------------------------------------------------


@pytest.fixture
def load(monkeypatch):
    """load(images, ranks=..., ...): the global batches (ids, view1, view2) of an epoch."""

    def load(images, *, ranks=1, workers=0, epoch=1, first=0, recipe=RECIPE, global_batch_size=8):
        shares = []
        for rank in range(ranks):
            monkeypatch.setattr("snclr.running.distributed.rank", lambda rank=rank: rank)
            for module in ("snclr.running.distributed", "snclr.loader"):
                monkeypatch.setattr(f"{module}.world_size", lambda: ranks)
            shares.append(
                list(
                    EpochLoader(images, recipe, global_batch_size, CPU, workers).epoch(epoch, first)
                )
            )
        return [
            tuple(
                torch.cat(field)
                for field in zip(*((part.ids, *part.views) for part in parts), strict=True)
            )
            for parts in zip(*shares, strict=True)
        ]

    return load


def assert_same_batches(some, others):
    assert len(some) == len(others) > 0
    for number, pair in enumerate(zip(some, others, strict=True)):
        same = [torch.equal(one, other) for one, other in zip(*pair, strict=True)]
        assert same == [True] * 3, f"batch {number}: ids, view1, view2 equal: {same}"


@pytest.mark.parametrize("kind", ["resident", "files"])
@pytest.mark.parametrize("ranks, workers", [(4, 0), (8, 0), (1, 2), (2, 1)])
def test_batches_are_the_same_for_any_number_of_ranks_and_workers(
    image_sets, load, kind, ranks, workers
):
    assert_same_batches(
        load(image_sets[kind]), load(image_sets[kind], ranks=ranks, workers=workers)
    )


@pytest.mark.parametrize("kind", ["resident", "files"])
def test_a_batch_has_two_different_views_of_each_image_normalised_by_the_sets_moments(
    image_sets, load, kind
):
    images = image_sets[kind]
    assert (images.mean.tolist(), images.std.tolist()) == tuple(
        map(pytest.approx, choices.IMAGENET)
    )
    for ids, view1, view2 in load(images, epoch=4):
        assert ids.shape == (8,) and ids.dtype == torch.int64
        assert (
            view1.shape == view2.shape == (8, 3, 16, 16)
            and view1.dtype == view2.dtype == torch.float32
        )
        assert not torch.equal(view1, view2)
        _, (crops,), (parameters,) = images.views(RECIPE, 4, ids.numpy())
        expected = operations.apply(crops, parameters, *map(torch.tensor, choices.IMAGENET))
        assert torch.equal(torch.cat([view1, view2]), expected)


@pytest.mark.parametrize("kind", ["resident", "files"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_longer_table_gives_more_views_of_other_sizes_and_leaves_the_first_as_they_were(
    image_sets, kind, workers
):
    small = View(8, 0.05, 0.25, jitter_p=0.8, blur_p=0.5)
    more = RECIPE._replace(views=(*RECIPE.views, small, small, View(24, 0.5)))
    loaders = [EpochLoader(image_sets[kind], r, 8, CPU, workers) for r in (RECIPE, more)]
    for two, five in zip(*(loader.epoch(3) for loader in loaders), strict=True):
        assert [tuple(view.shape) for view in five.views] == [
            (8, 3, side, side) for side in (16, 16, 8, 8, 24)
        ]
        assert all(torch.equal(a, b) for a, b in zip(two.views, five.views, strict=False))
        assert not torch.equal(*five.views[2:4])
    assert [len(batch.views) for batch in loaders[1].sample(8)] == [2]


def test_with_a_stream_of_its_own_each_batch_is_made_in_it_and_kept_for_the_step(
    image_sets, monkeypatch
):
    """The order of calls on a GPU, with a stand-in for the streams.

    A step must never run in the loader's stream.
    """
    calls = []

    @contextlib.contextmanager
    def stream(_):
        calls.append("in")
        yield
        calls.append("out")

    def made(*arguments):
        calls.append("made")
        return operations.apply(*arguments)

    training = SimpleNamespace(wait_stream=lambda _: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: training)
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda _, by: calls.append("kept") if by is training else None,
    )
    loader = EpochLoader(image_sets["resident"], RECIPE, 8, CPU, 0, made)
    loader.stream = object()
    for _ in loader.epoch(1):
        calls.append("step")
    assert calls == ["in", "made", "out", "wait", "kept", "kept", "step"] * 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_start_in_mid_epoch_gives_the_tail_of_the_epoch(image_sets, load, workers, first):
    for images in image_sets.values() if workers == 0 else [image_sets["files"]]:
        full = load(images, epoch=2)
        tail = load(images, epoch=2, first=first, workers=workers)
        assert len(tail) == len(full) - first
        if tail:
            assert_same_batches(full[first:], tail)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has workers forked")
def test_workers_are_children_of_the_rank_whatever_python_prefers(image_sets):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)  # the default since Python 3.14
    try:
        loader = EpochLoader(image_sets["files"], RECIPE, 8, CPU, workers=2)
        next(loader.epoch(0))
        children = multiprocessing.active_children()
    finally:
        multiprocessing.set_start_method(before, force=True)
    parents = [
        int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[1])
        for child in children
    ]
    assert len(parents) >= 2 and {*parents} == {os.getpid()}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_after_an_abandoned_one_is_unaffected(image_sets, load, workers):
    loader = EpochLoader(image_sets["files"], RECIPE, 8, CPU, workers)
    next(loader.epoch(0))
    next(loader.epoch(0, first=2))
    batches = [(batch.ids, *batch.views) for batch in loader.epoch(1)]
    assert_same_batches(load(image_sets["files"], epoch=1), batches)


# -- requests to the workers -----------------------------------------------------------------------


@pytest.mark.parametrize("ranks, workers, images_per_request", [(1, 0, 3), (2, 2, 3), (1, 2, 1)])
def test_a_batch_put_together_from_several_requests_is_the_same(
    image_sets, load, monkeypatch, ranks, workers, images_per_request
):
    small = View(8, 0.05, 0.25, jitter_p=0.8, blur_p=0.5)
    recipe = RECIPE._replace(views=(*RECIPE.views, small))
    whole = [load(image_sets["files"], recipe=r) for r in (RECIPE, recipe)]
    monkeypatch.setattr("snclr.loader.REQUEST", images_per_request)
    for expected, r in zip(whole, (RECIPE, recipe), strict=True):
        actual = load(image_sets["files"], recipe=r, ranks=ranks, workers=workers)
        assert len(actual) == len(expected) == 3
        for batch, same in zip(actual, expected, strict=True):
            assert [torch.equal(a, b) for a, b in zip(batch, same, strict=True)] == [True] * len(
                same
            )


def test_requests_are_bounded_and_shared_memory_is_checked_for_that(image_sets, monkeypatch):
    assert snclr.loader.REQUEST == 256
    monkeypatch.setattr("snclr.loader.REQUEST", 8)
    needed, asked = [], []
    files = image_sets["files"].select(np.arange(18))
    files.views = lambda recipe, epoch, indices: (
        asked.append(len(indices)) or type(files).views(files, recipe, epoch, indices)
    )
    monkeypatch.setattr("snclr.loader.check_shared_memory", lambda *case: needed.append(case))
    for batch in EpochLoader(files, RECIPE, 18, CPU, 0).epoch(0):
        assert len(batch.ids) == len({*batch.ids.tolist()}) == 18
    EpochLoader(files, RECIPE, 5, CPU, 3)
    assert asked == [6] * 3
    assert needed == [(8 * 2 * 3 * 16**2, 0, 1), (5 * 2 * 3 * 16**2, 3, 1)]


def test_workers_load_few_images_ahead_of_a_large_batch(image_sets, monkeypatch):
    monkeypatch.setattr("snclr.loader.REQUEST", 1)
    loader = EpochLoader(image_sets["files"], RECIPE, 15, CPU, workers=2)
    next(loader.epoch(0))
    assert len(loader.loader.queue) == 30 - 15 - 2 * 2  # of 15 other images each worker has two


def test_few_decoded_images_are_held_at_a_time(image_sets, monkeypatch):
    images, decode, held, counts = image_sets["files"], FileImages.image, [], []

    def counted(self, index):
        image = decode(self, index)
        held.append(weakref.ref(image))
        counts.append(sum(entry() is not None for entry in held))
        return image

    monkeypatch.setattr(FileImages, "image", counted)
    recipe = RECIPE._replace(views=(*RECIPE.views, View(8, 0.05)))
    results = []
    for most in (4, 30):
        counts.clear()
        monkeypatch.setattr(FileImages, "at_once", most)
        ids, crops, parameters = images.views(recipe, 2, np.arange(30))
        assert max(counts) == most
        results.append([ids, *crops, *(field for group in parameters for field in group)])
    assert all(map(torch.equal, *results))


def test_a_worker_writes_crops_into_shared_memory(image_sets, monkeypatch):
    images, crops = image_sets["files"], []
    full = mock.Mock(side_effect=RuntimeError("unable to allocate shared memory"))
    for worker, allocate in ((None, full), ("one", full), ("one", None)):
        monkeypatch.setattr("snclr.datasets.crops.get_worker_info", lambda worker=worker: worker)
        with monkeypatch.context() as patch:
            if allocate:
                patch.setattr("torch.UntypedStorage._new_shared", allocate)
            crops += images.views(RECIPE, 2, np.arange(5)).crops
    assert [x.is_shared() for x in crops] == [False, False, True]
    assert torch.equal(crops[0], crops[1]) and torch.equal(crops[0], crops[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_begin_the_next_epoch_before_the_last_one_has_ended(
    image_sets, load, monkeypatch, workers
):
    starts = []
    restart = WorkerBatches.__iter__
    monkeypatch.setattr(WorkerBatches, "__iter__", lambda w: starts.append(1) or restart(w))
    loader = EpochLoader(image_sets["files"], RECIPE, 8, CPU, workers)

    def read(epoch, **how):
        batches = loader.epoch(epoch, **how)
        count = loader.steps_per_epoch - how.get("first", 0)
        read = [next(batches) for _ in range(count)]  # as training reads: never beyond the last one
        return [(batch.ids, *batch.views) for batch in read]

    expected = [load(image_sets["files"], epoch=epoch) for epoch in range(4)]
    starts.clear()
    assert_same_batches(expected[0][1:], read(0, first=1, go_on=True))
    assert len(loader.loader.queue) == (0 if workers else 3)  # two workers have all three
    assert_same_batches(expected[1], read(1, go_on=True))
    assert len(starts) == 1
    assert_same_batches(expected[3], read(3, go_on=True))  # not the epoch that was announced
    assert len([*loader.sample(8)]) == 1
    assert_same_batches(expected[2], read(2))
    assert_same_batches(expected[2], read(2, go_on=True))
    next(loader.epoch(3))  # begun, but not read to its end
    assert_same_batches(expected[3], read(3))
    assert len(starts) == 6


@pytest.mark.parametrize("kind", ["resident", "files"])
def test_an_epoch_shows_no_image_twice_and_leaves_out_only_the_remainder(image_sets, load, kind):
    for global_batch_size, steps in [(8, 3), (30, 1), (7, 4)]:
        batches = load(image_sets[kind], global_batch_size=global_batch_size)
        seen = [number for ids, _, _ in batches for number in ids.tolist()]
        assert (
            len(batches)
            == steps
            == EpochLoader(image_sets[kind], RECIPE, global_batch_size, CPU, 0).steps_per_epoch
        )
        assert len(set(seen)) == len(seen) == steps * global_batch_size
    with pytest.raises(UsageError, match="--batch-size 31 exceeds the 30 training images"):
        load(image_sets[kind], global_batch_size=31)


def test_epochs_and_seeds_differ_in_order_and_in_views(image_sets, load):
    images = image_sets["resident"]
    (here, view_here, _), *_ = load(images, global_batch_size=30)
    for change in ({"epoch": 2}, {"recipe": RECIPE._replace(seed=6)}):
        (ids, view, _), *_ = load(images, global_batch_size=30, **change)
        assert not torch.equal(here, ids)
        changed = view_here[here.argsort()] != view[ids.argsort()]
        assert changed.flatten(1).any(dim=1).all()


@pytest.mark.parametrize("kind", ["resident", "files"])
def test_views_are_torchvisions_crops_of_the_drawn_boxes(image_sets, kind):
    images, indices = image_sets[kind], np.array([4, 0, 17])
    originals = [images.image(i) for i in indices]
    heights, widths = (np.array([image.shape[axis] for image in originals]) for axis in (1, 2))
    views = images.views(RECIPE, 3, indices)
    assert views.ids.tolist() == indices.tolist()
    for view, crops in enumerate(views.crops[0].chunk(2)):
        boxes, parameters = augment.draw(RECIPE, 3, indices, view, heights, widths)
        for image, box, crop in zip(originals, boxes.tolist(), crops, strict=True):
            expected = F.resized_crop(
                image, *box, [16, 16], InterpolationMode.BILINEAR, antialias=True
            )
            assert levels_apart(crop, expected) <= 1
        half = slice(3 * view, 3 * view + 3)
        assert all(
            torch.equal(field[half], drawn)
            for field, drawn in zip(views.parameters[0], parameters, strict=True)
        )


def test_resident_images_and_files_give_the_same_crops_to_one_level(tmp_path):
    resident = open_folder(save_folder(tmp_path, EQUAL))
    paths = sorted(str(path) for path in tmp_path.rglob("*.png"))
    files = FileImages(Paths(paths), resident.labels.numpy(), resident.classes, MOMENTS)
    ours, theirs = (images.views(RECIPE, 0, np.arange(30)) for images in (resident, files))
    assert levels_apart(ours.crops[0], theirs.crops[0]) <= 1
    assert all(
        torch.equal(one, other)
        for one, other in zip(ours.parameters[0], theirs.parameters[0], strict=True)
    )


def test_photographs_give_the_same_two_views_for_any_number_of_ranks(photographs, load):
    images = FileImages(Paths([str(path) for path in photographs]))
    recipe = Recipe(5, moco_v3_views(size=64, crop_min=0.2, blur=True))
    assert_same_batches(load(images, recipe=recipe), load(images, recipe=recipe, ranks=2))
    (_, view1, view2), *_ = load(images, recipe=recipe)
    assert 0.5 < view1.std() < 2 and 0.5 < view2.std() < 2


# -- unreadable files ------------------------------------------------------------------------------


def damage(path, kind):
    """Write an unreadable file; none for 'absent'. 'flipped': one wrong bit in a PNG's pixels."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "half a jpeg":
        noise.save(path, "jpeg", quality=95)
        path.write_bytes(path.read_bytes()[:400])
    elif kind == "half a png":
        noise.save(path, "png")
        path.write_bytes(path.read_bytes()[:400])
    elif kind == "flipped":
        noise.save(path, "png")
        content = bytearray(path.read_bytes())
        content[300] ^= 0x10
        path.write_bytes(content)


def assert_stopped_with_one_clear_line(run):
    with pytest.raises(RunError, match=r"cannot read image \S*broken\.png") as caught:
        run()
    message = str(caught.value)
    del caught  # it holds the frames with the loader, in a cycle: see LastingWorkers
    assert not any(unclear in message for unclear in ("\n", "Traceback", "np.str_"))


@pytest.mark.parametrize(
    "kind, workers",
    [
        ("empty", 0),
        ("text", 0),
        ("half a jpeg", 0),
        ("half a png", 0),
        ("absent", 0),
        ("text", 1),
        ("flipped", 1),
    ],
)
def test_an_unreadable_file_stops_the_epoch_with_its_name(tmp_path, image_sets, kind, workers):
    damage(tmp_path / "broken.png", kind)
    paths = [*image_sets["files"].paths[:5], str(tmp_path / "broken.png")]
    loader = EpochLoader(FileImages(Paths(paths), None, [], MOMENTS), RECIPE, 3, CPU, workers)
    assert_stopped_with_one_clear_line(lambda: list(loader.epoch(0)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_file_stops_the_evaluation_with_its_name(tmp_path, image_sets, workers):
    damage(tmp_path / "broken.png", "text")
    paths = [*image_sets["files"].paths[:5], str(tmp_path / "broken.png")]
    images = FileImages(Paths(paths), None, [], MOMENTS)
    batches = whole_images(images, np.arange(6), size=16, device=CPU, workers=workers)
    assert_stopped_with_one_clear_line(lambda: list(batches))


@pytest.mark.parametrize("kind", ["png", "text"])
def test_workers_end_with_the_last_reference_to_their_loader(tmp_path, image_sets, kind):
    """If only the garbage collector ends them, torch waits 5 s for each."""
    paths = [*image_sets["files"].paths[:5], str(tmp_path / "broken.png")]
    damage(tmp_path / "broken.png", kind)
    if kind == "png":
        paths[5] = paths[0]
    gc.collect()
    others = {*multiprocessing.active_children()}
    gc.disable()
    try:
        images = FileImages(Paths(paths), None, [], MOMENTS)
        loader = EpochLoader(images, RECIPE, 3, CPU, workers=1)
        with contextlib.suppress(RunError):
            for _ in loader.epoch(0):
                workers = {*multiprocessing.active_children()} - others
        assert workers
        del loader, _
        assert not any(worker.is_alive() for worker in workers)
    finally:
        gc.enable()


def test_workers_that_cannot_start_are_one_line(image_sets, monkeypatch):
    """torch's destructor of what it has begun to build would print a traceback."""

    def full(context):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ignored = []
    monkeypatch.setattr(multiprocessing.context.BaseContext, "Event", full)
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    with pytest.raises(RunError, match="No space left"):
        list(EpochLoader(image_sets["files"], RECIPE, 3, CPU, workers=1).epoch(0))
    gc.collect()
    assert not ignored


# -- whole images for evaluation -------------------------------------------------------------------


def as_sets(images):
    """The same (3, H, W) images as ResidentImages, and as FileImages, written as PNGs."""

    def files(folder):
        paths = [str(folder / f"{number}.png") for number in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            F.to_pil_image(image).save(path)
        return FileImages(Paths(paths), None, [], MOMENTS)

    return {
        "resident": lambda folder: ResidentImages(torch.stack(images), None, [], MOMENTS),
        "files": files,
    }


SIZES = [(24, 40, 16), (40, 24, 32), (17, 17, 15), (24, 24, 48), (24, 40, 24), (1, 3, 2)]


@pytest.mark.parametrize("kind", ["resident", "files"])
@pytest.mark.parametrize("height, width, size", SIZES)
def test_evaluation_sees_the_central_seven_eighths(tmp_path, kind, height, width, size):
    originals = [rgb(picture(height, width, seed)).to(torch.uint8) for seed in range(3)]
    whole = as_sets(originals)[kind](tmp_path).whole(np.array([2, 0]), size)
    side = round(min(height, width) * 7 / 8)
    for image, actual in zip([originals[2], originals[0]], whole, strict=True):
        expected = F.resize(
            F.center_crop(image, side), [size, size], InterpolationMode.BILINEAR, antialias=True
        )
        if (height - side) % 2 == 0 and (
            width - side
        ) % 2 == 0:  # else torchvision may cut half a pixel elsewhere
            assert levels_apart(actual, expected) <= 1
        top, left = (height - side) // 2, (width - side) // 2
        expected = F.resized_crop(
            image, top, left, side, side, [size, size], InterpolationMode.BILINEAR, antialias=True
        )
        assert levels_apart(actual, expected) <= 1


@pytest.mark.parametrize("kind", ["resident", "files"])
def test_images_of_the_evaluation_size_are_left_untouched(tmp_path, kind):
    originals = [rgb(picture(32, 32, seed)).to(torch.uint8) for seed in range(3)]
    assert torch.equal(
        as_sets(originals)[kind](tmp_path).whole(np.array([1, 2]), 32), torch.stack(originals[1:])
    )


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("kind, workers", [("resident", 0), ("files", 0), ("files", 2)])
def test_whole_images_come_normalised_in_order_and_in_chunks(tmp_path, kind, workers, chunk):
    originals = [rgb(picture(16, 16, seed)).to(torch.uint8) for seed in range(7)]
    images, order = as_sets(originals)[kind](tmp_path), np.array([6, 2, 2, 0, 5, 1, 3])
    batches = list(whole_images(images, order, size=16, device=CPU, workers=workers, chunk=chunk))
    assert [len(batch) for batch in batches] == [chunk] * (7 // chunk) + [7 % chunk] * (
        7 % chunk > 0
    )
    expected = torch.stack([F.normalize(originals[i] / 255, *MOMENTS) for i in order])
    torch.testing.assert_close(torch.cat(batches), expected)


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="this C library does not say what it keeps"
)
def test_freed_memory_is_kept_for_the_next_views():
    # reads the allocator's counters: not every system counts page faults
    program = """if True:
        import numpy
        names = "arena ordblks smblks hblks hblkhd usmblks fsmblks".split()
        names += "uordblks fordblks keepcost".split()
        class Info(ctypes.Structure):
            _fields_ = [(name, ctypes.c_size_t) for name in names]
        ask = ctypes.CDLL(None).mallinfo2
        ask.restype = Info
        keep_freed_memory()
        before = ask().hblkhd  # bytes that are given back as soon as they are freed
        x = numpy.ones(3 * 2**20)  # 24 MB; on some machines torch has an allocator of its own
        print(ask().hblkhd - before)
        del x
        print(ask().fordblks)"""
    function = inspect.getsource(keep_freed_memory)  # importing it, with torch, would take seconds
    program = f"import ctypes\n{function}\n{program}"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    fleeting, kept = map(int, run.stdout.split())
    assert fleeting == 0 and kept >= 24 * 2**20
