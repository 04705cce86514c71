"""Ray intersections and distances of the small world's bodies.

The interval functions take the array module `xp` (numpy or jax.numpy), so that the renderer, the
path planner and the captions share them. Vectors are 3-tuples of arrays that broadcast against
each other. Inside a body's frame the axes are (x, up, z), its centre is the origin.
"""

from __future__ import annotations

import numpy as np

from sanawm_jax.small_world.scenery.scene import NUM_BLOCKS, NUM_ROUNDS, Scene

_TINY = 1e-7
_KINDS = (
    slice(0, NUM_BLOCKS),
    slice(NUM_BLOCKS, NUM_BLOCKS + NUM_ROUNDS),
    slice(NUM_BLOCKS + NUM_ROUNDS, None),
)


def safe(xp, value):
    """`value`, with a tiny number in place of zero, to divide by."""
    return xp.where(xp.abs(value) < _TINY, _TINY, value)


def to_local(vector, cos, sin):
    """World vector (x, y, z) -> (x, up, z) in the frame of a body with yaw (cos, sin)."""
    x, y, z = vector
    return cos * x - sin * z, -y, sin * x + cos * z


def to_world(vector, cos, sin):
    """Inverse of `to_local`."""
    x, up, z = vector
    return cos * x + sin * z, -up, -sin * x + cos * z


def block_planes(half, taper):
    """The six planes of a block: (normal (x, up, z), offset); inside is normal . p <= offset."""
    a, h, b = half
    lean_x, lean_z = 0.5 * a * taper[0] / h, 0.5 * b * taper[1] / h
    wide_x, wide_z = a * (1.0 - 0.5 * taper[0]), b * (1.0 - 0.5 * taper[1])
    return (
        ((1.0, lean_x, 0.0), wide_x),
        ((-1.0, lean_x, 0.0), wide_x),
        ((0.0, lean_z, 1.0), wide_z),
        ((0.0, lean_z, -1.0), wide_z),
        ((0.0, 1.0, 0.0), h),
        ((0.0, -1.0, 0.0), h),
    )


def dot(n, v):
    """Sum of products of two 3-tuples; numbers that are 0.0 cost nothing."""
    total = 0.0
    for a, b in zip(n, v, strict=True):
        if not (isinstance(a, float) and a == 0.0):
            total = total + a * b
    return total


def block_interval(xp, origin, direction, half, taper):
    """Ray parameters where a ray enters and leaves a block; enter > leave if it misses."""
    near, far = -xp.inf, xp.inf
    for normal, offset in block_planes(half, taper):
        slope = safe(xp, dot(normal, direction))
        t = (offset - dot(normal, origin)) / slope
        near = xp.maximum(near, xp.where(slope < 0.0, t, -xp.inf))
        far = xp.minimum(far, xp.where(slope < 0.0, xp.inf, t))
    return near, far


def round_interval(xp, origin, direction, half, taper):
    """The same for an upright cylinder or cone."""
    a, h, b = half
    shrink = 0.5 * taper[0] / h
    ox, dx, oz, dz = origin[0] / a, direction[0] / a, origin[2] / b, direction[2] / b
    width, change = 1.0 - 0.5 * taper[0] - shrink * origin[1], -shrink * direction[1]
    qa = safe(xp, dx * dx + dz * dz - change * change)
    qb = ox * dx + oz * dz - width * change
    qc = ox * ox + oz * oz - width * width
    square = qb * qb - qa * qc
    root = xp.sqrt(xp.maximum(square, 0.0))
    first, last = (-qb - root) / qa, (-qb + root) / qa
    # A ray steeper than the cone's side is inside from one crossing on to infinity.
    is_steep, widens = qa < 0.0, change > 0.0
    near = xp.where(is_steep, xp.where(widens, first, -xp.inf), first)
    far = xp.where(is_steep, xp.where(widens, xp.inf, last), last)
    near = xp.where(square > 0.0, near, xp.where(is_steep, -xp.inf, xp.inf))
    slope = safe(xp, direction[1])
    bottom, top = (-h - origin[1]) / slope, (h - origin[1]) / slope
    near = xp.maximum(near, xp.minimum(bottom, top))
    far = xp.minimum(far, xp.maximum(bottom, top))
    return xp.where(h > 0.0, near, xp.inf), far


def ball_interval(xp, origin, direction, half, taper=None):
    """The same for an ellipsoid."""
    o = [origin[i] / half[i] for i in range(3)]
    d = [direction[i] / half[i] for i in range(3)]
    a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] + o[2] * d[2]
    c = o[0] * o[0] + o[1] * o[1] + o[2] * o[2] - 1.0
    square = b * b - a * c
    root = xp.sqrt(xp.maximum(square, 0.0))
    return xp.where((square > 0.0) & (half[0] > 0.0), (-b - root) / a, xp.inf), (-b + root) / a


INTERVALS = (block_interval, round_interval, ball_interval)


def room_exit(xp, origin, direction, room_min, room_max):
    """(t, face) where a ray from inside leaves the room; faces as in `scene.NUM_FACES`."""
    ends = []
    for axis in range(3):
        slope = safe(xp, direction[axis])
        wall = xp.where(slope > 0.0, room_max[axis], room_min[axis])
        ends.append((wall - origin[axis]) / slope)
    t = xp.minimum(xp.minimum(ends[0], ends[1]), ends[2])
    axis = xp.where(t == ends[0], 0, xp.where(t == ends[1], 1, 2))
    along = xp.where(axis == 0, direction[0], xp.where(axis == 1, direction[1], direction[2]))
    return t, 2 * axis + (along > 0.0)


def _frames(scene: Scene):
    return np.cos(scene.body_yaw), np.sin(scene.body_yaw)


def distance(scene: Scene, points: np.ndarray) -> np.ndarray:
    """Distance from points (..., 3) to the nearest surface, (...), in world units. Numpy only.

    It is a lower bound, which is what a path planner needs: a block or a round counts as wide
    everywhere as at its widest. Negative inside a body or outside the room; outdoors, only the
    ground counts of the room. Ponds count as ground.
    """
    points = np.asarray(points, np.float64)
    low, high = points - scene.room_min, scene.room_max - points
    nearest = np.minimum(low, high).min(-1) if scene.is_indoor else high[..., 1]
    rel = points[..., None, :] - scene.body_center
    local = to_local((rel[..., 0], rel[..., 1], rel[..., 2]), *_frames(scene))
    local, half = np.stack(local, -1), np.maximum(scene.body_half, 1e-3)
    half[:, [0, 2]] *= np.maximum(1.0, 1.0 - scene.body_taper)
    blocks, rounds, balls = _KINDS
    gap = np.abs(local[..., blocks, :]) - half[blocks]
    outside = np.linalg.norm(np.maximum(gap, 0.0), axis=-1) + np.minimum(gap.max(-1), 0.0)
    wide = half[rounds][:, [0, 2]].max(-1)
    gap = np.stack(
        (
            np.hypot(local[..., rounds, 0], local[..., rounds, 2]) - wide,
            np.abs(local[..., rounds, 1]) - half[rounds, 1],
        ),
        -1,
    )
    around = np.linalg.norm(np.maximum(gap, 0.0), axis=-1) + np.minimum(gap.max(-1), 0.0)
    scaled = np.linalg.norm(local[..., balls, :] / half[balls], axis=-1) - 1.0
    ball = scaled * half[balls].min(-1)
    nearest = np.minimum(nearest, outside.min(-1))
    return np.minimum(nearest, np.minimum(around.min(-1), ball.min(-1)))


def cast(scene: Scene, origins: np.ndarray, directions: np.ndarray) -> tuple:
    """Casts a few rays (..., 3) with numpy.

    Returns:
      t (...): ray parameter of the first surface; body (...): its index, or -1 for the room, the
      ground or the sky.
    """
    o = [np.asarray(origins, np.float64)[..., None, i] for i in range(3)]
    d = [np.asarray(directions, np.float64)[..., None, i] for i in range(3)]
    cos, sin = _frames(scene)
    hits = []
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for kind, interval in zip(_KINDS, INTERVALS, strict=True):
            center, c, s = scene.body_center[kind], cos[kind], sin[kind]
            local = to_local([o[i] - center[:, i] for i in range(3)], c, s)
            ray = to_local(d, c, s)
            half, taper = scene.body_half[kind].T, scene.body_taper[kind].T
            near, far = interval(np, local, ray, half, taper)
            hits.append(np.where((near < far) & (near > 1e-4), near, np.inf))
    hits = np.concatenate(hits, -1)
    room, _ = room_exit(
        np, [a[..., 0] for a in o], [a[..., 0] for a in d], scene.room_min, scene.room_max
    )
    t = hits.min(-1)
    return np.minimum(t, room), np.where(t < room, hits.argmin(-1), -1)
