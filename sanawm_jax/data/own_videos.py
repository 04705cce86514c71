"""Reads a folder of videos with cameras and captions, and checks it before encoding starts.

Axis letters: N pixel frames, H W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sanawm_jax.camera.intrinsics import crop_intrinsics, default_intrinsics, parse_intrinsics
from sanawm_jax.camera.pose_files import load_npz, read_poses
from sanawm_jax.camera.reconstructions import find_colmap_model, natural_key
from sanawm_jax.camera.track import PoseTrack
from sanawm_jax.data.zip_sidecars import caption_of, read_records
from sanawm_jax.media.image import load_image, resize_and_center_crop
from sanawm_jax.media.video import iterate_frames, video_facts
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.text.prompts import read_prompt

VIDEO_ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
POSE_ENDINGS = (".npz", ".npy", ".txt", ".tum", ".kitti", ".json")


@dataclasses.dataclass(frozen=True)
class OwnVideo:
    """One video to encode.

    Attributes:
      key: the file's name without its ending.
      path: a video file, or a folder of images.
      c2w: (N, 4, 4) poses of the frames that are used.
      intrinsics: (N, 4) in pixels of the video, or None.
      caption: its text.
    """

    key: str
    path: Path
    c2w: np.ndarray
    intrinsics: np.ndarray | None
    caption: str


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video as the autoencoder reads it.

    Attributes:
      video: (N, H, W, 3) uint8.
      intrinsics: (N, 4) float32 in pixels of these frames.
    """

    video: np.ndarray
    intrinsics: np.ndarray


def find_videos(folder: Path) -> dict[str, Path]:
    """Returns the videos of a folder by key, in the order of their names.

    A video is a file or a folder of images.

    Raises:
      InputError: the folder has no video, or two videos with the same key.
    """
    if not folder.is_dir():
        raise InputError(f"--videos {folder} is no folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda p: natural_key(p.name)):
        if path.name.startswith("."):
            continue
        is_video = path.is_file() and path.suffix.lower() in VIDEO_ENDINGS
        if not is_video and not (path.is_dir() and _images(path)):
            continue
        key = path.stem if is_video else path.name
        if key in found:
            raise InputError(f"{found[key]} and {path} have one name; rename one of them")
        found[key] = path
    if not found:
        raise InputError(f"{folder} holds no videos ({', '.join(VIDEO_ENDINGS)})")
    return found


def read_own_video(
    key: str,
    path: Path,
    track: PoseTrack,
    caption: str,
    *,
    num_frames: int,
    frame_step: int,
    intrinsics: np.ndarray | None,
) -> OwnVideo:
    """Combines a video with its camera, and uses `num_frames` frames, every `frame_step`-th one.

    Args:
      key, path, caption: see `OwnVideo`.
      track: a pose for every frame of the video.
      num_frames: N.
      frame_step: 1 uses every frame.
      intrinsics: (4,) or (F, 4) in pixels of the video, for a track without intrinsics.

    Raises:
      InputError: the numbers of poses and frames differ, or there are too few of them.
    """
    frames, width, height = _facts(path)
    poses = len(track.c2w)
    if frames and poses != frames:
        raise InputError(
            f"{path} has {frames} frames and its camera {poses} poses; give one pose per frame"
        )
    if -(-poses // frame_step) < num_frames:
        most = max(-(-poses // frame_step) - 1, 0) // 8 * 8 + 1
        raise InputError(
            f"{path} has {poses} frames, too few for {num_frames}; give --num_frames {most} or less"
        )
    rows = slice(0, (num_frames - 1) * frame_step + 1, frame_step)
    known = track.intrinsics_of(width, height)
    if known is None and intrinsics is not None:
        known = parse_intrinsics(intrinsics, poses)
    return OwnVideo(key, path, track.c2w[rows], None if known is None else known[rows], caption)


def load_clip(video: OwnVideo, frame_step: int, height: int, width: int) -> Clip:
    """Reads the frames of a video, and scales and crops them as sampling does with its image.

    A video without intrinsics gets the default field of view that sampling uses.

    Raises:
      InputError: the video cannot be read, or it has fewer frames than its camera.
    """
    taken = len(video.c2w)
    out = np.empty((taken, height, width, 3), np.uint8)
    done, crop = 0, None
    for number, frame in enumerate(_frames(video.path)):
        if number % frame_step:
            continue
        picture, *crop = resize_and_center_crop(frame, height, width)
        out[done] = np.asarray(picture)
        done += 1
        if done == taken:
            break
    if done < taken or crop is None:
        raise InputError(
            f"{video.path} ends after {done} of the {taken} frames that its camera has"
        )
    source, resized, offset = crop
    intrinsics = video.intrinsics
    if intrinsics is None:
        intrinsics = np.tile(default_intrinsics(*source), (taken, 1))
    return Clip(out, crop_intrinsics(intrinsics, source, resized, offset))


def read_tracks(poses: Path, keys: list[str], pose_format: str) -> dict[str, PoseTrack]:
    """Returns the camera of each video.

    Args:
      poses: a folder with a file or a folder per key; or the camera of the only video; or a `.npz`
        with ids, ranges, pose and intrinsics, as in upstream's `_camera.npz`.
      keys: the names of the videos.
      pose_format: see `camera.pose_files.read_poses`.

    Raises:
      InputError: a video has no camera, or its camera cannot be read; the message names it.
    """
    is_one = poses.is_file() or (
        poses.is_dir() and ((poses / "transforms.json").is_file() or find_colmap_model(poses))
    )
    if is_one:
        if poses.suffix == ".npz":
            arrays = load_npz(poses)
            if "ids" in arrays:
                return _tracks_of_sidecar(arrays, keys, poses)
        if len(keys) > 1:
            raise InputError(
                f"--poses {poses} is the camera of one video and there are {len(keys)}; give a "
                "folder with one for each"
            )
        return {keys[0]: read_poses(poses, pose_format)}
    if not poses.is_dir():
        raise InputError(f"--poses {poses} is neither a file nor a folder")
    return {key: read_poses(_find_pose(poses, key), pose_format) for key in keys}


def read_captions(file: Path | None, videos: dict[str, Path]) -> dict[str, str]:
    """Returns the caption of each video.

    Args:
      file: JSON or JSONL by key. With None, the caption of a video is in the file `<key>.txt` in
        the video's folder; without that file it is empty.
      videos: their paths by key.

    Raises:
      InputError: the file cannot be read, or has no caption of some video.
    """
    if file is None:
        beside = {key: path.with_name(f"{key}.txt") for key, path in videos.items()}
        return {k: read_prompt(str(f)) if f.is_file() else "" for k, f in beside.items()}
    captions = {key: caption_of(record) for key, record in read_records(file).items()}
    found = {key: captions.get(key) for key in videos}
    missing = [key for key, text in found.items() if text is None]
    if missing:
        raise InputError(f"{file} has no caption of {', '.join(missing[:5])}; name each by its key")
    return {key: text for key, text in found.items() if text is not None}


def _find_pose(folder: Path, key: str) -> Path:
    places = [folder / f"{key}{end}" for end in POSE_ENDINGS] + [folder / key]
    found = [place for place in places if place.exists()]
    if len(found) > 1:
        raise InputError(f"{found[0]} and {found[1]} are both cameras of one video; keep one")
    if not found:
        raise InputError(
            f"{folder} has no camera of video {key}: no {key}/ and no {key} with one of "
            f"{', '.join(POSE_ENDINGS)}"
        )
    return found[0]


def _tracks_of_sidecar(arrays: dict, keys: list[str], file: Path) -> dict[str, PoseTrack]:
    try:
        ranges = {str(k): range(a, a + n) for k, (a, n) in zip(arrays["ids"], arrays["ranges"])}  # noqa: B905
        rows = {key: np.array(ranges[key]) for key in keys}
        return {
            key: PoseTrack(arrays["pose"][r], arrays["intrinsics"][r]) for key, r in rows.items()
        }
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"{file} lacks {error}; it needs ids, ranges, pose, intrinsics") from error


def _images(folder: Path) -> list[Path]:
    files = [f for f in folder.iterdir() if f.suffix.lower() in IMAGE_ENDINGS]
    return sorted(files, key=lambda f: natural_key(f.name))


def _facts(path: Path) -> tuple[int, int, int]:
    if not path.is_dir():
        return video_facts(path)
    images = _images(path)
    return len(images), *load_image(images[0]).size


def _frames(path: Path) -> Iterator[Image.Image]:
    if path.is_dir():
        yield from map(load_image, _images(path))
    else:
        yield from map(Image.fromarray, iterate_frames(path))
