"""Camera paths through small-world scenes: action strings and smooth splines, free of collisions.

Poses are camera-to-world, OpenCV axes, in the scene's units. numpy only.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy.interpolate import CubicSpline

from sanawm_jax.camera.actions import actions_to_c2w, parse_actions
from sanawm_jax.small_world.geometry import cast, distance
from sanawm_jax.small_world.scene import INDOOR, Scene

CLEARANCE = 0.25  # world units between the camera and any surface, at least
SINGLE_ACTIONS = "wsadijkl"
ACTION_FRAMES = 48  # how long each single action is guaranteed to be free from a start pose
FOV_RANGE = (60.0, 80.0)  # horizontal, degrees

_MARGIN = 0.01  # kept on top of the clearance so that rounding cannot eat it
_EYE_HEIGHT = (0.75, 1.25)
_TRIES = 24


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


def sample_intrinsics(rng: np.random.Generator, height: int = 128, width: int = 128) -> np.ndarray:
    """Draw (fx, fy, cx, cy) in pixels, (4,) float32: square pixels, centre at W/2, H/2."""
    fov = np.deg2rad(rng.uniform(*FOV_RANGE))
    focal = width / 2 / np.tan(fov / 2)
    return np.array((focal, focal, width / 2, height / 2), np.float32)


def is_free(scene: Scene, c2w: np.ndarray) -> bool:
    """Whether every pose (..., 4, 4) keeps the clearance to all surfaces."""
    return bool(distance(scene, c2w[..., :3, 3]).min() >= CLEARANCE + _MARGIN)


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
    if scene.family == INDOOR:
        x = np.clip(x, scene.room_min[0] + 0.4, scene.room_max[0] - 0.4)
        z = np.clip(z, scene.room_min[2] + 0.4, scene.room_max[2] - 0.4)
    return np.stack((x, -rng.uniform(*_EYE_HEIGHT, count), z), -1)


def _view_scores(scene: Scene, poses: np.ndarray) -> np.ndarray:
    """How good poses (N, 4, 4) are as first views, (N,): objects in sight, none too close."""
    x, y = np.meshgrid(np.linspace(-0.6, 0.6, 7), np.linspace(-0.35, 0.45, 3))
    rays = np.stack((x.ravel(), y.ravel(), np.ones(x.size)), -1)
    directions = np.einsum("nij,rj->nri", poses[:, :3, :3], rays)
    origins = np.broadcast_to(poses[:, None, :3, 3], directions.shape)
    depth, body = cast(scene, origins, directions)
    near = np.where(depth < 6.0, body, -1)
    kinds = np.array([len(set(row) - {-1}) for row in near.tolist()])
    # Several depths in sight make parallax; a picture full of one near body makes none.
    variety = np.std(np.log(np.clip(depth, 0.3, 8.0)), axis=1)
    blocked = (depth < 0.8).mean(1) + 0.6 * (depth < 1.4).mean(1)
    return 0.15 * np.minimum(kinds, 5) + 0.4 * np.minimum(variety, 0.6) - 1.5 * blocked


def _best_view(rng: np.random.Generator, scene: Scene, positions: np.ndarray) -> np.ndarray:
    """The best of some random level views from each position (N, 3)."""
    yaws = rng.uniform(0, 2 * np.pi, (len(positions), 4))
    poses = np.stack([look_pose(p, a) for p, row in zip(positions, yaws, strict=True) for a in row])
    # The noise keeps the choice from always being the most crowded view.
    return poses[np.argmax(_view_scores(scene, poses) + rng.uniform(0, 0.15, len(poses)))]


def sample_start(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """Draw a start pose (4, 4) with a level horizon from which every single action is free.

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


def _free_view(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """A free level pose with something to see, (4, 4)."""
    positions = _random_positions(rng, scene, 8)
    kept = positions[distance(scene, positions) >= CLEARANCE + 0.15]
    return _best_view(rng, scene, kept[-3:] if len(kept) else positions[:1])


def random_actions(rng: np.random.Generator, num_steps: int) -> str:
    """Draw an action string of `num_steps` frames: a held key, a pair, or several segments."""
    kind = rng.random()
    if kind < 0.4:
        return f"{rng.choice(list(SINGLE_ACTIONS))}-{num_steps}"

    def keys() -> str:
        if rng.random() < 0.12:
            return "none"
        groups = rng.permutation(["ws", "ad", "ik", "jl"])[
            : rng.choice((1, 2, 3), p=(0.5, 0.4, 0.1))
        ]
        return "".join(str(rng.choice(list(g))) for g in groups)

    if kind < 0.55:
        pair = rng.permutation(["ws", "ad", "ik", "jl"])[:2]
        return "".join(str(rng.choice(list(g))) for g in pair) + f"-{num_steps}"
    parts = min(int(rng.integers(2, 6)), num_steps)
    cuts = np.sort(rng.choice(np.arange(1, num_steps), parts - 1, replace=False))
    lengths = np.diff([0, *cuts, num_steps])
    return ",".join(f"{keys()}-{n}" for n in lengths)


def _action_path(rng: np.random.Generator, scene: Scene, num_frames: int):
    """A free path of the action language: (c2w, action string)."""
    for _ in range(_TRIES):
        start = sample_start(rng, scene) if rng.random() < 0.5 else _free_view(rng, scene)
        text = random_actions(rng, num_frames - 1)
        c2w = start @ actions_to_c2w(text).astype(np.float64)
        if is_free(scene, c2w):
            return c2w, text
    text = f"{rng.choice(('a', 'd'))}-{num_frames - 1}"
    return sample_start(rng, scene) @ actions_to_c2w(text).astype(np.float64), text


def _smooth(rng: np.random.Generator, time: np.ndarray, reach: float, size: int) -> np.ndarray:
    """A smooth random curve from 0 over time in [0, 1], (len(time), size), end within `reach`."""
    knots = int(rng.integers(3, 6))
    steps = rng.normal(size=(knots - 1, size)) + 1.2 * rng.normal(size=size)
    points = np.concatenate((np.zeros((1, size)), np.cumsum(steps, 0)))
    points *= reach / max(np.abs(points).max(), 1e-6)
    return CubicSpline(np.linspace(0, 1, knots), points, bc_type="natural")(time)


def _spline_path(rng: np.random.Generator, scene: Scene, num_frames: int) -> np.ndarray:
    """A free smooth path: drifting position and look, or an arc around a seen point, (F, 4, 4)."""
    time = np.linspace(0.0, 1.0, num_frames)
    span = (num_frames - 1) / 48
    for attempt in range(_TRIES):
        scale = span * 0.93**attempt
        start = _free_view(rng, scene)
        forward = start[:3, 2]
        yaw0 = np.arctan2(forward[0], forward[2])
        position = (
            start[:3, 3]
            + np.concatenate(
                [_smooth(rng, time, scale * rng.uniform(lo, hi), n) for lo, hi, n in _AXES],
                1,
            )
            @ _ORDER
        )
        yaw = yaw0 + _smooth(rng, time, scale * np.deg2rad(rng.uniform(5, 50)), 1)[:, 0]
        pitch = (
            np.deg2rad(rng.uniform(-10, 8))
            + _smooth(rng, time, scale * np.deg2rad(rng.uniform(1, 10)), 1)[:, 0]
        )
        if rng.random() < 0.4:  # orbit
            radius, _ = cast(scene, start[None, :3, 3], forward[None])
            radius = float(np.clip(radius[0], 1.2, 3.0))
            target = start[:3, 3] + radius * forward
            sweep = scale * np.deg2rad(rng.uniform(15, 45)) * rng.choice((-1, 1))
            yaw = yaw0 + sweep * time * time * (3 - 2 * time)
            height = position[:, 1:2] - target[1]
            position = target - radius * np.stack((np.sin(yaw), 0 * yaw, np.cos(yaw)), 1)
            position[:, 1:2] += height
            pitch = -np.arctan2(-height[:, 0], radius)  # keep looking at the target
        roll = np.zeros(num_frames)
        if rng.random() < 0.3:
            roll = _smooth(rng, time, np.deg2rad(rng.uniform(0.3, 1.5)), 1)[:, 0]
        columns = zip(position, yaw, pitch, roll, strict=True)
        c2w = np.stack([look_pose(*column) for column in columns])
        if is_free(scene, c2w):
            return c2w
    start = sample_start(rng, scene)
    turn = np.deg2rad(30.0) * span
    return np.stack([start @ look_pose((0, 0, 0), turn * t) for t in time])


# Reach ranges of the two level axes and of the height, and the columns' world axes.
_AXES = ((0.4, 1.5, 2), (0.0, 0.3, 1))
_ORDER = np.array([[1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0]])


def sample_path(rng: np.random.Generator, scene: Scene, num_frames: int = 49) -> tuple:
    """Draw a camera path that keeps `CLEARANCE` to every surface.

    Half of the paths come from the action language (its speeds, level start), half are splines.

    Args:
      rng: source of randomness.
      scene: the scene.
      num_frames: pixel frames F, at least 2.

    Returns:
      (c2w (F, 4, 4) float32 world poses, held keys: F - 1 frozensets or None, action string or "").
    """
    if rng.random() < 0.5:
        c2w, text = _action_path(rng, scene, num_frames)
        return c2w.astype(np.float32), parse_actions(text), text
    return _spline_path(rng, scene, num_frames).astype(np.float32), None, ""
