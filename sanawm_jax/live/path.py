"""A path that was drawn on the map, as camera poses.

Axis letters: p points, f pixel frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sanawm_jax.camera.live import turn_right
from sanawm_jax.runtime.errors import InputError

MAX_FRAMES = 16 * 600  # ten minutes at 16 frames per second


def poses_along(
    points: Sequence[Sequence[float]], start: np.ndarray, distance: float, turn: float
) -> np.ndarray:
    """Poses (f, 4, 4) of a walk along a line, looking ahead; the height and pitch do not change.

    The camera walks from where it stands to the first point and on. It turns at most `turn` per
    frame, so it rounds corners with its eyes and not with its feet.

    Args:
      points: (p, 2) x, z on the ground, in units of the poses.
      start: (4, 4) pose before the path.
      distance: of one frame, in the same units.
      turn: radians of one frame at most.

    Raises:
      InputError: the path has no length, or is too long.
    """
    line = np.array([start[[0, 2], 3], *points], np.float64)
    steps = np.linalg.norm(np.diff(line, axis=0), axis=1)
    line = np.concatenate([line[:1], line[1:][steps > 1e-9]])
    at = np.concatenate([[0], np.cumsum(steps[steps > 1e-9])])
    count = math.ceil(at[-1] / distance)
    if not count:
        raise InputError("the path has no length; draw a line on the map")
    if count > MAX_FRAMES:
        raise InputError(f"the path takes {count} frames; draw one of {MAX_FRAMES} or fewer")
    s = np.minimum(np.arange(1, count + 1) * distance, at[-1])
    place = np.stack([np.interp(s, at, line[:, axis]) for axis in (0, 1)], 1)
    ahead = np.stack([np.interp(s + 6 * distance, at, line[:, axis]) for axis in (0, 1)], 1)
    heading = heading_of(start)
    poses = np.tile(start, (count, 1, 1))
    turned = 0.0
    for i in range(count):
        toward = ahead[i] - place[i]
        if np.linalg.norm(toward) > 1e-9:
            wanted = math.atan2(toward[0], toward[1]) - heading - turned
            wanted = (wanted + math.pi) % (2 * math.pi) - math.pi
            turned += min(max(wanted, -turn), turn)
        poses[i, :3, :3] = turn_right(turned) @ start[:3, :3]
        poses[i, [0, 2], 3] = place[i]
    return poses


def pieces(poses: np.ndarray, first: int, later: int) -> list[np.ndarray]:
    """Cuts poses (f, 4, 4) into chunks of `first` and then `later` frames; the last one waits."""
    cuts = range(first, len(poses), later)
    chunks = np.split(poses, cuts)
    rest = (later if len(chunks) > 1 else first) - len(chunks[-1])
    chunks[-1] = np.concatenate([chunks[-1], np.tile(chunks[-1][-1:], (rest, 1, 1))])
    return chunks


def heading_of(c2w: np.ndarray) -> float:
    """Radians by which a pose (4, 4) looks to the right of the +z axis."""
    return math.atan2(c2w[0, 2], c2w[2, 2])


def place_of(c2w: np.ndarray) -> tuple[float, float, float]:
    """x, z and heading of a pose (4, 4)."""
    return float(c2w[0, 3]), float(c2w[2, 3]), heading_of(c2w)
