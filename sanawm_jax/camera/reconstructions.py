"""Camera paths from reconstructions: COLMAP models and nerfstudio's `transforms.json`.

Frames are sorted by the last part of the image's name, and numbers in it are compared by value
(`2.png` comes before `10.png`). A reconstruction has its own scale, while the network was trained
on metres.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.camera.intrinsics import parse_intrinsics
from sanawm_jax.camera.track import FRACTIONS, PoseTrack
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.json_file import read_json

# camera models that are a pinhole with optional lens distortion
_COLMAP_PINHOLES = (
    "SIMPLE_PINHOLE PINHOLE SIMPLE_RADIAL RADIAL OPENCV FULL_OPENCV DIVISION SIMPLE_DIVISION"
).split()
_NERFSTUDIO_PINHOLES = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")
# only known endings: names such as 1305031102.175 have none
_IMAGE_ENDING = re.compile(
    r"\.(png|jpe?g|webp|tiff?|bmp|exr|heic|heif|avif|jp2|ppm|pgm|dng|npy)$", re.IGNORECASE
)
_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Returns a sort key that compares numbers in a name by value."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


def frame_name(name: str) -> str:
    """Returns the last part of an image's name without its ending, by which frames are matched.

    Tools change folders, endings (`.png` for `.jpg`) and, on some systems, the case or the Unicode
    form of a name.
    """
    last = unicodedata.normalize("NFC", re.split(r"[/\\]", name)[-1])
    return _IMAGE_ENDING.sub("", last).casefold()


def find_colmap_model(folder: Path) -> Path | None:
    """Returns the folder itself, its `sparse/0` or its `sparse`: the first that holds a model."""
    for place in (folder, folder / "sparse" / "0", folder / "sparse"):
        if any(
            (place / f"cameras.{end}").is_file() and (place / f"images.{end}").is_file()
            for end in ("bin", "txt")
        ):
            return place
    return None


def read_colmap(folder: Path) -> PoseTrack:
    """Reads poses and cameras of all registered images, in the order of their names.

    Lens distortion is ignored, with a warning.

    Raises:
      InputError: there is no model, pycolmap is not installed, the images have different sizes, or
        a camera is not a pinhole.
    """
    model = find_colmap_model(folder)
    if model is None:
        raise InputError(f"{folder} holds no COLMAP model (cameras and images, .bin or .txt)")
    try:
        import pycolmap
    except ImportError:
        raise InputError(
            "COLMAP models are read by pycolmap: pip install pycolmap, or "
            "pip install 'sanawm-jax[poses]'"
        ) from None
    try:
        reconstruction: Any = pycolmap.Reconstruction(str(model))
        images = [image for image in reconstruction.images.values() if image.has_pose]
    # errors of its C++ code arrive as any Python exception
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"pycolmap cannot read {model}: {reason[-1]}") from error
    if not images:
        raise InputError(f"{model} has no registered images")
    images.sort(key=lambda image: _order(image.name))
    cameras = [reconstruction.cameras[image.camera_id] for image in images]
    for camera in cameras:
        if camera.model.name not in _COLMAP_PINHOLES:
            raise InputError(
                f"{model} has a camera of model {camera.model.name}; undistort the images to "
                "PINHOLE (colmap image_undistorter)"
            )
    if not all(camera.is_undistorted() for camera in cameras):
        _warn_distorted(model)
    c2w = np.tile(np.eye(4), (len(images), 1, 1))
    for matrix, image in zip(c2w, images, strict=True):
        matrix[:3] = image.cam_from_world().inverse().matrix()
    intrinsics = [
        (c.focal_length_x, c.focal_length_y, c.principal_point_x, c.principal_point_y)
        for c in cameras
    ]
    size = _one_size([(camera.width, camera.height) for camera in cameras], model)
    names = tuple(image.name for image in images)
    return PoseTrack(c2w, np.array(intrinsics, np.float32), size, names)


def read_nerfstudio(path: Path) -> PoseTrack:
    """Reads `transforms.json`: OpenGL axes, and intrinsics for all frames or for each frame.

    Intrinsics are fl_x, fl_y, cx, cy, w, h. Without a focal length, `camera_angle_x` or
    `camera_angle_y` in radians is used, for which the size of the images need not be known. Lens
    distortion is ignored, with a warning.

    Raises:
      InputError: it is not such a file, a camera is not a pinhole, or the frames have different
        sizes.
    """
    file = path / "transforms.json" if path.is_dir() else path
    try:
        content = read_json(file)
        frames = list(content["frames"])
        frames.sort(key=lambda frame: _order(str(frame["file_path"])))
        names = tuple(str(frame["file_path"]) for frame in frames)
        matrices = [np.asarray(frame["transform_matrix"], np.float64) for frame in frames]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is no transforms.json: {type(error).__name__} {error}") from error
    if not frames:
        raise InputError(f"{file} has no frames")
    c2w = np.tile(np.eye(4), (len(frames), 1, 1))
    for number, (matrix, given) in enumerate(zip(c2w, matrices, strict=True)):
        if given.shape not in ((4, 4), (3, 4)):
            raise InputError(f"{file}: transform_matrix of frame {number} is {given.shape}")
        matrix[: len(given)] = given
    c2w[:, :3, 1:3] *= -1  # OpenGL's camera has y up and looks along -z
    merged = [{**content, **frame} for frame in frames]
    models = {str(frame.get("camera_model", "OPENCV")) for frame in merged}
    if not models <= set(_NERFSTUDIO_PINHOLES):
        raise InputError(f"{file} has camera_model {', '.join(sorted(models))}; use OPENCV")
    try:
        if any(float(frame.get(name, 0) or 0) for frame in merged for name in _DISTORTION):
            _warn_distorted(file)
        sizes = [(int(f["w"]), int(f["h"])) for f in merged if f.get("w") and f.get("h")]
        if any(side <= 0 for size in sizes for side in size):
            raise ValueError("w and h must be positive")
        size = _one_size(sizes, file)
        found = [_nerfstudio_intrinsics(frame, size) for frame in merged]
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: intrinsics that are no numbers ({error})") from error
    known = [one for one in found if one is not None]
    if not known:
        return PoseTrack(c2w, names=names)
    if len(known) < len(found):
        raise InputError(f"{file} has intrinsics for {len(known)} of its {len(found)} frames")
    units = {unit for _, unit in known}
    if len(units) > 1:
        raise InputError(f"{file} has focal lengths for some frames and angles for others")
    rows = np.array([row for row, _ in known])
    # parse_intrinsics refuses what is not finite or not positive, and NaN here means "unknown"
    parse_intrinsics(np.where(np.isnan(rows), 1.0, rows), len(rows))
    track = PoseTrack(c2w, rows.astype(np.float32), units.pop(), names)
    return track if size is None else track._replace(intrinsics=track.intrinsics_of(*size))


def _nerfstudio_intrinsics(
    frame: dict[str, Any], size: tuple[int, int] | None
) -> tuple[list[float], tuple[int, int] | None] | None:
    """Returns [fx, fy, cx, cy], NaN where a number is unknown, and the size they belong to."""

    def number(name: str) -> float:
        value = frame.get(name)
        if value is not None and not np.isfinite(float(value)):
            raise ValueError(f"{name} is {value}")
        return np.nan if value is None else float(value)

    row = [number(name) for name in ("fl_x", "fl_y", "cx", "cy")]
    if not np.isnan(row[:2]).all():
        return row, size
    angles = [number(f"camera_angle_{axis}") for axis in "xy"]
    if np.isnan(angles).all():
        return None
    row[:2] = [0.5 / np.tan(angle / 2) for angle in angles]
    if size is None:  # a principal point in pixels cannot be used without their number
        return [*row[:2], np.nan, np.nan], FRACTIONS
    scaled = [length * pixels for length, pixels in zip(row[:2], size, strict=True)]
    return [*scaled, *row[2:]], size


def _order(name: str) -> tuple[Any, ...]:
    return natural_key(frame_name(name)), natural_key(name)


def _one_size(sizes: list[tuple[int, int]], where: Path) -> tuple[int, int] | None:
    if len(set(sizes)) > 1:
        raise InputError(f"{where} has images of several sizes: {sorted(set(sizes))[:3]}")
    return sizes[0] if sizes else None


def _warn_distorted(where: Path) -> None:
    warnings.warn(
        f"{where} has lens distortion, which is left out; undistort the images for exact rays",
        stacklevel=3,
    )
