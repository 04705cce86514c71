"""The camera of one video, into which every format of poses is read.

Axis letters: f pixel frames.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32


class PoseTrack(NamedTuple):
    """The camera of one video. `pose_files.read_poses` checks the arrays and gives float32.

    Attributes:
      c2w: (f, 4, 4) camera-to-world, OpenCV axes, in any world frame.
      intrinsics: (f, 4) [fx, fy, cx, cy] in pixels, or None if the format has none.
      size: (width, height) of the images that the intrinsics belong to; None means the size of the
        video.
    """

    c2w: np.ndarray
    intrinsics: np.ndarray | None = None
    size: tuple[int, int] | None = None

    def intrinsics_of(self, width: int, height: int) -> Float32[np.ndarray, "f 4"] | None:
        """Returns the intrinsics [fx, fy, cx, cy] in pixels of a video of this size."""
        if self.intrinsics is None or self.size is None:
            return self.intrinsics
        scale = np.array([width / self.size[0], height / self.size[1]] * 2)
        return (self.intrinsics * scale).astype(np.float32)
