"""Makes further clips from the same pixels: mirrored and reversed ones. Uses numpy only.

Axis letters: N pixel frames, H W rows and columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0]).astype(np.float32)


class View(NamedTuple):
    """A change of a clip; the default changes nothing."""

    mirror: bool = False  # exchanges left and right
    reverse: bool = False  # plays the clip backwards


ALL_VIEWS = (View(), View(mirror=True), View(reverse=True), View(mirror=True, reverse=True))


def view_clip(clip: dict, view: View) -> dict:
    """Returns the clip with the change that `view` describes, also of its poses and intrinsics.

    Args:
      clip: video (N, H, W, 3), c2w (N, 4, 4), intrinsics (4,), and other entries, which stay.
      view: the change.

    Returns:
      A dict with the same keys. The centres of pixels are at whole numbers, so a mirrored principal
      point is at W - 1 - cx.
    """
    video, c2w, intrinsics = (clip[name] for name in ("video", "c2w", "intrinsics"))
    if view.mirror:
        fx, fy, cx, cy = intrinsics
        intrinsics = np.array([fx, fy, video.shape[2] - 1 - cx, cy], np.float32)
        # The world and the camera are both reflected, so the pose stays a rotation.
        video, c2w = video[:, :, ::-1], _MIRROR @ c2w @ _MIRROR
    if view.reverse:
        video, c2w = video[::-1], c2w[::-1]
    return {**clip, "video": video, "c2w": c2w, "intrinsics": intrinsics}
