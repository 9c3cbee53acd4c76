"""Decoding of image files: as PIL does it, upright, in RGB."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import levels_apart, picture, rgb

from snclr.datasets import decoding
from snclr.running.errors import RunError


def decode(path):
    return decoding.decode(np.fromfile(path, np.uint8), str(path))


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


def test_photographs_decode_as_pil_does(photographs):
    for path in photographs:
        with Image.open(path) as opened:
            expected = rgb(opened)
        decoded = decode(str(path))
        assert decoded.shape == expected.shape, path.name
        assert (decoded.int() - expected).abs().double().mean() <= 2, path.name


@pytest.mark.parametrize("library", ["torchcodec", "torchvision", "PIL"])
def test_all_decoders_of_jpeg_give_the_pixels_of_pil(tmp_path, monkeypatch, library):
    decoders = decoding.jpeg_decoders()
    if library not in decoders:
        pytest.skip(f"{library} has no decoder of JPEG files here")
    monkeypatch.setattr(decoding, "decode_jpeg", decoders[library])
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, (image, options) in FORMATS.items():
        if name.endswith(".jpg"):
            image.save(tmp_path / name, exif=exif, **options)
            with Image.open(tmp_path / name) as opened:
                expected = rgb(opened)
            # PIL converts CMYK by another formula
            assert levels_apart(decode(str(tmp_path / name)), expected) <= (name == "cmyk.jpg")
    content = np.fromfile(tmp_path / "rgb.jpg", np.uint8)
    with pytest.raises(RunError, match=r"(?i)^cannot read image half.jpg: .*truncated"):
        decoding.decode(content[: len(content) // 2], "half.jpg")


def test_torchcodec_is_first_then_torchvision_then_pil(monkeypatch):
    class Broken:
        def find_spec(self, name, *arguments):
            if name == "torchcodec":
                raise OSError("libtorchcodec_image.so: undefined symbol")

    codec = types.SimpleNamespace(decode_jpeg="torchcodec's")
    monkeypatch.setitem(sys.modules, "torchcodec", types.SimpleNamespace(decoders=codec))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", codec)
    assert list(decoding.jpeg_decoders()) == ["torchcodec", "torchvision", "PIL"]
    del codec.decode_jpeg  # as before 0.16
    assert list(decoding.jpeg_decoders()) == ["torchvision", "PIL"]
    monkeypatch.delitem(sys.modules, "torchcodec")
    monkeypatch.delitem(sys.modules, "torchcodec.decoders")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert list(decoding.jpeg_decoders()) == ["torchvision", "PIL"]
    monkeypatch.delattr("torchvision.io.decode_image")
    assert decoding.jpeg_decoders() == {"PIL": None}


def test_a_file_that_begins_like_postscript_is_not_given_to_ghostscript(tmp_path):
    Image.init()
    assert "EPS" in Image.ID
    (tmp_path / "x.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EOF")
    with Image.open(tmp_path / "x.jpg") as opened:  # which PIL would do
        assert opened.format == "EPS"
    with pytest.raises(RunError, match=r"x\.jpg: it is not an image of a known format"):
        decode(tmp_path / "x.jpg")
