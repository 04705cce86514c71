"""Mirrored and reversed clips show what a real camera would see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from sanawm_jax.camera.rays import camera_conditions
from sanawm_jax.data.views import ALL_VIEWS, View, view_clip

FRAMES, HEIGHT, WIDTH = 9, 32, 96


@pytest.fixture
def clip(rng: np.random.Generator) -> dict[str, Any]:
    c2w = np.tile(np.eye(4, dtype=np.float32), (FRAMES, 1, 1))
    turns = np.cumsum(rng.normal(size=(FRAMES, 3)) * 0.1, 0)
    c2w[:, :3, :3] = Rotation.from_rotvec(turns).as_matrix()
    c2w[:, :3, 3] = rng.normal(size=(FRAMES, 3))
    return {
        "video": rng.integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8),
        "c2w": c2w,
        # the principal point is not in the middle, which mirroring would leave where it is
        "intrinsics": np.array([50.0, 60.0, 31.0, 14.0], np.float32),
        "caption": "a room",
    }


def project(points: np.ndarray, c2w: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Pixels (N, K, 2) of world points (K, 3) in every frame."""
    local = np.linalg.inv(c2w) @ np.append(points, np.ones((len(points), 1)), 1).T  # N 4 K
    fx, fy, cx, cy = intrinsics
    x, y, z = local[:, 0], local[:, 1], local[:, 2]
    return np.stack([fx * x / z + cx, fy * y / z + cy], -1)


def test_a_mirrored_camera_sees_the_mirrored_world(
    clip: dict[str, Any], rng: np.random.Generator
) -> None:
    mirrored = view_clip(clip, View(mirror=True))
    points = rng.normal(size=(20, 3)) + np.array([0.0, 0.0, 9.0])
    pixels = project(points, clip["c2w"], clip["intrinsics"])
    found = project(points * [-1, 1, 1], mirrored["c2w"], mirrored["intrinsics"])
    # pixels sit at whole numbers: the first column becomes the last, W - 1
    np.testing.assert_allclose(found[..., 0], WIDTH - 1 - pixels[..., 0], atol=1e-3)
    np.testing.assert_allclose(found[..., 1], pixels[..., 1], atol=1e-3)
    for x in (0, 5, WIDTH - 1):
        np.testing.assert_array_equal(
            mirrored["video"][:, :, WIDTH - 1 - x], clip["video"][:, :, x]
        )
    np.testing.assert_allclose(np.linalg.det(mirrored["c2w"][:, :3, :3]), 1.0, atol=1e-5)


def test_rays_of_a_mirrored_clip_are_mirrored(clip: dict[str, Any]) -> None:
    """In the network's input (spatial ratio 1), column W - 1 - x has the mirrored ray of x."""

    def rays(clip: dict[str, Any]) -> np.ndarray:
        intrinsics = np.tile(clip["intrinsics"], (FRAMES, 1))
        plucker = camera_conditions(clip["c2w"], intrinsics, HEIGHT, WIDTH, 8, 1)[1]
        return plucker.reshape(*plucker.shape[:3], 8, 2, 3)  # direction, then moment

    mirrored = rays(view_clip(clip, View(mirror=True)))[:, :, ::-1]
    # A reflection changes the sign of x in a direction, and of y and z in a cross product.
    signs = np.array([[-1, 1, 1], [1, -1, -1]])
    np.testing.assert_allclose(mirrored * signs, rays(clip), atol=1e-4)


def test_a_reversed_clip_runs_backwards(clip: dict[str, Any]) -> None:
    reverse = view_clip(clip, View(reverse=True))
    for name in ("video", "c2w"):
        np.testing.assert_array_equal(reverse[name], clip[name][::-1])
    np.testing.assert_array_equal(reverse["intrinsics"], clip["intrinsics"])


@pytest.mark.parametrize("view", ALL_VIEWS)
def test_twice_the_same_view_is_the_clip(view: View, clip: dict[str, Any]) -> None:
    once = view_clip(clip, view)
    assert once.keys() == clip.keys() and once["caption"] == "a room"
    for name, value in view_clip(once, view).items():
        np.testing.assert_array_equal(value, clip[name])
    if view != View():
        assert np.any(once["video"] != clip["video"])
