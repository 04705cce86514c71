"""The camera of one video, as every pose format is read into it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class PoseTrack(NamedTuple):
    """The camera of one video.

    Attributes:
      c2w: (F, 4, 4) float32 camera-to-world, OpenCV axes, in any world frame.
      intrinsics: (F, 4) float32 [fx, fy, cx, cy] in pixels, or None if the layout has none.
      size: (width, height) of the images that the intrinsics are of; None: the video's own.
    """

    c2w: np.ndarray
    intrinsics: np.ndarray | None = None
    size: tuple[int, int] | None = None

    def intrinsics_of(self, width: int, height: int) -> np.ndarray | None:
        """The intrinsics, (F, 4) float32, in pixels of a video of this size."""
        if self.intrinsics is None or self.size is None:
            return self.intrinsics
        scale = np.array([width / self.size[0], height / self.size[1]] * 2)
        return (self.intrinsics * scale).astype(np.float32)
