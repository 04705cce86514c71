"""Things that stand in small-world scenes. Each maker adds bodies and one caption object.

Makers take the builder, a place (x, z, yaw) and sizes in world units; a thing's front looks along
its local -z axis, which `Builder.ring` turns to the middle of the scene.
"""

from __future__ import annotations

import numpy as np

from sanawm_jax.small_world.scenery.builder import Builder
from sanawm_jax.small_world.scenery.palette import COLORS, leaves

WARM = (1.0, 0.80, 0.48)


def offset(x, z, yaw, along, across) -> tuple[float, float]:
    """A ground point moved by local x `along` and local z `across`."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return x + cos * along + sin * across, z - sin * along + cos * across


def house(c: Builder, x, z, yaw, width, depth, kind: str = "house", lit: float = 0.0) -> None:
    """Walls with windows, a door, a gabled roof and a chimney."""
    rng = c.rng
    wall, roof = c.color(), c.color(("red", "brown", "orange", "navy", "teal", "gray"))
    height = rng.uniform(0.85, 1.25) if kind != "house" else rng.uniform(1.1, 2.2)
    c.thing(kind, wall)
    if kind == "cabin":
        mat = c.mat("stone", wall, 0.45)
    elif kind == "hut":
        mat = c.mat("striped", wall, 0.45)
    else:
        pane = np.array((1.0, 0.82, 0.48)) if lit else np.array((0.32, 0.40, 0.48))
        mat = c.mat("windowed", wall, 0.62, pane=pane, emission=1.3 * lit, noise=0.08)
    c.block(x, 0.0, z, (width, height, depth), yaw, mat)
    peak = rng.uniform(0.45, 0.75) * depth
    shingles = c.mat("shingled", roof, 0.42, noise=0.10)
    c.block(x, height - 0.02, z, (width + 0.16, peak, depth + 0.24), yaw, shingles, (0.0, 1.0))
    front = -(depth / 2 + 0.012)
    at = offset(x, z, yaw, rng.uniform(-0.2, 0.2) * width, front)
    c.block(*_up(at, 0.0), (0.30, 0.62, 0.05), yaw, c.mat("planked", c.color(), 0.3))
    if kind == "cabin":
        glow = c.mat("plain", "yellow", emission=1.2 * lit, noise=0.05)
        for side in (-0.3, 0.3):
            at = offset(x, z, yaw, side * width, front)
            c.block(*_up(at, 0.45 * height), (0.22, 0.24, 0.04), yaw, glow)
    if rng.random() < 0.6 and kind != "hut":
        at = offset(x, z, yaw, 0.28 * width, 0.12 * depth)
        brick = c.mat("brick", c.color(("red", "brown", "gray")), 0.2)
        c.block(*_up(at, height + 0.25 * peak), (0.16, 0.72 * peak + 0.1, 0.16), yaw, brick)


def _up(at, bottom) -> tuple[float, float, float]:
    """(x, z) and a height -> the arguments x, bottom, z."""
    return at[0], bottom, at[1]


def church(c: Builder, x, z, yaw, scale) -> None:
    """A landmark: a nave with a pointed tower."""
    wall, roof = c.color(("white", "cream", "tan", "gray")), c.color(("red", "teal", "navy"))
    c.thing("church", wall)
    pane = np.array((0.25, 0.33, 0.45))
    mat = c.mat("windowed", wall, 0.7 * scale, pane=pane, noise=0.08)
    tiles = c.mat("shingled", roof, 0.4, noise=0.10)
    c.block(x, 0.0, z, (1.5 * scale, 1.2 * scale, 2.2 * scale), yaw, mat)
    size = (1.7 * scale, 0.9 * scale, 2.35 * scale)
    c.block(x, 1.2 * scale, z, size, yaw, tiles, (1.0, 0.0))
    at = offset(x, z, yaw, 0.0, -1.2 * scale)
    c.block(*_up(at, 0.0), (0.85 * scale, 2.8 * scale, 0.85 * scale), yaw, mat)
    size = (1.0 * scale, 1.5 * scale, 1.0 * scale)
    c.block(*_up(at, 2.8 * scale), size, yaw, tiles, (1.0, 1.0))
    c.ball(at[0], 4.35 * scale, at[1], 0.09 * scale, c.mat("plain", "yellow", gloss=0.8))


def tower(c: Builder, x, z, radius, height, kind: str = "tower") -> None:
    """A round tower with a cone on top; a lighthouse has bands and a lamp."""
    rng, name = c.rng, c.color()
    if kind == "lighthouse":
        name = c.color(("red", "blue", "teal", "navy"))
        c.thing(kind, name)
        bands = 5
        white, band = c.mat("plain", "white", noise=0.06), c.mat("plain", name, noise=0.06)
        for index in range(bands):
            part = height / bands
            wide = radius * (1.0 - 0.09 * index)
            shrink = 0.09 / (1.0 - 0.09 * index)
            c.round(x, part * index, z, wide, part, (band, white)[index % 2], shrink)
        c.round(x, height, z, 0.68 * radius, 0.08, c.mat("plain", "gray"))
        glow = c.mat("plain", "yellow", emission=1.0, noise=0.0)
        c.round(x, height + 0.08, z, 0.36 * radius, 0.34 * radius + 0.1, glow)
        c.round(x, height + 0.18 + 0.34 * radius, z, 0.5 * radius, 0.5 * radius, band, 1.0)
        return
    c.thing(kind, name)
    c.round(x, 0.0, z, radius, height, c.mat("stone", name, 0.34), 0.12)
    c.round(x, height, z, 1.0 * radius, 0.14, c.mat("plain", name))
    roof = c.mat("shingled", c.color(("red", "navy", "teal", "brown")), 0.34, noise=0.1)
    c.round(x, height + 0.14, z, 1.15 * radius, rng.uniform(1.4, 2.2) * radius, roof, 1.0)


def tree(c: Builder, x, z, size, names=("green", "green", "green", "orange", "yellow")) -> None:
    """A trunk and two or three crowns."""
    rng, name = c.rng, c.color(names)
    c.thing("tree", name)
    trunk = rng.uniform(0.6, 0.9) * size
    c.round(x, 0.0, z, 0.09 * size + 0.02, trunk * 1.25, c.mat("plain", "brown"), 0.45)
    mat = leaves(rng, name)
    c.ball(x, trunk + 0.42 * size, z, (0.52 * size, 0.46 * size, 0.52 * size), mat)
    for _ in range(rng.integers(1, 3)):
        angle, wide = rng.uniform(0, 2 * np.pi), rng.uniform(0.28, 0.38) * size
        dx, dz = 0.30 * size * np.cos(angle), 0.30 * size * np.sin(angle)
        height = trunk + rng.uniform(0.45, 0.80) * size
        c.ball(x + dx, height, z + dz, (wide, 0.85 * wide, wide), mat)


def pine(c: Builder, x, z, size, snowy: bool) -> None:
    """Two or three stacked cones."""
    rng, name = c.rng, c.color(("green", "teal"))
    c.thing("pine", name)
    c.round(x, 0.0, z, 0.08 * size, 0.4 * size, c.mat("plain", "brown"))
    mat = leaves(rng, name, noise=0.24, noise_scale=2.5)
    if snowy:
        mat = mat._replace(color_a=0.55 * mat.color_a + 0.40, color_b=mat.color_b * 0.9)
    for level, (wide, low) in enumerate(((0.50, 0.30), (0.40, 0.75), (0.28, 1.15))):
        c.round(x, low * size, z, wide * size, (0.80 - 0.05 * level) * size, mat, 1.0)


def palm(c: Builder, x, z, size) -> None:
    """A leaning row of trunk pieces is too fine: a thin trunk under flat leaves."""
    rng = c.rng
    c.thing("palm", "green")
    height = 1.7 * size
    c.round(x, 0.0, z, 0.09 * size, height, c.mat("striped", "brown", 0.16), 0.4)
    mat = leaves(rng, "green", noise=0.25)
    turn = rng.uniform(0, np.pi)
    for index in range(3):
        yaw = turn + index * np.pi / 3
        c.ball(x, height + 0.04 * index, z, (0.85 * size, 0.10 * size, 0.20 * size), mat, yaw)
    c.ball(x, height, z, 0.17 * size, c.mat("plain", "brown"))


def bush(c: Builder, x, z, size, names=("green", "green", "teal")) -> None:
    """A low round shrub."""
    name = c.color(names)
    c.thing("bush", name)
    c.ball(x, 0.28 * size, z, (0.5 * size, 0.42 * size, 0.5 * size), leaves(c.rng, name))


def flowers(c: Builder, x, z, size) -> None:
    """A bed of low blossoms."""
    name = c.color(("red", "pink", "yellow", "purple", "white"))
    c.thing("flower", name)
    mat = leaves(c.rng, name, noise=0.30, noise_scale=6.0)
    mat = mat._replace(color_b=np.array(COLORS["green"]) * 0.8)
    c.ball(x, 0.05, z, (0.5 * size, 0.16 * size, 0.35 * size), mat, c.rng.uniform(0, np.pi))


def rock(c: Builder, x, z, size, name: str) -> None:
    """A boulder, half in the ground."""
    rng = c.rng
    c.thing("rock", name)
    mat = c.mat("plain", name, noise=0.30, noise_scale=1.8)
    radii = size * rng.uniform((0.35, 0.22, 0.3), (0.6, 0.45, 0.5))
    c.ball(x, 0.25 * radii[1], z, radii, mat, rng.uniform(0, np.pi))


def hills(c: Builder, name: str, count: int = 3, near: float = 15.0) -> None:
    """Far mounds, mostly below the ground, that close the horizon."""
    rng = c.rng
    for _ in range(count):
        c.thing("hill", name)
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(near, near + 8.0)
        radii = rng.uniform((5.0, 1.2, 4.0), (8.0, 2.6, 6.0))
        mat = c.mat("plain", name, noise=0.26, noise_scale=0.5)
        at = reach * np.cos(angle), reach * np.sin(angle)
        c.ball(at[0], -0.1, at[1], radii, mat, rng.uniform(0, np.pi))
    c.background()


def lantern(c: Builder, x, z, is_lit: bool) -> None:
    """A lamp post."""
    height = c.rng.uniform(1.0, 1.3)
    c.thing("lantern", "yellow" if is_lit else "black")
    iron = c.mat("plain", "black", noise=0.05)
    c.round(x, 0.0, z, 0.035, height, iron, 0.3)
    glass = c.mat("plain", "yellow", emission=2.2 if is_lit else 0.3, noise=0.0)
    c.block(x, height, z, (0.16, 0.20, 0.16), 0.0, glass, (-0.25, -0.25))
    c.block(x, height + 0.20, z, (0.26, 0.12, 0.26), 0.0, iron, (1.0, 1.0))
    if is_lit:
        c.lamp(x, height + 0.1, z, WARM, 1.5)


def bench(c: Builder, x, z, yaw) -> None:
    """A seat with a back."""
    name = c.color(("brown", "teal", "red"))
    c.thing("bench", name)
    mat = c.mat("planked", name, 0.3)
    c.block(x, 0.24, z, (0.95, 0.07, 0.34), yaw, mat)
    at = offset(x, z, yaw, 0.0, 0.16)
    c.block(*_up(at, 0.30), (0.95, 0.28, 0.05), yaw, mat)
    for side in (-0.4, 0.4):
        c.block(*_up(offset(x, z, yaw, side, 0.0), 0.0), (0.07, 0.24, 0.30), yaw, mat)


def well(c: Builder, x, z, yaw) -> None:
    """A stone ring under a small roof."""
    name = c.color(("gray", "tan"))
    c.thing("well", name)
    c.round(x, 0.0, z, 0.42, 0.5, c.mat("stone", name, 0.26))
    wood = c.mat("plain", "brown")
    for side in (-0.38, 0.38):
        c.block(*_up(offset(x, z, yaw, side, 0.0), 0.4), (0.08, 0.75, 0.08), yaw, wood)
    roof = c.mat("shingled", c.color(("red", "brown")), 0.28)
    c.block(x, 1.1, z, (1.05, 0.42, 0.85), yaw, roof, (0.0, 1.0))


def fence(c: Builder, x, z, yaw, length) -> None:
    """Two rails on posts."""
    name = c.color(("white", "brown", "cream"))
    c.thing("fence", name)
    mat = c.mat("plain", name, noise=0.08)
    for height in (0.18, 0.38):
        c.block(x, height, z, (length, 0.07, 0.04), yaw, mat)
    for part in np.linspace(-0.5, 0.5, 4):
        at = offset(x, z, yaw, part * length, 0.0)
        c.block(*_up(at, 0.0), (0.07, 0.54, 0.07), yaw, mat)


def hedge(c: Builder, x, z, yaw, length, height) -> None:
    """A cut green wall."""
    c.thing("hedge", "green")
    c.block(x, 0.0, z, (length, height, 0.34), yaw, leaves(c.rng, "green", noise=0.26), (0.04, 0.2))


def column(c: Builder, x, z, height, name, broken: bool = False) -> None:
    """A column with base and capital; a broken one has neither top."""
    c.thing("column", name)
    mat = c.mat("plain", name, noise=0.16)
    c.block(x, 0.0, z, (0.56, 0.14, 0.56), 0.0, mat)
    c.round(x, 0.14, z, 0.20, height, mat, 0.0 if broken else 0.15)
    if not broken:
        c.block(x, 0.14 + height, z, (0.54, 0.16, 0.54), 0.0, mat, (-0.25, -0.25))


def obelisk(c: Builder, x, z, height, name) -> None:
    """A tall narrow stone with a golden tip, a landmark."""
    c.thing("obelisk", name)
    c.block(x, 0.0, z, (0.9, 0.3, 0.9), 0.3, c.mat("stone", name, 0.45))
    c.block(x, 0.3, z, (0.5, height, 0.5), 0.3, c.mat("plain", name, noise=0.2), (0.45, 0.45))
    tip = c.mat("plain", "yellow", gloss=0.9, noise=0.05)
    c.block(x, 0.3 + height, z, (0.28, 0.30, 0.28), 0.3, tip, (1.0, 1.0))


def pyramid(c: Builder, x, z, yaw, size, name) -> None:
    """Steps, or a smooth pyramid: a landmark."""
    c.thing("pyramid", name)
    if c.rng.random() < 0.5:
        c.block(x, 0.0, z, (size, 0.62 * size, size), yaw, c.mat("stone", name, 0.5), (1.0, 1.0))
        return
    mat = c.mat("stone", name, 0.45)
    for level in range(4):
        wide = size * (1.0 - 0.21 * level)
        c.block(x, 0.16 * size * level, z, (wide, 0.16 * size, wide), yaw, mat, (0.08, 0.08))
    c.block(x, 0.64 * size, z, (0.26 * size, 0.2 * size, 0.26 * size), yaw, mat)


def arch(c: Builder, x, z, yaw, width, height, name, kind: str = "arch") -> None:
    """Two posts under a beam; a gate is red, with two beams that stick out."""
    c.thing(kind, name)
    mat = c.mat("plain" if kind == "gate" else "stone", name, 0.4, noise=0.10)
    thick = 0.13 if kind == "gate" else 0.40
    for side in (-1.0, 1.0):
        at = offset(x, z, yaw, side * (width / 2), 0.0)
        if kind == "gate":
            c.round(*_up(at, 0.0), thick, height, mat, 0.15)
        else:
            c.block(*_up(at, 0.0), (thick, height, thick), yaw, mat)
    if kind == "gate":
        cap = c.mat("plain", "black", noise=0.05)
        c.block(x, height, z, (width + 0.9, 0.16, 0.22), yaw, mat, (-0.06, 0.0))
        c.block(x, height + 0.16, z, (width + 1.1, 0.09, 0.30), yaw, cap, (-0.05, 0.2))
        c.block(x, 0.76 * height, z, (width + 0.45, 0.12, 0.14), yaw, mat)
    else:
        c.block(x, height, z, (width + 2.2 * thick, 0.42, 1.1 * thick), yaw, mat)


def statue(c: Builder, x, z, yaw, name) -> None:
    """A figure of three bodies on a plinth."""
    c.thing("statue", name)
    stone = c.mat("plain", c.color(("gray", "white", "tan")), noise=0.12)
    c.block(x, 0.0, z, (0.55, 0.5, 0.55), yaw, stone, (0.1, 0.1))
    mat = c.mat("plain", name, noise=0.08, gloss=0.25)
    c.round(x, 0.5, z, 0.19, 0.55, mat, 0.45)
    c.ball(x, 1.02, z, (0.17, 0.20, 0.13), mat, yaw)
    c.ball(x, 1.28, z, 0.11, mat)


def pagoda(c: Builder, x, z, yaw, scale, name) -> None:
    """Storeys under wide roofs, a landmark."""
    c.thing("pagoda", name)
    wall, roof = c.mat("windowed", "cream", 0.5, noise=0.06), c.mat("shingled", name, 0.36)
    bottom = 0.0
    for level in range(3):
        wide = scale * (1.5 - 0.32 * level)
        c.block(x, bottom, z, (wide, 0.8 * scale, wide), yaw, wall)
        bottom += 0.8 * scale
        size = (wide + 0.8 * scale, 0.34 * scale, wide + 0.8 * scale)
        c.block(x, bottom, z, size, yaw, roof, (0.55, 0.55))
        bottom += 0.30 * scale
    c.block(x, bottom, z, (0.5 * scale, 0.45 * scale, 0.5 * scale), yaw, roof, (1.0, 1.0))
    c.round(x, bottom + 0.4 * scale, z, 0.04, 0.6 * scale, c.mat("plain", "yellow", gloss=0.7))


def pavilion(c: Builder, x, z, yaw, size) -> None:
    """A roof on four columns over a step."""
    name = c.color()
    c.thing("pavilion", name)
    white = c.mat("plain", c.color(("white", "cream")), noise=0.08)
    c.block(x, 0.0, z, (size, 0.14, size), yaw, c.mat("stone", "gray", 0.5))
    for dx in (-0.38, 0.38):
        for dz in (-0.38, 0.38):
            at = offset(x, z, yaw, dx * size, dz * size)
            c.round(*_up(at, 0.14), 0.07, 1.25, white)
    roof = c.mat("shingled", name, 0.34)
    c.block(x, 1.39, z, (1.12 * size, 0.12, 1.12 * size), yaw, white)
    c.block(x, 1.51, z, (1.2 * size, 0.62 * size, 1.2 * size), yaw, roof, (1.0, 1.0))


def snowman(c: Builder, x, z, yaw) -> None:
    """Three balls, a hat and a nose."""
    c.thing("snowman", "white")
    snow = c.mat("plain", "white", noise=0.05, wrap=0.3)
    for height, radius in ((0.30, 0.36), (0.80, 0.26), (1.18, 0.18)):
        c.ball(x, height, z, radius, snow)
    hat = c.mat("plain", c.color(("black", "red", "navy")), noise=0.03)
    c.round(x, 1.32, z, 0.20, 0.04, hat)
    c.round(x, 1.36, z, 0.13, 0.17, hat)
    at = offset(x, z, yaw, 0.0, -0.18)
    c.ball(at[0], 1.17, at[1], (0.035, 0.035, 0.14), c.mat("plain", "orange"), yaw)


def boat(c: Builder, x, z, yaw, size) -> None:
    """A hull with a mast and a sail."""
    name = c.color()
    c.thing("boat", name)
    hull = c.mat("planked", name, 0.24)
    c.ball(x, 0.20, z, (0.9 * size, 0.34 * size, 0.34 * size), hull, yaw)
    c.round(x, 0.3, z, 0.035, 1.5 * size, c.mat("plain", "brown"))
    sail = c.mat("plain", c.color(("white", "cream", "red")), noise=0.06, wrap=0.5)
    at = offset(x, z, yaw, 0.28 * size, 0.0)
    c.block(*_up(at, 0.5), (0.55 * size, 1.2 * size, 0.04), yaw, sail, (0.9, 0.0))


def umbrella(c: Builder, x, z) -> None:
    """A beach umbrella."""
    name = c.color()
    c.thing("umbrella", name)
    c.round(x, 0.0, z, 0.025, 1.05, c.mat("plain", "white", noise=0.0))
    c.round(x, 0.98, z, 0.75, 0.32, c.mat("striped", name, 0.9, wrap=0.3), 0.97)


def crate(c: Builder, x, z, yaw, size) -> None:
    """A wooden box."""
    name = c.color(("brown", "tan", *c.colors))
    c.thing("crate", name)
    c.block(x, 0.0, z, (size, size, size), yaw, c.mat("planked", name, 0.5 * size))


def barrel(c: Builder, x, z) -> None:
    """A barrel."""
    name = c.color(("brown", *c.colors))
    c.thing("barrel", name)
    c.round(x, 0.0, z, 0.22, 0.55, c.mat("striped", name, 0.18))


def cactus(c: Builder, x, z, size) -> None:
    """A ribbed stem with arms."""
    c.thing("cactus", "green")
    mat = c.mat("striped", "green", 0.16, noise=0.12)
    c.round(x, 0.0, z, 0.15 * size, 1.3 * size, mat)
    c.ball(x, 1.3 * size, z, 0.15 * size, mat)
    for side, low in ((-1.0, 0.55), (1.0, 0.75)):
        at = x + side * 0.30 * size
        c.round(at, low * size, z, 0.09 * size, 0.4 * size, mat)
        c.ball(at, (low + 0.4) * size, z, 0.09 * size, mat)
        size_x = (0.34 * size, 0.13 * size, 0.13 * size)
        c.block(x + side * 0.16 * size, low * size, z, size_x, 0.0, mat)
