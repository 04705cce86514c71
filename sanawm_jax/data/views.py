"""Other clips from the same pixels: mirrored, and run backwards. numpy only.

Axis letters: N pixel frames, H W rows and columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0]).astype(np.float32)


class View(NamedTuple):
    """What is done to a clip; the default changes nothing."""

    mirror: bool = False  # left becomes right
    reverse: bool = False  # the last frame comes first


ALL_VIEWS = (View(), View(mirror=True), View(reverse=True), View(mirror=True, reverse=True))


def view_clip(clip: dict, view: View) -> dict:
    """The clip as `view` shows it, poses and intrinsics included.

    Args:
      clip: video (N, H, W, 3), c2w (N, 4, 4), intrinsics (4,) and whatever else, which stays.
      view: what to do.

    Returns:
      a dict of the same keys. Pixels sit at whole numbers, so a mirrored principal point is at
      W - 1 - cx.
    """
    video, c2w, intrinsics = (clip[name] for name in ("video", "c2w", "intrinsics"))
    if view.mirror:
        fx, fy, cx, cy = intrinsics
        intrinsics = np.array([fx, fy, video.shape[2] - 1 - cx, cy], np.float32)
        # world and camera are both reflected, so the pose stays a rotation
        video, c2w = video[:, :, ::-1], _MIRROR @ c2w @ _MIRROR
    if view.reverse:
        video, c2w = video[::-1], c2w[::-1]
    return {**clip, "video": video, "c2w": c2w, "intrinsics": intrinsics}
