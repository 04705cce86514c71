"""Which bodies the rays of a tile can meet, and loops over those alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sanawm_jax.small_world.scenery import scene as world
from sanawm_jax.small_world.scenery.light import AMBIENT_REACH
from sanawm_jax.small_world.scenery.shapes import INTERVALS, room_exit, to_local

jax.tree_util.register_dataclass(
    world.Scene, [f.name for f in dataclasses.fields(world.Scene)], meta_fields=[]
)

_GROUP = 4  # bodies that one turn of a loop tests; the number of bodies of each kind divides
KIND_STARTS = (0, world.NUM_BLOCKS, world.NUM_BLOCKS + world.NUM_ROUNDS)
_KIND_SIZES = (world.NUM_BLOCKS, world.NUM_ROUNDS, world.NUM_BALLS)


def body_table(scene: world.Scene) -> jax.Array:
    """Geometry of the bodies, (NUM_BODIES, 10): centre, cos, sin, half extents, tapers."""
    turn = jnp.stack((jnp.cos(scene.body_yaw), jnp.sin(scene.body_yaw)), -1)
    return jnp.concatenate((scene.body_center, turn, scene.body_half, scene.body_taper), -1)


def bounding_radius(scene: world.Scene) -> jax.Array:
    """Radius of a sphere around each body, (NUM_BODIES,); negative for unused ones."""
    # a negative taper widens a body towards its top
    wide = jnp.maximum(1.0, 1.0 - scene.body_taper)
    half = scene.body_half * jnp.stack((wide[:, 0], jnp.ones_like(wide[:, 0]), wide[:, 1]), -1)
    whole = jnp.sqrt((half**2).sum(-1))
    a, h, b = half[:, 0], half[:, 1], half[:, 2]
    around = jnp.sqrt(jnp.maximum(a, b) ** 2 + h * h)
    first, second = KIND_STARTS[1:]
    radius = jnp.concatenate((whole[:first], around[first:second], half[second:].max(-1)))
    return jnp.where(a > 0.0, radius, -1e6)


def over_bodies(table, mask, start, body):
    """Folds `body(carry, kind, index, row)` over the bodies in `mask`, a few per turn."""
    carry = start
    for kind, (first, size) in enumerate(zip(KIND_STARTS, _KIND_SIZES, strict=True)):
        chosen = mask[first : first + size]
        order = jnp.argsort(~chosen, stable=True).astype(jnp.int32)
        count = chosen.sum().astype(jnp.int32)

        def turn(state, kind=kind, first=first, order=order):
            at, carry = state
            for step in range(_GROUP):
                index = order[at + step] + first
                carry = body(carry, kind, index, table[index])
            return at + _GROUP, carry

        def more(state, count=count):
            return state[0] < count

        _, carry = jax.lax.while_loop(more, turn, (jnp.int32(0), carry))
    return carry


def unpack_row(row):
    cos, sin = row[3], row[4]
    return (row[0], row[1], row[2]), cos, sin, (row[5], row[6], row[7]), (row[8], row[9])


def nearest(scene, table, mask, origin, direction, least=1e-4):
    """First surface of rays: (t (R,), surface (R,) int32: a body or a face of the room).

    Args:
      origin: three scalars; direction: three arrays (R,).
      least: ray parameter below which nothing is hit, () or (R,).
    """
    t, face = room_exit(jnp, origin, direction, scene.room_min, scene.room_max)
    best = (t, face.astype(jnp.int32) + world.FIRST_FACE)

    def test(best, kind, index, row):
        t, surface = best
        center, cos, sin, half, taper = unpack_row(row)
        local = to_local([origin[i] - center[i] for i in range(3)], cos, sin)
        near, far = INTERVALS[kind](jnp, local, to_local(direction, cos, sin), half, taper)
        is_hit = (near < far) & (near > least) & (near < t)
        return jnp.where(is_hit, near, t), jnp.where(is_hit, index, surface)

    return over_bodies(table, mask, best, test)


def cone_mask(scene, radius, origin, axis, cos, sin):
    """Bodies that a cone of rays can meet, (NUM_BODIES,) bool; axis: unit vector (3,)."""
    toward = scene.body_center - jnp.stack(origin)
    along = toward @ axis
    across = jnp.sqrt(jnp.maximum((toward**2).sum(-1) - along**2, 0.0))
    return across * cos - along * sin <= radius


def shade_mask(scene, radius, point, is_solid):
    """Bodies that can shade some of the points (R,), (NUM_BODIES,) bool."""
    low = [jnp.where(is_solid, p, 1e9).min() for p in point]
    high = [jnp.where(is_solid, p, -1e9).max() for p in point]
    middle = jnp.stack([(a + b) / 2 for a, b in zip(low, high, strict=True)])
    spread = jnp.sqrt(sum((b - a) ** 2 for a, b in zip(low, high, strict=True))) / 2
    toward = scene.body_center - middle
    squared = (toward**2).sum(-1)
    along = toward @ scene.sun
    across = jnp.sqrt(jnp.maximum(squared - along**2, 0.0))
    room = radius + spread
    edge = scene.sun_size * jnp.maximum(along, 0.0) + 0.05
    throws = (across <= room + edge) & (along >= -room)
    is_near = jnp.sqrt(squared) <= room + AMBIENT_REACH
    return (throws | is_near) & (radius > 0.0) & is_solid.any()
