"""Indoor places of the small world: a room with furniture and a hall with columns."""

from __future__ import annotations

import numpy as np

from sanawm_jax.small_world.scenery import things
from sanawm_jax.small_world.scenery.builder import CLEAR_RADIUS, Builder
from sanawm_jax.small_world.scenery.palette import Material, leaves
from sanawm_jax.small_world.scenery.skies import room_light

_SKIES = ("clear", "golden", "pink", "turquoise")


def _shell(c: Builder, width, depth, height) -> None:
    """Sets the walls, so that the clear disc around the origin fits."""
    room = np.array((width, depth)) - 2 * (CLEAR_RADIUS + 0.1)
    x, z = c.rng.uniform(-0.35, 0.35, 2) * room
    c.room_min[:] = (x - width / 2, -height, z - depth / 2)
    c.room_max[:] = (x + width / 2, 0.0, z + depth / 2)


def _wall_place(c: Builder, side: int, along: float) -> tuple[float, float, float]:
    """Point and yaw at a wall: side 0..3 is -z, -x, +z, +x; along in [-1, 1] of the wall."""
    low, high = c.room_min, c.room_max
    middle, half = (low + high) / 2, (high - low) / 2
    if side % 2 == 0:
        z = low[2] if side == 0 else high[2]
        return middle[0] + along * half[0], z, 0.0 if side == 2 else np.pi
    x = low[0] if side == 1 else high[0]
    return x, middle[2] + along * half[2], np.pi / 2 if side == 3 else -np.pi / 2


def _window(c: Builder, side: int, along: float, half_width, half_height, middle) -> None:
    x, z, _ = _wall_place(c, side, along)
    normal = ((0.0, -1.0), (-1.0, 0.0), (0.0, 1.0), (1.0, 0.0))[side]
    c.windows.append((x, -middle, z, *normal, half_width, half_height))


def _aim_sun(c: Builder, light: dict, side: int) -> None:
    """Turns the sun so that it shines through the windows of a wall, from the side."""
    normal = np.array(((0.0, -1.0), (-1.0, 0.0), (0.0, 1.0), (1.0, 0.0))[side])
    turn = c.rng.uniform(-0.75, 0.75)
    cos, sin = np.cos(turn), np.sin(turn)
    flat = np.array((cos * normal[0] - sin * normal[1], sin * normal[0] + cos * normal[1]))
    height = np.deg2rad(c.rng.uniform(24, 42))
    light["sun"] = np.array((np.cos(height) * flat[0], -np.sin(height), np.cos(height) * flat[1]))


def _at_wall(c: Builder, half_x, half_z, sides=(0, 1, 2, 3)):
    """A draw for `Builder.find`: a thing's back (local +z) at one of the walls."""

    def draw():
        side = int(c.rng.choice(sides))
        x, z, yaw = _wall_place(c, side, c.rng.uniform(-0.85, 0.85))
        x, z = things.offset(x, z, yaw, 0.0, -(half_z + 0.02))
        return x, z, yaw

    return draw


def _picture(c: Builder, side: int, along: float) -> None:
    """A framed picture: a landscape of three plain colours."""
    rng = c.rng
    x, z, yaw = _wall_place(c, side, along)
    width, height, bottom = rng.uniform(0.7, 1.2), rng.uniform(0.55, 0.8), rng.uniform(0.95, 1.15)
    name = c.color()
    c.thing("picture", name)
    frame = c.mat("plain", c.color(("brown", "black", "white")), noise=0.04)
    x1, z1 = things.offset(x, z, yaw, 0.0, -0.02)
    c.block(x1, bottom, z1, (width + 0.12, height + 0.12, 0.05), yaw, frame)
    x2, z2 = things.offset(x, z, yaw, 0.0, -0.035)
    c.block(x2, bottom + 0.06, z2, (width, height, 0.05), yaw, c.mat("plain", c.color(), noise=0.2))
    x3, z3 = things.offset(x, z, yaw, 0.0, -0.045)
    part = rng.uniform(0.3, 0.55) * height
    c.block(x3, bottom + 0.06, z3, (width, part, 0.05), yaw, c.mat("plain", name, noise=0.2))


def _table(c: Builder, x, z, yaw) -> None:
    rng, name = c.rng, c.color(("brown", "tan", "white", *c.colors))
    c.thing("table", name)
    size = rng.uniform(0.8, 1.2)
    if rng.random() < 0.5:
        c.round(x, 0.60, z, 0.55 * size, 0.07, c.mat("plain", name))
        c.round(x, 0.0, z, 0.08, 0.60, c.mat("plain", "brown"))
    else:
        c.block(x, 0.60, z, (size, 0.07, 0.65), yaw, c.mat("planked", name, 0.3))
        for dx in (-0.42, 0.42):
            for dz in (-0.25, 0.25):
                at = things.offset(x, z, yaw, dx * size, dz)
                c.block(at[0], 0.0, at[1], (0.07, 0.60, 0.07), yaw, c.mat("plain", name))
    if c.room_for(0, 1, 1):
        vase = c.color()
        c.thing("vase", vase)
        mat = c.mat("plain", vase, gloss=0.5, noise=0.05)
        c.round(x, 0.67, z, 0.09, 0.22, mat, -0.3)
        c.ball(x, 1.0, z, (0.19, 0.16, 0.19), leaves(rng, c.color(("red", "pink", "yellow"))))


def _sofa(c: Builder, x, z, yaw) -> None:
    name = c.color()
    c.thing("sofa", name)
    mat = c.mat("plain", name, noise=0.12)
    c.block(x, 0.08, z, (1.6, 0.32, 0.7), yaw, mat, (0.03, 0.05))
    at = things.offset(x, z, yaw, 0.0, 0.27)
    c.block(at[0], 0.3, at[1], (1.6, 0.48, 0.2), yaw, mat, (0.05, 0.3))
    for side in (-0.72, 0.72):
        at = things.offset(x, z, yaw, side, -0.02)
        c.block(at[0], 0.08, at[1], (0.2, 0.50, 0.66), yaw, mat, (0.1, 0.05))
    at = things.offset(x, z, yaw, c.rng.uniform(-0.4, 0.4), 0.1)
    c.ball(at[0], 0.52, at[1], (0.2, 0.18, 0.1), c.mat("plain", c.color()), yaw)


def _shelf(c: Builder, x, z, yaw) -> None:
    name = c.color(("brown", "white", "tan"))
    c.thing("shelf", name)
    wood = c.mat("plain", name, noise=0.08)
    for side in (-0.5, 0.5):
        at = things.offset(x, z, yaw, side, 0.0)
        c.block(at[0], 0.0, at[1], (0.06, 1.7, 0.3), yaw, wood)
    books = c.mat("striped", c.color(), 0.14, noise=0.16)
    for level in range(3):
        c.block(x, 0.12 + 0.55 * level, z, (1.0, 0.05, 0.3), yaw, wood)
        c.block(x, 0.17 + 0.55 * level, z, (0.9, 0.32, 0.22), yaw, books)


def _bed(c: Builder, x, z, yaw) -> None:
    name = c.color()
    c.thing("bed", name)
    c.block(x, 0.05, z, (1.1, 0.3, 1.7), yaw, c.mat("plain", "white", noise=0.05))
    at = things.offset(x, z, yaw, 0.0, -0.25)
    c.block(at[0], 0.12, at[1], (1.14, 0.3, 1.22), yaw, c.mat("checkered", name, 0.35))
    at = things.offset(x, z, yaw, 0.0, 0.83)
    c.block(at[0], 0.0, at[1], (1.15, 0.85, 0.08), yaw, c.mat("planked", "brown", 0.3))
    at = things.offset(x, z, yaw, 0.0, 0.6)
    c.ball(at[0], 0.42, at[1], (0.36, 0.12, 0.2), c.mat("plain", "white", noise=0.03), yaw)


def _plant(c: Builder, x, z, yaw) -> None:
    c.thing("plant", "green")
    c.round(x, 0.0, z, 0.20, 0.36, c.mat("plain", c.color()), -0.25)
    mat = leaves(c.rng, "green")
    c.ball(x, 0.78, z, (0.34, 0.42, 0.34), mat)
    c.ball(x + 0.14, 1.12, z + 0.06, (0.22, 0.28, 0.22), mat)


def _floor_lamp(c: Builder, x, z, yaw) -> None:
    c.thing("lamp", "yellow")
    c.round(x, 0.0, z, 0.03, 1.3, c.mat("plain", "black"))
    c.round(x, 0.0, z, 0.16, 0.05, c.mat("plain", "black"))
    c.round(x, 1.25, z, 0.24, 0.32, c.mat("plain", "yellow", emission=1.1, noise=0.0), 0.35)
    c.lamp(x, 1.5, z, things.WARM, 0.9, 0.8)


def _stool(c: Builder, x, z, yaw) -> None:
    name = c.color()
    c.thing("stool", name)
    c.round(x, 0.0, z, 0.22, 0.42, c.mat("plain", name))


def _ball(c: Builder, x, z, yaw) -> None:
    name, size = c.color(), c.rng.uniform(0.18, 0.32)
    c.thing("ball", name)
    c.ball(x, size, z, size, c.mat("striped", name, 0.4, gloss=0.5))


def room(c: Builder):
    """A living room: windows with sunlight, furniture, pictures and a rug."""
    rng = c.rng
    width, depth = rng.uniform(5.2, 7.6, 2)
    _shell(c, width, depth, rng.uniform(2.4, 3.0))
    wall_name = c.color(("cream", "white", "tan", "pink", "turquoise", "yellow"))
    floor = c.color(("brown", "tan", "gray"))
    floor_texture = c.color(("planked", "tiled"))
    sky = c.color(_SKIES)
    side = int(rng.integers(4))
    for along in (-0.48, 0.48) if rng.random() < 0.7 else (0.0,):
        _window(c, side, along, rng.uniform(0.5, 0.75), rng.uniform(0.55, 0.75), 1.45)
    if rng.random() < 0.6:
        other = (side + int(rng.integers(1, 4))) % 4
        _window(c, other, rng.uniform(-0.4, 0.4), 0.6, 0.65, 1.45)
    walls = [s for s in range(4) if s != side]
    for wall in rng.permutation(walls)[:2]:
        _picture(c, int(wall), rng.uniform(-0.6, 0.6))
    name = c.color()
    c.thing("rug", name)
    yaw = rng.uniform(0, np.pi)
    half = rng.uniform(0.8, 1.2), rng.uniform(0.6, 0.9)
    is_round = bool(rng.random() < 0.4)
    border = c.mat("plain", c.color(), noise=0.10)
    c.patch(0.0, 0.0, half[0] + 0.12, half[1] + 0.12, yaw, border, is_round)
    c.patch(
        0.0, 0.0, half[0], half[1], yaw, c.mat(c.color(("plain", "checkered")), name, 0.4), is_round
    )
    c.background()
    pieces = [
        (_sofa, 0.85, 0.4, (4, 0, 1), True),
        (_shelf, 0.55, 0.17, (8,), True),
        (_bed, 0.6, 0.9, (3, 0, 1), True),
        (_table, 0.65, 0.6, (5, 2, 1), False),
        (_plant, 0.4, 0.4, (0, 1, 2), False),
        (_floor_lamp, 0.25, 0.25, (0, 3), False),
        (_stool, 0.24, 0.24, (0, 1), False),
        (_ball, 0.3, 0.3, (0, 0, 1), False),
        (_stool, 0.24, 0.24, (0, 1), False),
        (_plant, 0.4, 0.4, (0, 1, 2), False),
        (lambda c, x, z, yaw: things.crate(c, x, z, yaw, 0.5), 0.3, 0.3, (1,), False),
        (lambda c, x, z, yaw: things.statue(c, x, z, yaw, c.color()), 0.3, 0.3, (1, 1, 2), False),
    ]
    for index in rng.permutation(len(pieces)):
        make, half_x, half_z, slots, at_wall = pieces[index]
        draw = _at_wall(c, half_x, half_z) if at_wall else c.ring(1.9, 5.0)
        if c.room_for(*slots):
            spot = c.find(half_x, half_z, draw, gap=0.08)
            if spot is not None:
                make(c, *spot)
    wall = c.mat("plain", wall_name, noise=0.06)
    ceiling = c.mat("plain", "white", noise=0.04)
    ground = c.mat(floor_texture, floor, 0.55, noise=0.10, gloss=0.12)
    light = room_light(rng, sky, wall.color_a)
    _aim_sun(c, light, side)
    faces = [wall, wall, ceiling, ground, wall, wall]
    return c.finish(faces, (floor_texture, floor), wall_name, sky, light)


def hall(c: Builder):
    """A tall hall with columns, high windows, a carpet and statues."""
    rng = c.rng
    width, depth, height = rng.uniform(6.5, 8.5), rng.uniform(9.0, 13.0), rng.uniform(3.4, 4.4)
    _shell(c, width, depth, height)
    middle = (c.room_min[0] + c.room_max[0]) / 2
    wall_name = c.color(("cream", "tan", "gray", "white"))
    floor, texture = c.color(("gray", "cream", "tan")), c.color(("checkered", "tiled"))
    sky = c.color(_SKIES)
    side = 1 if rng.random() < 0.5 else 3
    for along in (-0.68, -0.23, 0.23, 0.68):
        _window(c, side, along, 0.5, 0.34 * height, 0.52 * height)
    stone = c.color(("white", "cream", "tan"))
    reach = width / 2 - rng.uniform(1.0, 1.3)
    count = int(rng.integers(3, 5))
    for row in np.linspace(c.room_min[2] + 1.2, c.room_max[2] - 1.2, count):
        for sign in (-1.0, 1.0):
            at = middle + sign * reach
            if np.hypot(at, row) > CLEAR_RADIUS + 0.35:
                c.rects.append((at, row, 0.3, 0.3, 0.0))
                c.thing("column", stone)
                mat = c.mat("plain", stone, noise=0.10)
                c.block(at, 0.0, row, (0.6, 0.16, 0.6), 0.0, mat)
                c.round(at, 0.16, row, 0.20, height - 0.36, mat, 0.1)
                c.block(at, height - 0.2, row, (0.56, 0.2, 0.56), 0.0, mat, (-0.3, -0.3))
    name = c.color(("red", "blue", "navy", "teal", "purple"))
    c.thing("rug", name)
    gold = Material("plain", np.array((0.85, 0.68, 0.35)), np.array((0.8, 0.6, 0.3)), noise=0.06)
    c.patch(middle, 0.0, 0.88, 40.0, 0.0, gold)
    c.patch(middle, 0.0, 0.78, 40.0, 0.0, c.mat("plain", name, noise=0.12))
    c.background()
    for wall in (0, 2):
        _picture(c, wall, rng.uniform(-0.6, -0.3))
        _picture(c, wall, rng.uniform(0.3, 0.6))
    for _ in range(4):
        spot = c.find(0.35, 0.35, c.ring(2.0, 6.0))
        if spot is not None and c.room_for(1, 1, 2):
            things.statue(c, *spot, c.color(("white", "teal", "yellow", *c.colors)))
    for make in (_plant, _plant, _ball, _stool):
        spot = c.find(0.35, 0.35, c.ring(1.95, 6.0))
        if spot is not None and c.room_for(0, 1, 2):
            make(c, *spot)
    for _ in range(2):
        spot = c.find(0.5, 0.3, c.ring(2.0, 5.0))
        if spot is not None and c.room_for(4):
            things.bench(c, *spot)
    wall = c.mat("stone", wall_name, 0.9, noise=0.08)
    ceiling = c.mat("planked", c.color(("brown", "white")), 0.8, noise=0.06)
    ground = c.mat(texture, floor, 0.8, noise=0.08, gloss=0.2)
    light = room_light(rng, sky, wall.color_a)
    _aim_sun(c, light, side)
    faces = [wall, wall, ceiling, ground, wall, wall]
    return c.finish(faces, (texture, floor), wall_name, sky, light)
