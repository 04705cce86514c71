"""Pairs of frames at which a camera comes back, and the pixels that the first picture shows."""

from __future__ import annotations

import numpy as np
import pytest

from sanawm_jax.camera.actions import actions_to_c2w
from sanawm_jax.eval.camera import rotation_angle
from sanawm_jax.eval.memory import Pair, frame_at, revisit, revisit_pairs
from sanawm_jax.eval.metrics import psnr
from sanawm_jax.eval.seen import seen_pixels


def test_a_path_that_turns_back_has_pairs() -> None:
    c2w = actions_to_c2w("a-120,none-9,d-120")
    pairs = revisit_pairs(c2w)
    assert len(pairs) == 5
    for first, second, distance, angle in pairs:
        assert distance < 0.5 and angle < 20
        assert second - first > 40
        turns = rotation_angle(c2w[first : second + 1, :3, :3], c2w[first, :3, :3])
        assert turns[-1] == pytest.approx(angle) and turns.max() > 20  # it was away
    seconds = sorted(pair.second for pair in pairs)
    assert np.diff(seconds).min() >= 16
    assert pairs[0].distance + pairs[0].angle <= pairs[-1].distance + pairs[-1].angle


@pytest.mark.parametrize("path", ["w-100", "none-100", "a-20,d-20"])
def test_a_path_that_never_left_or_never_returns_has_none(path: str) -> None:
    assert revisit_pairs(actions_to_c2w(path)) == []


def test_frame_numbers_of_another_frame_rate() -> None:
    assert frame_at(160, 16.04, 961) == 160
    assert frame_at(160, 8.0, 481) == 80
    assert frame_at(160, 24.0, 1000) == 240
    assert frame_at(960, 16.0, 900) == 899


def test_revisit_rows(rng: np.random.Generator) -> None:
    video = rng.uniform(0, 1, (4, 16, 16, 3))
    video[3] = video[0]
    truth = np.clip(video + 0.05, 0, 1.05)
    rows = revisit(video, [Pair(0, 3, 0.1, 2.0), Pair(1, 2, 0.2, 3.0)], truth)
    assert rows[0]["psnr"] == 100 and rows[0]["ssim"] == pytest.approx(1)
    assert (
        rows[1]["psnr"] == pytest.approx(psnr(video[1:2], video[2:3])[0]) and rows[1]["ssim"] < 0.5
    )
    assert rows[0]["psnr_to_truth"] == pytest.approx(psnr(video[3:], truth[3:])[0])
    assert rows[0]["psnr_of_truth"] == 100 and rows[1]["psnr_of_truth"] < 20
    assert "psnr_to_truth" not in revisit(video, [Pair(0, 3, 0.1, 2.0)])[0]


INTRINSICS = np.array((32.0, 32.0, 15.5, 11.5))


def test_all_is_seen_from_the_same_place() -> None:
    depth = np.full((2, 24, 32), 3.0)
    depth[:, :8] = np.inf
    assert seen_pixels(depth, np.tile(np.eye(4), (2, 1, 1)), INTRINSICS).all()


def test_a_step_aside_sees_what_was_outside_and_what_was_covered() -> None:
    """A wall at depth 4 and a post at depth 2 in front of it, seen after a step to the right."""
    columns = np.arange(32)

    def view(x: float) -> np.ndarray:
        ray = (columns - 15.5) / 32
        return np.where(np.abs(x + 2 * ray) < 0.2, 2.0, 4.0)

    shift = 0.5
    depth = np.stack([np.tile(view(x), (24, 1)) for x in (0.0, shift)])
    c2w = np.tile(np.eye(4), (2, 1, 1))
    c2w[1, 0, 3] = shift
    mask = seen_pixels(depth, c2w, INTRINSICS)
    assert mask[0].all()
    # the wall that the post covered at first: |x| < 0.4 at depth 4
    wall = shift + 4 * (columns - 15.5) / 32
    is_post = depth[1, 0] == 2
    hidden = ~is_post & (np.abs(wall) < 0.4 - 4 / 32)
    outside = ~is_post & (wall > 4 * 16 / 32)
    clearly_seen = is_post | ((np.abs(wall) > 0.4 + 4 / 32) & (wall < 4 * 15.4 / 32))
    assert hidden.sum() >= 3 and outside.sum() >= 3
    assert not mask[1][:, hidden].any() and not mask[1][:, outside].any()
    assert mask[1][:, clearly_seen].all()


def test_the_sky_counts_by_its_direction_alone() -> None:
    depth = np.full((3, 24, 32), np.inf)
    c2w = np.tile(np.eye(4), (3, 1, 1))
    c2w[1, :3, 3] = (5, -2, 30)  # far away, the same sky
    c2w[2, :3, :3] = np.diag((-1, 1, -1))  # behind
    mask = seen_pixels(depth, c2w, INTRINSICS)
    assert mask[1].all() and not mask[2].any()
