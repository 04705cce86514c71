"""Action strings: the grammar, and the smoothed mapping against another computation of it."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from sanawm_jax.camera.actions import ACTION_KEYS, MAX_FRAMES, actions_to_c2w, parse_actions
from sanawm_jax.runtime.errors import InputError

PRESS = 1 - math.exp(-1 / 16 / 0.45)
COAST = 1 - math.exp(-1 / 16)


def held(*keys: str) -> list[frozenset[str]]:
    return [frozenset(k) for k in keys]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("w-2,dw-1", held("w", "w", "wd")),
        (" W - 1 ,\n Dd-1 ", held("w", "d")),
        ("w-1\uff0ca-1", held("w", "a")),
        ("none-2,NONE-1,-1", held("", "", "", "")),
        ("w-003", held("w", "w", "w")),
    ],
)
def test_grammar(text, expected):
    assert parse_actions(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ("w-3,,d-2", "segment 2 is empty"),
        ("w-3,", "segment 2 is empty"),
        ("w40", 'no "-"'),
        ("x-3", "unknown keys 'x'"),
        ("nonew-3", "unknown keys 'eno'"),
        ("w-0", "zero"),
        ("w-000", "zero"),
        ("w--5", "negative"),
        ("w-", "whole number"),
        ("w-2.5", "whole number"),
        ("w-\u00b2", "whole number"),
        ("w-1e3", "whole number"),
        ("w-x", "whole number"),
        ("w--", "whole number"),
        (f"w-{MAX_FRAMES},s-1", "longer than"),
        ("w-" + "9" * 5000, "longer than"),
    ],
)
def test_bad_strings_raise_one_clear_line(text, says):
    with pytest.raises(InputError) as caught:
        parse_actions(text)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert len(message) < 200


def test_bad_mapping_and_speeds():
    with pytest.raises(InputError, match="sana, diffusers"):
        actions_to_c2w("w-1", "arrows")
    for speeds in ({"translation_speed": math.nan}, {"rotation_speed_deg": math.inf}):
        with pytest.raises(InputError, match="finite"):
            actions_to_c2w("w-1", **speeds)


def steps(c2w: np.ndarray) -> np.ndarray:
    return np.diff(c2w[:, :3, 3].astype(np.float64), axis=0)


def yaw_deg(c2w: np.ndarray) -> np.ndarray:
    return np.degrees(np.unwrap(np.arctan2(c2w[:, 0, 2], c2w[:, 2, 2]).astype(np.float64)))


def pitch_deg(c2w: np.ndarray) -> np.ndarray:
    return np.degrees(np.arcsin(-c2w[:, 1, 2].astype(np.float64)))


def test_shape_first_pose_and_default_step():
    c2w = actions_to_c2w("w-4")
    assert c2w.shape == (5, 4, 4)
    assert c2w.dtype == np.float32
    np.testing.assert_array_equal(c2w[0], np.eye(4))
    np.testing.assert_allclose(steps(c2w), [[0, 0, 0.025]] * 4, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "axis", "sign"), [("w", 2, 1), ("s", 2, -1), ("l", 0, 1), ("j", 0, -1)]
)
def test_step_keys(key, axis, sign):
    end = actions_to_c2w(f"{key}-1", translation_speed=1.0)[1, :3, 3]
    expected = np.zeros(3)
    expected[axis] = sign
    np.testing.assert_allclose(end, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("key", "angle", "sign"),
    [("d", yaw_deg, 1), ("a", yaw_deg, -1), ("i", pitch_deg, 1), ("k", pitch_deg, -1)],
)
def test_turn_keys(key, angle, sign):
    c2w = actions_to_c2w(f"{key}-10")
    np.testing.assert_allclose(np.diff(angle(c2w)), sign * 0.6, atol=1e-4)
    assert not steps(c2w).any()


def test_press_rate_without_a_new_key():
    # Letting go of s while w stays down is not a press: the speed climbs from 0 to 1.
    speed = steps(actions_to_c2w("ws-3,w-8", translation_speed=1.0))[:, 2]
    assert round(PRESS, 4) == 0.1297
    np.testing.assert_allclose(speed[:3], 0)
    np.testing.assert_allclose(speed[3:], 1 - (1 - PRESS) ** np.arange(1, 9), atol=1e-5)


def test_coasting_decays_and_never_snaps_to_zero():
    speed = steps(actions_to_c2w("w-3,none-40", translation_speed=1.0))[:, 2]
    assert round(COAST, 4) == 0.0606
    np.testing.assert_allclose(speed[3:], (1 - COAST) ** np.arange(1, 41), atol=1e-5)
    assert speed[-1] > 0.05


def test_a_new_key_snaps_every_control():
    # d is pressed while the camera still coasts forward: turning is at full speed at once, and
    # the forward coasting ends at once.
    c2w = actions_to_c2w("w-3,none-2,d-2", translation_speed=1.0)
    assert steps(c2w)[4, 2] > 0.8
    np.testing.assert_allclose(steps(c2w)[5:], 0, atol=1e-6)
    np.testing.assert_allclose(np.diff(yaw_deg(c2w))[5:], 0.6, atol=1e-4)


def test_pressing_again_after_release_snaps():
    speed = steps(actions_to_c2w("w-2,none-5,w-1", translation_speed=1.0))[:, 2]
    assert speed[6] < 0.8
    assert speed[7] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("key", "limit"), [("i", 60), ("k", -60)])
def test_pitch_is_cut_at_the_limit(key, limit):
    # 7 degrees a frame does not divide 60: the last step is cut to 4.
    pitch = pitch_deg(actions_to_c2w(f"{key}-12", rotation_speed_deg=7.0))
    expected = np.sign(limit) * np.minimum(7 * np.arange(13), 60)
    np.testing.assert_allclose(pitch, expected, atol=1e-3)
    back = pitch_deg(actions_to_c2w(f"{key}-12,{'k' if key == 'i' else 'i'}-1"))
    assert abs(back[-1]) < abs(back[-2]), "the accumulator must not run past the limit"


@pytest.mark.parametrize("mapping", ["sana", "diffusers"])
@pytest.mark.parametrize("pair", ["ws", "ad", "ik", "jl"])
def test_opposite_keys_cancel(mapping, pair):
    c2w = actions_to_c2w(f"{pair}-9", mapping)
    np.testing.assert_array_equal(c2w, np.broadcast_to(np.eye(4), c2w.shape))


def test_diagonals_are_not_shortened():
    end = actions_to_c2w("wl-1", translation_speed=1.0)[1, :3, 3]
    np.testing.assert_allclose(end, [1, 0, 1], atol=1e-5)


@pytest.mark.parametrize("mapping", ["sana", "diffusers"])
@pytest.mark.parametrize("seed", range(5))
def test_poses_are_rigid_and_height_never_changes(mapping, seed):
    c2w = actions_to_c2w(random_actions(seed), mapping, rotation_speed_deg=5.0)
    assert not c2w[:, 1, 3].any()
    rotation = c2w[:, :3, :3].astype(np.float64)
    gram = np.einsum("Fji,Fjk->Fik", rotation, rotation)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(3), gram.shape), atol=1e-6)


def random_actions(seed: int) -> str:
    draw = random.Random(seed)
    keys = sorted(ACTION_KEYS)
    return ",".join(
        "".join(draw.sample(keys, draw.randint(0, 4))) + f"-{draw.randint(1, 25)}" for _ in range(8)
    )


def plain_rollout(text: str, speed: float, degrees: float) -> np.ndarray:
    """Computes the smoothed mapping with angles and sums instead of matrices.

    Yaw and pitch are sums over frames, so a pose is R_y(yaw) R_x(pitch), and a position is a sum of
    steps along the headings.
    """
    velocity = dict.fromkeys("wldi", 0.0)
    opposite = {"w": "s", "l": "j", "d": "a", "i": "k"}
    full = {"w": speed, "l": speed, "d": math.radians(degrees), "i": math.radians(degrees)}
    before, yaw, pitch, x, z = set(), 0.0, 0.0, 0.0, 0.0
    poses = [np.eye(4)]
    for keys in parse_actions(text):
        goal = {c: full[c] * ((c in keys) - (opposite[c] in keys)) for c in full}
        for c in full:
            if any(k not in before for k in keys):
                velocity[c] = goal[c]
            else:
                velocity[c] += (PRESS if goal[c] else COAST) * (goal[c] - velocity[c])
        before = set(keys)
        yaw += velocity["d"]
        pitch = max(-math.pi / 3, min(math.pi / 3, pitch + velocity["i"]))
        # cos(pitch) is the level length of the viewing axis; the mapping adds 1e-6 to it.
        ahead = velocity["w"] * math.cos(pitch) / (math.cos(pitch) + 1e-6)
        aside = velocity["l"] / (1 + 1e-6)
        x += ahead * math.sin(yaw) + aside * math.cos(yaw)
        z += ahead * math.cos(yaw) - aside * math.sin(yaw)
        cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
        poses.append(
            np.array(
                [
                    [cy, sy * sp, sy * cp, x],
                    [0, cp, -sp, 0],
                    [-sy, cy * sp, cy * cp, z],
                    [0, 0, 0, 1],
                ]
            )
        )
    return np.stack(poses)


@pytest.mark.parametrize("seed", range(12))
def test_smoothed_mapping_equals_a_plain_rollout(seed):
    text = random_actions(seed)
    degrees = 0.6 if seed % 2 else 4.0  # the faster ones reach the pitch limit
    c2w = actions_to_c2w(text, rotation_speed_deg=degrees)
    np.testing.assert_allclose(c2w, plain_rollout(text, 0.025, degrees), atol=2e-6)
