"""Camera files and pictures of a request: known intrinsics are used, and what is cut is said."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.request import Request, make_request
from tests.own_files import HEIGHT, WIDTH, K, npz, picture, straight, transforms

PICTURE = Image.fromarray(picture())


def request(**given: object) -> Request:
    options = {"num_frames": 9, "height": HEIGHT, "width": WIDTH, "spatial": 16, **given}
    return make_request(PICTURE, **options)  # pyright: ignore


def test_the_intrinsics_of_a_camera_file_are_used(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = npz(tmp_path / "a.npz", intrinsics=K)
        np.testing.assert_allclose(request(camera=plain).intrinsics[3], K)
        twice = npz(tmp_path / "b.npz", intrinsics=2 * np.array(K), width=96, height=64)
        np.testing.assert_allclose(request(camera=str(twice)).intrinsics[3], K)
        file = transforms(
            tmp_path, [f"{n}.png" for n in range(9)], camera_angle_x=2 * np.arctan(0.6)
        )
        np.testing.assert_allclose(request(camera=file).intrinsics[3], K, rtol=1e-6)
        own = request(camera=plain, intrinsics="50,50,24,16")
        np.testing.assert_allclose(own.intrinsics[3], [50, 50, 24, 16])
    turned = npz(tmp_path / "c.npz", intrinsics=K, width=HEIGHT, height=WIDTH)
    with pytest.warns(UserWarning, match="left out: the camera belongs to 32x48 pixels"):
        default = request(camera=turned).intrinsics[3]
    assert default[0] == pytest.approx(24 / np.tan(np.radians(35)))


def test_cameras_in_memory() -> None:
    for given in (straight(), straight()[:, :3]):
        found = request(camera=given, intrinsics=K)
        np.testing.assert_allclose(found.c2w, straight())
    opengl = straight() * np.array([1, -1, -1, 1], np.float32)
    found = request(camera=opengl, camera_axes="opengl", intrinsics=K)
    np.testing.assert_allclose(found.c2w, straight())
    with pytest.raises(InputError, match="direction='up'"):
        request(camera=opengl, camera_direction="up", intrinsics=K)


def test_recorded_keys_and_a_path_that_is_longer(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(json.dumps(["w"] * 16))
    with pytest.warns(UserWarning, match="17 poses, and the video ends after 9; give"):
        found = request(action=str(tmp_path / "keys.json"), intrinsics=K)
    assert found.held_keys is not None and len(found.held_keys) == 16 and found.num_frames == 9
