"""Outdoor scenes: a toy street block with houses, towers, trees and a sky."""

from __future__ import annotations

import numpy as np

from sanawm_jax.small_world.composer import CLEAR_RADIUS, Composer
from sanawm_jax.small_world.indoor import furnish, pick
from sanawm_jax.small_world.palette import COLOR_NAMES, VIVID, Material, material
from sanawm_jax.small_world.scene import OUTDOOR

_EXTENT = 60.0
_GROUND = (
    ("marbled", ("green", "lime", "tan", "cream", "teal", "yellow")),
    ("plain", ("green", "tan", "teal", "lime")),
    ("tiled", ("gray", "tan", "cream", "pink", "teal")),
    ("brick", ("orange", "gray", "brown", "red")),
    ("checkered", ("gray", "green", "cream", "turquoise")),
)
# sky name -> zenith, horizon, cloud colour (sRGB), sun strength, sun tint, ambient
SKIES = {
    "blue": (
        (0.20, 0.45, 0.90),
        (0.72, 0.86, 0.97),
        (1.0, 1.0, 1.0),
        1.25,
        (1.0, 0.96, 0.86),
    ),
    "orange": (
        (0.36, 0.36, 0.68),
        (0.99, 0.66, 0.38),
        (1.0, 0.80, 0.66),
        1.15,
        (1.0, 0.72, 0.46),
    ),
    "pink": (
        (0.45, 0.42, 0.80),
        (0.98, 0.72, 0.76),
        (1.0, 0.88, 0.90),
        1.10,
        (1.0, 0.80, 0.74),
    ),
    "gray": (
        (0.60, 0.64, 0.70),
        (0.84, 0.86, 0.88),
        (0.93, 0.94, 0.95),
        0.65,
        (1.0, 0.99, 0.97),
    ),
    "turquoise": (
        (0.10, 0.55, 0.72),
        (0.80, 0.95, 0.92),
        (1.0, 1.0, 1.0),
        1.20,
        (1.0, 0.98, 0.90),
    ),
    "purple": (
        (0.20, 0.14, 0.44),
        (0.66, 0.42, 0.72),
        (0.80, 0.60, 0.84),
        0.85,
        (1.0, 0.82, 0.90),
    ),
}


def _house(c: Composer, x, z, yaw, half):
    rng, name = c.rng, pick(c.rng, COLOR_NAMES[:17])
    height = rng.uniform(0.9, 3.0)
    texture = "windowed" if rng.random() < 0.72 else pick(rng, ("brick", "planked", "tiled"))
    mat = material(rng, texture, name, rng.uniform(0.36, 0.5), emission=0.12)
    c.box(x, 0.0, z, (2 * half[0], height, 2 * half[1]), yaw, mat)
    if rng.random() < 0.6 and c.fits(2):  # a flat roof that sticks out
        roof = material(rng, "plain", pick(rng, VIVID), 0.3)
        c.box(x, height, z, (2 * half[0] + 0.16, 0.14, 2 * half[1] + 0.16), yaw, roof)
    c.note("house", name)


def _tower(c: Composer, x, z, radius):
    rng, name = c.rng, pick(c.rng, VIVID)
    height = rng.uniform(1.2, 2.8)
    texture = pick(rng, ("striped", "brick", "windowed", "checkered"))
    c.cylinder(x, 0.0, z, radius, height, material(rng, texture, name, 0.34))
    if c.fits(0, 4) and rng.random() < 0.7:
        dome = material(rng, "plain", pick(rng, VIVID), gloss=0.5)
        c.sphere(x, height, z, radius * 0.98, dome)
    c.note("tower", name)


def _tree(c: Composer, x, z, size):
    rng = c.rng
    name = pick(rng, ("green", "lime", "orange", "pink", "teal"), (0.45, 0.2, 0.15, 0.1, 0.1))
    trunk = rng.uniform(0.5, 0.9) * size
    c.cylinder(
        x,
        0.0,
        z,
        0.09 * size + 0.03,
        trunk * 1.3,
        material(rng, "striped", "brown", 0.1),
    )
    leaves = material(rng, "marbled", name, 0.25, grain=0.4, grain_scale=4.0)
    leaves = leaves._replace(color_b=leaves.color_a * rng.uniform(0.4, 0.65))
    c.sphere(x, trunk + 0.42 * size, z, 0.5 * size, leaves)
    if rng.random() < 0.4 and c.fits(0, 3):
        angle = rng.uniform(0, 2 * np.pi)
        dx, dz = 0.24 * size * np.cos(angle), 0.24 * size * np.sin(angle)
        c.sphere(x + dx, trunk + 0.78 * size, z + dz, 0.32 * size, leaves)
    c.note("tree", name)


def _lantern(c: Composer, x, z):
    rng, height = c.rng, c.rng.uniform(0.9, 1.4)
    c.cylinder(x, 0.0, z, 0.04, height, material(rng, "plain", "black"))
    name = pick(rng, ("yellow", "orange", "white", "pink"))
    c.sphere(x, height + 0.08, z, 0.15, material(rng, "plain", name, emission=0.8))
    c.note("lantern", name)


def _fence(c: Composer, x, z, yaw, half):
    rng, name = c.rng, pick(c.rng, COLOR_NAMES)
    mat = material(rng, pick(rng, ("striped", "brick", "planked")), name, 0.22)
    c.box(x, 0.0, z, (2 * half[0], rng.uniform(0.35, 0.6), 2 * half[1]), yaw, mat)
    c.note("fence", name)


def _ring(c: Composer, radius: float, low: float, high: float, yaw: float, turn: bool = False):
    """A draw for `Composer.place`: a spot `low..high` beyond the clear disc."""
    rng = c.rng

    def draw():
        reach = CLEAR_RADIUS + radius + rng.uniform(low, high)
        angle = rng.uniform(0, 2 * np.pi)
        x, z = c.clear[:2] + reach * np.array((np.cos(angle), np.sin(angle)))
        return x, z, yaw + (rng.integers(2) * np.pi / 2 if turn else 0.0)

    return draw


def _streets(c: Composer, yaw: float) -> None:
    """One or two crossing street slabs; they are flat and may pass under the camera."""
    rng, name = c.rng, pick(c.rng, ("gray", "black", "tan", "brown", "navy"))
    texture = pick(rng, ("brick", "tiled", "plain", "checkered"))
    mat = material(rng, texture, name, 0.45)
    offset = rng.uniform(-0.6, 0.6, 2)
    for turn in range(rng.integers(1, 3)):
        angle = yaw + turn * np.pi / 2
        size = (rng.uniform(1.0, 1.5), 0.02 + 0.01 * turn, 24.0)
        c.box(
            c.clear[0] + offset[0],
            0.0,
            c.clear[1] + offset[1],
            size,
            angle,
            mat,
            casts=False,
        )
    c.note("street", name)


def _hills(c: Composer) -> None:
    """Big far spheres, mostly below the ground, that close the horizon."""
    rng, name = c.rng, pick(c.rng, ("green", "teal", "purple", "tan", "blue"))
    mat = material(rng, "marbled", name, 1.5, grain=0.3, grain_scale=0.5)
    angle = rng.uniform(0, 2 * np.pi)
    for turn in range(2):
        at = angle + turn * rng.uniform(1.2, 2.8)
        radius = rng.uniform(7.0, 11.0)
        x, z = rng.uniform(17.0, 22.0) * np.array((np.cos(at), np.sin(at)))
        c.sphere(x, rng.uniform(1.5, 3.5) - radius, z, radius, mat)
    c.note("hill", name)


def _populate(c: Composer, yaw: float) -> None:
    """Houses first, then the smaller things between them."""
    rng = c.rng
    if rng.random() < 0.7:
        _hills(c)
    for index in range(rng.integers(6, 9)):
        half = rng.uniform(0.4, 1.0, 2)
        footprint = half + 0.09  # with the roof
        near = (0.0, 1.4) if index < 4 else (1.2, 4.5)
        spot = c.place(footprint[0], footprint[1], _ring(c, half.max(), *near, yaw, turn=True))
        if spot and c.fits(1):
            x, z, turn = spot
            _house(c, x, z, turn, half)
    for _ in range(rng.integers(0, 3)):
        radius = rng.uniform(0.25, 0.5)
        spot = c.place(radius, radius, _ring(c, radius, 0.0, 2.5, yaw))
        if spot and c.fits(0, 1, 1):
            x, z, _ = spot
            _tower(c, x, z, radius)
    for _ in range(rng.integers(2, 6)):
        size = rng.uniform(0.7, 1.3)
        spot = c.place(0.3 * size, 0.3 * size, _ring(c, 0.55 * size, 0.0, 2.5, yaw))
        if spot and c.fits(0, 1, 1):
            _tree(c, *spot[:2], size)
    for kind in rng.choice(("ball", "crate", "stool", "crate", "ball"), rng.integers(1, 4)):
        furnish(c, str(kind))
    if rng.random() < 0.6:
        spot = c.place(0.2, 0.2, _ring(c, 0.2, 0.0, 1.0, yaw))
        if spot and c.fits(0, 1, 1):
            _lantern(c, *spot[:2])
    if rng.random() < 0.5:
        half = (rng.uniform(0.5, 1.1), 0.06)
        spot = c.place(*half, _ring(c, 0.5, 0.0, 1.5, yaw, turn=True))
        if spot and c.fits(1):
            _fence(c, *spot, half)


def compose(rng: np.random.Generator, seed: int):
    """Draw an outdoor scene."""
    low, high = (-_EXTENT, -_EXTENT, -_EXTENT), (_EXTENT, 0.0, _EXTENT)
    c = Composer(rng, seed, OUTDOOR, low, high, rng.uniform(-1.0, 1.0, 2))
    yaw = rng.uniform(0, np.pi / 2)
    texture, names = _GROUND[rng.integers(len(_GROUND))]
    ground = (texture, pick(rng, names))
    sky = pick(rng, tuple(SKIES), (0.38, 0.16, 0.14, 0.1, 0.14, 0.08))
    if rng.random() < 0.75:
        _streets(c, yaw)
    _populate(c, yaw)
    floor = material(rng, *ground, rng.uniform(0.45, 0.8))
    faces = [Material("plain", np.full(3, 0.5), np.full(3, 0.5), 1.0)] * 6
    faces[3] = floor
    plain = ("plain", sky)
    return c.finish(faces, [plain, ground, plain], _sun_light(rng, sky))


def _sun_light(rng: np.random.Generator, sky: str) -> dict:
    """The sun as a far point light, with the sky's colours around it."""
    zenith, horizon, cloud, strength, tint = (np.array(v) for v in SKIES[sky])
    low = sky in ("orange", "pink", "purple")
    height = np.deg2rad(rng.uniform(18, 32) if low else rng.uniform(32, 60))
    angle = rng.uniform(0, 2 * np.pi)
    sun = np.array(
        (
            np.cos(height) * np.cos(angle),
            -np.sin(height),
            np.cos(height) * np.sin(angle),
        )
    )
    jitter = rng.uniform(0.92, 1.08, 3)
    skies = np.clip(np.stack((zenith * jitter, horizon, cloud)), 0, 1) ** 2.0
    ambient = 0.30 + 0.35 * skies[:2].mean(0)
    return {
        "light_position": sun * 1000.0,
        "light_color": tint**1.5 * strength,
        "light_falloff": 0.0,
        "ambient": ambient * (1.35 if sky == "gray" else 1.0),
        "sky": skies,
        "clouds": (rng.uniform(0.3, 0.95), rng.uniform(1.2, 2.4)),
        "haze": rng.uniform(0.015, 0.045),
    }


__all__ = ["SKIES", "compose"]
