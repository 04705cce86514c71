"""Scenes, paths and captions of the small world; no rendering."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys

import numpy as np
import pytest

from sanawm_jax.camera.actions import actions_to_c2w, parse_actions
from sanawm_jax.small_world.captions import KINDS, VOCABULARY, caption, object_names
from sanawm_jax.small_world.clip import HELD_OUT_SEED
from sanawm_jax.small_world.geometry import cast, distance
from sanawm_jax.small_world.paths import (
    CLEARANCE,
    SINGLE_ACTIONS,
    sample_intrinsics,
    sample_path,
    sample_start,
)
from sanawm_jax.small_world.sampler import sample_scene
from sanawm_jax.small_world.scene import FAMILIES, INDOOR, OUTDOOR, scene_arrays

SEEDS = (*range(12), HELD_OUT_SEED, HELD_OUT_SEED + 1)


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(seed) for seed in SEEDS]


def test_scenes_have_one_layout_and_both_families(scenes):
    layouts = {
        tuple((name, a.shape, a.dtype.str) for name, a in scene_arrays(s).items()) for s in scenes
    }
    assert len(layouts) == 1
    assert {int(s.family) for s in scenes} == {INDOOR, OUTDOOR}
    for s in scenes:
        assert all(np.isfinite(a).all() for a in scene_arrays(s).values())


def test_scene_is_its_seed(scenes):
    again = scene_arrays(sample_scene(SEEDS[3]))
    for name, array in scene_arrays(scenes[3]).items():
        np.testing.assert_array_equal(array, again[name])
    assert not np.array_equal(scenes[3].box_center, scenes[4].box_center)


def test_distance_agrees_with_cast_rays(scenes):
    rng = np.random.default_rng(0)
    for scene in scenes:
        origin = np.array((scene.clear[0], -1.0, scene.clear[1]))
        rays = rng.normal(size=(400, 3))
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
        t, _ = cast(scene, np.broadcast_to(origin, rays.shape), rays)
        free = distance(scene, origin)
        assert (t >= free - 1e-4).all()  # no ray ends inside the free ball
        hit = t < 50.0
        at_hit = distance(scene, origin + rays[hit] * t[hit, None])
        np.testing.assert_allclose(at_hit, 0.0, atol=2e-4)


def test_start_leaves_every_single_action_free(scenes):
    for scene in scenes:
        start = sample_start(np.random.default_rng(5), scene)
        np.testing.assert_allclose(start[1, :3], (0, 1, 0), atol=1e-9)  # level horizon
        for key in SINGLE_ACTIONS:
            path = start @ actions_to_c2w(f"{key}-48")
            assert distance(scene, path[:, :3, 3]).min() >= CLEARANCE, (int(scene.seed), key)


def test_paths_are_rigid_and_free(scenes):
    kinds = set()
    for scene in scenes:
        for seed in range(3):
            c2w, held, action = sample_path(np.random.default_rng(seed), scene, 49)
            assert c2w.shape == (49, 4, 4) and c2w.dtype == np.float32
            rotation = c2w[:, :3, :3].astype(np.float64)
            eye = np.broadcast_to(np.eye(3), (49, 3, 3))
            np.testing.assert_allclose(rotation @ rotation.swapaxes(1, 2), eye, atol=1e-5)
            np.testing.assert_allclose(np.linalg.det(rotation), 1.0, atol=1e-5)
            np.testing.assert_array_equal(c2w[:, 3], np.tile((0, 0, 0, 1), (49, 1)))
            assert distance(scene, c2w[:, :3, 3]).min() >= CLEARANCE
            kinds.add(bool(action))
            if not action:
                assert held is None
                continue
            assert held == parse_actions(action)
            relative = np.linalg.inv(c2w[0].astype(np.float64)) @ c2w
            np.testing.assert_allclose(relative, actions_to_c2w(action), atol=2e-5)
    assert kinds == {True, False}


def test_path_repeats_with_its_rng(scenes):
    first, second = (sample_path(np.random.default_rng(9), scenes[0], 17)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_intrinsics_are_square_and_centred():
    for seed in range(20):
        fx, fy, cx, cy = sample_intrinsics(np.random.default_rng(seed), 96, 128)
        assert fx == fy and (cx, cy) == (64, 48)
        assert 60 <= np.degrees(2 * np.arctan(64 / fx)) <= 80


def test_captions_use_a_closed_vocabulary_and_existing_objects():
    assert len(VOCABULARY) <= 300
    texts = set()
    for seed in range(60):
        scene = sample_scene(seed)
        text = caption(scene)
        assert text == caption(scene)
        words = re.findall(r"[a-z]+", text.lower())
        assert set(words) <= VOCABULARY, set(words) - VOCABULARY
        present = {kind for _, kind in object_names(scene)}
        pairs = {(color, kind) for color, kind in object_names(scene)}
        for before, word in itertools.pairwise(words):
            kind = "shelf" if word == "shelves" else word.removesuffix("s")
            if kind in KINDS:
                assert kind in present
                assert (before, kind) in pairs
        assert FAMILIES[int(scene.family)] == ("outdoor" if "sky" in words else "indoor")
        texts.add(text)
    assert len(texts) == 60


def test_generate_module_does_not_start_jax():
    code = (
        "import sys, sanawm_jax.small_world.generate, sanawm_jax.small_world.tfds, "
        "sanawm_jax.small_world.clip\n"
        "assert not {'jax', 'tensorflow_datasets', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
