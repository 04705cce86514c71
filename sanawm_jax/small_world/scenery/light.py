"""Soft shadows and ambient occlusion of single bodies, in closed form.

A body covers a share of the sun: 0.5 where the ray to the sun's middle touches its silhouette, and
a smooth step whose width is the sun's angular radius times the distance of the body. Arguments are
in the body's frame, see `shapes`; the direction to the sun is a unit vector.
"""

from __future__ import annotations

import jax.numpy as jnp

from sanawm_jax.small_world.scenery.shapes import block_planes, dot, safe

AMBIENT_REACH = 1.2  # world units from a body's core; see `occlusion`


def _step(depth, width):
    """0 below -width, 1 above +width, smooth between."""
    x = jnp.clip(0.5 + 0.5 * depth / width, 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def block_cover(origin, sun, half, taper, size, blur):
    """Share of the sun (R,) that a block covers.

    The ray to the sun is inside all six planes between the last entry and the first exit. Both
    meet when the ray is moved sideways by the exit minus the entry over the length of
    n_in / (n_in . sun) - n_out / (n_out . sun), which gives its distance from the silhouette.

    Args:
      origin: three arrays (R,), the lit points.
      sun: three scalars.
      half, taper: of the block.
      size: radius of the sun in radians.
      blur: least width of the edge in world units, (R,): what one pixel sees.
    """
    near, far = jnp.full_like(origin[0], -jnp.inf), jnp.full_like(origin[0], jnp.inf)
    v_near = v_far = (jnp.zeros_like(near),) * 3
    for normal, offset in block_planes(half, taper):
        slope = safe(jnp, dot(normal, sun))
        t = (offset - dot(normal, origin)) / slope
        vector = [n / slope for n in normal]
        is_entry = (slope < 0.0) & (t > near)
        is_exit = (slope > 0.0) & (t < far)
        near, far = jnp.where(is_entry, t, near), jnp.where(is_exit, t, far)
        v_near = [jnp.where(is_entry, v, w) for v, w in zip(vector, v_near, strict=True)]
        v_far = [jnp.where(is_exit, v, w) for v, w in zip(vector, v_far, strict=True)]
    rate = [a - b for a, b in zip(v_near, v_far, strict=True)]
    depth = (far - near) / jnp.sqrt(dot(rate, rate) + 1e-6)
    cover = _step(depth, size * jnp.maximum(near, 0.0) + blur)
    return jnp.where(far > 0.0, cover, 0.0)


def round_cover(origin, sun, half, taper, size, blur):
    """The same for a cylinder or cone."""
    a, h, b = half
    radius = 0.5 * (a + b)
    flat = jnp.maximum(sun[0] * sun[0] + sun[2] * sun[2], 1e-4)
    closest = -(origin[0] * sun[0] + origin[2] * sun[2]) / flat
    miss_x, miss_z = origin[0] + closest * sun[0], origin[2] + closest * sun[2]
    height = origin[1] + closest * sun[1]
    width = radius * (1.0 - taper[0] * jnp.clip(0.5 + 0.5 * height / h, 0.0, 1.0))
    aside = width - jnp.sqrt(miss_x * miss_x + miss_z * miss_z)
    chord = jnp.sqrt(jnp.maximum(width * width - miss_x * miss_x - miss_z * miss_z, 0.0) / flat)
    enter, leave = jnp.maximum(closest - chord, 0.0), closest + chord
    level = jnp.sqrt(flat)
    under_top = (h - (origin[1] + enter * sun[1])) * level
    over_bottom = (origin[1] + leave * sun[1] + h) * level
    depth = jnp.minimum(aside, jnp.minimum(under_top, over_bottom))
    cover = _step(depth, size * enter + blur)
    return jnp.where(leave > 1e-3, cover, 0.0) * (h > 0.0)


def ball_cover(origin, sun, half, taper, size, blur):
    """The same for an ellipsoid."""
    o = [origin[i] / half[i] for i in range(3)]
    d = [sun[i] / half[i] for i in range(3)]
    closest = -dot(o, d) / dot(d, d)
    miss = [o[i] + closest * d[i] for i in range(3)]
    length = jnp.sqrt(dot(miss, miss) + 1e-9)
    world = [miss[i] * half[i] for i in range(3)]
    scale = jnp.sqrt(dot(world, world) + 1e-9) / length
    cover = _step((1.0 - length) * scale, size * jnp.maximum(closest, 0.0) + blur)
    ahead = jnp.clip(closest / (0.4 * half[0]), 0.0, 1.0)
    return cover * ahead * (half[0] > 0.0)


COVERS = (block_cover, round_cover, ball_cover)


def occlusion(origin, normal, half):
    """Share of the sky (R,) that a body takes from points with a local unit normal.

    It is zero from a distance of `AMBIENT_REACH` on, so that a list of near bodies loses nothing.
    """
    core = [jnp.clip(origin[i], -0.6 * half[i], 0.6 * half[i]) for i in range(3)]
    toward = [core[i] - origin[i] for i in range(3)]
    squared = dot(toward, toward) + 1e-6
    facing = jnp.clip(dot(normal, toward) / jnp.sqrt(squared), 0.0, 1.0)
    reach = 0.8 * jnp.cbrt(jnp.maximum(half[0] * half[1] * half[2], 1e-9)) ** 2
    reach = jnp.minimum(reach, 0.8)
    least = 1.0 / (1.0 + AMBIENT_REACH**2 / reach)
    near = jnp.maximum(1.0 / (1.0 + squared / reach) - least, 0.0) / (1.0 - least)
    return 0.75 * facing * near * (half[0] > 0.0)
