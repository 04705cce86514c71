"""Camera paths in common formats: our npz, TUM and KITTI text, COLMAP, nerfstudio.

For every format, the result is camera-to-world in OpenCV axes, with one pose per video frame.
Principal points are used as they are written, whether a tool counts from the corner or from the
centre of a pixel: half a pixel is a sixtieth of a latent. Axis letters: f pixel frames.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.camera.intrinsics import parse_intrinsics
from sanawm_jax.camera.poses import load_c2w
from sanawm_jax.camera.reconstructions import find_colmap_model, read_colmap, read_nerfstudio
from sanawm_jax.camera.track import PoseTrack
from sanawm_jax.runtime.errors import InputError

_QUATERNION_TOLERANCE = 1e-2  # text files often have only three or four digits


def read_poses(path: str | os.PathLike, pose_format: str = "auto") -> PoseTrack:
    """Reads the camera of one video.

    Args:
      path: a file, or the folder of a COLMAP model or of a `transforms.json`.
      pose_format: one of `FORMATS`; "auto" decides by the name and, for text files, by the count
        of numbers in a row.

    Raises:
      InputError: the file does not exist, has another format, is not finite, or has a pose that is
        not rigid. The line names the file and the first bad frame.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no pose file {path}")
    if pose_format == "auto":
        pose_format = detect_format(path)
    if pose_format not in _READERS:
        raise InputError(f"pose_format={pose_format!r}; use one of {', '.join(FORMATS)}")
    try:
        track = _READERS[pose_format](path)
        c2w, intrinsics = load_c2w(track.c2w), track.intrinsics
        if intrinsics is not None:
            intrinsics = parse_intrinsics(intrinsics, len(c2w))
        return track._replace(c2w=c2w, intrinsics=intrinsics)
    except InputError as error:
        line = str(error)
        raise InputError(line if str(path) in line else f"{path}: {line}") from error


def detect_format(path: Path) -> str:
    """Returns the format of a pose file or folder.

    Raises:
      InputError: the format is unknown.
    """
    if path.is_dir():
        if (path / "transforms.json").is_file():
            return "nerfstudio"
        if find_colmap_model(path) is not None:
            return "colmap"
    elif path.suffix in (".npz", ".npy"):
        return "npz"
    elif path.suffix == ".json":
        return "nerfstudio"
    elif path.suffix in (".txt", ".tum", ".kitti"):
        columns = _read_rows(path).shape[1]
        if columns in (8, 12):
            return "tum" if columns == 8 else "kitti"
        raise InputError(f"{path} has {columns} numbers a row; TUM has 8 and KITTI 12")
    raise InputError(
        f"{path} is no pose file that is known: .npz, .npy, TUM or KITTI text, a COLMAP model or "
        "transforms.json"
    )


def read_npz(path: Path) -> PoseTrack:
    """Reads `c2w` (f, 4, 4) and, if they exist, `intrinsics`, `width` and `height`.

    The intrinsics may have any form of `parse_intrinsics`. A bare `.npy` holds only c2w.

    Raises:
      InputError: it is not such a file.
    """
    if path.suffix == ".npy":
        return PoseTrack(load_c2w(path))
    arrays = load_npz(path)
    if "c2w" not in arrays:
        raise InputError(f"{path} has no array c2w; it has {', '.join(arrays) or 'none'}")
    size = None
    if "width" in arrays and "height" in arrays:
        size = (int(arrays["width"]), int(arrays["height"]))
    return PoseTrack(arrays["c2w"], arrays.get("intrinsics"), size)


def load_npz(path: Path) -> dict[str, Any]:
    """Reads all arrays of a `.npz` file without pickles.

    Raises:
      InputError: the file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    # a damaged archive makes zipfile, zlib and numpy raise almost any exception
    except Exception as error:
        raise InputError(
            f"{path} is not a plain .npz file (pickled, cut short or another format); write it "
            "with np.savez"
        ) from error


def read_tum(path: Path) -> PoseTrack:
    """Reads rows `timestamp tx ty tz qx qy qz qw`, camera-to-world, one per frame, in time order.

    Raises:
      InputError: the file has another number of columns, timestamps that do not increase, or
        quaternions whose length is not 1.
    """
    from scipy.spatial.transform import Rotation

    rows = _read_columns(path, 8, "timestamp tx ty tz qx qy qz qw")
    if (np.diff(rows[:, 0]) <= 0).any():
        row = int(np.argmax(np.diff(rows[:, 0]) <= 0)) + 2
        raise InputError(f"{path}: the time of row {row} is not after that of the row before")
    c2w = np.tile(np.eye(4), (len(rows), 1, 1))
    c2w[:, :3, 3] = rows[:, 1:4]
    norm = np.linalg.norm(rows[:, 4:], axis=1)
    finite = np.isfinite(norm)  # the later check of all poses reports the others
    bad = finite & (np.abs(norm - 1) > _QUATERNION_TOLERANCE)
    if bad.any():
        row = int(np.argmax(bad))
        raise InputError(
            f"{path}: the quaternion of row {row + 1} has length {norm[row]:.3g}, not 1"
        )
    c2w[finite, :3, :3] = Rotation.from_quat(rows[finite, 4:]).as_matrix()
    c2w[~finite] = np.nan
    return PoseTrack(c2w)


def read_kitti(path: Path) -> PoseTrack:
    """Reads rows of 12 numbers: the upper 3x4 part of a camera-to-world matrix, row by row.

    Raises:
      InputError: the file has another number of columns.
    """
    rows = _read_columns(path, 12, "the 3x4 matrix row by row")
    c2w = np.tile(np.eye(4), (len(rows), 1, 1))
    c2w[:, :3] = rows.reshape(-1, 3, 4)
    return PoseTrack(c2w)


def _read_columns(path: Path, count: int, meaning: str) -> np.ndarray:
    rows = _read_rows(path)
    if rows.shape[1] != count:
        raise InputError(f"{path} has {rows.shape[1]} numbers a row; expected {count}, {meaning}")
    return rows


def _read_rows(path: Path) -> np.ndarray:
    """Reads a table (rows, columns) float64; commas count as blanks, and # starts a comment."""
    try:
        lines = path.read_text(encoding="utf-8-sig").replace(",", " ").splitlines()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it warns of no rows; see the error below
            rows = np.loadtxt(lines, ndmin=2)
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise InputError(
            f"{path} is not a table of numbers with rows of one length ({error})"
        ) from error
    if not rows.size:
        raise InputError(f"{path} holds no poses")
    return rows


_READERS: dict[str, Callable[[Path], PoseTrack]] = {
    "npz": read_npz,
    "tum": read_tum,
    "kitti": read_kitti,
    "colmap": read_colmap,
    "nerfstudio": read_nerfstudio,
}
FORMATS = ("auto", *_READERS)
