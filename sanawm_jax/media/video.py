"""Writes videos. A file appears under its name only when it is complete."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from sanawm_jax.runtime.atomic import atomic_write
from sanawm_jax.runtime.errors import InputError

_BT709 = 1  # the code of matrix, primaries and transfer function of HD video in H.264 streams
_LIMITED_RANGE = 1


def require_av() -> ModuleType:
    """Imports PyAV; raises `InputError` if PyAV or its H.264 encoder is missing."""
    try:
        import av
    except ImportError as error:
        raise InputError("MP4 files need PyAV: pip install av") from error
    if "libx264" not in av.codecs_available:
        raise InputError("this build of PyAV has no libx264 encoder: pip install --force av")
    return av


def check_writable(folder: str | os.PathLike) -> Path:
    """Creates a folder if necessary and checks that files can be written there.

    Raises:
      InputError: the folder cannot be created, is not a folder, or does not accept files.
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
    """Converts frames in [0, 1] to bytes, one frame at a time to save memory.

    Values outside the range are clipped and fractions are truncated, as in upstream's code and in
    `export_to_video` of diffusers: trunc(255 x). Bytes that were divided by 255 are restored.

    Args:
      frames: (F, H, W, 3) floating point, or any array with a leading axis.

    Raises:
      InputError: a value is NaN or infinite.
    """
    out = np.empty(frames.shape, dtype=np.uint8)
    for i, frame in enumerate(frames):
        if not np.isfinite(frame).all():
            raise InputError(
                f"frame {i} holds NaN or infinity: a weight is damaged, or --dtype is too narrow"
            )
        out[i] = np.clip(frame, 0, 1) * np.float32(255)
    return out


def as_float(frames: np.ndarray) -> np.ndarray:
    """Returns frames as float64 in [0, 1]: bytes divided by 255, or floating point as it is."""
    return frames / 255.0 if frames.dtype == np.uint8 else frames.astype(np.float64)


def write_mp4(
    path: str | os.PathLike,
    frames: np.ndarray | Iterable[np.ndarray],
    fps: float,
    crf: int = 18,
) -> Path:
    """Writes H.264 video (yuv420p, BT.709, index first) that browsers and players can open.

    Frames are encoded as they arrive, so an iterator needs little memory. The pixel format requires
    even sizes, so odd sizes are padded by repeating the last row or column.

    Args:
      path: the file to write; it must end in .mp4.
      frames: uint8, an array (F, H, W, 3) or an iterable of frames (H, W, 3) and chunks
        (n, H, W, 3), all of one size.
      fps: frames per second.
      crf: quality, 0 (lossless) to 51; 18 looks almost the same as the source.

    Returns:
      The path.

    Raises:
      InputError: fps, crf or the file name is invalid, or PyAV is missing.
      ValueError: there are no frames, or a frame has another type or size than the first.
    """
    with atomic_write(_mp4_path(path)) as partial:
        with Mp4Writer(partial, fps, crf=crf, options={"movflags": "+faststart"}) as writer:
            for frame in _each_frame(frames):
                writer.add(frame)
    return Path(path)


class Mp4Writer:
    """Writes H.264 video (yuv420p, BT.709) frame by frame; a context manager.

    Args:
      path: the file to write.
      fps: frames per second.
      crf: quality, see `write_mp4`.
      options: of the container.
      codec: further options of the encoder.

    Raises:
      InputError: see `write_mp4`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: float,
        *,
        crf: int = 18,
        options: dict[str, str] | None = None,
        codec: dict[str, str] | None = None,
    ):
        if not 0 <= crf <= 51:
            raise InputError(f"crf={crf} is outside 0..51")
        self._rate = frame_rate(fps)
        self._av = require_av()
        self._container = self._av.open(os.fspath(path), "w", format="mp4", options=options or {})
        self._codec = {"crf": str(crf), **(codec or {})}
        self._stream: Any = None
        self._count = 0

    def add(self, frame: np.ndarray, *, is_key: bool = False) -> None:
        """Encodes one frame (H, W, 3) uint8; with `is_key` a player can start there."""
        if self._stream is None:
            self._stream = self._open(*(size + size % 2 for size in frame.shape[:2]))
        pad = [(0, size % 2) for size in frame.shape[:2]]
        even = np.ascontiguousarray(np.pad(frame, [*pad, (0, 0)], mode="edge"))
        picture = self._av.VideoFrame.from_ndarray(even, format="rgb24").reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
        )
        picture.pts, picture.time_base = self._count, 1 / self._rate
        if is_key:
            picture.pict_type = self._av.video.frame.PictureType.I
        self._container.mux(self._stream.encode(picture))
        self._count += 1

    def _open(self, height: int, width: int) -> Any:
        stream = self._container.add_stream("libx264", rate=self._rate, options=self._codec)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / self._rate
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        return stream

    def close(self) -> None:
        """Encodes what waits and ends the file."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())
            self._stream = None
        self._container.close()

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mp4_path(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"the video's name must end in .mp4, not {path.name}")
    return path


def write_gif(
    path: str | os.PathLike, frames: np.ndarray | Iterable[np.ndarray], fps: float
) -> Path:
    """Writes a looping animation.

    GIF counts time in hundredths of a second. Each frame ends at the hundredth nearest to its true
    time, so the animation keeps its total length.

    Args:
      path: the file to write.
      frames: uint8, as for `write_mp4`.
      fps: frames per second, at most 50.

    Returns:
      The path.

    Raises:
      InputError: fps is invalid.
      ValueError: there are no frames, or a frame has another type or size than the first.
    """
    path = Path(path)
    rate = frame_rate(fps)
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


def frame_rate(fps: float) -> Fraction:
    """Returns a rate that video files can have; raises `InputError` for any other number."""
    # A comparison with NaN is false, and a number near 0 has no fraction with a small denominator.
    rate = Fraction(fps).limit_denominator(1001) if 0 < fps <= 1000 else 0
    if not rate:
        raise InputError(f"fps={fps} must be from 0.001 to 1000")
    return Fraction(rate)


def _each_frame(frames: np.ndarray | Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields (H, W, 3) frames after checking them; at least one frame."""
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
