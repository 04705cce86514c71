"""The camera of each video: which file it is in, which pose belongs to which frame, and its unit.

Axis letters: f frames of a video.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from sanawm_jax.camera.intrinsics import (
    WIDEST_FOV_DEG,
    check_field_of_view,
    field_of_view,
    parse_intrinsics,
)
from sanawm_jax.camera.npy import load_array
from sanawm_jax.camera.pose_files import load_npz, read_poses
from sanawm_jax.camera.poses import load_c2w
from sanawm_jax.camera.reconstructions import find_colmap_model, frame_name
from sanawm_jax.camera.track import PoseTrack
from sanawm_jax.data.zip_members import CameraFile
from sanawm_jax.media.video_reader import VideoFacts
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.file_names import by_name, is_companion

POSE_ENDINGS = (".npz", ".npy", ".txt", ".tum", ".kitti", ".json")
_OFF_CENTRE = 0.2  # of the width or the height
_NARROWEST_FOV_DEG = 1.0  # below it, the numbers are in another unit


def read_tracks(
    poses: Path, keys: list[str], pose_format: str = "auto", **options: str
) -> dict[str, PoseTrack]:
    """Returns the camera of each video.

    Args:
      poses: a folder with a file or a folder per key; or the camera of the only video; or a `.npz`
        with ids, ranges, pose and intrinsics, as in upstream's `_camera.npz`.
      keys: the names of the videos.
      pose_format, options: see `camera.pose_files.read_poses`.

    Raises:
      InputError: a video has no camera, or its camera cannot be read; the message names it.
    """
    is_one = poses.is_file() or (
        poses.is_dir() and ((poses / "transforms.json").is_file() or find_colmap_model(poses))
    )
    if is_one:
        if poses.suffix == ".npz" and "ids" in load_npz(poses):
            return _tracks_of_sidecar(poses, keys)
        if len(keys) > 1:
            raise InputError(
                f"--poses {poses} is the camera of one video and there are {len(keys)}; give a "
                "folder with one for each"
            )
        return {keys[0]: read_poses(poses, pose_format, **options)}
    if not poses.is_dir():
        raise InputError(f"--poses {poses} is neither a file nor a folder")
    places = by_name(((p.name, p) for p in poses.iterdir() if not is_companion(p.name)), poses)
    return {key: read_poses(_place_of(places, key, poses), pose_format, **options) for key in keys}


def in_frame_order(
    track: PoseTrack, images: list[Path] | None, path: Path, frames: int
) -> PoseTrack:
    """Returns the poses in the order of the frames.

    Poses of a folder of images are matched by the names of the images, if the format has names.
    Otherwise pose n belongs to frame n.

    Args:
      track: the camera of the video.
      images: the images in the order of the frames; None for a video file.
      path: the video, for messages.
      frames: how many frames it has.

    Raises:
      InputError: a frame has no pose, a pose has no frame, or two have one name.
    """
    count = len(track.c2w)
    order = None
    if track.names is not None:
        places = _places(track.names, f"the camera of {path}")
        if images is not None:
            order = _matched(places, [image.name for image in images], path)
    if order is None:
        if count != frames:
            raise InputError(
                f"{path} has {frames} frames and its camera {count} poses; give one pose per frame"
            )
        return track
    known = track.intrinsics
    return track._replace(
        c2w=track.c2w[order],
        intrinsics=None if known is None else known[order],
        names=tuple(track.names[n] for n in order) if track.names else None,
    )


def intrinsics_in_pixels(
    track: PoseTrack, facts: VideoFacts, given: object, path: Path
) -> tuple[np.ndarray | None, str]:
    """Returns the intrinsics (f, 4) in pixels of the frames as shown, and where they came from.

    Args:
      track: the camera, in the order of the frames.
      facts: sizes of the video.
      given: what `--intrinsics` names, for a track without intrinsics; or None.
      path: the video, for messages.

    Raises:
      InputError: they belong to a picture of another shape, or cannot be in pixels.
    """
    shown = facts.shown
    if track.intrinsics is not None:
        # pixels that are not square: a camera of the stored pixels is scaled along each axis
        misfit = track.misfit(*shown)
        if misfit and track.misfit(*facts.stored):
            raise InputError(f"{path}: {misfit}; give the camera of these pictures")
        rows, origin = track.intrinsics_of(*shown), "camera file"
        assert rows is not None
        if track.size is not None and track.size != shown:
            origin += f", scaled from {track.size[0]}x{track.size[1]}"
    elif given is not None:
        array = parse_intrinsics(given, len(track.c2w))  # pyright: ignore[reportArgumentType]
        count = _entries(given)
        if count not in (1, len(track.c2w)):
            raise InputError(
                f"--intrinsics has {count} entries and {path} has {len(track.c2w)} frames; give "
                "one or as many"
            )
        rows, origin = array, "--intrinsics"
    else:
        return None, "assumed field of view"
    _check_unit(rows, shown, path, has_size=track.size is not None)
    return rows, origin


def _check_unit(rows: np.ndarray, size: tuple[int, int], path: Path, *, has_size: bool) -> None:
    fov = field_of_view(rows, *size)
    bad = ((fov < _NARROWEST_FOV_DEG) | (fov > WIDEST_FOV_DEG)).any(axis=1)
    centre = rows[:, 2:] / np.array(size)
    outside = ((centre < 0) | (centre > 1)).any(axis=1) & (not has_size)
    if (bad | outside).any():
        frame = int(np.argmax(bad | outside))
        numbers = ", ".join(f"{v:g}" for v in rows[frame])
        horizontal, vertical = fov[frame]
        raise InputError(
            f"{path}: intrinsics {numbers} are not in pixels of its {size[0]}x{size[1]} frames: a "
            f"field of view of {horizontal:.1f} x {vertical:.1f} degrees, or a centre outside; "
            "fractions of the image need width=1 and height=1 beside them, and pixels of another "
            "size need its width and height"
        )
    check_field_of_view(rows, *size, is_given=True, name=f"{path}: intrinsics")
    if (np.abs(centre - 0.5) > _OFF_CENTRE).any():
        x, y = rows[np.argmax((np.abs(centre - 0.5) > _OFF_CENTRE).any(axis=1)), 2:]
        warnings.warn(
            f"{path}: the principal point ({x:g}, {y:g}) is far from the centre of its "
            f"{size[0]}x{size[1]} frames; are the intrinsics of a turned or a larger picture?",
            stacklevel=2,
        )


def _entries(given: object) -> int:
    if isinstance(given, str) and "," in given:
        return 1
    array = load_array(given, "intrinsics")  # pyright: ignore[reportArgumentType]
    return len(array) if array.ndim == 3 or (array.ndim == 2 and array.shape != (3, 3)) else 1


def _places(names: tuple[str, ...] | list[str], where: str) -> dict[str, int]:
    """Returns the position of each frame's name; see `reconstructions.frame_name`."""
    found: dict[str, int] = {}
    for place, name in enumerate(names):
        key = frame_name(name)
        if key in found:
            raise InputError(
                f"{where} has two frames of one name, {names[found[key]]} and {name}; rename one"
            )
        found[key] = place
    return found


def _matched(places: dict[str, int], images: list[str], path: Path) -> list[int]:
    frames = _places(images, str(path))
    without_pose = [image for image in images if frame_name(image) not in places]
    without_image = sorted(places.keys() - frames.keys())
    for what, names, other in (
        ("images", without_pose, "no pose in its camera"),
        ("poses", without_image, "no image"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(
                f"{path}: {what} {', '.join(names[:3])}{more} have {other}; frames are matched by "
                "name"
            )
    return [places[frame_name(image)] for image in images]


def _place_of(places: dict[str, Path], key: str, folder: Path) -> Path:
    found = [places[name] for name in (*(f"{key}{e}" for e in POSE_ENDINGS), key) if name in places]
    if len(found) > 1:
        raise InputError(f"{found[0]} and {found[1]} are both cameras of one video; keep one")
    if not found:
        raise InputError(
            f"{folder} has no camera of video {key}: no {key}/ and no {key} with one of "
            f"{', '.join(POSE_ENDINGS)}"
        )
    return found[0]


def _tracks_of_sidecar(file: Path, keys: list[str]) -> dict[str, PoseTrack]:
    try:
        cameras = CameraFile(file)
    except KeyError as error:
        raise InputError(f"{file} lacks {error}; it needs ids, ranges, pose, intrinsics") from error
    except (ValueError, TypeError, IndexError) as error:
        line = str(error)
        raise InputError(line if str(file) in line else f"{file}: {line}") from error
    tracks = {}
    for key in keys:
        if key not in cameras:
            raise InputError(f"{file} lacks '{key}' among its ids")
        try:
            pose, intrinsics = cameras.of(key)
            tracks[key] = PoseTrack(load_c2w(pose), parse_intrinsics(intrinsics, len(pose)))
        except InputError as error:
            raise InputError(f"{file}: {key}: {error}") from error
    return tracks
