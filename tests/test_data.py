import contextlib
import ctypes
import functools
import multiprocessing
import os
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from snclr import augment, options
from snclr import loader as data
from snclr.augment import Recipe, View, moco_v3_views
from snclr.datasets import embedded, sources
from snclr.loader import ImageFiles, ResidentImages, TwoViewLoader, whole_images
from snclr.running.errors import RunError

CPU = torch.device("cpu")
RECIPE = Recipe(5, moco_v3_views(size=16, crop_min=0.2, blur=True))
MOMENTS = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def picture(height=24, width=32, seed=0):
    """A smooth colour picture, of which no two turned or mirrored copies are alike."""
    y, x = np.mgrid[0:height, 0:width] / 32
    phase = np.random.default_rng(seed).uniform(0, 2, 3)
    levels = [0.5 + 0.45 * np.sin(2 * x + p) * np.cos(3 * y * p + x * y) for p in phase]
    return Image.fromarray((np.stack(levels, axis=2) * 255).round().astype(np.uint8))


def rgb(image):
    """What PIL makes of a picture: (3, H, W) int."""
    return (
        torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB")))
        .permute(2, 0, 1)
        .int()
    )


def levels_apart(one, other):
    assert one.shape == other.shape
    return int((one.int() - other.int()).abs().max())


def save_folder(root, sizes, split="train", classes=("ant", "bee")):
    """One small PNG for each (height, width), in class folders by turns."""
    for number, (height, width) in enumerate(sizes):
        folder = root / split / classes[number % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        picture(height, width, seed=number).save(folder / f"{number:03}.png")
    return root


def open_folder(root):
    """The training images of a folder."""
    return sources.open_data(options.parse_data([str(root)]))[0]


def decode(path):
    return data.decode(np.fromfile(path, np.uint8), str(path))


MIXED = [(20 + 3 * (n % 7), 18 + 5 * (n % 4)) for n in range(30)]
EQUAL = [(20, 26)] * 30


@pytest.fixture(scope="module")
def image_sets(tmp_path_factory):
    """'resident', and 'files' of mixed sizes, with 30 images each."""
    sets = {}
    for name, sizes in {"resident": EQUAL, "files": MIXED}.items():
        sets[name] = open_folder(save_folder(tmp_path_factory.mktemp(name), sizes))
    assert isinstance(sets["resident"], ResidentImages) and isinstance(sets["files"], ImageFiles)
    return sets


# -- two views -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def load(monkeypatch):
    """load(images, ranks=..., ...): the global batches (ids, view1, view2) of an epoch, ranks joined in order."""

    def load(images, *, ranks=1, workers=0, epoch=1, first=0, recipe=RECIPE, global_batch_size=8):
        shares = []
        for rank in range(ranks):
            monkeypatch.setattr(data, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(data, "world_size", lambda: ranks)
            shares.append(
                list(
                    TwoViewLoader(images, recipe, global_batch_size, CPU, workers).epoch(
                        epoch, first
                    )
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
        map(pytest.approx, options.IMAGENET)
    )
    for ids, view1, view2 in load(images, epoch=4):
        assert ids.shape == (8,) and ids.dtype == torch.int64
        assert (
            view1.shape == view2.shape == (8, 3, 16, 16)
            and view1.dtype == view2.dtype == torch.float32
        )
        assert not torch.equal(view1, view2)
        _, (crops,), (parameters,) = images.views(RECIPE, 4, ids.numpy())
        expected = augment.apply(crops, parameters, *map(torch.tensor, options.IMAGENET))
        assert torch.equal(torch.cat([view1, view2]), expected)


@pytest.mark.parametrize("kind", ["resident", "files"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_longer_table_gives_more_views_of_other_sizes_and_leaves_the_first_as_they_were(
    image_sets, kind, workers
):
    small = View(8, 0.05, 0.25, jitter_p=0.8, blur_p=0.5)
    more = RECIPE._replace(views=(*RECIPE.views, small, small, View(24, 0.5)))
    loaders = [TwoViewLoader(image_sets[kind], r, 8, CPU, workers) for r in (RECIPE, more)]
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
    """What a GPU is told, in its order, with a stand-in for the streams: a step must never run in the loader's stream."""
    told = []

    @contextlib.contextmanager
    def stream(_):
        told.append("in")
        yield
        told.append("out")

    apply = augment.apply
    training = SimpleNamespace(wait_stream=lambda _: told.append("wait"))
    monkeypatch.setattr(
        augment, "apply", lambda *arguments: told.append("made") or apply(*arguments)
    )
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: training)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda _, by: told.append("kept") if by is training else None
    )
    loader = TwoViewLoader(image_sets["resident"], RECIPE, 8, CPU, 0)
    loader.stream = object()
    for _ in loader.epoch(1):
        told.append("step")
    assert told == ["in", "made", "out", "wait", "kept", "kept", "step"] * 3


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
        loader = TwoViewLoader(image_sets["files"], RECIPE, 8, CPU, workers=2)
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
    loader = TwoViewLoader(image_sets["files"], RECIPE, 8, CPU, workers)
    next(loader.epoch(0))
    next(loader.epoch(0, first=2))
    batches = [(batch.ids, *batch.views) for batch in loader.epoch(1)]
    assert_same_batches(load(image_sets["files"], epoch=1), batches)


@pytest.mark.parametrize("kind", ["resident", "files"])
def test_an_epoch_shows_no_image_twice_and_leaves_out_only_the_remainder(image_sets, load, kind):
    for global_batch_size, steps in [(8, 3), (30, 1), (7, 4), (31, 0)]:
        batches = load(image_sets[kind], global_batch_size=global_batch_size)
        seen = [number for ids, _, _ in batches for number in ids.tolist()]
        assert (
            len(batches)
            == steps
            == TwoViewLoader(image_sets[kind], RECIPE, global_batch_size, CPU, 0).steps_per_epoch
        )
        assert len(set(seen)) == len(seen) == steps * global_batch_size


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
    originals = [
        images.images[i] if kind == "resident" else decode(images.paths[i]) for i in indices
    ]
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
    files = ImageFiles(paths, resident.labels.numpy(), resident.classes, MOMENTS)
    ours, theirs = (images.views(RECIPE, 0, np.arange(30)) for images in (resident, files))
    assert levels_apart(ours.crops[0], theirs.crops[0]) <= 1
    assert all(
        torch.equal(one, other)
        for one, other in zip(ours.parameters[0], theirs.parameters[0], strict=True)
    )


# -- decoding ------------------------------------------------------------------------------------------------------------

PALETTE = picture().quantize(32)
WITH_ALPHA = Image.merge("RGBA", [*picture().split(), Image.linear_gradient("L").resize((32, 24))])
FORMATS = {
    "rgb.jpg": (picture(), {"quality": 95}),
    "progressive.jpg": (picture(33, 47), {"quality": 80, "progressive": True}),
    "grey.jpg": (picture().convert("L"), {"quality": 95}),
    "cmyk.jpg": (picture().convert("CMYK"), {"quality": 95}),
    "rgb.png": (picture(), {}),
    "grey.png": (picture().convert("L"), {}),
    "bilevel.png": (picture().convert("1"), {}),
    "palette.png": (PALETTE, {}),
    "palette-one-transparent.png": (PALETTE, {"transparency": 3}),
    "palette-alpha.png": (PALETTE, {"transparency": bytes(range(0, 256, 8))}),
    "rgba.png": (WITH_ALPHA, {}),
    "grey-alpha.png": (WITH_ALPHA.convert("LA"), {}),
    "rgb.bmp": (picture(), {}),
    "rgb.ppm": (picture(), {}),
    "rgb.tif": (picture(), {}),
    "cmyk.tif": (picture().convert("CMYK"), {}),
    "one.gif": (PALETTE, {}),
    "animated.gif": (PALETTE, {"save_all": True, "append_images": [PALETTE.rotate(180)]}),
    "lossless.webp": (picture(), {"lossless": True}),
    "lossy.webp": (picture(), {"quality": 80}),
    "rgba.webp": (WITH_ALPHA, {"lossless": True, "exact": True}),
    "one-pixel.png": (picture(1, 1), {}),
    "one-row.jpg": (picture(1, 40), {}),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", FORMATS)
def test_decode_gives_rgb_as_pil_does(tmp_path, name):
    image, options = FORMATS[name]
    image.save(tmp_path / name, **options)
    decoded = decode(str(tmp_path / name))
    with Image.open(tmp_path / name) as opened:
        expected = rgb(opened)
    assert decoded.dtype == torch.uint8 and decoded.shape == (3, image.height, image.width)
    assert levels_apart(decoded, expected) <= 2


@pytest.mark.parametrize(
    "name", ["rgba.png", "palette.png", "rgb.bmp", "lossless.webp", "rgba.webp"]
)
def test_lossless_pictures_come_back_exactly(tmp_path, name):
    image, options = FORMATS[name]
    image.save(tmp_path / name, **options)
    assert torch.equal(decode(str(tmp_path / name)).int(), rgb(image))


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_16_bit_grey_keeps_its_levels(tmp_path, name):
    levels = np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / name)
    expected = torch.from_numpy((levels >> 8).astype(np.int32)).expand(3, 24, 32)
    decoded = decode(str(tmp_path / name))
    assert levels_apart(decoded, expected) <= 2


@pytest.mark.parametrize(
    "suffix, options",
    [("jpg", {"quality": 95}), ("png", {}), ("webp", {"lossless": True}), ("tif", {})],
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, suffix, options, orientation):
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(path, exif=exif, **options)
    with Image.open(path) as opened:
        assert opened.getexif()[0x0112] == orientation
        expected = rgb(opened)
    decoded = decode(str(path))
    assert levels_apart(decoded, expected) <= 2


@pytest.fixture
def photographs():
    """Paths of eight photographs of many sizes."""
    root = os.environ.get("SNCLR_TEST_DATA")
    paths = sorted(Path(root, "imagenet-sample").rglob("*.JPEG"))[::32] if root else []
    if not paths:
        pytest.skip("SNCLR_TEST_DATA names no folder that holds imagenet-sample/")
    return paths


def test_photographs_decode_as_pil_does(photographs):
    for path in photographs:
        with Image.open(path) as opened:
            expected = rgb(opened)
        decoded = decode(str(path))
        assert decoded.shape == expected.shape, path.name
        assert (decoded.int() - expected).abs().double().mean() <= 2, path.name


def test_photographs_give_the_same_two_views_for_any_number_of_ranks(photographs, load):
    images = ImageFiles([str(path) for path in photographs], None, [], options.IMAGENET)
    recipe = Recipe(5, moco_v3_views(size=64, crop_min=0.2, blur=True))
    assert_same_batches(load(images, recipe=recipe), load(images, recipe=recipe, ranks=2))
    (_, view1, view2), *_ = load(images, recipe=recipe)
    assert 0.5 < view1.std() < 2 and 0.5 < view2.std() < 2


# -- unreadable files ----------------------------------------------------------------------------------------------------


def damage(path, kind):
    """Write an unreadable file, or for 'absent' none. 'flipped': one bit of a PNG's pixel data is wrong."""
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
    traceback.clear_frames(caught.tb)  # they hold the loader, whose workers would be waited for
    for unclear in ("\n", "Traceback", "np.str_"):
        assert unclear not in str(caught.value)


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
    loader = TwoViewLoader(ImageFiles(paths, None, [], MOMENTS), RECIPE, 3, CPU, workers)
    assert_stopped_with_one_clear_line(lambda: list(loader.epoch(0)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_file_stops_the_evaluation_with_its_name(tmp_path, image_sets, workers):
    damage(tmp_path / "broken.png", "text")
    images = ImageFiles(
        [*image_sets["files"].paths[:5], str(tmp_path / "broken.png")], None, [], MOMENTS
    )
    batches = whole_images(images, np.arange(6), size=16, device=CPU, workers=workers)
    assert_stopped_with_one_clear_line(lambda: list(batches))


# -- whole images for evaluation -----------------------------------------------------------------------------------------


def as_sets(images):
    """The same (3, H, W) images as ResidentImages, and as ImageFiles by way of PNGs at the paths given."""

    def files(folder):
        paths = [str(folder / f"{number}.png") for number in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            F.to_pil_image(image).save(path)
        return ImageFiles(paths, None, [], MOMENTS)

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
    for image, found in zip([originals[2], originals[0]], whole, strict=True):
        expected = F.resize(
            F.center_crop(image, side), [size, size], InterpolationMode.BILINEAR, antialias=True
        )
        if (height - side) % 2 == 0 and (
            width - side
        ) % 2 == 0:  # else torchvision may cut half a pixel elsewhere
            assert levels_apart(found, expected) <= 1
        top, left = (height - side) // 2, (width - side) // 2
        expected = F.resized_crop(
            image, top, left, side, side, [size, size], InterpolationMode.BILINEAR, antialias=True
        )
        assert levels_apart(found, expected) <= 1


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


# -- opening -------------------------------------------------------------------------------------------------------------


# -- the embedded set ----------------------------------------------------------------------------------------------------

draw_once = functools.cache(embedded.draw)


@pytest.mark.parametrize("split, count", [("train", 5000), ("val", 1000)])
def test_the_embedded_set_is_balanced_and_of_the_right_shape(split, count):
    images, labels = draw_once(split)
    assert images.shape == (count, 3, 32, 32) and images.dtype == np.uint8
    assert labels.shape == (count,) and labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [count // len(embedded.CLASSES)] * len(embedded.CLASSES)
    assert np.abs(np.diff(labels)).max() > 1  # not sorted


def test_the_embedded_set_is_the_same_at_every_draw():
    again_images, again_labels = embedded.draw("val")
    images, labels = draw_once("val")
    assert np.array_equal(images, again_images) and np.array_equal(labels, again_labels)


def test_no_validation_picture_of_the_embedded_set_is_a_training_picture():
    train, val = (
        {picture.tobytes() for picture in draw_once(split)[0]} for split in ("train", "val")
    )
    assert len(train) == 5000 and len(val) == 1000 and not train & val


def test_the_stated_moments_are_those_of_the_embedded_training_images():
    pixels = draw_once("train")[0].astype(np.float64) / 255
    np.testing.assert_allclose(
        pixels.mean(axis=(0, 2, 3)), options.MEAN_STD["embedded"][0], atol=0.01
    )
    np.testing.assert_allclose(
        pixels.std(axis=(0, 2, 3)), options.MEAN_STD["embedded"][1], atol=0.01
    )


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="this C library does not say what it keeps"
)
def test_freed_memory_is_kept_for_the_next_views():
    program = """if True:  # asks the allocator itself: not every system counts page faults
        import ctypes, numpy
        from snclr.data import keep_freed_memory
        names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
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
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    fleeting, kept = map(int, run.stdout.split())
    assert fleeting == 0 and kept >= 24 * 2**20
