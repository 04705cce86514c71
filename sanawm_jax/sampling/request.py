"""A user's inputs, checked and prepared for the networks before anything is loaded."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.camera.actions import actions_to_c2w, parse_actions
from sanawm_jax.camera.intrinsics import (
    DEFAULT_FOV_DEG,
    check_field_of_view,
    crop_intrinsics,
    default_intrinsics,
    parse_intrinsics,
)
from sanawm_jax.camera.poses import load_c2w, snap_num_frames
from sanawm_jax.media.image import load_image, resize_and_center_crop, to_array
from sanawm_jax.media.overlay import OverlayPainter
from sanawm_jax.runtime.errors import InputError

Held = list[frozenset[str]]


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

    def painter(self, dropped: int, mapping: str) -> OverlayPainter:
        """Draws keys and camera path on a video that lacks the first `dropped` frames."""
        held = self.held_keys[dropped:] if self.held_keys else self.held_keys
        return OverlayPainter(self.c2w[dropped:], held, self.height, self.width, mapping)


def make_request(
    image: Any,
    *,
    camera: str | os.PathLike | np.ndarray | None = None,
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
      image: path or PIL image of the first frame.
      camera: camera-to-world poses (N, 4, 4), an array or the path of a .npy file.
      action: action string such as "w-40,dw-20"; exactly one of camera and action.
      action_mapping: meaning of the keys, `sana` or `diffusers`.
      intrinsics: see `camera.intrinsics.parse_intrinsics`, in pixels of the given image; None
        assumes a horizontal field of view of 70 degrees and warns.
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
        held_keys = parse_actions(action)
        c2w = actions_to_c2w(action, mapping=action_mapping)
    else:
        assert camera is not None
        c2w = load_c2w(camera)
    temporal *= chunk
    frames = snap_num_frames(min(num_frames, len(c2w)), temporal, upper_bound=len(c2w))
    if num_frames < 1 or frames <= 1:
        raise InputError(
            f"{min(num_frames, len(c2w))} frames are too few; "
            f"a video needs a path and --num_frames of {temporal + 1} or more"
        )
    if frames != num_frames:
        warnings.warn(
            f"making {frames} frames, not {num_frames}: the path has {len(c2w)} poses and the "
            f"length must be {temporal}k+1",
            stacklevel=2,
        )
    pixels, rows = read_picture(image, intrinsics, frames, height, width)
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
) -> tuple[np.ndarray, np.ndarray]:
    """The first frame and the intrinsics of all frames, at the size of the video.

    Args:
      image, intrinsics, height, width: see `make_request`.
      frames: N, pixel frames of the video.

    Returns:
      (H, W, 3) float32 in [-1, 1], and (N, 4) float32 in pixels of the output frame.

    Raises:
      InputError: the image or the intrinsics cannot be used.
    """
    picture = load_image(image) if isinstance(image, (str, Path)) else image.convert("RGB")
    cropped, source, resized, offset = resize_and_center_crop(picture, height, width)
    if intrinsics is None:
        rows = np.tile(default_intrinsics(*source), (frames, 1))
        warnings.warn(
            f"no intrinsics given: taking a horizontal field of view of {DEFAULT_FOV_DEG:g} "
            "degrees; pass --intrinsics fx,fy,cx,cy if you know the camera",
            stacklevel=3,
        )
    else:
        rows = parse_intrinsics(intrinsics, frames)
    rows = crop_intrinsics(rows, source, resized, offset)
    check_field_of_view(rows, width, height, is_given=intrinsics is not None)
    return to_array(cropped), rows
