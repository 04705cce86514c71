"""The camera of one video, into which every format of poses is read.

Axis letters: f pixel frames.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from sanawm_jax.camera.npy import to_finite_float32

FRACTIONS = (1, 1)  # the size of intrinsics that are fractions of the image's width and height


class PoseTrack(NamedTuple):
    """The camera of one video. `pose_files.read_poses` checks the arrays and gives float32.

    Attributes:
      c2w: (f, 4, 4) camera-to-world, OpenCV axes, in any world frame.
      intrinsics: (f, 4) [fx, fy, cx, cy] in pixels, or None if the format has none. NaN marks a
        number that the file does not have.
      size: (width, height) of the images that the intrinsics belong to; None means the size of the
        video.
      names: the image of each pose, or None if the format has no names. The poses are in the order
        of these names.
    """

    c2w: np.ndarray
    intrinsics: np.ndarray | None = None
    size: tuple[int, int] | None = None
    names: tuple[str, ...] | None = None

    def intrinsics_of(self, width: int, height: int) -> Float32[np.ndarray, "f 4"] | None:
        """Returns the intrinsics [fx, fy, cx, cy] in pixels of a video of this size.

        Where a focal length is unknown, pixels are square. Where the principal point is unknown, it
        is the centre.

        Raises:
          InputError: the scaled numbers are too large for float32.
        """
        if self.intrinsics is None:
            return None
        rows = np.array(self.intrinsics, np.float64)
        if self.size is not None:
            rows *= np.array([width / self.size[0], height / self.size[1]] * 2)
        centre = np.broadcast_to([width / 2, height / 2], (len(rows), 2))
        other = np.concatenate([rows[:, [1, 0]], centre], axis=1)
        return to_finite_float32(np.where(np.isnan(rows), other, rows), "intrinsics")

    def misfit(self, width: int, height: int) -> str | None:
        """Says why the intrinsics cannot belong to a video of this size; None if they can.

        The two sizes must be equal but for a scale, to two pixels of the smaller one.
        """
        if self.intrinsics is None or self.size in (None, FRACTIONS):
            return None
        if _have_one_shape(self.size, (width, height)):
            return None
        is_turned = _have_one_shape(self.size, (height, width))
        return (
            f"the camera belongs to {self.size[0]}x{self.size[1]} pixels and the pictures are "
            f"{width}x{height}"
            + (": one of the two is turned by 90 degrees" if is_turned else ", another shape")
        )


def _have_one_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one size is the other but for a scale, to two pixels of the smaller one."""
    small, large = sorted((one, other))
    return any(
        abs(small[1 - axis] - large[1 - axis] * small[axis] / large[axis]) <= 2 for axis in (0, 1)
    )
