"""A user's inputs, checked and prepared for the networks before anything is loaded."""

from __future__ import annotations

import dataclasses
import os
import warnings
from typing import Any

import numpy as np

from sanawm_jax.camera.actions import keys_to_c2w
from sanawm_jax.camera.intrinsics import (
    DEFAULT_FOV_DEG,
    check_field_of_view,
    crop_intrinsics,
    default_intrinsics,
    parse_intrinsics,
)
from sanawm_jax.camera.pose_files import AXES, DIRECTIONS, from_convention, read_poses
from sanawm_jax.camera.poses import snap_num_frames, to_matrices
from sanawm_jax.camera.recorded_keys import read_actions
from sanawm_jax.camera.track import PoseTrack
from sanawm_jax.media.image import load_image, resize_and_center_crop, to_array
from sanawm_jax.media.overlay import OverlayPainter
from sanawm_jax.media.upstream_overlay import UpstreamPainter
from sanawm_jax.runtime.errors import InputError

Held = list[frozenset[str]]
Painter = OverlayPainter | UpstreamPainter
OVERLAYS = ("keys", "upstream")  # ours, and the look of NVlabs/Sana


@dataclasses.dataclass(frozen=True)
class Request:
    """One video to make; arrays are numpy.

    Axis letters: N pixel frames.
    """

    pixels: np.ndarray  # (H, W, 3) float32 in [-1, 1], the first frame
    c2w: np.ndarray  # (N, 4, 4) float32
    intrinsics: np.ndarray  # (N, 4) float32 in pixels of the output frame
    held_keys: Held | None  # keys of the action language, or None for a pose file
    height: int
    width: int

    @property
    def num_frames(self) -> int:
        return len(self.c2w)

    def painter(self, dropped: int, mapping: str, overlay: str = "keys") -> Painter:
        """Draws the controls on a video that lacks the first `dropped` frames.

        Args:
          mapping: the meaning of the keys, see `camera.actions`.
          overlay: one of `OVERLAYS`.
        """
        if overlay == "upstream":
            return UpstreamPainter(self.c2w[dropped:], self.height, self.width)
        held = self.held_keys[dropped:] if self.held_keys else self.held_keys
        return OverlayPainter(self.c2w[dropped:], held, self.height, self.width, mapping)


def make_request(
    image: Any,
    *,
    camera: str | os.PathLike | np.ndarray | None = None,
    camera_format: str = "auto",
    camera_axes: str = AXES[0],
    camera_direction: str = DIRECTIONS[0],
    action: str | None = None,
    action_mapping: str = "sana",
    intrinsics: str | os.PathLike | np.ndarray | None = None,
    num_frames: int = 161,
    height: int = 704,
    width: int = 1280,
    temporal: int = 8,
    spatial: int = 32,
    chunk: int = 1,
) -> Request:
    """Checks a user's inputs and prepares them.

    Args:
      image: the first frame, in any form of `media.image.load_image`.
      camera: a file in any format of `camera.pose_files.read_poses`, or camera-to-world poses
        (N, 4, 4) or (N, 3, 4).
      camera_format, camera_axes, camera_direction: see `read_poses`.
      action: action string such as "w-40,dw-20", or the path of recorded keys, see
        `camera.recorded_keys.read_actions`; exactly one of camera and action.
      action_mapping: meaning of the keys, `sana` or `diffusers`.
      intrinsics: see `camera.intrinsics.parse_intrinsics`, in pixels of the given image. None takes
        those of the camera file; if it has none, a horizontal field of view of 70 degrees is
        assumed, with a warning.
      num_frames: upper bound; the video has temporal * chunk * k + 1 frames, at most one per pose.
      height, width: output size in pixels, multiples of `spatial`.
      temporal, spatial: pixel frames and pixels per latent of the VAE.
      chunk: latent frames of a stream's chunk; 1 for a video that is made as a whole.

    Raises:
      InputError: one line on the first thing that is wrong.
    """
    if (camera is None) == (action is None):
        raise InputError("give exactly one of --camera and --action")
    check_size(height, width, spatial)
    held_keys = None
    if action is not None:
        held_keys = read_actions(action)
        track = PoseTrack(keys_to_c2w(held_keys, mapping=action_mapping))
    elif isinstance(camera, (str, os.PathLike)):
        track = read_poses(camera, camera_format, axes=camera_axes, direction=camera_direction)
    else:
        assert camera is not None
        track = PoseTrack(from_convention(to_matrices(camera), camera_axes, camera_direction))
    c2w = track.c2w
    temporal *= chunk
    frames = snap_num_frames(min(num_frames, len(c2w)), temporal, upper_bound=len(c2w))
    if num_frames < 1 or frames <= 1:
        raise InputError(
            f"{min(num_frames, len(c2w))} frames are too few; "
            f"a video needs a path and --num_frames of {temporal + 1} or more"
        )
    if len(c2w) > max(frames, num_frames) and action is not None:
        warnings.warn(
            f"the path has {len(c2w)} poses, and the video ends after {frames}; give "
            f"--num_frames {len(c2w)} for all of it",
            stacklevel=2,
        )
    if frames != num_frames:
        warnings.warn(
            f"making {frames} frames, not {num_frames}: the path has {len(c2w)} poses and the "
            f"length must be {temporal}k+1",
            stacklevel=2,
        )
    pixels, rows = read_picture(image, intrinsics, frames, height, width, track)
    return Request(pixels, c2w[:frames], rows, held_keys, height, width)


def check_size(height: int, width: int, spatial: int) -> None:
    """Refuses a frame size in pixels that is no multiple of `spatial`.

    Raises:
      InputError: a size that the VAE cannot divide.
    """
    for name, size in (("height", height), ("width", width)):
        if size <= 0 or size % spatial:
            raise InputError(f"{name}={size} must be a positive multiple of {spatial}")


def read_picture(
    image: Any,
    intrinsics: str | os.PathLike | np.ndarray | None,
    frames: int,
    height: int,
    width: int,
    track: PoseTrack | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The first frame and the intrinsics of all frames, at the size of the video.

    Args:
      image, intrinsics, height, width: see `make_request`.
      frames: N, pixel frames of the video.
      track: the camera path, whose intrinsics are taken where none are given.

    Returns:
      (H, W, 3) float32 in [-1, 1], and (N, 4) float32 in pixels of the output frame.

    Raises:
      InputError: the image or the intrinsics cannot be used.
    """
    picture = load_image(image)
    cropped, source, resized, offset = resize_and_center_crop(picture, height, width)
    known = None if track is None or intrinsics is not None else track.intrinsics_of(*source)
    if known is not None and (misfit := track.misfit(*source) if track else None):
        warnings.warn(f"the intrinsics of --camera are left out: {misfit}", stacklevel=3)
        known = None
    if known is not None:
        rows = parse_intrinsics(known, frames)
    elif intrinsics is None:
        rows = np.tile(default_intrinsics(*source), (frames, 1))
        warnings.warn(
            f"no intrinsics given: taking a horizontal field of view of {DEFAULT_FOV_DEG:g} "
            "degrees; pass --intrinsics fx,fy,cx,cy if you know the camera",
            stacklevel=3,
        )
    else:
        rows = parse_intrinsics(intrinsics, frames)
    rows = crop_intrinsics(rows, source, resized, offset)
    check_field_of_view(rows, width, height, is_given=intrinsics is not None or known is not None)
    return to_array(cropped), rows
