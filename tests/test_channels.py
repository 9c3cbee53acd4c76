"""Images that are not RGB: arrays and pages of any number of channels, from the file to the export.

Operations that treat each channel alone are compared with the same on images of that channel.
"""

import functools
import io
import json
import sys
import tarfile

import numpy as np
import pytest
import timm
import torch
from accelerator import DEVICE, Accelerator
from PIL import Image
from test_augment import RECIPE, draw_many
from test_backbones import assert_uniform, build
from test_export import READS_FOLDERS
from test_high_bit_depth import scaled_slowly, tiff_16
from test_ranks import NO_EVALUATION
from test_sources import open_data, refused

import main_lincls
import main_snclr
import snclr
from snclr import augment, embed, export, operations, options, visualize
from snclr.datasets.decoding import decode
from snclr.datasets.images import EncodedImages, ResidentImages
from snclr.mean_std import mean_std
from snclr.pictures.canvas import in_colour
from snclr.running import settings
from snclr.running.errors import RunError, UsageError

C = 5


def bands(height=20, width=28, seed=0, channels=C, most=255, kind=np.uint8):
    """Random channels (channels, height, width) with values of 0 to most."""
    random = np.random.default_rng(seed)
    return random.integers(0, most + 1, (channels, height, width)).astype(kind)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def tiff(*pages):
    buffer = io.BytesIO()
    first, *others = (
        page if isinstance(page, Image.Image) else Image.fromarray(page) for page in pages
    )
    first.save(buffer, "tiff", save_all=True, append_images=others)
    return buffer.getvalue()


def decoded(content, channels=C, grey_range=None):
    return decode(np.frombuffer(bytearray(content), np.uint8), "x", grey_range, channels)


# -- from the file to channels ---------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 12])
def test_arrays_and_pages_of_8_bits_keep_their_values(channels):
    pixels = bands(channels=channels)
    expected = torch.from_numpy(pixels)
    last = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    files = [npy(pixels), npy(last), npy(np.asfortranarray(pixels)), tiff(*pixels)]
    if channels == 1:
        files.append(npy(pixels[0]))
    if channels > 3:
        files.append(tiff(last[..., :3], *pixels[3:]))
    for content in files:
        image = decoded(content, channels)
        assert torch.equal(image, expected) and image.dtype == torch.uint8
    # an array that is as high as it has channels: the first axis counts
    square = bands(channels, channels, channels=channels)
    assert torch.equal(decoded(npy(square), channels), torch.from_numpy(square))


@pytest.mark.parametrize("kind", ["<u2", ">u2", "i4", "f4", "f8"])
def test_more_bits_are_scaled_by_the_rule_of_grey_images(kind):
    pixels = bands(most=4095, kind=kind)
    expected = torch.from_numpy(scaled_slowly(pixels, 0, 4000))
    assert torch.equal(decoded(npy(pixels), C, (0, 4000)), expected)
    default = scaled_slowly(pixels, 0, 1 if "f" in kind else 65535)
    assert torch.equal(decoded(npy(pixels)), torch.from_numpy(default))
    if kind in ("<u2", "i4", "f4"):
        assert torch.equal(decoded(tiff(*pixels), C, (0, 4000)), expected)
        assert torch.equal(decoded(tiff(*pixels)), torch.from_numpy(default))


@pytest.mark.parametrize("order", "<>")
def test_every_page_of_16_bits_per_colour_keeps_all_bits(order):
    pixels = bands(channels=6, most=4095, kind=np.uint16)
    one, two = (
        np.ascontiguousarray(pixels[part].transpose(1, 2, 0)) for part in (slice(3), slice(3, 6))
    )
    size = len(tiff_16(one, order))
    content = tiff_16(one, order, following=size + 8) + tiff_16(two, order, start=size)
    expected = torch.from_numpy(scaled_slowly(pixels, 0, 4000))
    assert torch.equal(decoded(content, 6, (0, 4000)), expected)
    assert torch.equal(decoded(content, 6), torch.from_numpy((pixels >> 8).astype(np.uint8)))


def test_one_channel_is_grey():
    colours = bands(channels=3).transpose(1, 2, 0)
    picture = Image.fromarray(colours)
    for kind in ("jpeg", "png"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        expected = np.array(Image.open(buffer).convert("L"))
        assert torch.equal(decoded(buffer.getvalue(), 1), torch.from_numpy(expected)[None])
    pages = [Image.fromarray(colours[..., 0]).convert(mode) for mode in ("1", "P", "RGB")]
    expected = [np.array(page.convert("L"))[None] for page in pages[:2]]
    expected.append(np.array(pages[2]).transpose(2, 0, 1))
    assert torch.equal(decoded(tiff(*pages)), torch.from_numpy(np.concatenate(expected)))
    with pytest.raises(RunError, match="its pages have 3 channels, --channels is 5"):
        decoded(buffer.getvalue())


@pytest.mark.parametrize(
    "content, message",
    [
        (npy(bands(channels=4)), r"its array is \(4, 20, 28\), --channels is 5"),
        (npy(bands()[0]), r"its array is \(1, 20, 28\), --channels is 5"),
        (npy(bands()[None]), r"its array is \(1, 5, 20, 28\)"),
        (npy(bands().astype("U3")), "an array of <U3"),
        (npy(bands() > 9), "an array of bool"),
        (npy(bands()[:, :0]), r"an array of uint8, \(5, 0, 28\), is no image"),
        (npy(np.array([{}])), "allow_pickle=False"),
        (npy(bands())[:-9], "reading array data"),
        (tiff(*bands(channels=4)), "its pages have 4 channels, --channels is 5"),
        (tiff(*bands(channels=7)), "its pages have 6 channels, --channels is 5"),
        (tiff(*bands(), bands()[0, 1:]), "dimensions"),
        (b"text", "it is not an image of a known format"),
    ],
)
def test_other_files_are_refused_by_name(content, message):
    with pytest.raises(RunError, match=rf"^cannot read image x: .*{message}"):
        decoded(content)


# -- views -----------------------------------------------------------------------------------------


def blurred_slowly(x, sigma):
    """Each pixel of (C, S, S) as the weighted sum of those around it, reflected at the border."""
    radius, size = int(np.ceil(3 * sigma)), x.shape[-1]
    offsets = np.arange(-radius, radius + 1)
    taps = np.exp(-(offsets**2) / (2 * sigma**2))
    taps /= taps.sum()
    at = np.abs(np.arange(size)[:, None] + offsets)
    at = np.minimum(at, 2 * (size - 1) - at)  # (S, taps)
    rows = (x[:, at] * taps[None, None, :, None]).sum(axis=2)
    return (rows[:, :, at] * taps).sum(axis=3)


def applied_slowly(crop, p, i, mean, std):
    """View i of (C, S, S) uint8 in float64, operation after operation."""
    x = crop.astype(np.float64) / 255
    for operation in p.order[i].tolist() if p.jitter[i] else ():
        factor = p.factors[i, operation].item()
        around = {0: 0, 1: x.mean()}
        if operation in around:  # saturation and hue are off
            x = (factor * x + (1 - factor) * around[operation]).clip(0, 1)
    if p.sigma[i] > 0:
        x = blurred_slowly(x, p.sigma[i].item())
    if p.solarize[i]:
        x = np.where(x >= 128 / 255, 1 - x, x)
    x = x[:, :, ::-1] if p.flip[i] else x
    x = x[:, ::-1] if p.flip_v[i] else x
    x = np.rot90(x, p.quarters[i].item(), axes=(1, 2))
    return (x - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize("size, count, channels", [(16, 40, C), (16, 40, 1), (66, 12, C)])
def test_views_equal_a_slow_twin_and_an_accelerators(size, count, channels):
    view = RECIPE.views[0]._replace(
        jitter=(0.8, 0.9, 0, 0), gray_p=0, blur_p=0.5, solarize_p=0.5, flip_v_p=0.5, rotate_p=0.5
    )
    _, p = draw_many(RECIPE._replace(views=(view,)), count=count)
    crops = bands(size, size * count, channels=channels).reshape(channels, size, count, size)
    crops = np.ascontiguousarray(crops.transpose(2, 0, 1, 3))
    mean, std = np.linspace(0.3, 0.7, channels), np.linspace(0.2, 0.4, channels)
    expected = [applied_slowly(crop, p, i, mean, std) for i, crop in enumerate(crops)]
    expected = torch.from_numpy(np.stack(expected)).float()
    args = torch.from_numpy(crops), p, torch.from_numpy(mean), torch.from_numpy(std)
    torch.testing.assert_close(operations.apply(*args), expected, atol=1e-5, rtol=0)
    with Accelerator() as accelerator:
        views = operations.apply(args[0].to(DEVICE, non_blocking=True), *args[1:])
    assert accelerator.waits == []
    torch.testing.assert_close(views.local, expected, atol=1e-5, rtol=0)


class Arrays(EncodedImages):
    """Images (n, C, H, W) as if each were decoded."""

    def __init__(self, arrays, channels):
        super().__init__(None, [], ([0.5] * channels, [0.5] * channels))
        self.arrays, self.channels = torch.from_numpy(arrays), channels

    def __len__(self):
        return len(self.arrays)

    def image(self, index):
        return self.arrays[index]


def test_a_set_of_which_a_part_is_taken_names_its_arrays():
    images = Arrays(np.zeros((3, C, 8, 8), np.uint8), C)
    with pytest.raises(AssertionError, match="per_image must name"):
        images.select(np.arange(2))


@pytest.mark.parametrize("kind", [Arrays, ResidentImages])
def test_crops_and_whole_images_are_those_of_each_channel(kind):
    arrays = np.stack([bands(30, 40, seed) for seed in range(3)])
    rgb = [np.repeat(arrays[:, [number]], 3, axis=1) for number in range(C)]
    half = [0.5] * C, [0.5] * C
    images, *channels = (
        Arrays(x, x.shape[1]) if kind is Arrays else ResidentImages(x, None, [], half)
        for x in (arrays, *rgb)
    )
    indices = np.arange(3)
    crops = images.views(RECIPE, 0, indices).crops[0]
    whole = images.whole(indices, 12)
    assert crops.shape == (6, C, 16, 16) and whole.shape == (3, C, 12, 12)
    for number, of_channel in enumerate(channels):
        for mine, theirs in (
            (crops, of_channel.views(RECIPE, 0, indices).crops[0]),
            (whole, of_channel.whole(indices, 12)),
        ):
            apart = mine[:, number].int() - theirs[:, 1].int()
            assert apart.abs().max() <= 1  # another kernel of torch rounds otherwise


def test_unreadable_images_are_replaced_by_grey_in_all_channels():
    images = Arrays(bands(channels=C)[None], C)
    images.skip_bad = True
    images.image = lambda index: decoded(b"text")
    assert (images.whole(np.array([0]), 9) == 127).all() and images.whole([0], 9).shape[1] == C
    assert images.whole([], 9).shape == (0, C, 9, 9)


# -- sets and flags --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Arrays and TIFF files of two classes in two sizes, with 12 bits."""
    root = tmp_path_factory.mktemp("bands")
    for number in range(24):
        pixels = bands(36, 33 + number % 2, number, most=4095, kind=np.uint16)
        path = root / ("train" if number < 16 else "val") / "ab"[number // 2 % 2]
        path.mkdir(parents=True, exist_ok=True)
        name, content = (
            (f"{number}.tif", tiff(*pixels)) if number % 4 else (f"{number}.npy", npy(pixels))
        )
        (path / name).write_bytes(content)
    return root


def test_arrays_are_images_only_beside_other_channels_and_mean_std_counts_them(folder, tmp_path):
    images, _, notes = open_data(folder, "--channels", C, "--img-size", 33)
    assert len(images) == 16 and images.labels.tolist() == 4 * [0, 0] + 4 * [1, 1]
    assert "16-bit" not in notes[0] and "of 0..65535. Give the range of all images" in notes[0]
    assert images.mean.tolist() == images.std.tolist() == [0.5] * C
    pixels = images.whole(np.arange(16), 33).numpy() / 255
    expected = pixels.mean(axis=(0, 2, 3)), pixels.std(axis=(0, 2, 3))
    np.testing.assert_allclose(mean_std(images, 33, 0), expected, atol=1e-6)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(folder / "train", "")
    assert len(open_data(tmp_path / "x.tar")[0]) == 12  # of three channels: only the TIFF files
    shards, _, _ = open_data(tmp_path / "x.tar", "--channels", C)
    assert len(shards) == 16
    name = shards.paths[3].removeprefix(f"{tmp_path}/x.tar/")
    assert torch.equal(shards.image(3), decoded((folder / "train" / name).read_bytes()))


def test_what_makes_no_sense_is_refused_in_one_line(folder, tmp_path):
    assert refused("--channels", 5) == "--dataset embedded has RGB images, not --channels 5"
    assert "--dataset cifar10 has RGB" in refused(tmp_path, "--dataset", "cifar10", "--channels", 1)
    assert "--channels is 4" in refused(folder, "--channels", 4)
    wrong = ["--mean", *"234", "--std", *"234"]
    wrong = [f".{x}" if x.isdigit() else x for x in wrong]
    assert "--mean and --std need 5 numbers each" in refused(folder, "--channels", 5, *wrong)
    for flags in ("--grey-p 0 0.1", "--jitter 0.4 0.4 0.1 0", "--jitter 1 1 0 0 1 1 0 0.1"):
        with pytest.raises(UsageError, match="only images of red, green and blue have saturation"):
            options.parse([str(folder), "--channels", "5", *flags.split()])
    args = options.parse([str(folder), "--channels", "5", "--method", "mocov2"])
    views = augment.build_views(args)
    assert {view.jitter for view in views} == {(0.4, 0.4, 0, 0)}
    assert {view.gray_p for view in views} == {0} and {view.jitter_p for view in views} == {0.8}


# -- from training to the export -------------------------------------------------------------------


STEMS = {
    "resnet8": "conv1",
    "vit_tiny": "patch_embed.proj",
    "vit_conv_small": "patch_embed.proj.0",
    "timm:test_vit": "patch_embed.proj",
}


@pytest.mark.parametrize("arch", STEMS)
def test_only_the_stem_has_other_weights(arch):
    size = {"img_size": 160} if arch == "timm:test_vit" else {}
    usual, other = (build(arch, channels=channels, **size).state_dict() for channels in (3, C))
    differing = {name for name in usual if usual[name].shape != other[name].shape}
    stem = f"{STEMS[arch]}.weight"
    assert usual.keys() == other.keys() and differing == {stem}
    assert other[stem].shape[1] == C
    if arch == "vit_tiny":
        assert_uniform(other[stem], (6 / (C * 16**2 + 192)) ** 0.5)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """From an architecture to the checkpoint of a run of two steps on the folder."""

    @functools.cache
    def train(arch):
        workdir = tmp_path_factory.mktemp(arch)
        flags = f"{NO_EVALUATION} --channels {C} --grey-range 0 4095 --workdir {workdir}"
        flags = flags.replace("resnet8", arch) + " --stop-after-steps 2"
        if arch == "resnet8":
            flags = flags.replace("--eval-freq 0", "--eval-freq 1")
        if arch == "resnet18":  # timm's has a 7x7 stem and full width
            flags = flags.replace("--width 8", "--no-small-stem")
        main_snclr.main([str(folder), *flags.split()])
        return str(workdir / "checkpoint_last.pth.tar")

    return train


@pytest.mark.parametrize("arch", ["resnet8", "vit_tiny"])
def test_a_run_its_features_its_pictures_and_its_export(
    arch, trained, folder, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)  # optional, and slow
    file = trained(arch)
    encoder, info = snclr.load_encoder(file)
    assert info["channels"] == C and info["mean"] == info["std"] == [0.5] * C
    embed.main([file, str(folder), "--out", f"{tmp_path}/x.npz", "--workers", "0"])
    written = np.load(tmp_path / "x.npz")
    for name, features in zip(written["names"][::5], written["features"][::5], strict=True):
        image = decode(np.fromfile(name, np.uint8), name, (0, 4095), C)
        whole = Arrays(image[None].numpy(), C).whole([0], 32)
        expected = encoder.embed(whole / 127.5 - 1)[0]
        np.testing.assert_allclose(features, expected.numpy(), rtol=1e-4, atol=1e-5)
    photo = next(map(str, folder.rglob("*.npy")))
    flags = f"--image {photo} --count 2 --pool 8 --workers 0 --out {tmp_path}/pictures"
    visualize.main([file, str(folder), *flags.split()])
    assert (tmp_path / "pictures/retrieval.png").exists()
    kind = "onnx" if arch == "resnet8" else "timm"
    if kind == "onnx":
        pytest.importorskip("onnxruntime", reason="--format onnx needs onnxruntime")
    export.main([file, "--format", kind, "--out", f"{tmp_path}/{kind}"])
    card = tmp_path / ("onnx.md" if kind == "onnx" else "timm/README.md")
    assert f"32 x 32 px, {C} channels, divided" in card.read_text()
    if kind == "timm":
        # before 1.0.31 timm adapts the first filters to other channels, and takes them for RGB's
        config = json.loads((tmp_path / "timm/config.json").read_text())
        assert config["pretrained_cfg"]["first_conv"] is None
        if not READS_FOLDERS:
            pytest.skip("timm before 1.0.26 does not read folders")
        model = timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True)
        x = torch.randn(2, C, 32, 32)
        torch.testing.assert_close(model.eval()(x), encoder(x), rtol=1e-4, atol=1e-5)
        assert [*model.pretrained_cfg["input_size"]] == [C, 32, 32]
        exported = snclr.load_encoder(f"{tmp_path}/timm/model.safetensors")[1]
        assert exported["channels"] == C


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny"])
def test_exports_for_transformers_and_timm(arch, trained, tmp_path):
    pytest.importorskip("transformers", reason="--format hf needs transformers")
    for kind in ("hf", "timm"):
        export.main([trained(arch), "--format", kind, "--out", f"{tmp_path}/{kind}"])
    assert json.loads((tmp_path / "hf/config.json").read_text())["num_channels"] == C


@pytest.mark.parametrize("encoder", ["online", "pixels"])
def test_a_probe_needs_no_flag(encoder, trained, folder, tmp_path):
    flags = f"--encoder {encoder} --epochs 1 --batch-size 8 --workdir {tmp_path}/probe"
    main_lincls.main([str(folder), "--pretrained", trained("resnet8"), *flags.split()])
    assert json.loads((tmp_path / "probe/results.json").read_text())["training_images"] == 16


def test_files_for_other_channels_are_refused_in_one_line(trained, folder, tmp_path):
    file = trained("resnet8")
    flags = f"{NO_EVALUATION} --channels 4 --grey-range 0 4095".split()
    with pytest.raises(UsageError, match="--channels is 4"):
        main_snclr.main([str(folder), *flags, "--workdir", str(tmp_path / "x")])
    with pytest.raises(UsageError, match="is for images with 5 channels, not 4: give the same"):
        snclr.load_encoder(file, channels=4)
    flags = f"{NO_EVALUATION} --init-from {file} --workdir {tmp_path}/x".split()
    with pytest.raises(UsageError, match="with 5 channels, not 3: give the same number as --chan"):
        main_snclr.main(flags)
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    given = dict(arch="vit_tiny", img_size=32, channels=C, num_heads=3)
    path = str(tmp_path / "plain.pth")
    with pytest.raises(
        UsageError, match="with 3 channels, not 5: give the same number as --channels"
    ):
        snclr.load_encoder(path, **given)
    torch.save(build("vit_tiny", channels=C).state_dict(), path)
    with pytest.raises(UsageError, match=r"plain.pth: --mean and --std need 5 numbers each"):
        snclr.load_encoder(path, **given)
    for kind in ("torchvision", "mocov3", "detectron2"):
        with pytest.raises(UsageError, match="has only models of RGB images, not of 5 channels"):
            export.main([file, "--format", kind, "--out", str(tmp_path / kind)])


def test_runs_resume_with_their_channels_only():
    args = options.parse(["--stop-after-steps", "1"])
    saved = vars(args) | {"channels": C}
    assert settings.changes(saved, args, options.ON_RESUME)[0] == ["channels 5 -> 3"]
    del saved["channels"]  # as in files of earlier versions
    assert settings.changes(saved, args, options.ON_RESUME) == ([], [])
    args.channels = C
    assert settings.changes(saved, args, options.ON_RESUME)[0] == ["channels 3 -> 5"]


def test_pictures_show_three_channels_or_grey():
    x = torch.from_numpy(bands(4, 6, channels=12).reshape(2, 6, 4, 6))
    assert np.array_equal(in_colour(x), x[:, :3].permute(0, 2, 3, 1).numpy())
    for channels in (1, 2):
        grey = in_colour(x[:, :channels])
        assert grey.shape == (2, 4, 6, 3)
        assert all(np.array_equal(grey[..., n], x[:, 0].numpy()) for n in range(3))
