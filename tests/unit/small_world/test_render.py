"""The renderer against projective geometry."""

from __future__ import annotations

import numpy as np
import pytest

from sanawm_jax.small_world import scene as world
from sanawm_jax.small_world.clip import make_clip, make_clips
from sanawm_jax.small_world.composer import Composer
from sanawm_jax.small_world.palette import Material
from sanawm_jax.small_world.paths import look_pose, sample_start
from sanawm_jax.small_world.render import _render, depth, render
from sanawm_jax.small_world.sampler import sample_scene

INTRINSICS = np.array((60.0, 60.0, 32.0, 32.0), np.float32)
GRAY, RED = np.full(3, 0.5), np.array((0.9, 0.05, 0.05))
FIRST_SPHERE = world.NUM_FACES + world.NUM_BOXES


def _plain(color, emission=0.0):
    return Material("plain", color, color, 1.0, 0.0, 1.0, emission)


def _room(**bodies):
    """Returns a gray room with boxes and spheres, and a light in the middle of the ceiling."""
    c = Composer(np.random.default_rng(0), 0, world.INDOOR, (-3, -3, -3), (3, 0, 3), (0, 0))
    for sphere in bodies.get("spheres", ()):
        c.sphere(*sphere, _plain(RED, 1.0))
    for box in bodies.get("boxes", ()):
        c.box(*box, _plain(RED, 1.0))
    light = {
        "light_position": (0.0, -2.9, 0.0),
        "light_color": np.ones(3),
        "light_falloff": 0.0,
        "ambient": np.full(3, 0.4),
        "sky": np.full((3, 3), 0.5),
        "clouds": (0.0, 1.0),
        "haze": 0.0,
    }
    return c.finish([_plain(GRAY)] * 6, [("plain", "gray")] * 3, light)


def _project(c2w, points, intrinsics=INTRINSICS):
    """Pixel coordinates (N, 2) and depth (N,) of world points (N, 3)."""
    local = (points - c2w[:3, 3]) @ c2w[:3, :3]
    pixels = local[:, :2] / local[:, 2:] * intrinsics[:2] + intrinsics[2:]
    return pixels, local[:, 2]


def test_sphere_appears_where_its_centre_projects():
    center = np.array((0.35, -1.2, 1.5))
    scene = _room(spheres=[(center[0], -center[1], center[2], 0.12)])
    poses = [look_pose((x, -1.0, -1.5), yaw, 0.1) for x, yaw in ((0.0, 0.0), (0.3, 0.2))]
    video = render(scene, np.stack(poses), INTRINSICS, 64, 64).astype(float)
    for pose, frame in zip(poses, video, strict=True):
        redness = np.clip(frame[..., 0] - frame[..., 1] - 40, 0, None)
        y, x = np.mgrid[:64, :64]
        found = np.array([(redness * v).sum() for v in (x, y)]) / redness.sum()
        expected, _ = _project(pose, center[None])
        # A half-pixel shift of the ray grid would fail this.
        np.testing.assert_allclose(found, expected[0], atol=0.12)


def test_depth_of_a_sphere_and_edges_of_a_box():
    scene = _room(spheres=[(-0.9, 1.0, 1.0, 0.3)], boxes=[(0.6, 0.5, 1.0, (0.8, 0.6, 0.4), 0.3)])
    pose = look_pose((0.0, -1.0, -1.4), 0.05)
    z, surface = depth(scene, pose[None], INTRINSICS, 64, 64)
    center = np.array((-0.9, -1.0, 1.0))
    (pixel,), (expected,) = _project(pose, center[None])
    x, y = np.rint(pixel).astype(int)
    assert surface[0, y, x] == FIRST_SPHERE
    nearest = expected * (1 - 0.3 / np.linalg.norm(center - pose[:3, 3]))
    assert z[0, y, x] == pytest.approx(nearest, rel=2e-3)
    corners = np.array([(i, j, k) for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)])
    turn = look_pose((0, 0, 0), 0.3)[:3, :3]
    points = (corners * (0.4, 0.3, 0.2)) @ turn.T + (0.6, -0.8, 1.0)
    pixels, _ = _project(pose, points)
    rows, columns = np.nonzero(surface[0] == world.NUM_FACES)
    assert columns.min() == np.ceil(pixels[:, 0].min())
    assert columns.max() == np.floor(pixels[:, 0].max())
    assert rows.min() == np.ceil(pixels[:, 1].min())
    assert rows.max() == np.floor(pixels[:, 1].max())


@pytest.mark.parametrize("seed", [0, 4])
def test_moved_camera_sees_the_reprojected_picture(seed):
    scene = sample_scene(seed)
    start = sample_start(np.random.default_rng(1), scene)
    moved = start @ look_pose((0.25, 0.0, 0.2), 0.12)
    poses, intrinsics = np.stack((start, moved)), np.array((110.0, 110.0, 64.0, 64.0))
    video = render(scene, poses, intrinsics).astype(float)
    z, surface = depth(scene, poses, intrinsics)
    y, x = np.mgrid[:128, :128]
    solid = np.isfinite(z[0]) & (z[0] < 12)
    rays = np.stack(((x - 64) / 110.0, (y - 64) / 110.0, np.ones_like(z[0])), -1)
    points = (rays[solid] * z[0][solid][:, None]) @ start[:3, :3].T + start[:3, 3]
    pixels, expected = _project(moved, points, intrinsics)
    column, row = np.rint(pixels).astype(int).T
    inside = (expected > 0.1) & (column >= 0) & (column < 128) & (row >= 0) & (row < 128)
    column, row, expected = column[inside], row[inside], expected[inside]
    same = surface[1][row, column] == surface[0][solid][inside]
    close = np.abs(z[1][row, column] / expected - 1) < 0.04
    assert inside.mean() > 0.5
    assert same.mean() > 0.85
    assert close[same].mean() > 0.9
    good = same & close
    before = video[0][solid][inside][good]
    error = np.abs(video[1][row, column][good] - before).mean(-1)
    unmoved = np.abs(video[1][solid][inside][good] - before).mean(-1)
    assert np.median(error) < 6
    assert error.mean() < 0.5 * unmoved.mean()


def test_clip_is_its_seed_and_one_program_serves_all_scenes():
    _render.clear_cache()
    size = {"num_frames": 3, "height": 24, "width": 24}
    clips = list(make_clips([5, 6, 7], **size))
    assert _render._cache_size() == 1
    again = make_clip(6, **size)
    for name, value in clips[1].items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)
    assert clips[1]["video"].shape == (3, 24, 24, 3) and clips[1]["video"].dtype == np.uint8
    assert [c["seed"] for c in clips] == [5, 6, 7]
    for clip in clips:
        assert clip["video"].std() > 15  # a picture, not a flat field
