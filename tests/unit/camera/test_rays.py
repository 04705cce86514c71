"""Camera tokens and Plücker maps: windows, geometry, and independence of JAX."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from sanawm_jax.camera.actions import actions_to_c2w
from sanawm_jax.camera.rays import camera_conditions, plucker_rays


def test_shapes_and_types():
    c2w = actions_to_c2w("w-16")
    camera, plucker = camera_conditions(c2w, np.tile([90.0, 90, 64, 48], (17, 1)), 96, 128)
    assert camera.shape == (3, 20)
    assert plucker.shape == (3, 3, 4, 48)
    assert camera.dtype == plucker.dtype == np.float32


def test_tokens_hold_relative_poses_and_latent_intrinsics():
    c2w = actions_to_c2w("wd-16") + np.float32(0)
    c2w[:, :3, 3] += [5, 6, 7]
    rows = np.stack([np.linspace(90, 106, 17)] * 2 + [np.full(17, 64.0), np.full(17, 48.0)], axis=1)
    camera, _ = camera_conditions(c2w, rows, 96, 128)
    np.testing.assert_array_equal(camera[0, :16], np.eye(4).ravel())
    np.testing.assert_allclose(camera[1, [3, 7, 11]], c2w[8, :3, 3] - [5, 6, 7], atol=1e-6)
    np.testing.assert_allclose(camera[:, 16], rows[[0, 8, 16], 0] / 32, rtol=1e-6)
    np.testing.assert_allclose(camera[2, 18:], [2, 1.5])


def frame_of_each_slot(frames: int) -> np.ndarray:
    """Finds which pixel frame is in each place of each window, by its focal length."""
    rows = np.tile([32.0, 32, 0, 0], (frames, 1))
    rows[:, 0] = 32 * (1 + np.arange(frames))
    _, plucker = camera_conditions(np.tile(np.eye(4), (frames, 1, 1)), rows, 32, 64)
    # In column 1 the ray is (1 / fx, 0, 1) before it is normalised.
    rays = plucker[:, 0, 1].reshape(len(plucker), 8, 6)
    return np.round(rays[..., 2] / rays[..., 0] - 1).astype(int)


def test_windows():
    np.testing.assert_array_equal(
        frame_of_each_slot(17), [np.arange(8), np.arange(1, 9), np.arange(9, 17)]
    )
    # Short clips repeat their last frame.
    np.testing.assert_array_equal(frame_of_each_slot(3), [[0, 1, 2, 2, 2, 2, 2, 2]])


def test_rays_pass_through_the_camera_and_the_pixel(rng):
    c2w = actions_to_c2w("wdi-5,jl-3", "diffusers", translation_speed=1.0)
    rays = plucker_rays(c2w, np.tile([5.0, 6, 2.2, 1.4], (9, 1)), 3, 4).astype(np.float64)
    direction, moment = rays[..., :3], rays[..., 3:]
    np.testing.assert_allclose(np.linalg.norm(direction, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(np.einsum("NHWi,NHWi->NHW", direction, moment), 0, atol=1e-5)
    # The point at depth 3 behind pixel row 2, column 1, seen from frame 7, has the same moment.
    in_camera = 3 * np.array([(1 - 2.2) / 5, (2 - 1.4) / 6, 1])
    point = c2w[7, :3, :3] @ in_camera + c2w[7, :3, 3]
    np.testing.assert_allclose(np.cross(point, direction[7, 2, 1]), moment[7, 2, 1], atol=1e-5)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="9 poses need"):
        camera_conditions(actions_to_c2w("w-8"), np.ones((8, 4)), 32, 32)


def test_camera_and_media_import_no_jax():
    code = (
        "import sys\n"
        "import sanawm_jax.camera.rays, sanawm_jax.camera.intrinsics, sanawm_jax.media.image\n"
        "import sanawm_jax.media.overlay, sanawm_jax.media.video\n"
        "print([m for m in ('jax', 'flax', 'torch', 'av') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
