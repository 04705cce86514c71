"""Held keys to poses, a few frames at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanawm_jax.camera.actions import ACTION_KEYS, actions_to_c2w, parse_actions
from sanawm_jax.camera.live import Motion, walk
from sanawm_jax.camera.mapping import get_mapping

KEYS = st.sets(st.sampled_from(sorted(ACTION_KEYS)), max_size=3).map(frozenset)


@pytest.mark.parametrize("mapping", ["sana", "diffusers"])
@given(held=st.lists(KEYS, min_size=1, max_size=12), cuts=st.sets(st.integers(0, 12)))
def test_any_cut_gives_the_same_poses(mapping: str, held: list, cuts: set) -> None:
    rule = get_mapping(mapping)
    whole, last = walk(Motion(), held, rule)
    motion, parts = Motion(), []
    edges = sorted({0, len(held), *(cut for cut in cuts if cut < len(held))})
    for start, end in itertools.pairwise(edges):
        poses, motion = walk(motion, held[start:end], rule)
        parts.append(poses)
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(motion.velocity, last.velocity)


def test_it_is_the_path_of_an_action_string() -> None:
    text = "w-5,dw-7,none-4,ik-3,j-2"
    poses, _ = walk(Motion(), parse_actions(text), get_mapping("sana"))
    np.testing.assert_array_equal(poses.astype(np.float32), actions_to_c2w(text)[1:])


def test_a_released_key_coasts_and_two_branches_are_apart() -> None:
    rule = get_mapping("sana")
    _, motion = walk(Motion(), [frozenset("w")] * 4, rule)
    coasting, _ = walk(motion, [frozenset()] * 3, rule)
    again, _ = walk(motion, [frozenset("s")] * 3, rule)
    assert np.all(np.diff(coasting[:, 2, 3]) > 0)  # the camera still moves forward, ever slower
    assert np.all(np.diff(again[:, 2, 3]) < 0)
    np.testing.assert_array_equal(walk(motion, [frozenset()] * 3, rule)[0], coasting)
