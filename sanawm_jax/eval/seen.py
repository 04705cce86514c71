"""Which pixels of a clip show something that its first picture shows.

Axis letters: N frames, H W rows and columns.
"""

from __future__ import annotations

import numpy as np

_SLACK = 0.02  # relative difference of depths that still counts as the same surface


def seen_pixels(depth: np.ndarray, c2w: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Masks of the pixels whose surface is in sight in frame 0.

    The surface of a pixel is projected into frame 0. It is in sight there if it falls inside of the
    picture and no nearer surface covers it. The depth of frame 0 is read with a margin of one
    pixel, so that surfaces seen at a flat angle are not lost.

    Args:
      depth: (N, H, W) along the optical axis, inf for the sky.
      c2w: (N, 4, 4) camera to world, OpenCV axes.
      intrinsics: (4,) fx, fy, cx, cy; an integer coordinate is the centre of a pixel.

    Returns:
      (N, H, W) bool. The mask of frame 0 is true everywhere.
    """
    from scipy.ndimage import maximum_filter

    fx, fy, cx, cy = np.asarray(intrinsics, np.float64)
    height, width = depth.shape[1:]
    y, x = np.mgrid[:height, :width]
    rays = np.stack(((x - cx) / fx, (y - cy) / fy, np.ones_like(x)), -1)
    farthest = maximum_filter(depth[0], 3, mode="nearest") * (1 + _SLACK)
    poses = np.asarray(c2w, np.float64)
    to_first = np.linalg.inv(poses[0]) @ poses
    masks = np.empty(depth.shape, bool)
    for mask, z, pose in zip(masks, depth, to_first, strict=True):
        is_sky = np.isinf(z)
        # the sky is infinitely far away: only its direction counts
        points = rays * np.where(is_sky, 1.0, z)[..., None] @ pose[:3, :3].T
        points += np.where(is_sky, 0.0, 1.0)[..., None] * pose[:3, 3]
        ahead = points[..., 2]
        safe = np.where(ahead > 1e-6, ahead, 1.0)
        column = np.round(points[..., 0] / safe * fx + cx)
        row = np.round(points[..., 1] / safe * fy + cy)
        inside = (ahead > 1e-6) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        there = farthest[
            np.where(inside, row, 0).astype(int), np.where(inside, column, 0).astype(int)
        ]
        mask[...] = inside & (np.where(is_sky, np.inf, ahead) <= there)
    masks[0] = True
    return masks
