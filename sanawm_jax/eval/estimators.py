"""Where estimated camera poses come from: structure from motion, or a file of another program.

An estimator is a function of a video and some frame numbers, and returns `Estimate`. The search
against a known scene (`photometric.py`) is the third kind. An estimator that fails raises
`EstimateError`, and `camera_row` turns this into a row that says so.

Axis letters: N frames, H W rows and columns.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sanawm_jax.camera.poses import load_c2w
from sanawm_jax.eval.camera import camera_accuracy
from sanawm_jax.runtime.errors import InputError

MAPPINGS = ("incremental", "global")
_LEAST_SHARE = 0.5  # of the frames; with fewer poses, the rest of a path is not measured


class EstimateError(Exception):
    """An estimator found no poses; the message says why."""


class Estimate(NamedTuple):
    """Poses of some frames of a video.

    Attributes:
      frames: numbers of the frames that have a pose, in increasing order.
      c2w: (len(frames), 4, 4) camera to world, in any world and of any scale.
    """

    frames: np.ndarray
    c2w: np.ndarray


Estimator = Callable[[np.ndarray, np.ndarray], Estimate]  # (video, frame numbers)


def camera_row(
    estimator: Estimator,
    video: np.ndarray,
    truth: np.ndarray,
    interval: int = 4,
    skip_first_frame: bool = False,
) -> dict[str, Any]:
    """Camera errors of a video.

    Args:
      estimator: see the head of this module.
      video: (N, H, W, 3) uint8 or in [0, 1].
      truth: (N, 4, 4) the commanded poses.
      interval, skip_first_frame: see `camera.pair_poses`.

    Returns:
      rot_err_deg, trans_err, cam_mc, poses, and asked, the number of frames whose pose was sought.
      If the estimator failed, only asked, poses = 0 and error.
    """
    frames = np.arange(0, len(video), interval)[int(skip_first_frame) :]
    try:
        found = estimator(video, frames)
        errors = camera_accuracy(truth[found.frames], found.c2w)
    except (EstimateError, InputError) as error:
        return {"asked": len(frames), "poses": 0, "error": str(error)}
    return {**errors, "asked": len(frames)}


def from_file(path: str | os.PathLike) -> Estimator:
    """Poses that another program made.

    Args:
      path: a `.npz` file with `c2w`, and optionally `frames`, the numbers of the frames of its
        poses; or a `.npy` file of c2w. Without `frames`, the file has a pose of every frame.

    Raises:
      InputError: the file cannot be read or has no poses.
    """
    path = Path(path)
    numbers = None
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                c2w = load_c2w(arrays["c2w"])
                numbers = np.asarray(arrays["frames"], int) if "frames" in arrays else None
        except KeyError as error:
            raise InputError(f"{path} has no array c2w") from error
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is not a readable .npz file of arrays") from error
    else:
        c2w = load_c2w(path)
    known = np.arange(len(c2w)) if numbers is None else numbers
    if known.shape != (len(c2w),):
        raise InputError(f"{path} has {len(c2w)} poses and {known.size} frame numbers")

    def estimate(video: np.ndarray, frames: np.ndarray) -> Estimate:
        row = {int(number): index for index, number in enumerate(known)}
        kept = [int(frame) for frame in frames if int(frame) in row]
        if len(kept) < 2:
            raise EstimateError(f"{path} has poses of {len(kept)} of {len(frames)} frames")
        return Estimate(np.array(kept), c2w[[row[frame] for frame in kept]])

    return estimate


def structure_from_motion(
    mapping: str = "incremental",
    intrinsics: np.ndarray | None = None,
    scale: int = 1,
    seed: int = 0,
) -> Estimator:
    """COLMAP's structure from motion, by the package pycolmap.

    Args:
      mapping: `incremental`, or `global` (GLOMAP).
      intrinsics: (4,) fx, fy, cx, cy in pixels, an integer coordinate being the centre of a pixel;
        they stay fixed. None estimates the focal length too.
      scale: enlarges small pictures by this whole factor, since SIFT finds little in them.
      seed: of the random samples of matching and mapping.

    Raises:
      InputError: an unknown mapping, or pycolmap is missing.
    """
    if mapping not in MAPPINGS:
        raise InputError(f"unknown mapping {mapping!r}; use one of {', '.join(MAPPINGS)}")
    try:
        import pycolmap
    except ImportError:
        raise InputError(
            "estimating poses needs pycolmap: pip install 'sanawm-jax[poses]'"
        ) from None

    def estimate(video: np.ndarray, frames: np.ndarray) -> Estimate:
        with tempfile.TemporaryDirectory(prefix="sanawm_poses_") as folder:
            try:
                models = _reconstruct(pycolmap, Path(folder), video, frames)
            # errors of its C++ code arrive as any Python exception
            except Exception as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise EstimateError(f"pycolmap failed: {lines[-1]}") from error
        poses = max(models, key=len, default={})
        if len(poses) < max(2, _LEAST_SHARE * len(frames)):
            raise EstimateError(f"pycolmap placed {len(poses)} of {len(frames)} frames")
        numbers = sorted(poses)
        return Estimate(np.array(numbers), np.stack([poses[number] for number in numbers]))

    def _reconstruct(
        colmap: Any, folder: Path, video: np.ndarray, frames: np.ndarray
    ) -> list[dict[int, np.ndarray]]:
        _write_pictures(folder / "pictures", video, frames, scale)
        colmap.logging.minloglevel = int(colmap.logging.FATAL)
        colmap.set_random_seed(seed)
        database, pictures = folder / "database.db", folder / "pictures"
        reader = colmap.ImageReaderOptions()
        if intrinsics is None:
            reader.camera_model = "SIMPLE_PINHOLE"
        else:
            # COLMAP's pixel centres are at halves
            fx, fy, cx, cy = np.asarray(intrinsics, np.float64) * scale
            reader.camera_model = "PINHOLE"
            shift = scale / 2
            reader.camera_params = f"{fx}, {fy}, {cx + shift}, {cy + shift}"
        colmap.extract_features(
            database, pictures, camera_mode=colmap.CameraMode.SINGLE, reader_options=reader
        )
        colmap.match_exhaustive(database)
        (folder / "models").mkdir()
        if mapping == "incremental":
            options = colmap.IncrementalPipelineOptions()
            options.ba_refine_focal_length = intrinsics is None
            options.ba_refine_extra_params = False
            options.min_model_size = 2
            run = colmap.incremental_mapping
        else:
            options = colmap.GlobalPipelineOptions()
            adjustment = options.mapper.bundle_adjustment
            adjustment.refine_focal_length = intrinsics is None
            adjustment.refine_extra_params = False
            run = colmap.global_mapping
        options.random_seed = seed
        models = run(database, pictures, folder / "models", options)
        return [_poses(model) for model in models.values()]

    return estimate


def _write_pictures(folder: Path, video: np.ndarray, frames: np.ndarray, scale: int) -> None:
    from PIL import Image

    from sanawm_jax.media.video import to_uint8

    folder.mkdir()
    for number in frames:
        frame = video[number]
        picture = Image.fromarray(frame if frame.dtype == np.uint8 else to_uint8(frame[None])[0])
        if scale > 1:
            size = (picture.width * scale, picture.height * scale)
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / f"{int(number):06d}.png")


def _poses(model: Any) -> dict[int, np.ndarray]:
    """Camera-to-world matrices (4, 4) of a reconstruction, by frame number."""
    found = {}
    for image in model.images.values():
        if image.has_pose:
            pose = np.eye(4)
            pose[:3] = image.cam_from_world().inverse().matrix()
            found[int(Path(image.name).stem)] = pose
    return found
