"""Images of more than 8 bits per channel: every format keeps its levels, scaled by --grey-range."""

import json
import struct
import tarfile
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import picture, save_folder
from test_ranks import SMALL

import main_lincls
import main_snclr
from snclr import load_encoder, mean_std, visualize
from snclr.datasets import sources
from snclr.datasets.decoding import decode
from snclr.datasets.high_bit_depth import to_8_bits
from snclr.running.errors import RunError, UsageError

TWELVE_BITS = (0.0, 4095.0)


def levels(height=48, width=96, channels=None, seed=0):
    """A ramp through all values of 12 bits, in random order: (height, width[, channels]) uint16."""
    shape = (height, width) if channels is None else (height, width, channels)
    ramp = np.linspace(0, 4095, np.prod(shape)).round().astype(np.uint16)
    return np.random.default_rng(seed).permutation(ramp).reshape(shape)


def scaled_slowly(values, low, high):
    """Each value by exact arithmetic: clipped to the range, then scaled to 0..255 and rounded."""
    low, high = Fraction(low), Fraction(high)
    clipped = [min(max(Fraction(float(value)), low), high) for value in np.ravel(values)]
    scaled = [round(255 * (value - low) / (high - low)) for value in clipped]
    return np.array(scaled, dtype=np.uint8).reshape(np.shape(values))


def png_16(pixels):
    """A PNG of (H, W, C) uint16, which PIL cannot write; C = 2 is grey with alpha."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff_16(pixels, order="<", compressed=False, orientation=1, start=0, following=0, planar=False):
    """A TIFF of (H, W, C) uint16 or float32, which PIL cannot write for C = 3, 4.

    planar: each channel in a strip of its own, else one strip with all. start: its position in a
    file of several pages; following: that of the tags of the next page.
    """
    height, width, channels = pixels.shape
    planes = pixels.transpose(2, 0, 1) if planar else [pixels]
    number = pixels.dtype.newbyteorder(order)
    strips = [plane.astype(number).tobytes() for plane in planes]
    strips = [zlib.compress(strip) if compressed else strip for strip in strips]
    bits = struct.pack(f"{order}{channels}H", *[8 * number.itemsize] * channels)
    sizes = struct.pack(f"{order}{len(strips)}I", *map(len, strips))
    tags = [  # number, type (3: 16 bits, 4: 32 bits), count, value
        (256, 3, 1, width),
        (257, 3, 1, height),
        # bits per sample, behind the tags
        (258, 3, channels, None if channels > 1 else 8 * number.itemsize),
        (259, 3, 1, 8 if compressed else 1),
        (262, 3, 1, 2 if channels > 1 else 1),
        (273, 4, len(strips), None),  # the strips, behind them; of several, their places
        (274, 3, 1, orientation),
        (277, 3, 1, channels),
        (278, 3, 1, height),
        (279, 4, len(strips), len(strips[0])),
        (284, 3, 1, 2 if planar else 1),
        (339, 3, 1, 3 if number.kind == "f" else 1),
    ]
    after_bits = start + 8 + 2 + 12 * len(tags) + 4 + len(bits)
    places = {273: after_bits}
    if channels > 1:
        places[258] = after_bits - len(bits)
    if len(strips) > 1:
        places[279] = after_bits + len(sizes)
        offsets = [sum(map(len, strips[:number])) for number in range(channels)]
        offsets = [after_bits + 2 * len(sizes) + offset for offset in offsets]
        bits += struct.pack(f"{order}{channels}I", *offsets) + sizes
    file = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    for number, kind, count, value in tags:
        file += struct.pack(f"{order}HHI", number, kind, count)
        value = places.get(number, value)
        short = kind == 3 and number not in places
        file += struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
    return file + struct.pack(f"{order}I", following) + bits + b"".join(strips)


def ppm_16(pixels, largest=65535):
    """A PPM of (H, W, 3) uint16, a PGM of (H, W)."""
    kind = "P6" if pixels.ndim == 3 else "P5"
    header = f"{kind} {pixels.shape[1]} {pixels.shape[0]} {largest}\n"
    return header.encode() + pixels.astype(">u2").tobytes()


def big_endian(pixels):
    """PIL has no way to make an I;16B image from an array."""
    return Image.frombytes("I;16B", pixels.shape[::-1], pixels.astype(">u2").tobytes())


# how 12-bit pixels are stored, and the range that their values then have
GREY_FILES = {
    "I;16.png": (Image.fromarray, TWELVE_BITS),
    "I;16.tif": (Image.fromarray, TWELVE_BITS),
    "I;16B.tif": (big_endian, TWELVE_BITS),
    "I.tif": (lambda pixels: Image.fromarray(pixels.astype(np.int32)), TWELVE_BITS),
    "F.tif": (lambda pixels: Image.fromarray(pixels.astype(np.float32)), TWELVE_BITS),
    "F01.tif": (lambda pixels: Image.fromarray((pixels / 4095).astype(np.float32)), (0, 1)),
}


@pytest.mark.parametrize("name", GREY_FILES)
@pytest.mark.parametrize("orientation", [1, 6])
def test_12_bit_grey_keeps_256_levels_with_the_range(tmp_path, name, orientation):
    to_picture, grey_range = GREY_FILES[name]
    pixels, exif = levels(), Image.Exif()
    exif[0x0112] = orientation
    to_picture(pixels).save(tmp_path / name, exif=exif)
    decoded = decode(np.fromfile(tmp_path / name, np.uint8), name, grey_range)
    expected = scaled_slowly(pixels, *TWELVE_BITS)
    if orientation == 6:
        expected = np.rot90(expected, k=-1)
    assert len(decoded.unique()) == 256
    if name == "F01.tif":  # a quotient is not exact, and may be rounded the other way
        assert (decoded.int() - torch.from_numpy(expected.copy()).int()).abs().max() <= 1
    else:
        assert torch.equal(decoded, torch.from_numpy(expected.copy()).expand(3, -1, -1))


COLOUR_FILES = {
    "rgb.png": (png_16, 3),
    "rgba.png": (png_16, 4),
    "little-endian.tif": (tiff_16, 3),
    "big-endian.tif": (lambda pixels: tiff_16(pixels, ">"), 3),
    "alpha.tif": (tiff_16, 4),
    "compressed.tif": (lambda pixels: tiff_16(pixels, compressed=True), 3),
    "compressed-big-endian.tif": (lambda pixels: tiff_16(pixels, ">", compressed=True), 3),
    "planar.tif": (lambda pixels: tiff_16(pixels, planar=True), 3),
    "planar-big-endian.tif": (lambda pixels: tiff_16(pixels, ">", planar=True), 3),
    "planar-alpha.tif": (lambda pixels: tiff_16(pixels, planar=True), 4),
}


@pytest.mark.parametrize("name", COLOUR_FILES)
def test_16_bits_per_colour_keep_256_levels_with_the_range(name):
    to_bytes, channels = COLOUR_FILES[name]
    pixels = levels(channels=channels)
    encoded = np.frombuffer(to_bytes(pixels), np.uint8)
    expected = scaled_slowly(pixels[..., :3], *TWELVE_BITS)
    assert np.array_equal(decode(encoded, name, TWELVE_BITS).permute(1, 2, 0).numpy(), expected)
    upper = decode(encoded, name).permute(1, 2, 0).numpy()  # without a range as PIL reads them
    assert np.array_equal(upper, pixels[..., :3] >> 8)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_one_channel_in_a_plane_of_its_own_keeps_its_levels(order, dtype):
    encoded = np.frombuffer(tiff_16(levels(channels=1).astype(dtype), order, planar=True), np.uint8)
    expected = scaled_slowly(levels(), *TWELVE_BITS)
    assert np.array_equal(decode(encoded, "x.tif", TWELVE_BITS)[0].numpy(), expected)


def test_16_bits_per_colour_are_turned_upright():
    pixels = levels(channels=3)
    encoded = np.frombuffer(tiff_16(pixels, orientation=6), np.uint8)
    expected = np.rot90(scaled_slowly(pixels, *TWELVE_BITS), k=-1)
    decoded = decode(encoded, "turned.tif", TWELVE_BITS).permute(1, 2, 0).numpy()
    assert np.array_equal(decoded, expected)


# of these PIL reads the upper byte only
PARTLY_READ = {
    "grey with alpha.png": lambda: png_16(levels(channels=2)),
    "compressed planar.tif": lambda: tiff_16(levels(channels=3), compressed=True, planar=True),
    "colours.ppm": lambda: ppm_16(levels(channels=3)),
}


@pytest.mark.parametrize("name", PARTLY_READ)
def test_16_bits_that_cannot_be_read_are_noted_and_with_the_range_an_error(name, tmp_path):
    encoded = np.frombuffer(PARTLY_READ[name](), np.uint8)
    assert decode(encoded, "x.png").shape == (3, 48, 96)
    with pytest.raises(RunError, match=r"cannot read image x.png: only 8 of its 16 bits"):
        decode(encoded, "x.png", TWELVE_BITS)
    encoded.tofile(tmp_path / name)
    (note,) = range_notes(open_set(tmp_path)[2])
    assert f"{name} has grey values" in note


def test_a_pgm_that_pil_scales_is_an_error_with_the_range():
    encoded = np.frombuffer(ppm_16(levels(), 4095), np.uint8)
    assert np.array_equal(decode(encoded, "x.ppm")[0].numpy(), scaled_slowly(levels(), 0, 4095))
    with pytest.raises(RunError, match=r"cannot read image x.ppm: only 8 of its 16 bits"):
        decode(encoded, "x.ppm", TWELVE_BITS)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "CMYK", "LA", "RGBA", "webp", "gif", "ppm"])
def test_images_of_8_bits_do_not_depend_on_the_range(tmp_path, mode):
    suffix = mode if mode.islower() else "tif" if mode == "CMYK" else "png"
    path = tmp_path / f"x.{suffix}"
    picture().convert("RGB" if mode.islower() else mode).save(path)
    encoded = np.fromfile(path, np.uint8)
    assert torch.equal(decode(encoded, "x", (0, 10)), decode(encoded, "x"))


RANGES = [None, (0, 4095), (-1000, 3096), (0.25, 0.75), (1e9, 1e9 + 7)]


@pytest.mark.parametrize("grey_range", RANGES)
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_scaling_equals_exact_arithmetic(grey_range, dtype):
    values = np.array([0, 0.3, 0.5, 0.9, 1, 2, 255, 256, 4094, 4095, 4096, 65535]).astype(dtype)
    if dtype != np.uint16:
        values = np.append(values, np.array([-2000, -1, 1e9 + 6, 2e9], dtype))
    default = (0, 1) if dtype == np.float32 else (0, 65535)
    expected = scaled_slowly(values, *(grey_range or default))
    assert np.array_equal(to_8_bits(values, grey_range), expected)


def test_no_number_is_black_and_infinity_is_clipped():
    values = np.array([np.nan, -np.inf, np.inf, 0.5], dtype=np.float32)
    assert to_8_bits(values, None).tolist() == [0, 0, 255, 128]


# -- sets ------------------------------------------------------------------------------------------


def save_set(root, suffix="png", to_picture=Image.fromarray, scale=1):
    """Folders train/ and val/ of two classes with 32-px images of 12 bits."""
    for split, count in (("train", 40), ("val", 8)):
        for number in range(count):
            folder = root / split / ("ant", "bee")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = levels(32, 32, seed=number) * scale
            to_picture(pixels).save(folder / f"{number:03}.{suffix}")
    return root


def open_set(*flags):
    return sources.open_data(mean_std.parse([str(flag) for flag in flags]))


def range_notes(notes):
    return [note for note in notes if "--grey-range" in note]


def test_a_set_of_12_bits_is_noted_once_and_keeps_its_levels_with_the_flag(tmp_path):
    save_set(tmp_path)
    train, _, notes = open_set(tmp_path)
    assert len(train.images.unique()) <= 17
    (note,) = range_notes(notes)  # one for both sets
    assert f"{tmp_path}/train: 32 of 32 sampled images use little of the range" in note
    assert "000.png has grey values 0..4095 of 0..65535" in note and "\n" not in note
    for path in (tmp_path, tmp_path / "train"):  # a tree, too
        train, _, notes = open_set(path, "--grey-range", 0, 4095)
        assert len(train.images.unique()) == 256 and range_notes(notes) == []


def test_measuring_mean_and_std_shows_the_note_as_well(tmp_path, capsys):
    mean_std.main([str(save_set(tmp_path)), "--workers", "0", "--img-size", "32"])
    out, err = capsys.readouterr()
    assert err.count("--grey-range LOW HIGH") == 1 and out.startswith("--mean 0.03")


def test_12_bits_in_only_the_validation_images_are_noted(tmp_path):
    save_set(tmp_path)
    for path in (tmp_path / "train").rglob("*.png"):
        Image.new("L", (32, 32)).save(path)
    (note,) = range_notes(open_set(tmp_path)[2])
    assert f"{tmp_path}/val: 8 of 8 sampled images" in note


def test_a_list_and_shards_use_the_range_as_well(tmp_path):
    save_set(tmp_path / "set")
    paths = sorted((tmp_path / "set/train").rglob("*.png"))
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for path in paths:
            archive.add(path, arcname=path.name)
    for path in (tmp_path / "list.txt", tmp_path / "shard.tar"):
        assert len(range_notes(open_set(path)[2])) == 1
        train, _, notes = open_set(path, "--grey-range", 0, 4095)
        assert len(train.images.unique()) == 256 and range_notes(notes) == []


def as_floats(pixels):
    return Image.fromarray(pixels.astype(np.float32))


def as_0_to_1(pixels):
    return Image.fromarray((pixels / 4095).astype(np.float32))


@pytest.mark.parametrize(
    "name, to_picture, scale, expected",
    [
        ("16 bits", Image.fromarray, 16, None),
        ("floats 0..1", as_0_to_1, 1, None),
        ("8 bits", lambda pixels: Image.fromarray((pixels >> 4).astype(np.uint8)), 1, None),
        ("integers", lambda pixels: Image.fromarray(pixels.astype(np.int32)), 1, "of 0..65535"),
        ("floats 0..4095", as_floats, 1, "grey values 0..4095 of 0..1"),
    ],
)
def test_only_a_badly_used_range_is_noted(tmp_path, name, to_picture, scale, expected):
    save_set(tmp_path, "tif", to_picture, scale)
    notes = range_notes(open_set(tmp_path)[2])
    assert (notes == []) if expected is None else expected in notes[0]


def test_12_bit_colours_are_noted(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png_16(levels(channels=3)))
    (note,) = range_notes(open_set(tmp_path)[2])
    assert "3 of 3 sampled images" in note
    train, _, notes = open_set(tmp_path, "--grey-range", 0, 4095)
    assert len(train.images.unique()) == 256 and range_notes(notes) == []


def test_damaged_images_do_not_disturb_the_note(tmp_path):
    save_folder(tmp_path, [(12, 10)] * 5)
    (tmp_path / "train/ant/000.png").write_bytes(b"II*\0")
    _, _, notes = open_set(tmp_path, "--on-bad-image", "skip")
    assert range_notes(notes) == [] and any("000.png" in note for note in notes)


@pytest.mark.parametrize("low, high", [("5", "5"), ("9", "-9"), ("nan", "1"), ("0", "inf")])
def test_an_impossible_range_is_refused(tmp_path, low, high):
    with pytest.raises(UsageError, match="--grey-range needs LOW below HIGH, both finite, found"):
        open_set(tmp_path, "--grey-range", low, high)


def test_a_run_keeps_its_range_and_hands_it_to_the_evaluation(tmp_path, capsys, monkeypatch):
    data, run = str(save_set(tmp_path / "set")), str(tmp_path / "run")
    flags = [data, *SMALL.split(), "--workdir", run]
    main_snclr.main([*flags, "--stop-after-steps", "1"])
    assert capsys.readouterr().out.count("--grey-range LOW HIGH") == 1
    with pytest.raises(UsageError, match=r"is of another run: grey_range None -> \[0.0, 4095.0\]"):
        main_snclr.main([*flags, "--resume", "auto", "--grey-range", "0", "4095"])
    monkeypatch.setattr(visualize, "_draw", lambda *arguments: {})
    visualize.main([f"{run}/checkpoint_last.pth.tar", data, "--workers", "0"])
    assert capsys.readouterr().out.count("--grey-range LOW HIGH") == 1
    run = str(tmp_path / "ranged")
    main_snclr.main([data, *SMALL.split(), "--workdir", run, "--grey-range", "0", "4095"])
    assert "--grey-range LOW HIGH" not in capsys.readouterr().out
    saved = f"{run}/checkpoint_last.pth.tar"
    assert load_encoder(saved)[1]["grey_range"] == [0, 4095]
    for name, extra, expected in (("own", [], [0, 4095]), ("other", ["0", "8190"], [0, 8190])):
        workdir = str(tmp_path / name)
        extra = ["--grey-range", *extra] if extra else []
        flags = ["--pretrained", saved, "--workdir", workdir, "--epochs", "1", "-b", "8"]
        main_lincls.main([data, *flags, "-j", "0", *extra])
        settings = json.loads((tmp_path / name / "args.json").read_text())
        assert settings["grey_range"] == expected
