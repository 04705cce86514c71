"""Paths, captions and clips of the new scenes."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys

import numpy as np
import pytest

from sanawm_jax.camera.actions import parse_actions
from sanawm_jax.small_world.scenery import scene as world
from sanawm_jax.small_world.scenery.captions import (
    VOCABULARY,
    caption,
    object_names,
    visible_objects,
)
from sanawm_jax.small_world.scenery.clip import HELD_OUT_SEED, describe
from sanawm_jax.small_world.scenery.paths import (
    CLEARANCE,
    LENGTHS,
    SINGLE_ACTIONS,
    is_free_start,
    is_over_water,
    look_pose,
    sample_intrinsics,
    sample_length,
    sample_path,
    sample_start,
)
from sanawm_jax.small_world.scenery.places import sample_scene
from sanawm_jax.small_world.scenery.render import depth
from sanawm_jax.small_world.scenery.shapes import distance
from sanawm_jax.small_world.scenery.words import KINDS, PLURALS

SEEDS = (*range(16), *range(HELD_OUT_SEED, HELD_OUT_SEED + 8))


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(seed) for seed in SEEDS]


def test_starts_are_free_for_every_key(scenes):
    for seed, scene in zip(SEEDS, scenes, strict=True):
        assert is_free_start(scene, sample_start(np.random.default_rng(seed), scene)), seed


@pytest.mark.parametrize("num_frames", [9, 49, 193])
def test_paths_keep_their_distance(scenes, num_frames):
    for seed, scene in zip(SEEDS, scenes, strict=True):
        c2w, action = sample_path(np.random.default_rng(seed), scene, num_frames)
        assert c2w.shape == (num_frames, 4, 4) and c2w.dtype == np.float32
        points = c2w[:, :3, 3].astype(float)
        assert distance(scene, points).min() > CLEARANCE, (seed, action)
        assert not is_over_water(scene, points).any(), (seed, action)
        turn = c2w[:, :3, :3] @ c2w[:, :3, :3].swapaxes(1, 2)
        np.testing.assert_allclose(turn, np.broadcast_to(np.eye(3), turn.shape), atol=1e-5)
        if action:
            assert len(parse_actions(action)) == num_frames - 1


def test_training_sees_every_key_stops_pairs_returns_and_every_length(scenes):
    keys, stops, pairs, returns = set(), 0, 0, 0
    for seed in range(80):
        scene = scenes[seed % len(scenes)]
        c2w, action = sample_path(np.random.default_rng([seed, 5]), scene, 97)
        held = parse_actions(action) if action else []
        keys |= set().union(*held) if held else set()
        stops += any(not h for h in held)
        pairs += any(len(h) > 1 for h in held)
        away = np.linalg.norm(c2w[:, :3, 3] - c2w[0, :3, 3], axis=1)
        returns += away.max() > 0.3 and away[-1] < 0.4 * away.max()
    assert keys == set(SINGLE_ACTIONS)
    assert min(stops, pairs, returns) >= 8, (stops, pairs, returns)
    assert {sample_length(np.random.default_rng(s)) for s in range(200)} == set(LENGTHS)


def test_a_clip_is_decided_by_its_seed():
    for seed in (3, HELD_OUT_SEED):
        (_, first), (_, again) = describe(seed, 25), describe(seed, 25)
        np.testing.assert_array_equal(first["c2w"], again["c2w"])
        np.testing.assert_array_equal(first["intrinsics"], again["intrinsics"])
        assert first["caption"] == again["caption"] and first["action"] == again["action"]


def test_intrinsics_are_square_and_centred():
    for seed in range(10):
        fx, fy, cx, cy = sample_intrinsics(np.random.default_rng(seed), 96, 160)
        assert fx == fy and (cx, cy) == (80, 48)
        assert 62 <= np.degrees(2 * np.arctan(80 / fx)) <= 78


def test_captions_name_only_what_is_in_sight():
    """Against the renderer's own surfaces, which know nothing of the captions' rays."""
    singular = {v: k for k, v in PLURALS.items()}
    for seed in (0, 2, 6, 9):
        scene, clip = describe(seed, 9)
        text = clip["caption"]
        words = re.findall(r"[a-z]+", text.lower())
        assert set(words) <= VOCABULARY, set(words) - VOCABULARY
        _, surface = depth(scene, clip["c2w"], clip["intrinsics"])
        owners = np.concatenate(
            (scene.body_object, np.full(world.NUM_FACES, -1), scene.patch_object, [-1])
        )
        seen = {object_names(scene)[i] for i in set(owners[np.unique(surface)].tolist()) if i >= 0}
        kinds = set(KINDS)
        for before, word in itertools.pairwise(words):
            kind = singular.get(word, word if word in kinds else word.removesuffix("s"))
            if word == "walls":  # the room's, which are no object
                continue
            if kind in kinds and before in {color for color, _ in object_names(scene)}:
                assert (before, kind) in seen, (seed, before, kind, text)


def test_what_is_behind_the_camera_is_not_in_sight():
    scene, clip = describe(1, 9)
    names = visible_objects(scene, clip["c2w"][:1], clip["intrinsics"])
    turned = clip["c2w"][:1] @ look_pose((0, 0, 0), np.pi)
    assert names and set(names) != set(visible_objects(scene, turned, clip["intrinsics"]))
    assert caption(scene, clip["c2w"], clip["intrinsics"]) != caption(
        scene, turned, clip["intrinsics"]
    )


def test_planning_does_not_start_jax():
    code = (
        "import sys, sanawm_jax.small_world.scenery.pool\n"
        "assert not {'jax', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
