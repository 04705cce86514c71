"""The new scenes' renderer against projective geometry, light and its own numpy twin."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.small_world.scenery import scene as world
from sanawm_jax.small_world.scenery.builder import Builder
from sanawm_jax.small_world.scenery.light import COVERS
from sanawm_jax.small_world.scenery.palette import Material
from sanawm_jax.small_world.scenery.paths import look_pose, sample_start
from sanawm_jax.small_world.scenery.places import sample_scene
from sanawm_jax.small_world.scenery.render import _render, depth, render
from sanawm_jax.small_world.scenery.shapes import cast
from sanawm_jax.small_world.scenery.skies import sky_light
from sanawm_jax.small_world.scenery.textures import fractal_noise, pattern_mix

HEIGHT, WIDTH = 48, 64
INTRINSICS = np.array((60.0, 60.0, 32.0, 24.0), np.float32)
GRAY, RED = np.full(3, 0.5), np.array((0.8, 0.08, 0.08))


def _plain(color, **more):
    return Material("plain", color, color, noise=0.0, **more)


def _scene(fill, ground=None, sun=(0.0, -1.0, 0.0), size=0.05):
    """An open plain with what `fill` adds, white sun, no haze, gray ground."""
    c = Builder(np.random.default_rng(0), 0, "garden", ("red", "white"))
    fill(c)
    light = sky_light(np.random.default_rng(0), "clear", GRAY, 0.0)
    light.update(sun=np.array(sun) / np.linalg.norm(sun), sun_size=size, haze=0.0)
    light.update(sun_color=np.ones(3), ambient=np.zeros((2, 3)))
    faces = [_plain(GRAY)] * 3 + [ground or _plain(GRAY)] + [_plain(GRAY)] * 2
    return c.finish(faces, ("plain", "gray"), "gray", "clear", light)


def _project(c2w, points):
    """Pixel coordinates (N, 2) and depth (N,) of world points (N, 3)."""
    local = (points - c2w[:3, 3]) @ c2w[:3, :3]
    return local[:, :2] / local[:, 2:] * INTRINSICS[:2] + INTRINSICS[2:], local[:, 2]


def _rays():
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack(((x - 32) / 60.0, (y - 24) / 60.0, np.ones((HEIGHT, WIDTH))), -1)


def test_depth_of_the_ground_plane():
    scene = _scene(lambda c: None)
    pose = look_pose((0.3, -1.1, -0.4), 0.4, -0.2)
    z, surface = depth(scene, pose[None], INTRINSICS, HEIGHT, WIDTH)
    down = (_rays() @ pose[:3, :3].T)[..., 1]
    ground = down > 0.02
    np.testing.assert_allclose(z[0][ground], (1.1 / down)[ground], rtol=1e-4)
    assert (surface[0][ground] == world.FLOOR).all()
    assert np.isinf(z[0][down < 0]).all()
    assert (surface[0][down < 0] == world.SKY_SURFACE).all()


def test_sphere_appears_where_its_centre_projects():
    center = np.array((0.35, -1.2, 2.5))
    scene = _scene(lambda c: c.ball(0.35, 1.2, 2.5, 0.2, _plain(RED, emission=1.0)))
    for x, yaw in ((0.0, 0.0), (0.3, 0.2)):
        pose = look_pose((x, -1.0, -0.5), yaw, 0.1)
        frame = render(scene, pose[None], INTRINSICS, HEIGHT, WIDTH)[0].astype(float)
        redness = np.clip(frame[..., 0] - frame[..., 2] - 60, 0, None)
        rows, columns = np.mgrid[:HEIGHT, :WIDTH]
        found = np.array([(redness * v).sum() for v in (columns, rows)]) / redness.sum()
        # a ray grid that is off by half a pixel would fail this
        np.testing.assert_allclose(found, _project(pose, center[None])[0][0], atol=0.15)


def test_edges_of_a_turned_box():
    scene = _scene(lambda c: c.block(0.6, 0.5, 2.0, (0.8, 0.6, 0.4), 0.3, _plain(RED)))
    pose = look_pose((0.0, -1.0, -0.4), 0.05)
    _, surface = depth(scene, pose[None], INTRINSICS, HEIGHT, WIDTH)
    corners = np.array([(i, j, k) for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)])
    turn = look_pose((0, 0, 0), 0.3)[:3, :3]
    pixels, _ = _project(pose, (corners * (0.4, 0.3, 0.2)) @ turn.T + (0.6, -0.8, 2.0))
    rows, columns = np.nonzero(surface[0] == 0)
    assert columns.min() == np.ceil(pixels[:, 0].min())
    assert columns.max() == np.floor(pixels[:, 0].max())
    assert rows.min() == np.ceil(pixels[:, 1].min())
    assert rows.max() == np.floor(pixels[:, 1].max())


def test_a_gable_and_a_cone_end_at_their_tops():
    def fill(c):
        c.block(-0.7, 0.0, 3.0, (1.0, 1.0, 0.6), 0.0, _plain(RED), (1.0, 0.0))
        c.round(0.8, 0.0, 3.0, 0.5, 1.2, _plain(RED), 1.0)

    scene = _scene(fill)
    pose = look_pose((0.0, -0.6, 0.0), 0.0)
    # rays towards points just inside and just outside of the slopes at half height
    for x, height, hits in ((-0.7, 0.95, True), (-1.0, 0.5, False), (-0.94, 0.5, True)):
        target = np.array((x, -height, 2.7))
        _, body = cast(scene, pose[None, :3, 3], (target - pose[:3, 3])[None])
        assert (body[0] == 0) == hits, (x, height)
    for x, hits in ((0.8 + 0.20, True), (0.8 + 0.30, False)):
        target = np.array((x, -0.6, 3.0))
        _, body = cast(scene, pose[None, :3, 3], (target - pose[:3, 3])[None])
        assert (body[0] == world.NUM_BLOCKS) == hits, x


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_occlusion_agrees_with_all_bodies_tested_in_numpy(seed):
    """The renderer's short lists of bodies per tile must not lose one."""
    scene = sample_scene(seed)
    pose = sample_start(np.random.default_rng(seed), scene)
    z, surface = depth(scene, pose[None], INTRINSICS, HEIGHT, WIDTH)
    directions = _rays() @ pose[:3, :3].T
    t, body = cast(scene, np.broadcast_to(pose[:3, 3], directions.shape), directions)
    found = np.where(surface[0] < world.NUM_BODIES, surface[0], -1)
    same = found == body
    assert same.mean() > 0.995  # rays along an edge may round either way
    solid = same & (body >= 0)
    np.testing.assert_allclose(z[0][solid], t[solid], rtol=2e-3)


def test_texture_lies_where_it_should():
    ground = Material("checkered", np.full(3, 0.9), np.full(3, 0.1), cell=0.5, noise=0.0)
    scene = _scene(lambda c: None, ground)
    cell = 1.0 / scene.paint[world.FLOOR, world.PAINT.index("cells_u")]
    pose = look_pose((0.0, -4.0, 0.0), 0.0, -np.pi / 2 + 1e-3)
    frame = render(scene, pose[None], INTRINSICS, HEIGHT, WIDTH)[0].mean(-1)
    for i, j in ((0, 0), (1, 0), (0, 1), (1, 1), (-1, 0), (2, -1)):
        point = np.array((((i + 0.5) * cell, 0.0, (j + 0.5) * cell),))
        (x, y), *_ = _project(pose, point)[0]
        value = frame[round(y), round(x)]
        assert (value > 128) == ((i + j) % 2 == 0), (i, j, value)


def test_shadow_lies_away_from_the_sun_and_softens_with_distance():
    def covers(height, points):
        """Share of the sun that a plate at `height` takes from points on the ground."""
        origin = [jnp.asarray(points), jnp.full(len(points), -height), jnp.zeros(len(points))]
        sun = (jnp.float32(0.6), jnp.float32(0.8), jnp.float32(0.0))
        half, taper = (0.5, 0.05, 0.5), (0.0, 0.0)
        return np.asarray(
            COVERS[0](origin, sun, half, taper, 0.05, jnp.full(len(points), 1e-3)), float
        )

    for height in (0.5, 2.0):
        shift = -0.75 * height  # the sun is to the right, so the shadow is to the left
        share = covers(height, np.float32([shift, shift + 1.2, shift - 1.2]))
        np.testing.assert_allclose(share, [1.0, 0.0, 0.0], atol=1e-3)
    near, far = (covers(h, np.float32(-0.75 * h + np.linspace(0.2, 0.9, 400))) for h in (0.5, 2.0))
    widths = [((s > 0.1) & (s < 0.9)).sum() for s in (near, far)]
    assert widths[1] > 2.5 * widths[0] > 0


def test_patterns_and_noise_are_gone_below_two_pixels():
    u = jnp.linspace(0.0, 9.7, 500)
    shape = [jnp.full(500, v) for v in (0.5, 0.1, 0.2, 0.3)]
    for code in range(4):
        pattern = jnp.full(500, code)
        for footprint in (0.5, 2.0):
            wide = jnp.full(500, footprint)
            mix, tone = pattern_mix(pattern, u, 1.3 * u, shape, wide, wide)
            assert np.ptp(np.asarray(mix)) < 1e-6
            assert np.ptp(np.asarray(tone)) < 1e-6
    place = [u, 0.7 * u, 0.2 * u]
    assert np.ptp(np.asarray(fractal_noise(place, jnp.full(500, 0.5)))) < 1e-6
    fine = np.asarray(fractal_noise(place, jnp.full(500, 0.005)))
    coarse = np.asarray(fractal_noise(place, jnp.full(500, 0.2)))
    assert np.abs(np.diff(fine)).mean() > 1.5 * np.abs(np.diff(coarse)).mean()


def test_water_mirrors_what_stands_behind_it():
    water = Material("plain", GRAY * 0.1, GRAY * 0.1, noise=0.0, mirror=1.0)

    def fill(c):
        c.patch(0.0, 2.0, 3.0, 1.2, 0.0, water)
        c.block(0.0, 0.0, 4.0, (0.8, 1.0, 0.4), 0.0, _plain(RED, emission=1.0))

    pose = look_pose((0.0, -1.0, 0.0), 0.0, -0.15)
    frame = render(_scene(fill), pose[None], INTRINSICS, HEIGHT, WIDTH)[0].astype(float)
    (x, y), *_ = _project(pose, np.array(((0.0, 0.5, 3.8),)))[0]  # the mirrored block's middle
    red = frame[..., 0] - frame[..., 1]
    assert red[round(y), round(x)] > 15
    assert red[round(y), round(x) - 25] < 8


def test_tiles_in_turn_and_at_once_give_the_same_picture():
    scene = sample_scene(2)
    pose = sample_start(np.random.default_rng(1), scene)[None].astype(np.float32)
    one, other = (
        np.asarray(_render(scene, pose, INTRINSICS, 24, 32, 1, in_turn), int)
        for in_turn in (True, False)
    )
    assert np.abs(one - other).max() <= 2


def test_a_scene_is_decided_by_its_seed():
    first, again = (world.scene_arrays(sample_scene(7)) for _ in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)
    other = world.scene_arrays(sample_scene(8))
    assert any(not np.array_equal(v, other[n]) for n, v in first.items())
    shapes = [jax.tree.map(np.shape, world.scene_arrays(sample_scene(s))) for s in range(24)]
    assert all(s == shapes[0] for s in shapes)
    places = {int(sample_scene(s).place) for s in range(64)}
    assert places == set(range(len(world.PLACES)))
