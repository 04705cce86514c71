"""Collects the bodies, materials and caption facts of one scene and packs them into arrays."""

from __future__ import annotations

import numpy as np

from sanawm_jax.small_world import scene as world
from sanawm_jax.small_world.captions import KINDS
from sanawm_jax.small_world.palette import (
    COLOR_NAMES,
    TEXTURE_CODE,
    TEXTURES,
    Material,
    pattern_row,
)
from sanawm_jax.small_world.scenery.builder import rect_distance, rect_points

CLEAR_RADIUS = 1.5  # a 48-frame walk of 1.2 units in any direction plus the camera's clearance
_BURIED = (0.0, 100.0, 0.0)


class Composer:
    """Mutable helper of `indoor.compose` and `outdoor.compose`.

    Heights are given upwards from the floor (positive up), unlike the scene's y axis.
    """

    def __init__(self, rng, seed, family, room_min, room_max, clear_xz):
        self.rng, self.seed, self.family = rng, seed, family
        self.room_min, self.room_max = (
            np.array(room_min, float),
            np.array(room_max, float),
        )
        self.clear = np.array((*clear_xz, CLEAR_RADIUS))
        self.casters, self.panels, self.spheres, self.cylinders = [], [], [], []
        self.rects, self.objects = [], []

    def fits(self, boxes: int = 0, spheres: int = 0, cylinders: int = 0) -> bool:
        """Whether that many more shadow-casting boxes, spheres and cylinders have slots."""
        return (
            len(self.casters) + boxes <= world.NUM_CASTERS
            and len(self.spheres) + spheres <= world.NUM_SPHERES
            and len(self.cylinders) + cylinders <= world.NUM_CYLINDERS
        )

    def box(self, x, bottom, z, size, yaw, mat: Material, casts: bool = True) -> None:
        """Add a box of size (width, height, depth) standing at height `bottom`."""
        half = np.array(size, float) / 2
        row = (np.array((x, -bottom - half[1], z)), half, yaw, mat)
        (self.casters if casts else self.panels).append(row)

    def sphere(self, x, height, z, radius, mat: Material) -> None:
        """Add a sphere with its centre at `height`."""
        self.spheres.append((np.array((x, -height, z)), radius, mat))

    def cylinder(self, x, bottom, z, radius, height, mat: Material) -> None:
        """Add an upright cylinder standing at height `bottom`."""
        self.cylinders.append((np.array((x, -bottom - height / 2, z)), radius, height / 2, mat))

    def note(self, kind: str, color: str) -> None:
        """Record an object for the caption."""
        if len(self.objects) < world.NUM_OBJECTS:
            self.objects.append((KINDS.index(kind), COLOR_NAMES.index(color)))

    def is_free(self, rect: tuple, gap: float = 0.1) -> bool:
        """Whether a ground rectangle avoids the clear disc, all placed ones and the walls."""
        points = rect_points(rect)
        if rect_distance(self.clear[:2], rect) < self.clear[2] + 0.02:
            return False
        inside = (points > self.room_min[[0, 2]]) & (points < self.room_max[[0, 2]])
        if not inside.all():
            return False
        return all(
            rect_distance(points, other).min() > gap
            and rect_distance(rect_points(other), rect).min() > gap
            for other in self.rects
        )

    def place(self, half_x, half_z, draw, tries: int = 25):
        """Try `draw() -> (x, z, yaw)` until the rectangle is free; reserve it. None if never."""
        for _ in range(tries):
            x, z, yaw = draw()
            rect = (x, z, half_x, half_z, yaw)
            if self.is_free(rect):
                self.rects.append(rect)
                return x, z, yaw
        return None

    def finish(self, faces: list[Material], surfaces: list[tuple[str, str]], light: dict):
        """Pack everything into a `Scene`. `faces`: 6 materials; `light`: the lighting fields."""
        spare = [(np.array(_BURIED), -np.ones(3), 0.0, None)]
        casters = (self.casters + spare * world.NUM_CASTERS)[: world.NUM_CASTERS]
        num_panels = world.NUM_BOXES - world.NUM_CASTERS
        boxes = casters + (self.panels + spare * num_panels)[:num_panels]
        balls = self.spheres + [(np.array(_BURIED), -1.0, None)] * world.NUM_SPHERES
        balls = balls[: world.NUM_SPHERES]
        poles = self.cylinders + [(np.array(_BURIED), -1.0, -1.0, None)] * world.NUM_CYLINDERS
        poles = poles[: world.NUM_CYLINDERS]
        room = self.room_max - self.room_min
        rows = [_surface(m, room, False) for m in faces]
        rows += [_surface(m, 2 * half, False) for _, half, _, m in boxes]
        rows += [_surface(m, np.full(3, 2 * r), True) for _, r, m in balls]
        rows += [_surface(m, np.array((2 * r, 2 * h, 2 * r)), True) for _, r, h, m in poles]
        columns = [np.stack(column) for column in zip(*rows, strict=True)]
        objects = np.full((world.NUM_OBJECTS, 2), -1)
        objects[: len(self.objects)] = self.objects or objects[:0]
        named = [(TEXTURES.index(t), COLOR_NAMES.index(c)) for t, c in surfaces]
        values = dict(
            seed=self.seed,
            family=self.family,
            room_min=self.room_min,
            room_max=self.room_max,
            box_center=[b[0] for b in boxes],
            box_half=[b[1] for b in boxes],
            box_yaw=[b[2] for b in boxes],
            sphere_center=[b[0] for b in balls],
            sphere_radius=[b[1] for b in balls],
            cylinder_center=[b[0] for b in poles],
            cylinder_radius=[b[1] for b in poles],
            cylinder_half=[b[2] for b in poles],
            texture=columns[0],
            color_a=columns[1],
            color_b=columns[2],
            counts=columns[3],
            pattern=columns[4],
            cycles=columns[5],
            grain=columns[6],
            glow=columns[7],
            clear=self.clear,
            objects=objects,
            surfaces=named,
            **light,
        )
        whole = {"seed", "family", "texture", "objects", "surfaces"}
        return world.Scene(
            **{k: np.asarray(v, np.int32 if k in whole else np.float32) for k, v in values.items()}
        )


def _surface(mat: Material | None, size: np.ndarray, wraps: bool) -> tuple:
    """Columns of one material row, in linear light."""
    if mat is None:
        zero = np.zeros(3)
        return (
            np.array(0),
            zero,
            zero,
            np.ones(3),
            np.zeros(4),
            np.array(1.0),
            zero[:2],
            zero[:2],
        )
    counts, pattern, cycles = pattern_row(mat, np.asarray(size, float), wraps)
    return (
        np.array(TEXTURE_CODE[mat.texture]),
        np.asarray(mat.color_a) ** 2.0,
        np.asarray(mat.color_b) ** 2.0,
        counts,
        pattern,
        cycles,
        np.array((mat.grain, mat.grain_scale)),
        np.array((mat.emission, mat.gloss)),
    )
