"""Outdoor places of the small world, one function per kind; each fills a `Builder`."""

from __future__ import annotations

import numpy as np

from sanawm_jax.small_world.scenery import scene as world
from sanawm_jax.small_world.scenery import things
from sanawm_jax.small_world.scenery.builder import Builder
from sanawm_jax.small_world.scenery.palette import COLORS, HARMONIES, Material
from sanawm_jax.small_world.scenery.rooms import hall, room
from sanawm_jax.small_world.scenery.skies import sky_light

_NOTHING = Material("plain", np.full(3, 0.5), np.full(3, 0.5))


def _ground(c: Builder, name: str, second: str | None = None, **more) -> Material:
    """Ground with soft wide patches of a second shade."""
    values = {"noise": 0.24, "noise_scale": 0.9, "blotch": 0.8, **more}
    mat = c.mat("plain", name, **values)
    other = np.array(COLORS[second]) if second else mat.color_a * np.array((0.78, 0.84, 0.70))
    return mat._replace(color_b=other)


def _path(c: Builder, name: str, texture: str = "stone", wide: float = 0.75) -> float:
    """A straight path through the middle; returns its yaw. Nothing large is put on it."""
    yaw = c.rng.uniform(0, np.pi)
    c.thing("path", name)
    c.patch(0.0, 0.0, wide, 26.0, yaw, c.mat(texture, name, 0.5, noise=0.14))
    c.reserve(0.0, 0.0, wide + 0.1, 9.0, yaw)
    if c.rng.random() < 0.5:
        c.patch(0.0, 0.0, 2.2, 2.2, yaw, c.mat(texture, name, 0.5, noise=0.14), is_round=True)
    c.background()
    return yaw


def _water(c: Builder, name: str = "teal") -> Material:
    color = np.array(COLORS[name]) * 0.62
    return Material("plain", color, color * 0.8, noise=0.10, noise_scale=0.8, gloss=0.6, mirror=1.0)


def _pond(c: Builder) -> bool:
    half = c.rng.uniform((1.3, 1.0), (2.4, 1.6))
    spot = c.find(half[0], half[1], c.ring(3.2, 5.0), gap=0.3)
    if spot is None:
        return False
    x, z, yaw = spot
    c.thing("pond", "teal")
    rim = c.mat("stone", c.color(("gray", "tan")), 0.4)
    c.patch(x, z, half[0] + 0.22, half[1] + 0.22, yaw, rim, is_round=True)
    c.patch(x, z, half[0], half[1], yaw, _water(c), is_round=True)
    c.background()
    return True


def _scatter(c: Builder, count: int, radius: float, low: float, high: float, slots, make) -> None:
    """Tries to put `count` round things at free spots."""
    for _ in range(count):
        if not c.room_for(*slots):
            return
        spot = c.find(radius, radius, c.ring(low, high))
        if spot is not None:
            make(*spot)
    c.background()


def _rows(c: Builder, yaw: float, side: float, step: float, count: int, make) -> None:
    """Puts things on both sides of a path, from near to far."""
    for index in range(count):
        for sign in (-1.0, 1.0):
            for end in (-1.0, 1.0):
                along = end * (2.2 + step * index)
                x, z = things.offset(0.0, 0.0, yaw, sign * side, along)
                make(x, z, yaw, sign)
    c.background()


def village(c: Builder):
    """Houses around a lane, trees, lanterns and a church."""
    rng = c.rng
    ground = _ground(c, "green")
    sky = str(rng.choice(("clear", "cloudy", "golden", "turquoise", "pink", "dusk")))
    lit = 1.0 if sky == "dusk" else 0.0
    _path(c, c.color(("gray", "tan", "cream")))
    spot = c.find(1.3, 1.6, c.ring(5.5, 8.0))
    if spot is not None and rng.random() < 0.75:
        things.church(c, *spot, rng.uniform(0.85, 1.15))
    for index in range(8):
        width, depth = rng.uniform(1.2, 2.0), rng.uniform(1.1, 1.6)
        near = (2.6, 4.6) if index < 4 else (4.5, 10.0)
        spot = c.find(width / 2 + 0.1, depth / 2 + 0.12, c.ring(*near))
        if spot is not None and c.room_for(4):
            things.house(c, *spot, width, depth, lit=lit)
    spot = c.find(0.6, 0.6, c.ring(2.3, 3.5))
    if spot is not None and rng.random() < 0.5 and c.room_for(3, 1):
        things.well(c, *spot)
    if rng.random() < 0.4:
        _pond(c)
    lamps = int(rng.integers(2, 4))
    _scatter(c, lamps, 0.18, 1.9, 4.5, (2, 1), lambda x, z, y: things.lantern(c, x, z, lit > 0))
    _scatter(
        c, 8, 0.45, 2.3, 9.0, (0, 1, 3), lambda x, z, y: things.tree(c, x, z, rng.uniform(0.9, 1.5))
    )
    _scatter(c, 2, 0.5, 1.9, 4.0, (4,), things_bench(c))
    _scatter(c, 3, 0.3, 1.8, 5.0, (0, 0, 1), lambda x, z, y: things.flowers(c, x, z, 0.9))
    _scatter(c, 3, 0.25, 1.9, 5.0, (0, 1), lambda x, z, y: things.barrel(c, x, z))
    spot = c.find(0.9, 0.1, c.ring(2.2, 5.0))
    if spot is not None and c.room_for(6):
        things.fence(c, *spot, 1.7)
    things.hills(c, c.color(("green", "teal")), int(rng.integers(1, 4)))
    return ground, ("plain", "green"), sky, 1.0


def things_bench(c: Builder):
    """A maker of benches for `_scatter`."""
    return lambda x, z, yaw: things.bench(c, x, z, yaw)


def ruins(c: Builder):
    """Columns, arches and an obelisk or a pyramid on sand."""
    rng, stone = c.rng, c.color(("tan", "cream", "gray"))
    ground = _ground(c, "tan", noise_scale=0.7, noise=0.16)
    sky = str(rng.choice(("clear", "golden", "turquoise", "pink")))
    yaw = _path(c, "cream", "tiled", 0.9)
    if rng.random() < 0.6:

        def post(x, z, yaw, sign):
            if rng.random() < 0.8 and c.room_for(2, 1):
                broken = rng.random() < 0.4
                height = rng.uniform(0.4, 1.2) if broken else 1.9
                things.column(c, x, z, height, stone, broken)

        _rows(c, yaw, 1.5, 1.8, 3, post)
        c.reserve(0.0, 0.0, 2.0, 8.5, yaw)
    spot = c.find(1.6, 1.6, c.ring(5.5, 9.0))
    if spot is not None:
        things.pyramid(c, *spot, rng.uniform(2.6, 3.6), stone)
    spot = c.find(0.5, 0.5, c.ring(2.6, 5.0))
    if spot is not None and rng.random() < 0.7:
        things.obelisk(c, *spot[:2], rng.uniform(2.2, 3.4), c.color(("gray", "tan", "red")))
    for _ in range(3):
        spot = c.find(1.3, 0.3, c.ring(2.6, 6.0))
        if spot is not None and c.room_for(3):
            things.arch(c, *spot, 1.6, rng.uniform(1.5, 2.2), stone)
    spot = c.find(0.4, 0.4, c.ring(2.2, 4.0))
    if spot is not None and rng.random() < 0.6:
        things.statue(c, *spot, c.color(("teal", "yellow", "gray")))
    if rng.random() < 0.4:
        _pond(c)
    _scatter(
        c,
        5,
        0.34,
        2.1,
        6.0,
        (2, 1),
        lambda x, z, y: things.column(c, x, z, rng.uniform(0.4, 1.9), stone, rng.random() < 0.6),
    )
    _scatter(
        c, 3, 0.5, 2.5, 7.0, (0, 1, 4), lambda x, z, y: things.palm(c, x, z, rng.uniform(0.9, 1.3))
    )
    _scatter(
        c, 4, 0.4, 2.2, 7.0, (2, 3, 3), lambda x, z, y: things.cactus(c, x, z, rng.uniform(0.7, 1))
    )
    _scatter(
        c,
        6,
        0.4,
        2.0,
        8.0,
        (0, 0, 1),
        lambda x, z, y: things.rock(c, x, z, rng.uniform(0.7, 1.5), stone),
    )
    things.hills(c, c.color(("tan", "orange")), 2)
    return ground, ("plain", "tan"), sky, 0.8


def garden(c: Builder):
    """Hedges, flowers, a pavilion, statues and a pond."""
    rng = c.rng
    ground = _ground(c, "green", noise_scale=0.8)
    sky = str(rng.choice(("clear", "cloudy", "golden", "pink")))
    yaw = _path(c, c.color(("cream", "tan", "white")), "tiled")
    if rng.random() < 0.6:

        def side(x, z, yaw, sign):
            if c.room_for(1):
                things.hedge(c, x, z, yaw + np.pi / 2, 1.5, rng.uniform(0.45, 0.6))

        _rows(c, yaw, 1.55, 2.2, 2, side)
        c.reserve(0.0, 0.0, 1.8, 6.0, yaw)
    spot = c.find(1.1, 1.1, c.ring(3.6, 6.0))
    if spot is not None:
        things.pavilion(c, *spot, rng.uniform(1.7, 2.1))
    _pond(c)
    for _ in range(2):
        spot = c.find(0.4, 0.4, c.ring(2.2, 4.5))
        if spot is not None and c.room_for(1, 1, 2):
            things.statue(c, *spot, c.color(("white", "gray", "teal", "yellow")))
    _scatter(
        c, 7, 0.5, 2.6, 9.0, (0, 1, 3), lambda x, z, y: things.tree(c, x, z, rng.uniform(1.0, 1.7))
    )
    _scatter(
        c,
        6,
        0.35,
        1.8,
        5.0,
        (0, 0, 1),
        lambda x, z, y: things.flowers(c, x, z, rng.uniform(0.8, 1.4)),
    )
    _scatter(c, 3, 0.4, 2.0, 6.0, (0, 0, 1), lambda x, z, y: things.bush(c, x, z, 1.1))
    for _ in range(3):
        spot = c.find(1.0, 0.2, c.ring(3.0, 7.0))
        if spot is not None and c.room_for(1):
            things.hedge(c, *spot, 2.0, rng.uniform(0.6, 1.2))
    _scatter(c, 2, 0.5, 2.0, 4.5, (4,), things_bench(c))
    things.hills(c, "green", int(rng.integers(1, 3)))
    return ground, ("plain", "green"), sky, 1.0


def winter(c: Builder):
    """Pines, cabins with lit windows and a snowman on snow."""
    rng = c.rng
    ground = _ground(c, "white", "blue", noise=0.07, wrap=0.25)
    ground = ground._replace(color_b=np.array((0.78, 0.84, 0.92)))
    sky = str(rng.choice(("dusk", "gray", "pink", "clear", "golden")))
    lit = 1.0 if sky in ("dusk", "gray", "pink") else 0.0
    if rng.random() < 0.6:
        _path(c, "gray", "stone", 0.6)
    for index in range(4):
        width, depth = rng.uniform(1.3, 1.9), rng.uniform(1.2, 1.6)
        near = (2.8, 4.6) if index < 2 else (4.5, 9.0)
        spot = c.find(width / 2 + 0.1, depth / 2 + 0.12, c.ring(*near))
        if spot is not None and c.room_for(6):
            things.house(c, *spot, width, depth, "cabin", lit)
            if lit and index < 2:
                x, z, yaw = spot
                at = things.offset(x, z, yaw, 0.0, -depth / 2 - 0.35)
                c.lamp(at[0], 0.6, at[1], things.WARM, 0.8, 1.6)
    if rng.random() < 0.5:
        half = rng.uniform((1.2, 0.9), (2.2, 1.5))
        spot = c.find(half[0], half[1], c.ring(3.2, 5.0), gap=0.3)
        if spot is not None:
            c.thing("pond", "blue")
            ice = Material("plain", np.array((0.52, 0.66, 0.76)), np.array((0.45, 0.6, 0.72)))
            c.patch(
                *spot[:2], half[0], half[1], spot[2], ice._replace(mirror=0.55, gloss=0.5), True
            )
            c.background()
    spot = c.find(0.45, 0.45, c.ring(2.1, 3.4))
    if spot is not None and rng.random() < 0.75:
        things.snowman(c, *spot)
    _scatter(c, 2, 0.18, 1.9, 4.0, (2, 1), lambda x, z, y: things.lantern(c, x, z, lit > 0))
    _scatter(
        c,
        7,
        0.6,
        2.4,
        9.0,
        (0, 4),
        lambda x, z, y: things.pine(c, x, z, rng.uniform(0.9, 1.6), True),
    )
    _scatter(
        c,
        5,
        0.4,
        2.0,
        7.0,
        (0, 0, 1),
        lambda x, z, y: things.rock(c, x, z, rng.uniform(0.6, 1.2), "gray"),
    )
    _scatter(c, 1, 0.3, 1.9, 4.0, (1,), lambda x, z, y: things.crate(c, x, z, y, 0.45))
    spot = c.find(0.9, 0.1, c.ring(2.2, 5.0))
    if spot is not None and c.room_for(6):
        things.fence(c, *spot, 1.7)
    things.hills(c, "white", 3)
    return ground, ("plain", "white"), sky, 1.5


def shore(c: Builder):
    """A beach with a lighthouse, huts, boats and the sea."""
    rng = c.rng
    ground = _ground(c, "cream", "tan", noise=0.12, noise_scale=0.8)
    sky = str(rng.choice(("clear", "turquoise", "golden", "pink", "cloudy")))
    yaw = rng.uniform(0, 2 * np.pi)
    far = rng.uniform(2.6, 3.6)
    x, z = things.offset(0.0, 0.0, yaw, 0.0, far + 300.0)
    c.thing("sea", "teal")
    wet = c.mat("plain", "tan", noise=0.10)
    c.patch(x, z, 600.0, 300.5, yaw, wet)
    c.patch(x, z, 600.0, 300.0, yaw, _water(c, str(rng.choice(("teal", "blue", "turquoise")))))
    c.background()
    at = things.offset(0.0, 0.0, yaw, rng.uniform(-6, 6), far + rng.uniform(3.0, 6.0))
    if rng.random() < 0.7:
        c.thing("rock", "gray")
        rough = c.mat("plain", "gray", noise=0.3, noise_scale=1.4)
        c.ball(at[0], -0.1, at[1], (1.7, 0.55, 1.4), rough, rng.uniform(0, np.pi))
        things.tower(c, *at, rng.uniform(0.45, 0.6), rng.uniform(2.6, 3.6), "lighthouse")
    for _ in range(3):
        at = things.offset(0.0, 0.0, yaw, rng.uniform(-7, 7), far + rng.uniform(1.0, 7.0))
        if c.room_for(1, 1, 1):
            things.boat(c, *at, rng.uniform(0, np.pi), rng.uniform(0.7, 1.1))
    c.reserve(*things.offset(0.0, 0.0, yaw, 0.0, far + 20.0), 60.0, 20.0, yaw)
    for _ in range(5):
        spot = c.find(0.7, 0.7, c.ring(2.8, 7.0))
        if spot is not None and c.room_for(3):
            things.house(c, *spot, 1.15, 1.1, "hut")
    _scatter(c, 3, 0.6, 2.3, 5.0, (0, 2), lambda x, z, y: things.umbrella(c, x, z))
    _scatter(
        c, 5, 0.5, 2.5, 8.0, (0, 1, 4), lambda x, z, y: things.palm(c, x, z, rng.uniform(1.0, 1.5))
    )
    _scatter(
        c,
        5,
        0.4,
        2.0,
        7.0,
        (0, 0, 1),
        lambda x, z, y: things.rock(c, x, z, rng.uniform(0.6, 1.4), "gray"),
    )
    _scatter(c, 2, 0.3, 1.9, 4.0, (1,), lambda x, z, y: things.crate(c, x, z, y, 0.45))
    _scatter(c, 2, 0.25, 1.9, 4.0, (0, 1), lambda x, z, y: things.barrel(c, x, z))
    _scatter(c, 2, 0.3, 2.0, 5.0, (0, 0, 1), lambda x, z, y: things.bush(c, x, z, 1.0))
    things.hills(c, "green", 2)
    return ground, ("plain", "cream"), sky, 0.6


def shrine(c: Builder):
    """Red gates over a path, blossoming trees, stone lanterns and a pagoda."""
    rng = c.rng
    ground = _ground(c, str(rng.choice(("green", "tan"))), noise_scale=0.8)
    name = "green" if ground.color_a[1] > ground.color_a[0] else "tan"
    sky = str(rng.choice(("pink", "clear", "golden", "cloudy")))
    yaw = _path(c, "gray", "tiled", 0.8)
    gate = str(rng.choice(("red", "red", "orange")))
    for index in range(3):
        for end in (-1.0, 1.0):
            if rng.random() < 0.8 and c.room_for(3, 2):
                at = things.offset(0.0, 0.0, yaw, 0.0, end * (2.4 + 2.2 * index))
                things.arch(c, *at, yaw, 2.3, 1.9, gate, "gate")
    c.reserve(0.0, 0.0, 1.5, 8.0, yaw)
    spot = c.find(1.3, 1.3, c.ring(4.2, 7.5))
    if spot is not None:
        things.pagoda(c, *spot, rng.uniform(0.85, 1.1), c.color(("red", "teal", "navy", "brown")))
    _pond(c)
    for _ in range(4):
        spot = c.find(0.25, 0.25, c.ring(1.95, 5.0))
        if spot is not None and c.room_for(3, 1):
            stone_lantern(c, *spot)
    _scatter(
        c,
        6,
        0.5,
        2.4,
        9.0,
        (0, 1, 3),
        lambda x, z, y: things.tree(
            c, x, z, rng.uniform(1.0, 1.6), ("pink", "pink", "red", "green", "white")
        ),
    )
    _scatter(
        c,
        5,
        0.4,
        2.0,
        6.0,
        (0, 0, 1),
        lambda x, z, y: things.rock(c, x, z, rng.uniform(0.5, 1.2), "gray"),
    )
    _scatter(c, 4, 0.4, 1.9, 6.0, (0, 0, 1), lambda x, z, y: things.bush(c, x, z, 1.0))
    _scatter(
        c,
        3,
        0.6,
        4.0,
        9.0,
        (0, 4),
        lambda x, z, y: things.pine(c, x, z, rng.uniform(0.9, 1.5), False),
    )
    things.hills(c, "green", 2)
    return ground, ("plain", name), sky, 1.4


def stone_lantern(c: Builder, x, z, yaw) -> None:
    """A lantern of stone with a warm light."""
    c.thing("lantern", "gray")
    mat = c.mat("plain", "gray", noise=0.18)
    c.block(x, 0.0, z, (0.36, 0.10, 0.36), yaw, mat)
    c.round(x, 0.10, z, 0.08, 0.45, mat)
    glow = c.mat("plain", "yellow", emission=0.8, noise=0.0)
    c.block(x, 0.55, z, (0.22, 0.18, 0.22), yaw, glow)
    c.block(x, 0.73, z, (0.44, 0.18, 0.44), yaw, mat, (0.9, 0.9))


_OUTDOOR = {
    "village": village,
    "ruins": ruins,
    "garden": garden,
    "winter": winter,
    "shore": shore,
    "shrine": shrine,
}
_INDOOR = {"room": room, "hall": hall}


def sample_scene(seed: int, place: str | None = None) -> world.Scene:
    """The scene of a seed: the kind of place, unless it is given, and all in it."""
    rng = np.random.default_rng([int(seed), 0x5CE7F])
    drawn = str(rng.choice(world.PLACES))
    place = drawn if place is None else place
    colors = HARMONIES[rng.integers(len(HARMONIES))]
    c = Builder(rng, int(seed), place, colors)
    if place in _INDOOR:
        return _INDOOR[place](c)
    ground, floor, sky, ridges = _OUTDOOR[place](c)
    faces = [_NOTHING] * 6
    faces[3] = ground
    light = sky_light(rng, sky, ground.color_a, ridges)
    return c.finish(faces, floor, floor[1], sky, light)
