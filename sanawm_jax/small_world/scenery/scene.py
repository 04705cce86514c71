"""Scenes of the small world: arrays of fixed shapes, so that one compiled program renders all.

World axes are OpenCV's: x right, y down, z forward. The ground or floor is the plane y = 0, so a
point above it has a negative y. The eye is about 1 unit above the ground.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

PLACES = ("village", "ruins", "garden", "winter", "shore", "shrine", "room", "hall")
INDOOR = ("room", "hall")

NUM_BLOCKS = 52  # boxes that may get narrower towards the top: houses, roofs, pyramids
NUM_ROUNDS = 32  # upright cylinders and cones
NUM_BALLS = 32  # ellipsoids
NUM_BODIES = NUM_BLOCKS + NUM_ROUNDS + NUM_BALLS
NUM_FACES = 6  # of the room: -x, +x, ceiling, floor, -z, +z
NUM_PATCHES = 6  # flat areas on the ground: paths, ponds, rugs
NUM_SURFACES = NUM_BODIES + NUM_FACES + NUM_PATCHES
NUM_WINDOWS = 6
NUM_LAMPS = 4
RIDGE_POINTS = 128  # of a mountain ridge around the horizon
NUM_OBJECTS = 40  # caption entries
FIRST_FACE = NUM_BODIES
FLOOR = FIRST_FACE + 3
FIRST_PATCH = FIRST_FACE + NUM_FACES
SKY_SURFACE = NUM_SURFACES  # what `depth` reports where no surface is hit

# Columns of `Scene.paint`.
PAINT = (
    *("red_a", "green_a", "blue_a", "red_b", "green_b", "blue_b"),
    *("cells_u", "cells_v", "offset", "border_u", "border_v", "jitter"),
    *("noise", "noise_scale", "emission", "gloss", "wrap", "mirror", "blotch"),
)


@dataclass(frozen=True)
class Scene:
    """One scene.

    Bodies are ordered blocks, rounds, balls. A block's half width at its top is
    `half * (1 - taper)`; a round's radius likewise by `taper[0]`. Unused bodies lie far below
    the ground with negative sizes, which no ray hits. Colours are linear light.
    """

    seed: np.ndarray  # () int32
    place: np.ndarray  # () int32, index into PLACES
    is_indoor: np.ndarray  # () int32, 0 or 1; outdoors every face but the floor shows the sky
    room_min: np.ndarray  # (3,)
    room_max: np.ndarray  # (3,)
    body_center: np.ndarray  # (NUM_BODIES, 3)
    body_half: np.ndarray  # (NUM_BODIES, 3) half extents
    body_yaw: np.ndarray  # (NUM_BODIES,) radians about y
    body_taper: np.ndarray  # (NUM_BODIES, 2) share of the width lost at the top, across and along
    body_object: np.ndarray  # (NUM_BODIES,) int32, row of `objects`, -1 for none
    pattern: np.ndarray  # (NUM_SURFACES,) int32, index into palette.PATTERNS
    paint: np.ndarray  # (NUM_SURFACES, len(PAINT))
    patches: np.ndarray  # (NUM_PATCHES, 6) x, z, half x, half z, yaw, roundness; later ones on top
    patch_object: np.ndarray  # (NUM_PATCHES,) int32, row of `objects`, -1 for none
    windows: np.ndarray  # (NUM_WINDOWS, 7) centre, outward normal (x, z), half width, half height
    lamps: np.ndarray  # (NUM_LAMPS, 7) position, colour, reach
    sun: np.ndarray  # (3,) unit vector towards the sun
    sun_color: np.ndarray  # (3,)
    sun_size: np.ndarray  # () radius of the sun, radians: how soft shadows are
    ambient: np.ndarray  # (2, 3) light from above and from below
    sky: np.ndarray  # (4, 3) zenith, horizon, cloud and mountain colour
    clouds: np.ndarray  # (2,) amount, scale
    ridge: np.ndarray  # (2, RIDGE_POINTS) slope of two mountain ridges around the horizon
    haze: np.ndarray  # () extinction per unit
    clear: np.ndarray  # (3,) x, z, radius of a disc that no body enters
    objects: np.ndarray  # (NUM_OBJECTS, 2) int32: kind, colour (caption indices), -1 if none
    words: np.ndarray  # (4,) int32: colour of floor, of walls, texture of floor, name of sky


def scene_arrays(scene: Scene) -> dict[str, np.ndarray]:
    """The scene's arrays by field name."""
    return {f.name: getattr(scene, f.name) for f in fields(scene)}


def stack_scenes(scenes) -> Scene:
    """Scenes as one `Scene` whose arrays have a leading batch axis."""
    rows = [scene_arrays(s) for s in scenes]
    return Scene(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})
