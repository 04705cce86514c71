"""The pose search against renders of a small room, whose poses are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from sanawm_jax.camera.actions import actions_to_c2w
from sanawm_jax.eval.camera import camera_accuracy, rotation_angle
from sanawm_jax.eval.photometric import Level, _normal_equations, estimate_poses, small_motion

HEIGHT, WIDTH = 48, 64
INTRINSICS = np.array((45.0, 45.0, 31.5, 23.5))
HALF = np.array((2.0, 1.2, 2.5))  # of the room, whose middle is the origin
FRAMES = np.arange(0, 33, 4)


def view(pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A room with smooth patterns on its walls, and a sky behind the wall on the left."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    rays = np.stack(((x - 31.5) / 45, (y - 23.5) / 45, np.ones(x.shape)), -1) @ pose[:3, :3].T
    depth = (np.sign(rays) * HALF - pose[:3, 3]) / np.where(rays == 0, 1e-9, rays)
    wall = depth.argmin(-1)
    depth = depth.min(-1)
    point = pose[:3, 3] + depth[..., None] * rays
    is_sky = (wall == 0) & (rays[..., 0] < 0)
    place = np.where(
        is_sky[..., None], 2 * rays / np.linalg.norm(rays, axis=-1, keepdims=True), point
    )
    waves = np.array(((3.1, 1.3, 2.2), (-1.7, 2.9, 3.3), (2.3, -3.7, 1.1)))
    picture = 0.5 + 0.3 * np.sin(place @ waves.T + wall[..., None]) * np.cos(place @ waves)
    return picture, np.where(is_sky, np.inf, depth)


def render(c2w: np.ndarray) -> np.ndarray:
    return np.stack([view(pose)[0] for pose in c2w])


def test_motion_explains_the_change_of_the_picture() -> None:
    """One step recovers a small motion in each direction, up to the curvature of the picture."""
    level = Level(2.0, 1, 1)
    pose = small_motion(np.array((0.1, 0.6, 0.0, 0.2, 0.1, -0.3)))
    for motion in 0.02 * np.eye(6):
        target = level.of(view(pose @ small_motion(motion))[0])
        found = _normal_equations(target, *view(pose), INTRINSICS, level).solve(1e-6)
        np.testing.assert_allclose(found, motion, atol=0.2 * 0.02)


@pytest.mark.parametrize("action", ["w-32", "a-32", "i-32", "l-32", "wd-16,sj-16"])
def test_finds_the_true_poses(action: str) -> None:
    c2w = actions_to_c2w(action).astype(np.float64)
    found = estimate_poses(render(c2w), view, c2w[0], INTRINSICS, FRAMES)
    assert rotation_angle(found[:, :3, :3], c2w[FRAMES, :3, :3]).max() < 0.05
    assert np.abs(found[:, :3, 3] - c2w[FRAMES, :3, 3]).max() < 0.005


def test_a_video_that_disobeys_is_measured_as_it_is() -> None:
    """Neither a wrong command nor a wrong brightness moves the result."""
    start = small_motion(np.array((0.05, 0.4, 0.0, 0.2, 0.1, -0.3)))
    commanded = start @ actions_to_c2w("w-32")
    moved = start @ actions_to_c2w("aw-32", translation_speed=0.015)
    video = np.clip(0.8 * render(moved) + 0.05, 0, 1)
    found = estimate_poses(video, view, start, INTRINSICS, FRAMES, commanded)
    assert rotation_angle(found[:, :3, :3], moved[FRAMES, :3, :3]).max() < 0.1
    true = camera_accuracy(commanded[FRAMES], moved[FRAMES])
    seen = camera_accuracy(commanded[FRAMES], found)
    assert true["rot_err_deg"] > 3
    for name in ("rot_err_deg", "trans_err", "cam_mc"):
        assert seen[name] == pytest.approx(true[name], rel=0.02)


def test_blur_and_noise_cost_little(rng: np.random.Generator) -> None:
    c2w = actions_to_c2w("wd-32").astype(np.float64)
    video = gaussian_filter(render(c2w), (0, 1, 1, 0)) + 0.03 * rng.normal(size=(33, 48, 64, 3))
    found = estimate_poses(video, view, c2w[0], INTRINSICS, FRAMES, c2w)
    assert rotation_angle(found[:, :3, :3], c2w[FRAMES, :3, :3]).mean() < 0.3


def test_the_sky_alone_fixes_the_rotation_and_leaves_the_place(rng: np.random.Generator) -> None:
    def sky(pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y, x = np.mgrid[:HEIGHT, :WIDTH]
        rays = np.stack(((x - 31.5) / 45, (y - 23.5) / 45, np.ones(x.shape)), -1) @ pose[:3, :3].T
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
        return 0.5 + 0.4 * np.sin(6 * rays + rays[..., ::-1]), np.full(x.shape, np.inf)

    c2w = actions_to_c2w("a-32").astype(np.float64)
    video = np.stack([sky(pose)[0] for pose in c2w])
    found = estimate_poses(video, sky, c2w[0], INTRINSICS, FRAMES)
    assert rotation_angle(found[:, :3, :3], c2w[FRAMES, :3, :3]).max() < 0.05
    np.testing.assert_allclose(found[:, :3, 3], 0, atol=1e-9)
