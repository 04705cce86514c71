"""Collects the bodies, lights and caption facts of one scene and packs them into arrays."""

from __future__ import annotations

import numpy as np

from sanawm_jax.small_world.scenery import scene as world
from sanawm_jax.small_world.scenery.palette import (
    COLOR_NAMES,
    TEXTURE_NAMES,
    Material,
    material,
    paint_row,
)
from sanawm_jax.small_world.scenery.words import KINDS, SKY_NAMES

CLEAR_RADIUS = 1.6  # a walk of 48 frames in any direction, 1.2 units, plus the camera's clearance
_BURIED = (0.0, 100.0, 0.0)
_OPEN = 900.0


def rect_distance(points: np.ndarray, rect: tuple) -> np.ndarray:
    """Distance from ground points (..., 2) to a rectangle (x, z, half_x, half_z, yaw)."""
    x, z, half_x, half_z, yaw = rect
    dx, dz = points[..., 0] - x, points[..., 1] - z
    along = np.cos(yaw) * dx - np.sin(yaw) * dz
    across = np.sin(yaw) * dx + np.cos(yaw) * dz
    gap = np.stack((np.abs(along) - half_x, np.abs(across) - half_z), -1)
    return np.linalg.norm(np.maximum(gap, 0.0), axis=-1) + np.minimum(gap.max(-1), 0.0)


def rect_points(rect: tuple, steps: int = 5) -> np.ndarray:
    """Points of a ground rectangle, (steps * steps, 2)."""
    x, z, half_x, half_z, yaw = rect
    grid = np.linspace(-1.0, 1.0, steps)
    a, b = (g.ravel() for g in np.meshgrid(grid * half_x, grid * half_z))
    return np.stack(
        (x + np.cos(yaw) * a + np.sin(yaw) * b, z - np.sin(yaw) * a + np.cos(yaw) * b), -1
    )


class Builder:
    """What the makers of `things` and `places` write into.

    Heights are given upwards from the ground (positive up), unlike the scene's y axis. The scene's
    clear disc is around the origin.
    """

    def __init__(self, rng: np.random.Generator, seed: int, place: str, colors: tuple[str, ...]):
        self.rng, self.seed, self.place, self.colors = rng, seed, place, colors
        self.room_min = np.array((-_OPEN, -_OPEN, -_OPEN))
        self.room_max = np.array((_OPEN, 0.0, _OPEN))
        self.bodies: tuple[list, list, list] = ([], [], [])
        self.patches: list = []
        self.windows: list = []
        self.lamps: list = []
        self.rects: list = []
        self.objects: list = []
        self.current = -1

    def color(self, among: tuple[str, ...] | None = None) -> str:
        """One of the scene's accent colours, or of the given names."""
        return str(self.rng.choice(among or self.colors))

    def mat(self, texture: str, name: str, cell: float = 0.5, **more) -> Material:
        """Draws a material."""
        return material(self.rng, texture, name, cell, **more)

    def room_for(self, blocks: int = 0, rounds: int = 0, balls: int = 0) -> bool:
        """Whether that many more bodies have slots."""
        limits = (world.NUM_BLOCKS, world.NUM_ROUNDS, world.NUM_BALLS)
        return all(
            len(have) + more <= limit
            for have, more, limit in zip(self.bodies, (blocks, rounds, balls), limits, strict=True)
        )

    def thing(self, kind: str, color: str) -> None:
        """Begins an object of the caption: the bodies that follow belong to it."""
        self.current = -1
        if len(self.objects) < world.NUM_OBJECTS:
            self.current = len(self.objects)
            self.objects.append((KINDS.index(kind), COLOR_NAMES.index(color)))

    def background(self) -> None:
        """The bodies that follow belong to no object."""
        self.current = -1

    def _add(self, kind: int, center, half, yaw, taper, mat) -> None:
        limit = (world.NUM_BLOCKS, world.NUM_ROUNDS, world.NUM_BALLS)[kind]
        if len(self.bodies[kind]) < limit:
            self.bodies[kind].append((center, half, yaw, taper, mat, self.current))

    def block(self, x, bottom, z, size, yaw, mat: Material, taper=(0.0, 0.0)) -> None:
        """A box of size (width, height, depth) that stands at height `bottom`."""
        half = np.array(size, float) / 2
        self._add(0, (x, -bottom - half[1], z), half, yaw, taper, mat)

    def round(self, x, bottom, z, radius, height, mat: Material, taper: float = 0.0) -> None:
        """An upright cylinder, or a cone that loses `taper` of its radius."""
        half = (radius, height / 2, radius)
        self._add(1, (x, -bottom - height / 2, z), half, 0.0, (taper, taper), mat)

    def ball(self, x, height, z, radii, mat: Material, yaw: float = 0.0) -> None:
        """An ellipsoid with its centre at `height`; radii: one number or (x, up, z)."""
        half = np.broadcast_to(np.array(radii, float), (3,))
        self._add(2, (x, -height, z), half, yaw, (0.0, 0.0), mat)

    def patch(self, x, z, half_x, half_z, yaw, mat: Material, is_round: bool = False) -> None:
        """A flat area on the ground; later ones lie on top."""
        if len(self.patches) < world.NUM_PATCHES:
            self.patches.append(((x, z, half_x, half_z, yaw, float(is_round)), mat, self.current))

    def lamp(self, x, height, z, color, power: float, reach: float = 1.2) -> None:
        """A light without shadows; its light falls off as 1 / (1 + reach * distance^2)."""
        if len(self.lamps) < world.NUM_LAMPS:
            self.lamps.append((x, -height, z, *(np.array(color) ** 2.2 * power), reach))

    def is_free(self, rect: tuple, gap: float) -> bool:
        """Whether a ground rectangle avoids the clear disc, all placed ones and the walls."""
        points = rect_points(rect)
        if rect_distance(np.zeros(2), rect) < CLEAR_RADIUS + 0.02:
            return False
        low, high = self.room_min[[0, 2]], self.room_max[[0, 2]]
        if not ((points > low) & (points < high)).all():
            return False
        return all(
            rect_distance(points, other).min() > gap
            and rect_distance(rect_points(other), rect).min() > gap
            for other in self.rects
        )

    def find(
        self, half_x, half_z, draw, gap: float = 0.15, tries: int = 20
    ) -> tuple[float, float, float] | None:
        """Tries `draw() -> (x, z, yaw)` until the rectangle is free; reserves it, or None."""
        for _ in range(tries):
            x, z, yaw = draw()
            if self.is_free((x, z, half_x, half_z, yaw), gap):
                self.rects.append((x, z, half_x, half_z, yaw))
                return x, z, yaw
        return None

    def reserve(self, x, z, half_x, half_z, yaw) -> None:
        """Keeps a ground rectangle free of bodies that `find` places."""
        self.rects.append((x, z, half_x, half_z, yaw))

    def ring(self, low: float, high: float, yaw: float | None = None):
        """A draw for `find`: a spot between two distances from the middle.

        Its yaw is given, or turned so that the thing's front (local -z) looks to the middle.
        """
        rng = self.rng

        def draw():
            reach, angle = rng.uniform(low, high), rng.uniform(0, 2 * np.pi)
            x, z = reach * np.cos(angle), reach * np.sin(angle)
            return x, z, np.arctan2(x, z) if yaw is None else yaw

        return draw

    def finish(self, faces: list[Material], floor: tuple[str, str], wall: str, sky: str, light):
        """Packs everything into a `Scene`.

        Args:
          faces: 6 materials of the room; outdoors only the floor's counts.
          floor: texture and colour name; wall: colour name; sky: name in `words.SKIES`.
          light: the lighting fields of `Scene`.
        """
        spare = (_BURIED, (-1.0, -1.0, -1.0), 0.0, (0.0, 0.0), None, -1)
        sizes = (world.NUM_BLOCKS, world.NUM_ROUNDS, world.NUM_BALLS)
        rows, paints = [], []
        for kind, (have, size) in enumerate(zip(self.bodies, sizes, strict=True)):
            for row in have + [spare] * (size - len(have)):
                rows.append(row)
                paints.append(paint_row(row[4], 2 * np.array(row[1]), kind > 0))
        paints += [paint_row(mat, (1.0 / 0.37, 1.0 / 0.37), False) for mat in faces]
        patches = np.tile((0.0, 100.0, -1.0, -1.0, 0.0, 0.0), (world.NUM_PATCHES, 1))
        patch_object = np.full(world.NUM_PATCHES, -1)
        for index in range(world.NUM_PATCHES):
            mat = None
            if index < len(self.patches):
                patches[index], mat, patch_object[index] = self.patches[index]
            paints.append(paint_row(mat, (1.0 / 0.37, 1.0 / 0.37), False))
        windows = np.tile((0.0, -500.0, 0.0, 1.0, 0.0, -1.0, -1.0), (world.NUM_WINDOWS, 1))
        windows[: len(self.windows)] = self.windows or windows[:0]
        lamps = np.tile((0.0, -500.0, 0.0, 0.0, 0.0, 0.0, 1.0), (world.NUM_LAMPS, 1))
        lamps[: len(self.lamps)] = self.lamps or lamps[:0]
        objects = np.full((world.NUM_OBJECTS, 2), -1)
        objects[: len(self.objects)] = self.objects or objects[:0]
        values = dict(
            seed=self.seed,
            place=world.PLACES.index(self.place),
            is_indoor=self.place in world.INDOOR,
            room_min=self.room_min,
            room_max=self.room_max,
            body_center=[r[0] for r in rows],
            body_half=[r[1] for r in rows],
            body_yaw=[r[2] for r in rows],
            body_taper=[r[3] for r in rows],
            body_object=[r[5] for r in rows],
            pattern=[p[0] for p in paints],
            paint=[p[1] for p in paints],
            patches=patches,
            patch_object=patch_object,
            windows=windows,
            lamps=lamps,
            clear=(0.0, 0.0, CLEAR_RADIUS),
            objects=objects,
            words=(
                COLOR_NAMES.index(floor[1]),
                COLOR_NAMES.index(wall),
                TEXTURE_NAMES.index(floor[0]),
                SKY_NAMES.index(sky),
            ),
            **light,
        )
        whole = {
            "seed",
            "place",
            "is_indoor",
            "body_object",
            "patch_object",
            "pattern",
            "objects",
            "words",
        }
        return world.Scene(
            **{k: np.asarray(v, np.int32 if k in whole else np.float32) for k, v in values.items()}
        )
