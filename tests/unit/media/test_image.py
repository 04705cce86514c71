"""The first frame: which files can be read, and how they are cropped."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sanawm_jax.camera.intrinsics import crop_intrinsics
from sanawm_jax.media.image import load_image, resize_and_center_crop, shown_size, to_array
from sanawm_jax.runtime.errors import InputError


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, size=shape, dtype=np.uint8)


def test_reads_rgb(tmp_path, rng):
    pixels = noise(rng, 5, 7, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        image = load_image(path)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_other_modes_become_rgb(tmp_path, rng):
    pixels = noise(rng, 5, 7, 4)
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "alpha.png")), pixels[..., :3])
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    grey = np.repeat(pixels[..., :1], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "grey.png")), grey)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256 + 9).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "deep.png")), grey)


def test_applies_the_stored_orientation(tmp_path, rng):
    pixels = noise(rng, 4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers must rotate it by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "phone.png", exif=exif)
    upright = np.asarray(load_image(tmp_path / "phone.png"))
    np.testing.assert_array_equal(upright, np.rot90(pixels, -1))


def test_unreadable_images(tmp_path, rng):
    Image.fromarray(noise(rng, 50, 50, 3)).save(tmp_path / "whole.png")
    (tmp_path / "short.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "nothing.jpg").write_bytes(b"")
    for name in ("short.png", "text.png", "nothing.jpg", "."):
        with pytest.raises(InputError, match="cannot read"):
            load_image(tmp_path / name)
    with pytest.raises(InputError, match="there is no file"):
        load_image(tmp_path / "absent.png")


@pytest.mark.parametrize(
    ("src", "resized", "offset"),
    [
        ((1280, 704), (1280, 704), (0, 0)),
        ((640, 480), (1280, 960), (0, 128)),
        ((2000, 704), (2000, 704), (360, 0)),
        ((1000, 701), (1280, 897), (0, 96)),
        ((1, 1), (1280, 1280), (0, 288)),
    ],
)
def test_crop_sizes(src, resized, offset):
    crop, *found = resize_and_center_crop(Image.new("RGB", src), 704, 1280)
    assert crop.size == (1280, 704)
    assert found == [src, resized, offset]


def test_the_crop_is_the_middle_and_intrinsics_follow():
    pixels = np.zeros((40, 100, 3), dtype=np.uint8)
    pixels[10:30, 45:55] = 255
    crop, *sizes = resize_and_center_crop(Image.fromarray(pixels), 80, 80)
    bright = np.argwhere(np.asarray(crop)[..., 0] > 127)
    np.testing.assert_array_equal([bright.min(axis=0), bright.max(axis=0)], [[20, 30], [59, 49]])
    row = crop_intrinsics(np.array([50.0, 50, 50, 20]), *sizes)
    np.testing.assert_allclose(row, [100, 100, 40, 40])


def test_to_array_maps_bytes_to_minus_one_and_one(rng):
    pixels = noise(rng, 4, 4, 3)
    pixels[0, 0] = [0, 255, 51]
    array = to_array(Image.fromarray(pixels))
    assert array.dtype == np.float32
    np.testing.assert_allclose(array[0, 0], [-1, 1, -0.6], atol=1e-6)
    np.testing.assert_array_equal(np.round((array + 1) * 127.5), pixels)


@pytest.mark.parametrize("kind", ["int32", "float", "float 255", "uint16", "big-endian"])
def test_deep_pictures_are_scaled(kind, tmp_path):
    ramp = np.tile(np.linspace(0, 1, 64), (8, 1))
    pixels = {
        "int32": (ramp * 65535).astype(np.int32),
        "float": ramp.astype(np.float32),
        "float 255": (ramp * 255).astype(np.float32),
        "uint16": (ramp * 65535).astype(np.uint16),
        "big-endian": (ramp * 65535).astype(">u2"),
    }[kind]
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    for given in (tmp_path / "a.tif", Image.fromarray(pixels)):
        found = np.asarray(load_image(given))[..., 0] / 255
        assert np.abs(found - ramp).max() < 1 / 128
    Image.fromarray(np.float32([[-1, 2]])).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="from -1 to 2 have no known range"):
        load_image(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [0, 1, 3, 4])
def test_arrays_are_pictures_too(dtype, channels, rng):
    pixels = noise(rng, 4, 6, *([channels] if channels else []))
    given = {"u": pixels.astype(dtype), "f": (pixels / 255).astype(dtype)}[np.dtype(dtype).kind]
    if dtype == np.uint16:
        given = given * 256
    grey = pixels.reshape(4, 6, -1)[..., : max(1, min(channels, 3))]
    np.testing.assert_array_equal(load_image(given), np.broadcast_to(grey, (4, 6, 3)))


@pytest.mark.parametrize("value", [np.zeros((2, 2, 5)), np.zeros((0, 2, 3)), None, "x", 7, [["a"]]])
def test_what_is_no_picture(value):
    with pytest.raises(InputError, match="image: "):
        load_image(value)


def test_an_opened_picture_is_as_upright_as_its_file(tmp_path, rng):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(rng, 4, 6, 3)).save(tmp_path / "phone.png", exif=exif)
    upright = np.asarray(load_image(tmp_path / "phone.png"))
    with (tmp_path / "phone.png").open("rb") as file:
        np.testing.assert_array_equal(load_image(file), upright)
    np.testing.assert_array_equal(load_image(Image.open(tmp_path / "phone.png")), upright)
    assert shown_size(tmp_path / "phone.png") == (4, 6)


def test_what_is_said_of_large_narrow_and_foreign_files(tmp_path, monkeypatch):
    Image.new("1", (40, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(InputError, match="has 1,200 pixels, more than 1,000; scale it down"):
        load_image(tmp_path / "large.png")
    monkeypatch.undo()
    for brand, words in ((b"heic", "HEIC"), (b"mif1", "HEIC"), (b"isom", "is a video")):
        (tmp_path / "x.jpg").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(64))
        with pytest.raises(InputError, match=words):
            load_image(tmp_path / "x.jpg")
    for size in ((1, 20000), (40, 20000), (20000, 10)):
        with pytest.raises(InputError, match="too narrow"):
            resize_and_center_crop(Image.new("RGB", size), 704, 1280)
    assert resize_and_center_crop(Image.new("RGB", (100, 1000)), 64, 64)[0].size == (64, 64)
