"""Camera paths: reading and checking pose files, relative poses, frame counts.

Axis letters: f pixel frames.
"""

from __future__ import annotations

import os

import numpy as np
from jaxtyping import Float32, Num
from numpy.typing import ArrayLike

from sanawm_jax.camera.actions import get_mapping
from sanawm_jax.camera.npy import load_array, to_finite_float32
from sanawm_jax.runtime.errors import InputError

RIGID_TOLERANCE = 1e-3
ROUNDED_TOLERANCE = 1e-2  # text files often have only three or four digits
_NAME = "camera poses"


def load_c2w(
    value: str | os.PathLike | ArrayLike, *, is_rounded: bool = False
) -> Float32[np.ndarray, "f 4 4"]:
    """Reads camera-to-world poses and checks that each is a rigid motion.

    Args:
      value: a `.npy` file or an array, (f, 4, 4) of any real dtype, f >= 1.
      is_rounded: the numbers come from text, which may have only three digits. A rotation within
        `ROUNDED_TOLERANCE` is then replaced by the nearest rotation.

    Returns:
      The poses in the given world frame.

    Raises:
      InputError: the file cannot be read, the shape is wrong, a value is not finite, or a pose is
        not rigid within `RIGID_TOLERANCE`. The line names the first bad frame.
    """
    array = load_array(value, _NAME)
    if array.ndim != 3 or array.shape[1:] != (4, 4) or len(array) == 0:
        raise InputError(
            f"{_NAME}: expected shape (F, 4, 4) with one matrix a frame, got {array.shape}"
        )
    c2w = to_finite_float32(array, _NAME)
    tolerance = ROUNDED_TOLERANCE if is_rounded else RIGID_TOLERANCE
    rigid = _rigid(c2w.astype(np.float64), tolerance)
    return c2w if rigid is None else rigid.astype(np.float32)


def to_matrices(value: str | os.PathLike | ArrayLike) -> Num[np.ndarray, "f 4 4"]:
    """Reads matrices in any usual shape and adds the last row 0 0 0 1 where it is absent.

    Args:
      value: a `.npy` file or an array of (f, 4, 4) or (f, 3, 4), or of the rows of these matrices
        one after the other, (f, 16) or (f, 12).

    Raises:
      InputError: the file cannot be read, or the array has another shape.
    """
    array = load_array(value, _NAME)
    shape = array.shape
    if array.ndim == 2 and shape[1] in (12, 16):
        array = array.reshape(len(array), -1, 4)
    if array.ndim != 3 or array.shape[1:] not in ((4, 4), (3, 4)) or len(array) == 0:
        raise InputError(
            f"{_NAME}: expected shape (F, 4, 4) or (F, 3, 4) with one matrix a frame, got {shape}"
        )
    if array.shape[1] == 4:
        return array
    last = np.broadcast_to(np.array([0, 0, 0, 1], array.dtype), (len(array), 1, 4))
    return np.concatenate([array, last], axis=1)


def _rigid(c2w: np.ndarray, tolerance: float) -> np.ndarray | None:
    """Returns the poses with the nearest rotations if some are rounded; None if they are exact."""
    rotation = c2w[:, :3, :3]
    with np.errstate(over="ignore", invalid="ignore"):
        gram = np.einsum("Fji,Fjk->Fik", rotation, rotation)
        skew = np.abs(gram - np.eye(3)).max(axis=(1, 2))
        bottom = np.abs(c2w[:, 3] - [0.0, 0.0, 0.0, 1.0]).max(axis=1)
        mirrored = np.linalg.det(rotation) <= 0
    bad_row, bad_rotation = bottom > RIGID_TOLERANCE, skew > tolerance
    bad = bad_row | bad_rotation | mirrored
    rounded = skew > RIGID_TOLERANCE
    if not bad.any():
        if not rounded.any():
            return None
        u, _, vh = np.linalg.svd(rotation[rounded])
        c2w[rounded, :3, :3] = u @ vh
        return c2w
    frame = int(np.argmax(bad))
    if bad_row[frame]:
        reason = "its last row is not 0 0 0 1 (are the matrices transposed?)"
    elif bad_rotation[frame]:
        reason = f"R^T R differs from the identity by {skew[frame]:.3g}; remove scale and shear"
    else:
        reason = "its rotation is a mirror image (determinant below 0)"
    raise InputError(f"{_NAME}: frame {frame} is not a rigid camera-to-world matrix: {reason}")


def relative_to_first(c2w: Num[np.ndarray, "f 4 4"]) -> Float32[np.ndarray, "f 4 4"]:
    """Expresses poses in the frame of the first camera.

    The inverse is that of a rigid motion, `[R^T, -R^T t]`. It is computed in float64 and rounded
    once, so a distant world origin costs no accuracy beyond that of the input.

    Args:
      c2w: rigid camera-to-world poses.

    Returns:
      The poses; the first is exactly the identity.
    """
    poses = np.asarray(c2w, dtype=np.float64)
    unrotate = poses[0, :3, :3].T
    relative = np.tile(np.eye(4), (len(poses), 1, 1))
    relative[1:, :3, :3] = unrotate @ poses[1:, :3, :3]
    relative[1:, :3, 3] = (poses[1:, :3, 3] - poses[0, :3, 3]) @ unrotate.T
    return relative.astype(np.float32)


def snap_num_frames(n: int, stride: int = 8, upper_bound: int | None = None) -> int:
    """Rounds a frame count to the nearest `stride * k + 1`, which the video autoencoder needs.

    A tie is rounded up. If the rounded count is above `upper_bound` (the length of the camera
    path), it is rounded down instead. A count that already has the form `stride * k + 1` is
    returned unchanged, even above `upper_bound`, so clip it to the path first.

    Args:
      n: the requested number of pixel frames; a number below 1 counts as 1.
      stride: pixel frames per latent frame.
      upper_bound: the largest allowed count, or None.

    Returns:
      The rounded count, at least 1. It equals that of `snap_num_frames` of diffusers' SANA-WM
      pipeline.
    """
    below, rest = divmod(max(n, 1) - 1, stride)
    snapped = (below + (2 * rest >= stride)) * stride + 1
    if rest and upper_bound is not None and snapped > upper_bound:
        snapped = below * stride + 1
    return snapped


def keys_from_poses(c2w: Num[np.ndarray, "f 4 4"], mapping: str = "sana") -> list[frozenset[str]]:
    """Guesses which keys would have moved the camera along a path, for display.

    A key counts as held if its part of the motion is at least a quarter of the fastest motion of
    that kind in the whole path, and also above a floor (0.05 degrees per frame; for steps, a
    millionth of the length of the path). Noise and the end of a fading motion therefore show no
    key.

    Args:
      c2w: camera-to-world poses.
      mapping: the meaning of the keys, see `actions`.

    Returns:
      f - 1 sets of keys; entry n moves frame n to frame n + 1, as in `actions.parse_actions`.
    """
    rule = get_mapping(mapping)
    poses = relative_to_first(c2w).astype(np.float64)
    if len(poses) < 2:
        return []
    ahead, aside = poses[:, :3, 2], poses[:, :3, 0]
    yaw = np.unwrap(np.arctan2(ahead[:, 0], ahead[:, 2]))
    pitch = np.arcsin(np.clip(-ahead[:, 1], -1, 1))
    step = np.diff(poses[:, :3, 3], axis=0)
    moves = np.stack([_along(step, ahead[1:]), _along(step, aside[1:])], axis=1)
    turns = np.degrees(np.stack([np.diff(yaw), np.diff(pitch)], axis=1))

    length = np.linalg.norm(step, axis=1)
    move_floor = max(0.25 * length.max(), 1e-6 * length.sum(), 1e-9)
    turn_floor = max(0.25 * np.abs(turns).max(), 0.05)
    signs = [np.sign(moves) * (np.abs(moves) >= move_floor)]
    signs += [np.sign(turns) * (np.abs(turns) >= turn_floor)]
    pairs = (rule.forward, rule.strafe, rule.yaw, rule.pitch)
    return [
        frozenset(pair[0] if s > 0 else pair[1] for pair, s in zip(pairs, row, strict=True) if s)
        for row in np.concatenate(signs, axis=1)
    ]


def _along(step: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """Returns the horizontal part of each step along the horizontal direction of an axis."""
    flat = axis[:, [0, 2]]
    length = np.maximum(np.linalg.norm(flat, axis=1), 1e-9)
    return np.einsum("FX,FX->F", step[:, [0, 2]], flat) / length
