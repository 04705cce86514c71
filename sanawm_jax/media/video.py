"""Writing and reading films. A file appears under its name only when it is complete."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from sanawm_jax.runtime.atomic import atomic_write
from sanawm_jax.runtime.errors import InputError

_BT709 = 1  # matrix, primaries and transfer of HD video share this code in H.264 streams
_LIMITED_RANGE = 1


def require_av() -> ModuleType:
    """Imports PyAV; `InputError` if it, or its H.264 encoder, is missing."""
    try:
        import av
    except ImportError as error:
        raise InputError("MP4 files need PyAV: pip install av") from error
    if "libx264" not in av.codecs_available:
        raise InputError("this build of PyAV has no libx264 encoder: pip install --force av")
    return av


def check_writable(folder: str | os.PathLike) -> Path:
    """Creates a folder if need be and proves that files can be written there.

    Raises:
      InputError: it cannot be created, is not a folder, or refuses a file.
    """
    folder = Path(folder)
    probe = folder / f".{uuid.uuid4().hex}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or "unknown reason"
        raise InputError(f"cannot write to the folder {folder}: {reason}") from error
    return folder


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Turns frames in [0, 1] into bytes, one frame at a time to spare memory.

    Values outside are clipped and fractions cut off, as upstream and `export_to_video` of
    diffusers do: trunc(255 x). Bytes divided by 255 come back unchanged.

    Args:
      frames: (F, H, W, 3) floating point, or any array with a leading axis.

    Raises:
      ValueError: a NaN or an infinity.
    """
    out = np.empty(frames.shape, dtype=np.uint8)
    for i, frame in enumerate(frames):
        if not np.isfinite(frame).all():
            raise ValueError(f"frame {i} holds NaN or infinity")
        out[i] = np.clip(frame, 0, 1) * np.float32(255)
    return out


def write_mp4(
    path: str | os.PathLike,
    frames: np.ndarray | Iterable[np.ndarray],
    fps: float,
    crf: int = 18,
) -> Path:
    """Writes H.264 video (yuv420p, BT.709, index first) that browsers and players open.

    Frames are encoded as they arrive, so an iterator streams with little memory. Odd sizes are
    padded to even ones by repeating the last row or column, which the pixel format requires.

    Args:
      path: the file to write; it must end in .mp4.
      frames: uint8, an array (F, H, W, 3) or an iterable of frames (H, W, 3) and chunks
        (n, H, W, 3), all of one size.
      fps: frames a second.
      crf: quality, 0 (lossless) to 51; 18 is hard to tell from the source.

    Returns:
      The path.

    Raises:
      InputError: a bad fps, crf or file name, or PyAV is missing.
      ValueError: no frames, or frames of another type or size than the first.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"the video's name must end in .mp4, not {path.name}")
    if not 0 <= crf <= 51:
        raise InputError(f"crf={crf} is outside 0..51")
    rate = _frame_rate(fps)
    av = require_av()
    with atomic_write(path) as partial:
        _encode(av, partial, _each_frame(frames), rate, crf)
    return path


def _encode(
    av: ModuleType, path: Path, frames: Iterator[np.ndarray], rate: Fraction, crf: int
) -> None:
    first = next(frames)
    height, width = (size + size % 2 for size in first.shape[:2])
    with av.open(path, "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / rate
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        for i, frame in enumerate(_prepend(first, frames)):
            pad = [(0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0)]
            even = np.ascontiguousarray(np.pad(frame, pad, mode="edge"))
            picture = av.VideoFrame.from_ndarray(even, format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            picture.pts, picture.time_base = i, 1 / rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def read_mp4(path: str | os.PathLike) -> np.ndarray:
    """Reads the first video stream as (F, H, W, 3) uint8 RGB.

    Raises:
      InputError: the file is absent, damaged or holds no video.
    """
    return np.stack(list(iterate_frames(path)))


def iterate_frames(path: str | os.PathLike) -> Iterator[np.ndarray]:
    """Yields the frames of the first video stream, (H, W, 3) uint8 RGB; at least one.

    Raises:
      InputError: the file is absent, damaged or holds no video.
    """
    av = require_av()
    count = 0
    try:
        with av.open(os.fspath(path)) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
                count += 1
    except (av.FFmpegError, IndexError) as error:
        raise InputError(f"cannot read {path} as a video") from error
    if not count:
        raise InputError(f"{path} holds no video frames")


def video_facts(path: str | os.PathLike) -> tuple[int, int, int]:
    """Frames, width and height that a file's header states; 0 frames if it does not say.

    Raises:
      InputError: the file is absent, damaged or holds no video.
    """
    av = require_av()
    try:
        with av.open(os.fspath(path)) as container:
            stream = container.streams.video[0]
            return stream.frames, stream.width, stream.height
    except (av.FFmpegError, IndexError) as error:
        raise InputError(f"cannot read {path} as a video") from error


def write_gif(
    path: str | os.PathLike, frames: np.ndarray | Iterable[np.ndarray], fps: float
) -> Path:
    """Writes an endless animation.

    GIF counts time in hundredths of a second; each frame ends at the hundredth nearest to its true
    time, so the whole keeps its length.

    Args:
      path: the file to write.
      frames: uint8, as for `write_mp4`.
      fps: frames a second, at most 50.

    Returns:
      The path.

    Raises:
      InputError: a bad fps.
      ValueError: no frames, or frames of another type or size than the first.
    """
    path = Path(path)
    rate = _frame_rate(fps)
    if rate > 50:
        raise InputError(f"GIF cannot show {float(rate):g} frames a second; give 50 or less")
    pictures = [Image.fromarray(frame).quantize(256) for frame in _each_frame(frames)]
    ends = [round(100 * i / rate) for i in range(len(pictures) + 1)]
    durations = [10 * (end - start) for start, end in itertools.pairwise(ends)]
    with atomic_write(path) as partial:
        pictures[0].save(
            partial,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=durations,
            loop=0,
        )
    return path


def _frame_rate(fps: float) -> Fraction:
    # Also catches NaN, which compares false.
    if not 0 < fps <= 1000:
        raise InputError(f"fps={fps} must be above 0 and at most 1000")
    return Fraction(fps).limit_denominator(1001)


def _each_frame(frames: np.ndarray | Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields checked (H, W, 3) frames; at least one."""
    shape = None
    for item in frames:
        for frame in item if np.ndim(item) == 4 else [item]:
            frame = np.asarray(frame)
            shape = shape or frame.shape
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
                raise ValueError(
                    f"video frames must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}"
                )
            if frame.shape != shape:
                raise ValueError(f"a frame of shape {frame.shape} follows frames of {shape}")
            yield frame
    if shape is None:
        raise ValueError("there are no frames to write")


def _prepend(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest
