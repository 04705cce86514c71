"""The first frame: which files can be read, and how they are cropped."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sanawm_jax.camera.intrinsics import crop_intrinsics
from sanawm_jax.media.image import load_image, resize_and_center_crop, to_array
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
