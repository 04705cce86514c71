"""Pinhole intrinsics `[fx, fy, cx, cy]` in pixels: reading, defaults, field of view, cropping.

Axis letters: f pixel frames.
"""

from __future__ import annotations

import os
import reprlib
import warnings
from typing import TypeGuard

import numpy as np
from jaxtyping import Float32, Float64, Num
from numpy.typing import ArrayLike

from sanawm_jax.camera.npy import load_array, to_finite_float32
from sanawm_jax.runtime.errors import InputError

DEFAULT_FOV_DEG = 70.0  # horizontal, as in a wide-angle photograph; 42 degrees high at 1280x704
FOV_RANGE_DEG = (25.0, 120.0)  # the training range in both directions, without its bounds
WIDEST_FOV_DEG = 150.0  # of training data; wider ones are intrinsics in another unit than pixels
_NAME = "intrinsics"


def parse_intrinsics(
    value: str | os.PathLike | ArrayLike, num_frames: int
) -> Float32[np.ndarray, "f 4"]:
    """Reads intrinsics in any of the accepted forms and fits them to the length of the video.

    One entry is used for every frame. A longer sequence is cut. A shorter one is resampled: each
    of the four numbers is interpolated linearly over the time from the first to the last frame.

    Args:
      value: the path of a `.npy` file, the text "fx,fy,cx,cy", or an array. Shapes are (4,) and
        (f, 4) for [fx, fy, cx, cy], and (3, 3) and (f, 3, 3) for matrices K, in pixels of the
        given image.
      num_frames: pixel frames of the video.

    Returns:
      [fx, fy, cx, cy] in pixels; f = num_frames.

    Raises:
      InputError: the value cannot be read, has another shape, is not finite, or has a focal length
        that is not positive.
    """
    array = _parse_text(value) if _is_text(value) else load_array(value, _NAME)
    if array.shape[-2:] == (3, 3) and array.ndim in (2, 3):
        array = array[..., [0, 1, 0, 1], [0, 1, 2, 2]]
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.shape[1] != 4 or len(array) == 0:
        raise InputError(
            f"{_NAME}: expected shape (4,), (3, 3), (F, 4) or (F, 3, 3), got {array.shape}"
        )
    rows = to_finite_float32(_fit_length(array, num_frames), _NAME)
    bad = (rows[:, :2] <= 0).any(axis=1)
    if bad.any():
        frame = int(np.argmax(bad))
        fx, fy = rows[frame, :2]
        raise InputError(
            f"{_NAME}: focal lengths must be positive, frame {frame} has fx={fx:g}, fy={fy:g}"
        )
    return rows


def default_intrinsics(
    width: int, height: int, fov_deg: float = DEFAULT_FOV_DEG
) -> Float32[np.ndarray, "4"]:
    """Returns the intrinsics of a camera with square pixels that looks through the centre.

    Args:
      width, height: image size in pixels.
      fov_deg: horizontal field of view in degrees, between 0 and 180.

    Returns:
      [fx, fy, cx, cy].

    Raises:
      InputError: a field of view outside (0, 180) degrees.
    """
    if not 0 < fov_deg < 180:
        raise InputError(f"a field of view of {fov_deg:g} degrees is impossible; give 25 to 120")
    focal = width / 2 / np.tan(np.radians(fov_deg) / 2)
    return np.array([focal, focal, width / 2, height / 2], dtype=np.float32)


def field_of_view(
    intr: Num[np.ndarray, "*rest 4"], width: int, height: int
) -> Float64[np.ndarray, "*rest 2"]:
    """Returns the horizontal and vertical field of view in degrees.

    It is 2 atan(size / 2f), which assumes that the principal point is the centre. `intr` is
    [fx, fy, cx, cy] in pixels of a width x height image.
    """
    size = np.array([width, height], dtype=np.float64)
    return np.degrees(2 * np.arctan(size / (2 * np.asarray(intr, dtype=np.float64)[..., :2])))


def check_field_of_view(
    intr: Num[np.ndarray, "*rest 4"], width: int, height: int, *, is_given: bool, name: str = _NAME
) -> None:
    """Checks that both fields of view are strictly inside `FOV_RANGE_DEG` in every frame.

    Args:
      intr: [fx, fy, cx, cy] in pixels of a width x height image.
      width, height: image size in pixels.
      is_given: the user gave these intrinsics, so values outside the range lead to a warning. An
        estimate or a default outside the range is an error.
      name: what the message begins with.

    Raises:
      InputError: a field of view is outside the range and the user did not give it.
    """
    low, high = FOV_RANGE_DEG
    fov = field_of_view(intr, width, height).reshape(-1, 2)
    bad = ((fov <= low) | (fov >= high)).any(axis=1)
    if not bad.any():
        return
    horizontal, vertical = fov[np.argmax(bad)]
    message = (
        f"{name}: a field of view of {horizontal:.1f} x {vertical:.1f} degrees (horizontal x "
        f"vertical) is outside ({low:g}, {high:g})"
    )
    if not is_given:
        raise InputError(f"{message}; give the camera's own with --intrinsics fx,fy,cx,cy")
    warnings.warn(f"{message}, which the model has not seen; is the unit pixels?", stacklevel=2)


def crop_intrinsics(
    intr: Num[np.ndarray, "*rest 4"],
    src_size: tuple[int, int],
    resized_size: tuple[int, int],
    offset: tuple[int, int],
) -> Num[np.ndarray, "*rest 4"]:
    """Adapts intrinsics to resizing and cropping, see `media.image.resize_and_center_crop`.

    Args:
      intr: [fx, fy, cx, cy] in pixels of the source image.
      src_size, resized_size: (width, height) before and after resizing.
      offset: (left, top) of the crop in the resized image.

    Returns:
      An array of the shape of `intr`, in pixels of the crop. The result equals that of
      `transform_intrinsics_for_crop` of diffusers' SANA-WM pipeline.
    """
    scaled = np.array(intr, dtype=np.result_type(intr, np.float32))
    for axis in range(2):
        scaled[..., [axis, axis + 2]] *= resized_size[axis] / src_size[axis]
        scaled[..., axis + 2] -= offset[axis]
    return scaled


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and "," in value and not os.path.exists(value)


def _parse_text(text: str) -> np.ndarray:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise InputError(
            f"{_NAME}: {reprlib.repr(text)} is neither a file nor four numbers fx,fy,cx,cy"
        )
    return np.array(numbers)


def _fit_length(rows: np.ndarray, num_frames: int) -> np.ndarray:
    if len(rows) >= num_frames:
        return rows[:num_frames]
    if len(rows) == 1:
        return np.repeat(rows, num_frames, axis=0)
    old, new = np.linspace(0, 1, len(rows)), np.linspace(0, 1, num_frames)
    return np.stack([np.interp(new, old, column) for column in rows.T], axis=1)
