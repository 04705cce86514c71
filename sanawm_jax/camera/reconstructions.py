"""Camera paths from reconstructions: COLMAP models and nerfstudio's `transforms.json`.

Frames are sorted by image name, and numbers in a name are compared by value (`2.png` comes before
`10.png`). A reconstruction has its own scale, while the network was trained on metres.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.camera.track import PoseTrack
from sanawm_jax.runtime.errors import InputError

# camera models that are a pinhole with optional lens distortion
_COLMAP_PINHOLES = (
    "SIMPLE_PINHOLE PINHOLE SIMPLE_RADIAL RADIAL OPENCV FULL_OPENCV DIVISION SIMPLE_DIVISION"
).split()
_NERFSTUDIO_PINHOLES = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")
_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Returns a sort key that compares numbers in a name by value."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


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
            "COLMAP models are read by pycolmap: pip install 'sanawm-jax[poses]'"
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
    images.sort(key=lambda image: natural_key(image.name))
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
    return PoseTrack(c2w, np.array(intrinsics, np.float32), size)


def read_nerfstudio(path: Path) -> PoseTrack:
    """Reads `transforms.json`: OpenGL axes, and intrinsics for all frames or for each frame.

    Intrinsics are fl_x, fl_y, cx, cy, w, h. Without a focal length, `camera_angle_x` in radians is
    used. Lens distortion is ignored, with a warning.

    Raises:
      InputError: it is not such a file, a camera is not a pinhole, or the frames have different
        sizes.
    """
    file = path / "transforms.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        frames = list(content["frames"])
        frames.sort(key=lambda frame: natural_key(str(frame["file_path"])))
        matrices = [np.asarray(frame["transform_matrix"], np.float64) for frame in frames]
    except (OSError, ValueError, KeyError, TypeError) as error:
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
        rows = [_nerfstudio_intrinsics(frame) for frame in merged]
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: intrinsics that are no numbers ({error})") from error
    known = [row for row in rows if row is not None]
    if not known:
        return PoseTrack(c2w)
    if len(known) < len(rows):
        raise InputError(f"{file} has intrinsics for {len(known)} of its {len(rows)} frames")
    size = _one_size([(int(f["w"]), int(f["h"])) for f in merged if "w" in f and "h" in f], file)
    return PoseTrack(c2w, np.array(known, np.float32), size)


def _nerfstudio_intrinsics(frame: dict[str, Any]) -> tuple[float, float, float, float] | None:
    width, height = frame.get("w"), frame.get("h")
    focal = frame.get("fl_x")
    if focal is None and frame.get("camera_angle_x") is not None and width is not None:
        focal = float(width) / 2 / np.tan(float(frame["camera_angle_x"]) / 2)
    if focal is None:
        return None
    cx = frame.get("cx", None if width is None else float(width) / 2)
    cy = frame.get("cy", None if height is None else float(height) / 2)
    if cx is None or cy is None:
        return None
    return float(focal), float(frame.get("fl_y", focal)), float(cx), float(cy)


def _one_size(sizes: list[tuple[int, int]], where: Path) -> tuple[int, int] | None:
    if len(set(sizes)) > 1:
        raise InputError(f"{where} has images of several sizes: {sorted(set(sizes))[:3]}")
    return sizes[0] if sizes else None


def _warn_distorted(where: Path) -> None:
    warnings.warn(
        f"{where} has lens distortion, which is left out; undistort the images for exact rays",
        stacklevel=3,
    )
