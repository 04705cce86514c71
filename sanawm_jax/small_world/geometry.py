"""Ray intersections and distances for the bodies of the small world.

The interval functions take the array module `xp` (numpy or jax.numpy), so the renderer and the
path planner share them. Vectors are 3-tuples of arrays that broadcast against each other.
"""

from __future__ import annotations

import numpy as np

from sanawm_jax.small_world.scene import OUTDOOR, Scene

_TINY = 1e-7


def _slab(xp, origin, direction, half):
    """Enter and leave parameters of |origin + t * direction| <= half; empty when half < 0."""
    safe = xp.where(xp.abs(direction) < _TINY, _TINY, direction)
    inverse = 1.0 / safe
    middle = -origin * inverse
    reach = xp.abs(inverse) * half
    return middle - reach, middle + reach


def to_local(vector, cos, sin):
    """Rotate a world vector (x, y, z) into a body's frame with yaw (cos, sin)."""
    x, y, z = vector
    return cos * x - sin * z, y, sin * x + cos * z


def box_interval(xp, origin, direction, half, cos, sin):
    """Enter and leave parameters of a yawed box; `origin` is relative to its centre."""
    origin, direction = to_local(origin, cos, sin), to_local(direction, cos, sin)
    near_x, far_x = _slab(xp, origin[0], direction[0], half[0])
    near_y, far_y = _slab(xp, origin[1], direction[1], half[1])
    near_z, far_z = _slab(xp, origin[2], direction[2], half[2])
    near = xp.maximum(xp.maximum(near_x, near_y), near_z)
    return near, xp.minimum(xp.minimum(far_x, far_y), far_z)


def sphere_interval(xp, origin, direction, radius):
    """Enter and leave parameters of a sphere; `origin` is relative to its centre."""
    a = direction[0] ** 2 + direction[1] ** 2 + direction[2] ** 2
    b = origin[0] * direction[0] + origin[1] * direction[1] + origin[2] * direction[2]
    # radius * |radius| keeps a negative radius (an unused slot) unreachable.
    c = origin[0] ** 2 + origin[1] ** 2 + origin[2] ** 2 - radius * xp.abs(radius)
    root = xp.sqrt(xp.maximum(b * b - a * c, 0.0))
    return (-b - root) / a, (-b + root) / a


def cylinder_interval(xp, origin, direction, radius, half):
    """Enter and leave parameters of a vertical capped cylinder; `origin` relative to centre."""
    a = xp.maximum(direction[0] ** 2 + direction[2] ** 2, _TINY)
    b = origin[0] * direction[0] + origin[2] * direction[2]
    c = origin[0] ** 2 + origin[2] ** 2 - radius * xp.abs(radius)
    square = b * b - a * c
    root = xp.sqrt(xp.maximum(square, 0.0))
    near_y, far_y = _slab(xp, origin[1], direction[1], half)
    near = xp.where(square > 0.0, xp.maximum((-b - root) / a, near_y), xp.inf)
    return near, xp.minimum((-b + root) / a, far_y)


def room_exit(xp, origin, direction, room_min, room_max):
    """Return (t, face) where a ray from inside leaves the room; faces as in `scene.NUM_FACES`."""
    ends = []
    for axis in range(3):
        safe = xp.where(xp.abs(direction[axis]) < _TINY, _TINY, direction[axis])
        wall = xp.where(safe > 0.0, room_max[axis], room_min[axis])
        ends.append((wall - origin[axis]) / safe)
    t = xp.minimum(xp.minimum(ends[0], ends[1]), ends[2])
    axis = xp.where(t == ends[0], 0, xp.where(t == ends[1], 1, 2))
    along = xp.where(axis == 0, direction[0], xp.where(axis == 1, direction[1], direction[2]))
    return t, 2 * axis + (along > 0.0)


def distance(scene: Scene, points: np.ndarray) -> np.ndarray:
    """Distance from points (..., 3) to the nearest surface, (...), in world units.

    Negative inside a body or outside the room. Numpy only. Outdoors, the room's walls and
    ceiling are sky and do not count.
    """
    p = np.asarray(points, np.float64)[..., None, :]
    low, high = points - scene.room_min, scene.room_max - points
    if scene.family == OUTDOOR:
        nearest = high[..., 1]
    else:
        nearest = np.minimum(low, high).min(-1)
    cos, sin = np.cos(scene.box_yaw), np.sin(scene.box_yaw)
    rel = p - scene.box_center
    local = np.stack(to_local((rel[..., 0], rel[..., 1], rel[..., 2]), cos, sin), -1)
    gap = np.abs(local) - scene.box_half
    outside = np.linalg.norm(np.maximum(gap, 0.0), axis=-1)
    box = (outside + np.minimum(gap.max(-1), 0.0)).min(-1)
    sphere = (np.linalg.norm(p - scene.sphere_center, axis=-1) - scene.sphere_radius).min(-1)
    rel = p - scene.cylinder_center
    gap = np.stack(
        (
            np.hypot(rel[..., 0], rel[..., 2]) - scene.cylinder_radius,
            np.abs(rel[..., 1]) - scene.cylinder_half,
        ),
        -1,
    )
    outside = np.linalg.norm(np.maximum(gap, 0.0), axis=-1)
    cylinder = (outside + np.minimum(gap.max(-1), 0.0)).min(-1)
    return np.minimum(np.minimum(nearest, box), np.minimum(sphere, cylinder))


def cast(scene: Scene, origins: np.ndarray, directions: np.ndarray) -> tuple:
    """Cast a few rays (..., 3) with numpy.

    Returns (t (...), body (...)): the index among boxes, spheres, cylinders, in this order, or -1
    where the ray reaches the room or the ground first.
    """
    o = [np.asarray(origins, np.float64)[..., None, i] for i in range(3)]
    d = [np.asarray(directions, np.float64)[..., None, i] for i in range(3)]

    def relative(center):
        return [o[i] - center[:, i] for i in range(3)]

    cos, sin = np.cos(scene.box_yaw), np.sin(scene.box_yaw)
    pole = (scene.cylinder_radius, scene.cylinder_half)
    intervals = (
        box_interval(np, relative(scene.box_center), d, scene.box_half.T, cos, sin),
        sphere_interval(np, relative(scene.sphere_center), d, scene.sphere_radius),
        cylinder_interval(np, relative(scene.cylinder_center), d, *pole),
    )
    hits = np.concatenate(
        [np.where((near < far) & (near > 1e-4), near, np.inf) for near, far in intervals], -1
    )
    room, _ = room_exit(
        np, [a[..., 0] for a in o], [a[..., 0] for a in d], scene.room_min, scene.room_max
    )
    t = hits.min(-1)
    return np.minimum(t, room), np.where(t < room, hits.argmin(-1), -1)
