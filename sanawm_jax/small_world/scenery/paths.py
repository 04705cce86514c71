"""Camera paths through small-world scenes, free of collisions: keys, looks like a mouse's, curves.

Poses are camera to world, OpenCV axes, in the scene's units. numpy only.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy.interpolate import CubicSpline

from sanawm_jax.camera.actions import actions_to_c2w
from sanawm_jax.small_world.scenery.scene import FIRST_PATCH, PAINT, Scene
from sanawm_jax.small_world.scenery.shapes import cast, distance

CLEARANCE = 0.25  # world units between the camera and any surface, at least
SINGLE_ACTIONS = "wsadijkl"
ACTION_FRAMES = 48  # how long each single action is guaranteed to be free from a start pose
FOV_RANGE = (62.0, 78.0)  # horizontal, degrees
# Frames of a training clip and how often each length comes.
LENGTHS = (49, 97, 193, 385, 961)
LENGTH_WEIGHTS = (0.45, 0.25, 0.15, 0.10, 0.05)

_MARGIN = 0.01  # kept on top of the clearance so that rounding cannot eat it
_EYE_HEIGHT = (0.85, 1.15)
_REACH = 11.0  # how far from the middle a camera goes outdoors
_TRIES = 24
_OPPOSITE = {"w": "s", "s": "w", "a": "d", "d": "a", "i": "k", "k": "i", "j": "l", "l": "j"}
_PAIRS = ("ws", "ad", "ik", "jl")


def look_pose(position, yaw: float, pitch: float = 0.0, roll: float = 0.0) -> np.ndarray:
    """Pose (4, 4) at a position; yaw turns right, pitch looks up, roll last, radians."""
    (cy, sy), (cp, sp), (cr, sr) = ((np.cos(a), np.sin(a)) for a in (yaw, pitch, roll))
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    tilt = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    lean = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    pose = np.eye(4)
    pose[:3, :3] = turn @ tilt @ lean
    pose[:3, 3] = position
    return pose


def sample_intrinsics(rng: np.random.Generator, height: int = 96, width: int = 160) -> np.ndarray:
    """Draws (fx, fy, cx, cy) in pixels, (4,) float32: square pixels, centre at W/2, H/2."""
    fov = np.deg2rad(rng.uniform(*FOV_RANGE))
    focal = width / 2 / np.tan(fov / 2)
    return np.array((focal, focal, width / 2, height / 2), np.float32)


def sample_length(rng: np.random.Generator) -> int:
    """Draws the number of frames of a training clip, 8k + 1."""
    return int(rng.choice(LENGTHS, p=LENGTH_WEIGHTS))


def is_over_water(scene: Scene, points: np.ndarray) -> np.ndarray:
    """Whether points (..., 3) are above a pond or the sea."""
    wet = np.zeros(points.shape[:-1], bool)
    mirror = scene.paint[FIRST_PATCH:, PAINT.index("mirror")]
    for (x, z, half_x, half_z, yaw, is_round), gloss in zip(scene.patches, mirror, strict=True):
        if gloss < 0.9 or half_x <= 0:
            continue
        dx, dz = points[..., 0] - x, points[..., 2] - z
        u = np.abs(np.cos(yaw) * dx - np.sin(yaw) * dz) / (half_x + 0.1)
        v = np.abs(np.sin(yaw) * dx + np.cos(yaw) * dz) / (half_z + 0.1)
        wet |= (np.hypot(u, v) if is_round > 0.5 else np.maximum(u, v)) < 1.0
    return wet


def is_free(scene: Scene, c2w: np.ndarray) -> bool:
    """Whether every pose (..., 4, 4) keeps the clearance to all surfaces, over dry ground."""
    points = np.asarray(c2w)[..., :3, 3]
    if not scene.is_indoor and np.hypot(points[..., 0], points[..., 2]).max() > _REACH:
        return False
    if is_over_water(scene, points).any():
        return False
    return bool(distance(scene, points).min() >= CLEARANCE + _MARGIN)


@functools.cache
def _single_action_steps() -> np.ndarray:
    """Relative poses of the eight single actions, (8 * 49, 4, 4)."""
    return np.concatenate([actions_to_c2w(f"{k}-{ACTION_FRAMES}") for k in SINGLE_ACTIONS])


def is_free_start(scene: Scene, start: np.ndarray) -> bool:
    """Whether all eight single actions held for 48 frames are free from a pose (4, 4)."""
    return is_free(scene, start @ _single_action_steps())


def _random_positions(rng: np.random.Generator, scene: Scene, count: int) -> np.ndarray:
    """Positions (count, 3) around the scene's clear disc; the first is the disc's centre."""
    spread = scene.clear[2] * np.sqrt(rng.random(count)) * 1.4
    angle = rng.uniform(0, 2 * np.pi, count)
    spread[0] = 0.0
    x = scene.clear[0] + spread * np.cos(angle)
    z = scene.clear[1] + spread * np.sin(angle)
    if scene.is_indoor:
        x = np.clip(x, scene.room_min[0] + 0.4, scene.room_max[0] - 0.4)
        z = np.clip(z, scene.room_min[2] + 0.4, scene.room_max[2] - 0.4)
    return np.stack((x, -rng.uniform(*_EYE_HEIGHT, count), z), -1)


def _view_scores(scene: Scene, poses: np.ndarray) -> np.ndarray:
    """How good poses (N, 4, 4) are as first views, (N,): objects in sight, none too close."""
    x, y = np.meshgrid(np.linspace(-0.6, 0.6, 9), np.linspace(-0.35, 0.30, 4))
    rays = np.stack((x.ravel(), y.ravel(), np.ones(x.size)), -1)
    directions = np.einsum("nij,rj->nri", poses[:, :3, :3], rays)
    origins = np.broadcast_to(poses[:, None, :3, 3], directions.shape)
    depth, body = cast(scene, origins, directions)
    things = np.where((depth < 9.0) & (body >= 0), scene.body_object[body], -1)
    kinds = np.array([len(set(row) - {-1}) for row in things.tolist()])
    # Several depths in sight make parallax; a picture full of one near body makes none.
    variety = np.std(np.log(np.clip(depth, 0.3, 12.0)), axis=1)
    blocked = (depth < 0.9).mean(1) + 0.6 * (depth < 1.6).mean(1)
    return 0.15 * np.minimum(kinds, 6) + 0.4 * np.minimum(variety, 0.8) - 1.5 * blocked


def _best_view(rng: np.random.Generator, scene: Scene, positions: np.ndarray) -> np.ndarray:
    """The best of some random level views from each position (N, 3)."""
    yaws = rng.uniform(0, 2 * np.pi, (len(positions), 4))
    poses = np.stack([look_pose(p, a) for p, row in zip(positions, yaws, strict=True) for a in row])
    # The noise keeps the choice from always being the most crowded view.
    return poses[np.argmax(_view_scores(scene, poses) + rng.uniform(0, 0.15, len(poses)))]


def sample_start(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """Draws a start pose (4, 4) with a level horizon from which every single action is free.

    Each of the keys w s a d i j k l held for 48 frames keeps `CLEARANCE` to all surfaces. The
    scene's clear disc guarantees that such a pose exists.
    """
    positions = _random_positions(rng, scene, 16)
    free = [p for p in positions if is_free_start(scene, look_pose(p, 0.0))]
    # The walk directions turn with the yaw, so the chosen view is checked again.
    for _ in range(_TRIES):
        pose = _best_view(rng, scene, np.array(free[:4] if free else positions[:1]))
        if is_free_start(scene, pose):
            return pose
        free = [p for p in free if not np.array_equal(p, pose[:3, 3])]
    return look_pose(positions[0], rng.uniform(0, 2 * np.pi))


def _keys(rng: np.random.Generator, still: float = 0.1) -> str:
    """One to three keys that do not cancel, or none with probability `still`."""
    if rng.random() < still:
        return "none"
    groups = rng.permutation(_PAIRS)[: rng.choice((1, 2, 3), p=(0.5, 0.38, 0.12))]
    return "".join(str(rng.choice(list(g))) for g in groups)


def _reversed_keys(keys: str) -> str:
    return keys if keys == "none" else "".join(_OPPOSITE[k] for k in keys)


def _action_path(rng: np.random.Generator, scene: Scene, num_frames: int):
    """A free path of the action language: (c2w, action string).

    Segments are added while they are free; one that collides is drawn again. A third of the paths
    go back the way they came, after a stop.
    """
    steps = num_frames - 1
    kind = rng.random()
    for attempt in range(_TRIES):
        start = sample_start(rng, scene) if attempt % 3 == 2 else _free_view(rng, scene)
        if kind < 0.25 and steps <= 96:
            text = f"{rng.choice(list(SINGLE_ACTIONS))}-{steps}"
        elif kind < 0.35 and steps <= 96:
            text = f"{_keys(rng, 0.0)}-{steps}"
        else:
            text = _segments(rng, scene, start, steps, goes_back=kind > 0.68)
        if text:
            c2w = start @ actions_to_c2w(text).astype(np.float64)
            if is_free(scene, c2w):
                return c2w, text
    # turning on the spot is free everywhere
    text = f"{rng.choice(('a', 'd'))}-{steps}"
    return sample_start(rng, scene) @ actions_to_c2w(text).astype(np.float64), text


def _segments(rng, scene, start, steps: int, goes_back: bool) -> str:
    """Segments that fill `steps` frames, or "" if none are free."""
    goes_back = goes_back and steps >= 24  # too short to stop and turn
    pause = int(rng.integers(4, 13)) if goes_back else 0
    budget = (steps - pause) // 2 if goes_back else steps
    parts: list[tuple[str, int]] = []
    done, failures = 0, 0
    while done < budget and failures < 30:
        length = min(int(rng.integers(10, 75)), budget - done)
        part = (_keys(rng), length)
        text = ",".join(f"{k}-{n}" for k, n in [*parts, part])
        if is_free(scene, (start @ actions_to_c2w(text))[done:]):
            parts.append(part)
            done += length
        else:
            failures += 1
    if done < budget:
        parts.append((str(rng.choice(("a", "d"))), budget - done))
    if goes_back:
        back = [(_reversed_keys(k), n) for k, n in reversed(parts)]
        rest = steps - 2 * budget
        parts = [*parts, *([("none", rest)] if rest else []), *back]
    return ",".join(f"{k}-{n}" for k, n in parts)


def _free_view(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """A free level pose with something to see, (4, 4)."""
    positions = _random_positions(rng, scene, 8)
    kept = positions[distance(scene, positions) >= CLEARANCE + 0.15]
    return _best_view(rng, scene, kept[-3:] if len(kept) else positions[:1])


def _smooth(rng, time: np.ndarray, reach: float, size: int, knots: int) -> np.ndarray:
    """A smooth random curve from 0 over time in [0, 1], (len(time), size), within `reach`."""
    steps = rng.normal(size=(knots - 1, size)) + 0.8 * rng.normal(size=size)
    points = np.concatenate((np.zeros((1, size)), np.cumsum(steps, 0)))
    points *= reach / max(np.abs(points).max(), 1e-6)
    return CubicSpline(np.linspace(0, 1, knots), points, bc_type="natural")(time)


def _glances(rng: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Yaw and pitch (frames,) of a hand on a mouse: quick turns with rests between, radians."""
    turns, at = np.zeros((frames, 2)), 0
    now = np.zeros(2)
    while at < frames:
        rest, move = int(rng.integers(4, 30)), int(rng.integers(6, 22))
        goal = now + np.deg2rad(rng.normal(size=2) * (28.0, 7.0))
        goal[1] = np.clip(goal[1], np.deg2rad(-25), np.deg2rad(25))
        ease = np.clip((np.arange(rest + move) - rest) / move, 0.0, 1.0)
        ease = ease**3 * (10 - 15 * ease + 6 * ease**2)  # least jerk
        part = now + (goal - now) * ease[:, None]
        turns[at : at + len(part)] = part[: frames - at]
        at, now = at + len(part), goal
    return turns[:, 0], turns[:, 1]


def _free_path(rng: np.random.Generator, scene: Scene, num_frames: int) -> np.ndarray:
    """A free path without keys (F, 4, 4): a curve, an orbit or a walk with glances.

    A third of the paths return to where they began.
    """
    kind, returns = rng.random(), rng.random() < 0.33
    clock = np.linspace(0.0, 1.0, num_frames)
    time = 1.0 - np.abs(2.0 * clock - 1.0) if returns else clock
    if returns:  # slow down before turning back
        time = np.sin(0.5 * np.pi * np.clip(time, 0, 1)) * 1.0
    span = (num_frames - 1) / (96 if returns else 48)
    knots = int(np.clip(3 + span * rng.uniform(0.6, 1.2), 3, 16))
    for attempt in range(_TRIES):
        scale = min(span, 5.0) * 0.9**attempt
        start = _free_view(rng, scene)
        forward = start[:3, 2]
        yaw0 = np.arctan2(forward[0], forward[2])
        level = _smooth(rng, time, scale * rng.uniform(0.4, 1.3), 2, knots)
        rise = _smooth(rng, time, min(scale, 1.0) * rng.uniform(0.0, 0.25), 1, knots)[:, 0]
        position = start[:3, 3] + np.stack((level[:, 0], rise, level[:, 1]), 1)
        yaw = yaw0 + _smooth(rng, time, scale * np.deg2rad(rng.uniform(5, 50)), 1, knots)[:, 0]
        pitch = np.deg2rad(rng.uniform(-8, 6)) + _smooth(rng, time, 0.12, 1, knots)[:, 0]
        if kind < 0.35:  # glances
            yaw, pitch = _glances(rng, num_frames)
            yaw = yaw0 + yaw
        elif kind < 0.6:  # orbit around what is seen
            radius, _ = cast(scene, start[None, :3, 3], forward[None])
            radius = float(np.clip(radius[0], 1.2, 4.0))
            target = start[:3, 3] + radius * forward
            sweep = scale * np.deg2rad(rng.uniform(15, 45)) * rng.choice((-1, 1))
            yaw = yaw0 + sweep * time * time * (3 - 2 * time)
            position = target - radius * np.stack((np.sin(yaw), 0 * yaw, np.cos(yaw)), 1)
            position[:, 1] += rise
            pitch = np.zeros(num_frames)
        c2w = np.stack([look_pose(*c) for c in zip(position, yaw, pitch, strict=True)])
        if is_free(scene, c2w):
            return c2w
    start = sample_start(rng, scene)
    yaw, pitch = _glances(rng, num_frames)
    return np.stack([start @ look_pose((0, 0, 0), a, b) for a, b in zip(yaw, pitch, strict=True)])


def sample_path(rng: np.random.Generator, scene: Scene, num_frames: int = 49) -> tuple:
    """Draws a camera path that keeps `CLEARANCE` to every surface.

    Six of ten paths come from the action language (its speeds, level start).

    Args:
      rng: source of randomness.
      scene: the scene.
      num_frames: pixel frames F, at least 2.

    Returns:
      (c2w (F, 4, 4) float32 world poses, action string or "").
    """
    if rng.random() < 0.6:
        c2w, text = _action_path(rng, scene, num_frames)
        return c2w.astype(np.float32), text
    return _free_path(rng, scene, num_frames).astype(np.float32), ""
