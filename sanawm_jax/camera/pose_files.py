"""Camera paths in common formats: arrays, TUM, KITTI and RealEstate10K text, COLMAP, nerfstudio.

For every format, the result is camera-to-world in OpenCV axes, with one pose per video frame.
Principal points are used as they are written, whether a tool counts from the corner or from the
centre of a pixel: half a pixel is a sixtieth of a latent. Axis letters: f pixel frames.
"""

from __future__ import annotations

import codecs
import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Num

from sanawm_jax.camera.intrinsics import parse_intrinsics
from sanawm_jax.camera.npy import load_array
from sanawm_jax.camera.poses import ROUNDED_TOLERANCE, load_c2w, to_matrices
from sanawm_jax.camera.reconstructions import find_colmap_model, read_colmap, read_nerfstudio
from sanawm_jax.camera.track import FRACTIONS, PoseTrack
from sanawm_jax.runtime.errors import InputError

AXES = ("opencv", "opengl")
DIRECTIONS = ("c2w", "w2c")
_LARGEST_SIDE = 1_000_000  # pixels of an image
_LAYOUTS = (
    ".npy or .npz arrays, TUM (8 numbers a row), KITTI (12), 4x4 matrices (16), RealEstate10K "
    "(19), a COLMAP model or transforms.json"
)


def read_poses(
    path: str | os.PathLike,
    pose_format: str = "auto",
    *,
    axes: str = "opencv",
    direction: str = "c2w",
) -> PoseTrack:
    """Reads the camera of one video.

    Args:
      path: a file, or the folder of a COLMAP model or of a `transforms.json`.
      pose_format: one of `FORMATS`; "auto" decides by the content and, for text files, by the count
        of numbers in a row.
      axes: of the camera in arrays and in text: "opencv" (y down, looking along z) or "opengl" (y
        up, looking along -z). The other formats define their own.
      direction: of the matrices in arrays and in text: "c2w", or "w2c", which is inverted.

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
        if track.size is not None and not all(0 < side <= _LARGEST_SIDE for side in track.size):
            raise InputError(f"images of {track.size[0]:g}x{track.size[1]:g} pixels cannot be")
        c2w = load_c2w(track.c2w, is_rounded=pose_format in _TEXT)
        if pose_format in _PLAIN:
            c2w = from_convention(c2w, axes, direction)
        elif (axes, direction) != (AXES[0], DIRECTIONS[0]):
            from_convention(c2w, axes, direction)  # an unknown name is the first fault
            raise InputError(f"{pose_format} defines its axes itself; leave out axes and direction")
        return track._replace(c2w=c2w)
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
        raise InputError(f"{path} is no pose file that is known: {_LAYOUTS}")
    try:
        with path.open("rb") as file:
            head = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
    except OSError as error:
        raise InputError(f"cannot open {path}: {error.strerror or 'not readable'}") from error
    if head.startswith((b"\x93NUMPY", b"PK")) or path.suffix in (".npz", ".npy"):
        return "npz"
    if head.startswith(b"{") or path.suffix == ".json":
        return "nerfstudio"
    columns = _read_rows(path).shape[1]
    if columns not in _COLUMNS:
        raise InputError(f"{path} has {columns} numbers a row; known are {_LAYOUTS}")
    return _COLUMNS[columns]


def from_convention(
    poses: Num[np.ndarray, "f 4 4"], axes: str, direction: str
) -> Float32[np.ndarray, "f 4 4"]:
    """Checks that poses (f, 4, 4) are rigid, and converts them to camera-to-world, OpenCV axes.

    Raises:
      InputError: a pose is not rigid, or `axes` or `direction` is not one of `AXES`, `DIRECTIONS`.
    """
    for name, given, known in (("axes", axes, AXES), ("direction", direction, DIRECTIONS)):
        if given not in known:
            raise InputError(f"{name}={given!r} of the camera path; use {' or '.join(known)}")
    c2w = load_c2w(poses)
    if (axes, direction) == (AXES[0], DIRECTIONS[0]):
        return c2w
    poses = c2w.astype(np.float64)
    if direction == "w2c":
        poses = np.linalg.inv(poses)
    if axes == "opengl":
        poses[:, :3, 1:3] *= -1
    return poses.astype(np.float32)


def read_npz(path: Path) -> PoseTrack:
    """Reads `c2w` (f, 4, 4) and, if they exist, `intrinsics`, `width` and `height`.

    The intrinsics may have any form of `parse_intrinsics`, with one entry or one per pose. ViPE's
    files have `data` (f, 4, 4) and `inds`, the number of each frame. A bare `.npy` holds only c2w.
    The matrices may have any shape of `to_matrices`.

    Raises:
      InputError: it is not such a file.
    """
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    if not is_archive and path.suffix != ".npz":
        return PoseTrack(to_matrices(path))
    arrays = load_npz(path)
    name = "data" if "c2w" not in arrays and {"data", "inds"} <= arrays.keys() else "c2w"
    if name not in arrays:
        raise InputError(f"{path} has no array c2w; it has {', '.join(arrays) or 'none'}")
    poses = to_matrices(arrays[name])
    if name == "data":
        poses = poses[_order_of(arrays["inds"], len(poses))]
    if "intrinsics" not in arrays:
        return PoseTrack(poses)
    given = load_array(arrays["intrinsics"], "intrinsics")
    rows = parse_intrinsics(given, len(poses))
    count = len(given) if given.ndim > 1 and given.shape != (3, 3) else 1
    if count not in (1, len(poses)):
        raise InputError(f"intrinsics: {count} entries for {len(poses)} poses; give one or as many")
    return PoseTrack(poses, rows, _size(arrays))


def _order_of(numbers: Any, count: int) -> np.ndarray:
    """Returns the order that sorts poses by the numbers of their frames, which have no gap."""
    numbers = np.asarray(numbers)
    if numbers.shape != (count,) or numbers.dtype.kind not in "iu":
        raise InputError(f"inds are {numbers.dtype} {numbers.shape}; expected {count} integers")
    order = np.argsort(numbers, kind="stable")
    steps = np.diff(numbers[order].astype(np.int64))
    if (steps != 1).any():
        frame = int(numbers[order][np.argmax(steps != 1)])
        raise InputError(f"inds: frame {frame} is not followed by frame {frame + 1}")
    return order


def _size(arrays: dict[str, Any]) -> tuple[int, int] | None:
    if not {"width", "height"} <= arrays.keys():
        return None
    try:
        width, height = (int(arrays[name]) for name in ("width", "height"))
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError("width and height are not one number each") from error
    if width <= 0 or height <= 0:
        raise InputError(f"width {width} and height {height} must be positive")
    return width, height


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


def read_tum(path: Path, *, is_w_first: bool = False) -> PoseTrack:
    """Reads rows `timestamp tx ty tz qx qy qz qw`, camera-to-world, one per frame, in time order.

    Args:
      path: a text file.
      is_w_first: the quaternions are qw qx qy qz, as some programs write them.

    Raises:
      InputError: the file has another number of columns, timestamps that do not increase, or
        quaternions whose length is not 1.
    """
    from scipy.spatial.transform import Rotation

    rows = _read_columns(path, 8, "timestamp tx ty tz qx qy qz qw")
    _check_times(rows[:, 0], path)
    c2w = np.tile(np.eye(4), (len(rows), 1, 1))
    c2w[:, :3, 3] = rows[:, 1:4]
    if is_w_first:
        rows = rows[:, [0, 1, 2, 3, 5, 6, 7, 4]]
    with np.errstate(over="ignore"):
        norm = np.linalg.norm(rows[:, 4:], axis=1)
    finite = np.isfinite(norm)  # the later check of all poses reports the others
    bad = finite & (np.abs(norm - 1) > ROUNDED_TOLERANCE)
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
    return PoseTrack(to_matrices(_read_columns(path, 12, "the 3x4 matrix row by row")))


def read_matrices(path: Path) -> PoseTrack:
    """Reads rows of 16 numbers: a camera-to-world matrix, row by row.

    Raises:
      InputError: the file has another number of columns.
    """
    return PoseTrack(to_matrices(_read_columns(path, 16, "the 4x4 matrix row by row")))


def read_re10k(path: Path) -> PoseTrack:
    """Reads RealEstate10K: `timestamp fx fy cx cy 0 0` and a 3x4 world-to-camera matrix per row.

    The intrinsics are fractions of the image's width and height. A first line with the address of
    the film is skipped.

    Raises:
      InputError: the file has another number of columns, or timestamps that do not increase.
    """
    rows = _read_columns(path, 19, "timestamp fx fy cx cy 0 0 and the 3x4 matrix row by row")
    _check_times(rows[:, 0], path)
    w2c = load_c2w(to_matrices(rows[:, 7:]), is_rounded=True)
    intrinsics = parse_intrinsics(rows[:, 1:5], len(rows))
    return PoseTrack(from_convention(w2c, "opencv", "w2c"), intrinsics, FRACTIONS)


def _check_times(times: np.ndarray, path: Path) -> None:
    if (np.diff(times) <= 0).any():
        row = int(np.argmax(np.diff(times) <= 0)) + 2
        raise InputError(f"{path}: the time of row {row} is not after that of the row before")


def _read_columns(path: Path, count: int, meaning: str) -> np.ndarray:
    rows = _read_rows(path)
    if rows.shape[1] != count:
        raise InputError(f"{path} has {rows.shape[1]} numbers a row; expected {count}, {meaning}")
    return rows


def _read_rows(path: Path) -> np.ndarray:
    """Reads a table (rows, columns) float64; commas count as blanks, and # starts a comment."""
    try:
        lines = path.read_text(encoding="utf-8-sig").replace(",", " ").splitlines()
        if lines and "://" in lines[0]:  # RealEstate10K names its film
            lines[0] = ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it warns of no rows; see the error below
            rows = np.loadtxt(lines, ndmin=2)
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise InputError(
            f"{path} is not a table of numbers with rows of one length ({_first_line(error)}); "
            f"known are {_LAYOUTS}"
        ) from error
    if not rows.size:
        raise InputError(f"{path} holds no poses")
    return rows


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


_READERS: dict[str, Callable[[Path], PoseTrack]] = {
    "npz": read_npz,
    "tum": read_tum,
    "tum_wxyz": functools.partial(read_tum, is_w_first=True),
    "kitti": read_kitti,
    "matrices": read_matrices,
    "re10k": read_re10k,
    "colmap": read_colmap,
    "nerfstudio": read_nerfstudio,
}
_PLAIN = ("npz", "tum", "tum_wxyz", "kitti", "matrices")
_TEXT = ("kitti", "matrices", "nerfstudio")
_COLUMNS = {8: "tum", 12: "kitti", 16: "matrices", 19: "re10k"}
FORMATS = ("auto", *_READERS)
