"""Reads a folder of videos with cameras and captions, and checks it before encoding starts.

Axis letters: N pixel frames, H W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sanawm_jax.camera.intrinsics import crop_intrinsics, default_intrinsics
from sanawm_jax.camera.reconstructions import frame_name, natural_key
from sanawm_jax.camera.track import PoseTrack
from sanawm_jax.data.own_cameras import in_frame_order, intrinsics_in_pixels
from sanawm_jax.data.zip_sidecars import caption_of, read_records
from sanawm_jax.media.image import load_image, resize_and_center_crop, shown_size
from sanawm_jax.media.video_reader import VideoFacts, iterate_frames, video_facts
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.file_names import by_name, is_companion, one_form
from sanawm_jax.text.prompts import read_prompt

VIDEO_ENDINGS = tuple(
    ".mp4 .mov .mkv .webm .avi .m4v .ts .mts .m2ts .mpg .mpeg .wmv .flv .ogv .3gp".split()
)
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".heic", ".avif")
_SAME_RATE = 0.1  # films of 15 frames per second are used like those of 16


@dataclasses.dataclass(frozen=True)
class OwnVideo:
    """One video to encode.

    Attributes:
      key: the file's name without its ending.
      path: a video file, or a folder of images.
      numbers: (N,) which frames of the video are used, in increasing order.
      c2w: (N, 4, 4) poses of these frames.
      intrinsics: (N, 4) in pixels of the frames as shown, or None.
      origin: where the intrinsics came from, for the report.
      facts: what the file says of itself.
      caption: its text.
    """

    key: str
    path: Path
    numbers: np.ndarray
    c2w: np.ndarray
    intrinsics: np.ndarray | None
    origin: str
    facts: VideoFacts
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
    for path in sorted(folder.iterdir(), key=lambda p: natural_key(one_form(p.name))):
        if is_companion(path.name):
            continue
        is_video = path.is_file() and path.suffix.lower() in VIDEO_ENDINGS
        if not is_video and not (path.is_dir() and images_of(path)):
            continue
        key = one_form(path.stem if is_video else path.name)
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
    frame_step: int = 1,
    fps: float = 0.0,
    intrinsics: object = None,
) -> OwnVideo:
    """Combines a video with its camera, and chooses `num_frames` frames from its start.

    Args:
      key, path, caption: see `OwnVideo`.
      track: a pose for every frame of the video.
      num_frames: N.
      frame_step: every `frame_step`-th frame is used.
      fps: with a `frame_step` of 1, the frames that are nearest in time to this rate are used; 0
        uses every frame. The rate of a folder of images is unknown, and every image is used.
      intrinsics: see `parse_intrinsics`, in pixels of the video, for a track without intrinsics.

    Raises:
      InputError: the frames and the poses do not belong together, or there are too few of them, or
        the intrinsics are not in pixels of the video.
    """
    images = images_of(path) if path.is_dir() else None
    facts = _facts_of_images(images, path) if images else video_facts(path)
    if images is None and len(track.c2w) != len(facts.times):
        facts = video_facts(path, decode=True)  # packets may be more than frames
    track = in_frame_order(track, images, path, len(facts.times))
    rows, origin = intrinsics_in_pixels(track, facts, intrinsics, path)
    numbers = _chosen(facts, frame_step, fps, path)
    if len(numbers) < num_frames:
        most = max(len(numbers) - 1, 0) // 8 * 8 + 1
        have = f"{len(facts.times)} frames"
        if len(numbers) != -(-len(facts.times) // frame_step):
            have += f" of {facts.fps:.4g} a second, of which {len(numbers)} are used"
        raise InputError(
            f"{path} has {have}, too few for {num_frames}; give --num_frames {most} or less"
        )
    numbers = numbers[:num_frames]
    known = None if rows is None else rows[numbers]
    return OwnVideo(key, path, numbers, track.c2w[numbers], known, origin, facts, caption)


def load_clip(video: OwnVideo, height: int, width: int) -> Clip:
    """Reads the frames of a video, and scales and crops them as sampling does with its image.

    A video without intrinsics gets the default field of view that sampling uses.

    Raises:
      InputError: the video cannot be read, it has fewer frames than its camera, or a frame has
        another size than the first.
    """
    taken = len(video.numbers)
    out = np.empty((taken, height, width, 3), np.uint8)
    done, first = 0, None
    for number, frame in enumerate(_frames(video.path)):
        if number != video.numbers[done]:
            continue
        picture, *crop = resize_and_center_crop(frame, height, width)
        first = first or crop
        if crop != first:
            raise InputError(_other_size(video.path, str(number), crop[0], first[0]))
        out[done] = np.asarray(picture)
        done += 1
        if done == taken:
            break
    if done < taken or first is None:
        raise InputError(
            f"{video.path} ends after {done} of the {taken} frames that its camera has"
        )
    source, resized, offset = first
    intrinsics = video.intrinsics
    if intrinsics is None:
        intrinsics = np.tile(default_intrinsics(*source), (taken, 1))
    return Clip(out, crop_intrinsics(intrinsics, source, resized, offset))


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
        folders = {path.parent for path in videos.values()}
        texts = [f for folder in folders for f in folder.glob("*.txt") if not is_companion(f.name)]
        beside = by_name(((f.stem, f) for f in texts), "the folder of the videos")
        return {k: read_prompt(str(beside[k])) if k in beside else "" for k in videos}
    captions = {key: caption_of(record) for key, record in read_records(file).items()}
    found = {key: captions.get(key) for key in videos}
    missing = [key for key, text in found.items() if text is None]
    if missing:
        raise InputError(f"{file} has no caption of {', '.join(missing[:5])}; name each by its key")
    return {key: text for key, text in found.items() if text is not None}


def images_of(folder: Path) -> list[Path]:
    """Returns the images of a folder in the order of the numbers in their names."""
    files = [
        f
        for f in folder.iterdir()
        if f.suffix.lower() in IMAGE_ENDINGS and not is_companion(f.name)
    ]
    return sorted(files, key=lambda f: natural_key(frame_name(f.name)))


def _facts_of_images(images: list[Path], folder: Path) -> VideoFacts:
    by_name(((frame_name(image.name), image) for image in images), folder)
    sizes = [shown_size(image) for image in images]
    for image, size in zip(images, sizes, strict=True):
        if size != sizes[0]:
            raise InputError(_other_size(folder, image.name, size, sizes[0]))
    return VideoFacts(np.zeros(len(images)), sizes[0], sizes[0])


def _other_size(path: Path, frame: str, size: tuple[int, ...], first: tuple[int, ...]) -> str:
    return (
        f"{path}: frame {frame} is {size[0]}x{size[1]} and the frames before it are "
        f"{first[0]}x{first[1]}; give all frames of a video one size"
    )


def _chosen(facts: VideoFacts, frame_step: int, fps: float, path: Path) -> np.ndarray:
    """Returns the numbers of the frames to use.

    Raises:
      InputError: the video has fewer frames per second than `fps`.
    """
    every = np.arange(0, len(facts.times), frame_step)
    if frame_step > 1 or not fps or not facts.fps or abs(facts.fps / fps - 1) <= _SAME_RATE:
        return every
    if facts.fps < fps:
        raise InputError(
            f"{path} has {facts.fps:.4g} frames a second, fewer than {fps:g}; give --fps 0 to use "
            "every frame as it is"
        )
    times = facts.times - facts.times[0]
    wanted = np.arange(int(times[-1] * fps + 0.5) + 1) / fps
    after = np.searchsorted(times, wanted).clip(1, len(times) - 1)
    is_before = wanted - times[after - 1] <= times[after] - wanted
    return np.unique(after - is_before)


def _frames(path: Path) -> Iterator[Image.Image]:
    if path.is_dir():
        yield from map(load_image, images_of(path))
    else:
        yield from map(Image.fromarray, iterate_frames(path))
