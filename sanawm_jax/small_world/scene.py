"""Scenes of the small world: fixed-size arrays drawn from a seed.

World axes are OpenCV's: x right, y down, z forward; the floor or ground is the plane y = 0, so a
point above it has negative y. A scene is a toy: rooms of 4 to 7 units, eye height about 1.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

INDOOR, OUTDOOR = 0, 1
FAMILIES = ("indoor", "outdoor")

NUM_BOXES = 22
NUM_CASTERS = 15  # boxes before this index cast shadows; the rest are rugs, panels and streets
NUM_SPHERES = 9
NUM_CYLINDERS = 11
NUM_FACES = 6  # of the room: -x, +x, ceiling, floor, -z, +z
NUM_SURFACES = NUM_FACES + NUM_BOXES + NUM_SPHERES + NUM_CYLINDERS
NUM_OBJECTS = 24  # caption entries
FLOOR_FACE = 3


@dataclass(frozen=True)
class Scene:
    """One scene; every field is a numpy array of a fixed shape, so one compilation serves all.

    Unused bodies lie far below the ground with negative size, which no ray can hit. Material
    rows are ordered: 6 room faces, boxes, spheres, cylinders (`NUM_SURFACES` rows). Colours are
    linear light. Outdoors the room is only the ground: its other faces show the sky.
    """

    seed: np.ndarray  # () int32
    family: np.ndarray  # () int32, index into FAMILIES
    room_min: np.ndarray  # (3,)
    room_max: np.ndarray  # (3,)
    box_center: np.ndarray  # (NUM_BOXES, 3)
    box_half: np.ndarray  # (NUM_BOXES, 3) half extents
    box_yaw: np.ndarray  # (NUM_BOXES,) radians about y
    sphere_center: np.ndarray  # (NUM_SPHERES, 3)
    sphere_radius: np.ndarray  # (NUM_SPHERES,)
    cylinder_center: np.ndarray  # (NUM_CYLINDERS, 3)
    cylinder_radius: np.ndarray  # (NUM_CYLINDERS,)
    cylinder_half: np.ndarray  # (NUM_CYLINDERS,) half heights
    texture: np.ndarray  # (NUM_SURFACES,) int32, index into palette.TEXTURES
    color_a: np.ndarray  # (NUM_SURFACES, 3)
    color_b: np.ndarray  # (NUM_SURFACES, 3)
    counts: np.ndarray  # (NUM_SURFACES, 3) pattern cells along the body
    pattern: np.ndarray  # (NUM_SURFACES, 4) row offset, border across, border up, jitter
    cycles: np.ndarray  # (NUM_SURFACES,) pattern cells per world unit
    grain: np.ndarray  # (NUM_SURFACES, 2) noise strength, noise cells per unit
    glow: np.ndarray  # (NUM_SURFACES, 2) emission, gloss
    light_position: np.ndarray  # (3,)
    light_color: np.ndarray  # (3,)
    light_falloff: np.ndarray  # () attenuation 1 / (1 + falloff * distance^2)
    ambient: np.ndarray  # (3,)
    sky: np.ndarray  # (3, 3) zenith, horizon, cloud colour
    clouds: np.ndarray  # (2,) amount, scale
    haze: np.ndarray  # () extinction per unit
    clear: np.ndarray  # (3,) x, z, radius of a disc that no body enters
    objects: np.ndarray  # (NUM_OBJECTS, 2) int32: kind, colour (caption indices), -1 if none
    surfaces: np.ndarray  # (3, 2) int32: wall, floor or ground, ceiling or sky: texture, colour


def scene_arrays(scene: Scene) -> dict[str, np.ndarray]:
    """Return the scene's arrays by field name."""
    return {f.name: getattr(scene, f.name) for f in fields(scene)}
