"""Memory: does a place look the same when the camera comes back to it?

Axis letters: N frames, H W rows and columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sanawm_jax.eval.camera import rotation_angle
from sanawm_jax.eval.metrics import psnr, ssim

MAX_DISTANCE = 0.5  # metres, or units of the scene
MAX_ANGLE = 20.0  # degrees
MAX_PAIRS = 5  # per clip
PAIR_FPS = 16.0  # frame rate in which the benchmark numbers the frames of its pairs


class Pair(NamedTuple):
    """Two frames that show the same place.

    Attributes:
      first, second: frame numbers.
      distance: between the camera centres.
      angle: between the camera rotations, degrees.
    """

    first: int
    second: int
    distance: float
    angle: float


def revisit_pairs(
    c2w: np.ndarray,
    max_distance: float = MAX_DISTANCE,
    max_angle: float = MAX_ANGLE,
    max_pairs: int = MAX_PAIRS,
    least_gap: int = 16,
) -> list[Pair]:
    """Pairs of frames between which the camera went away and came back, the nearest ones first.

    A camera has gone away when it is farther than `max_distance` or turned by more than `max_angle`
    from the first frame of the pair.

    Args:
      c2w: (N, 4, 4) camera to world.
      max_pairs: pairs are chosen one after the other by distance and angle; the second frame of
        each is at least `least_gap` frames away from the second frames before it.

    Returns:
      At most `max_pairs` pairs; none if the path never returns.
    """
    rotation, centre = c2w[:, :3, :3], c2w[:, :3, 3].astype(np.float64)
    distance = np.linalg.norm(centre[:, None] - centre[None], axis=-1)
    angle = rotation_angle(rotation[:, None], rotation[None])
    is_near = (distance < max_distance) & (angle < max_angle)
    is_later = np.arange(len(c2w))[None] > np.arange(len(c2w))[:, None]
    went_away = np.logical_or.accumulate(~is_near & is_later, axis=1)
    score = distance / max_distance + angle / max_angle
    first, second = np.nonzero(is_near & went_away)
    pairs: list[Pair] = []
    for index in np.argsort(score[first, second], kind="stable"):
        a, b = int(first[index]), int(second[index])
        if all(abs(b - pair.second) >= least_gap for pair in pairs):
            pairs.append(Pair(a, b, float(distance[a, b]), float(angle[a, b])))
        if len(pairs) == max_pairs:
            break
    return pairs


def frame_at(index: int, fps: float, frames: int, pair_fps: float = PAIR_FPS) -> int:
    """The frame of a video of `fps` that shows the time of frame `index` at `pair_fps`."""
    if abs(fps - pair_fps) >= 0.1:
        index = round(index / pair_fps * fps)
    return min(max(index, 0), frames - 1)


def revisit(video: np.ndarray, pairs: list[Pair], truth: np.ndarray | None = None) -> list[dict]:
    """Similarity of the two frames of each pair.

    Args:
      video: (N, H, W, 3).
      pairs: from `revisit_pairs` or from a benchmark's file.
      truth: the rendered video; adds `psnr_to_truth`, of the second frame. The two frames of a pair
        are not taken from exactly the same place, so `psnr_of_truth`, between the true frames,
        is what a perfect video gets.

    Returns:
      One row per pair: frame_a, frame_b, psnr, ssim (the benchmark's uniform window), distance and
      angle_deg.
    """
    rows = []
    for first, second, distance, angle in pairs:
        a, b = video[first][None], video[second][None]
        row: dict[str, Any] = {
            "frame_a": first,
            "frame_b": second,
            "psnr": float(psnr(a, b)[0]),
            "ssim": float(ssim(a, b, uniform=True)[0]),
            "distance": distance,
            "angle_deg": angle,
        }
        if truth is not None:
            row["psnr_to_truth"] = float(psnr(b, truth[second][None])[0])
            row["psnr_of_truth"] = float(psnr(truth[first][None], truth[second][None])[0])
        rows.append(row)
    return rows
