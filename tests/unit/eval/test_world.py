"""Both sets of scenes through one interface."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from sanawm_jax.camera.actions import actions_to_c2w
from sanawm_jax.eval.camera import rotation_angle
from sanawm_jax.eval.photometric import estimate_poses
from sanawm_jax.eval.world import OLD, SCENERY, WORLD, World, in_threads
from sanawm_jax.small_world.scene import Scene as OldScene
from sanawm_jax.small_world.scenery.scene import Scene as SceneryScene

WORLDS = pytest.mark.parametrize("world", [OLD, SCENERY], ids=["old", "scenery"])


@WORLDS
def test_planning_a_clip(world: World) -> None:
    seed = world.held_out_seed
    scene, rng = world.scene(seed), np.random.default_rng(seed)
    assert isinstance(scene, OldScene if world is OLD else SceneryScene)
    start, intrinsics = world.start(rng, scene), world.intrinsics(rng, world.height, world.width)
    c2w = start @ actions_to_c2w("w-48")
    assert world.is_free(scene, c2w) and intrinsics[2] == world.width / 2
    assert world.caption(scene, c2w, intrinsics)
    assert WORLD in (OLD, SCENERY)


def test_threads_keep_the_order() -> None:
    assert in_threads(lambda x: x * x, range(50)) == [x * x for x in range(50)]


@pytest.mark.slow
@WORLDS
def test_the_pose_search_against_the_renderer(world: World) -> None:
    """Well below the errors of a trained model, which are degrees; also for a bad picture."""
    height, width = world.height // 2, world.width // 2
    scene, rng = world.scene(world.held_out_seed + 3), np.random.default_rng(1)
    start, intrinsics = world.start(rng, scene), world.intrinsics(rng, height, width)
    c2w = start @ actions_to_c2w("wd-32")
    video = world.frames(scene, c2w, intrinsics, height, width)
    np.testing.assert_array_equal(
        video[5], world.render(scene, c2w[5:6], intrinsics, height, width)[0]
    )
    assert world.depths(scene, c2w[:2], intrinsics, height, width).shape == (2, height, width)
    view, frames = world.view(scene, intrinsics, height, width), np.arange(0, 33, 4)
    found = estimate_poses(video, view, start, intrinsics, frames, c2w)
    assert rotation_angle(found[:, :3, :3], c2w[frames, :3, :3]).mean() < 0.15
    damaged = 0.8 * gaussian_filter(video / 255.0, (0, 1.5, 1.5, 0)) + 0.1
    damaged += rng.normal(0, 0.03, video.shape)
    found = estimate_poses(damaged, view, start, intrinsics, frames, c2w)
    assert rotation_angle(found[:, :3, :3], c2w[frames, :3, :3]).mean() < 0.8
