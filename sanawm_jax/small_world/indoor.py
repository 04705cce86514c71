"""Indoor scenes: a room with pictures, windows, furniture and things on it."""

from __future__ import annotations

import numpy as np

from sanawm_jax.small_world.composer import CLEAR_RADIUS, Composer
from sanawm_jax.small_world.palette import COLOR_NAMES, VIVID, Material, color, material
from sanawm_jax.small_world.scene import INDOOR

_WALL_TEXTURES = (
    "plain",
    "striped",
    "brick",
    "tiled",
    "marbled",
    "planked",
    "checkered",
)
_WALL_WEIGHTS = (0.2, 0.2, 0.2, 0.12, 0.12, 0.1, 0.06)
_FLOORS = ("checkered", "planked", "tiled", "marbled", "brick", "striped")
_WALL_COLORS = tuple(n for n in COLOR_NAMES if n not in ("black", "navy"))
_LIGHT_COLORS = ("white", "cream", "gray", "tan", "pink", "turquoise", "yellow")


def pick(rng: np.random.Generator, names, weights=None) -> str:
    """Draw one name."""
    return str(rng.choice(names, p=weights))


def _table(c: Composer, x, z, yaw, name, size):
    r, top = (
        c.rng,
        material(c.rng, pick(c.rng, ("planked", "plain", "marbled")), name, 0.25),
    )
    width, height, depth = size
    c.box(x, height - 0.08, z, (width, 0.08, depth), yaw, top)
    leg = material(r, "plain", pick(r, COLOR_NAMES))
    c.cylinder(x, 0.0, z, 0.09, height - 0.08, leg)
    if r.random() < 0.7 and c.fits(0, 1, 0):
        other = pick(r, VIVID)
        c.sphere(x, height + 0.16, z, 0.16, material(r, "striped", other, 0.12, gloss=0.5))
        c.note("ball", other)


def _sofa(c: Composer, x, z, yaw, name, size):
    width, height, depth = size
    mat = material(c.rng, pick(c.rng, ("plain", "striped", "marbled")), name, 0.2)
    c.box(x, 0.0, z, (width, 0.4, depth), yaw, mat)
    back = -(depth / 2 - 0.1)  # the back is on the local -z side
    c.box(
        x + np.sin(yaw) * back,
        0.4,
        z + np.cos(yaw) * back,
        (width, height - 0.4, 0.2),
        yaw,
        mat,
    )
    for side in (-1.0, 1.0):
        dx = side * (width / 2 - 0.09)
        c.box(
            x + np.cos(yaw) * dx,
            0.4,
            z - np.sin(yaw) * dx,
            (0.18, 0.2, depth),
            yaw,
            mat,
        )


def _cabinet(c: Composer, x, z, yaw, name, size):
    mat = material(c.rng, pick(c.rng, ("tiled", "planked", "checkered")), name, 0.35)
    c.box(x, 0.0, z, size, yaw, mat)
    if c.fits(0, 0, 1) and c.rng.random() < 0.6:
        other = pick(c.rng, VIVID)
        vase = material(c.rng, "striped", other, 0.1, gloss=0.4)
        c.cylinder(x, size[1], z, 0.11, 0.34, vase)
        c.note("vase", other)


def _shelf(c: Composer, x, z, yaw, name, size):
    books = material(c.rng, "windowed", name, 0.26)._replace(
        color_a=color(c.rng, pick(c.rng, VIVID))
    )
    c.box(x, 0.0, z, size, yaw, books)


def _bed(c: Composer, x, z, yaw, name, size):
    width, height, depth = size
    c.box(
        x,
        0.0,
        z,
        size,
        yaw,
        material(c.rng, pick(c.rng, ("checkered", "striped")), name, 0.3),
    )
    back = -(depth / 2 - 0.06)
    frame = material(c.rng, "planked", "brown", 0.2)
    at = (x + np.sin(yaw) * back, z + np.cos(yaw) * back)
    c.box(at[0], 0.0, at[1], (width, height + 0.5, 0.12), yaw, frame)


def _column(c: Composer, x, z, yaw, name, size):
    texture = pick(c.rng, ("striped", "brick", "marbled", "tiled"))
    tall = float(-c.room_min[1])
    c.cylinder(x, 0.0, z, size[0] / 2, tall, material(c.rng, texture, name, 0.25))


def _lamp(c: Composer, x, z, yaw, name, size):
    c.cylinder(x, 0.0, z, 0.05, size[1], material(c.rng, "plain", "gray"))
    glow = material(c.rng, "plain", name, emission=0.75)
    c.sphere(x, size[1] + 0.15, z, 0.22, glow)


def _ball(c: Composer, x, z, yaw, name, size):
    texture = pick(c.rng, ("checkered", "striped", "marbled", "plain"))
    mat = material(c.rng, texture, name, 0.22, gloss=0.6)
    c.sphere(x, size[0] / 2, z, size[0] / 2, mat)


def _stool(c: Composer, x, z, yaw, name, size):
    mat = material(c.rng, pick(c.rng, ("striped", "plain", "checkered")), name, 0.16)
    c.cylinder(x, 0.0, z, size[0] / 2, size[1], mat)


def _crate(c: Composer, x, z, yaw, name, size):
    mat = material(c.rng, pick(c.rng, ("planked", "checkered", "tiled", "brick")), name, 0.2)
    c.box(x, 0.0, z, size, yaw, mat)
    if c.rng.random() < 0.4 and c.fits(1):
        other = pick(c.rng, VIVID)
        small = np.array(size) * 0.6
        c.box(x, size[1], z, small, yaw + 0.5, material(c.rng, "plain", other, 0.2))
        c.note("crate", other)


def _plant(c: Composer, x, z, yaw, name, size):
    c.cylinder(x, 0.0, z, 0.2, 0.45, material(c.rng, "striped", name, 0.15))
    leaves = material(c.rng, "marbled", "green", 0.2, grain=0.4, grain_scale=5.0)
    leaves = leaves._replace(color_b=leaves.color_a * 0.45)
    c.sphere(x, 0.45 + size[0] * 0.42, z, size[0] / 2, leaves)


# kind -> maker, size low and high (width, height, depth), slots (boxes, spheres, cylinders),
# stands at a wall
_FURNITURE = {
    "table": (_table, (0.7, 0.55, 0.5), (1.3, 0.8, 0.8), (1, 1, 1), False),
    "sofa": (_sofa, (1.2, 0.75, 0.6), (1.8, 0.95, 0.8), (4, 0, 0), True),
    "cabinet": (_cabinet, (0.6, 0.7, 0.4), (1.4, 1.2, 0.55), (1, 0, 1), True),
    "shelf": (_shelf, (0.8, 1.4, 0.3), (1.3, 2.0, 0.4), (1, 0, 0), True),
    "bed": (_bed, (1.0, 0.45, 1.3), (1.3, 0.6, 1.7), (2, 0, 0), True),
    "column": (_column, (0.3, 1.0, 0.3), (0.55, 1.0, 0.55), (0, 0, 1), False),
    "lamp": (_lamp, (0.42, 1.1, 0.42), (0.42, 1.6, 0.42), (0, 1, 1), False),
    "ball": (_ball, (0.4, 0.4, 0.4), (0.9, 0.9, 0.9), (0, 1, 0), False),
    "stool": (_stool, (0.35, 0.4, 0.35), (0.55, 0.6, 0.55), (0, 0, 1), False),
    "crate": (_crate, (0.4, 0.4, 0.4), (0.75, 0.8, 0.75), (1, 0, 0), False),
    "plant": (_plant, (0.55, 0.9, 0.55), (0.85, 1.2, 0.85), (0, 1, 1), False),
}


def furnish(c: Composer, kind: str) -> bool:
    """Try to add one piece of furniture; False when it has no slot or no place."""
    rng = c.rng
    maker, low, high, slots, at_wall = _FURNITURE[kind]
    if not c.fits(*slots):
        return False
    size = rng.uniform(low, high)
    if low[0] == low[2]:
        size[2] = size[0]  # round or square things
    half_x, half_z = size[0] / 2, size[2] / 2

    def at_a_wall():
        side = rng.integers(4)  # the piece's back (local -z) turns to the wall
        yaw = side * np.pi / 2
        span, wall = (0, 2) if side % 2 == 0 else (2, 0)
        low_wall = side < 2
        edge = c.room_min[wall] if low_wall else c.room_max[wall]
        off = edge + (half_z + 0.02) * (1 if low_wall else -1)
        along = rng.uniform(c.room_min[span] + half_x, c.room_max[span] - half_x)
        return (along, off, yaw) if span == 0 else (off, along, yaw)

    def anywhere():
        reach = CLEAR_RADIUS + max(half_x, half_z) + 0.05 + rng.gamma(1.2, 0.45)
        angle = rng.uniform(0, 2 * np.pi)
        x, z = c.clear[:2] + reach * np.array((np.cos(angle), np.sin(angle)))
        return x, z, rng.uniform(0, np.pi)

    spot = c.place(half_x, half_z, at_a_wall if at_wall else anywhere)
    if spot is None:
        return False
    name = pick(rng, VIVID if rng.random() < 0.8 else COLOR_NAMES)
    c.note(kind, name)
    maker(c, *spot, name, size)
    return True


def _hang_panels(c: Composer) -> None:
    """Pictures and windows on the walls."""
    rng = c.rng
    for side in rng.permutation(4)[: rng.integers(2, 5)]:
        span, wall = (0, 2) if side % 2 == 0 else (2, 0)
        edge = c.room_min[wall] if side < 2 else c.room_max[wall]
        width, height = rng.uniform(0.8, 1.6), rng.uniform(0.7, 1.1)
        along = rng.uniform(c.room_min[span] + 0.9, c.room_max[span] - 0.9)
        bottom = rng.uniform(0.85, 1.05)
        if rng.random() < 0.45:
            name = pick(rng, ("white", "brown", "gray", "cream"))
            glass = np.array((0.62, 0.85, 1.0))
            mat = Material("windowed", glass, color(rng, name), 0.48, 0.05, 2.0, 0.9)
            c.note("window", name)
        else:
            name = pick(rng, VIVID)
            first, second = color(rng, pick(rng, VIVID)), color(rng, name)
            mat = Material("painted", first, second, 1.0, 0.25, 3.0)
            c.note("picture", name)
        x, z = (along, edge) if span == 0 else (edge, along)
        c.box(x, bottom, z, (width, height, 0.1), side * np.pi / 2, mat, casts=False)


def compose(rng: np.random.Generator, seed: int):
    """Draw an indoor scene."""
    width, depth = rng.uniform(4.6, 7.2, 2)
    height = rng.uniform(2.2, 3.0)
    reach = np.array((width, depth)) / 2 - CLEAR_RADIUS - 0.1
    c = Composer(
        rng,
        seed,
        INDOOR,
        (-width / 2, -height, -depth / 2),
        (width / 2, 0.0, depth / 2),
        rng.uniform(-reach, reach) * 0.7,
    )
    walls = (pick(rng, _WALL_TEXTURES, _WALL_WEIGHTS), pick(rng, _WALL_COLORS))
    floor = (pick(rng, _FLOORS), pick(rng, COLOR_NAMES))
    while floor[1] == walls[1]:
        floor = (floor[0], pick(rng, COLOR_NAMES))
    ceiling = ("plain" if rng.random() < 0.6 else "planked", pick(rng, _LIGHT_COLORS))
    wall = material(rng, *walls, rng.uniform(0.3, 0.5))
    faces = [wall._replace(color_a=np.clip(wall.color_a * s, 0, 1)) for s in (1.0, 0.92)]
    faces += [
        material(rng, *ceiling, 0.6),
        material(rng, *floor, rng.uniform(0.4, 0.65)),
    ]
    faces += [wall._replace(color_a=np.clip(wall.color_a * s, 0, 1)) for s in (1.05, 0.97)]
    if rng.random() < 0.5:  # a rug
        name = pick(rng, VIVID)
        x, z = c.clear[:2] + rng.uniform(-0.5, 0.5, 2)
        rug = material(rng, pick(rng, ("striped", "checkered", "tiled")), name, 0.3)
        size = (rng.uniform(1.2, 1.9), 0.02, rng.uniform(0.9, 1.5))
        c.box(x, 0.0, z, size, rng.uniform(0, np.pi), rug, casts=False)
        c.note("rug", name)
    _hang_panels(c)
    kinds = list(_FURNITURE)
    wanted, placed = rng.integers(6, 10), 0
    for kind in rng.choice(kinds, 24):
        placed += furnish(c, str(kind)) if placed < wanted else 0
    return c.finish(faces, [walls, floor, ceiling], _lamp_light(rng, c))


def _lamp_light(rng: np.random.Generator, c: Composer) -> dict:
    """A lamp under the ceiling, off the middle so that shadows have a direction."""
    spot = rng.uniform(-0.6, 0.6, 2) * c.room_max[[0, 2]]
    warm = rng.uniform(0.0, 1.0)
    tint = np.array((1.0, 0.97, 0.90)) * (1 - warm) + np.array((1.0, 0.86, 0.66)) * warm
    return {
        "light_position": (spot[0], c.room_min[1] + 0.12, spot[1]),
        "light_color": tint * rng.uniform(1.1, 1.45),
        "light_falloff": 0.06,
        "ambient": np.array((0.40, 0.43, 0.50)) * rng.uniform(0.8, 1.15),
        "sky": np.full((3, 3), 0.5),
        "clouds": (0.0, 1.0),
        "haze": 0.0,
    }
