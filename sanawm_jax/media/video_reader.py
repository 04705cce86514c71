"""Reads videos as a player shows them: upright, not mirrored, and with square pixels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sanawm_jax.media.video import require_av
from sanawm_jax.runtime.errors import InputError

_WIDEST_PIXEL = 10  # a ratio beyond this, or below its inverse, is a damaged header


class VideoFacts(NamedTuple):
    """What is known of a video before all of it is decoded.

    Attributes:
      times: seconds at which each frame is shown, in order; their count is the number of frames.
      shown: (width, height) of the frames that `iterate_frames` yields.
      stored: (width, height) of the upright frames before their pixels are made square.
    """

    times: np.ndarray
    shown: tuple[int, int]
    stored: tuple[int, int]

    @property
    def fps(self) -> float:
        """The mean number of frames per second; 0 if the file does not say when it shows them."""
        length = self.times[-1] - self.times[0] if len(self.times) > 1 else 0.0
        return float((len(self.times) - 1) / length) if length > 0 else 0.0


def read_mp4(path: str | os.PathLike) -> np.ndarray:
    """Reads the video stream as (F, H, W, 3) uint8 RGB.

    Raises:
      InputError: the file does not exist, is damaged or holds no video.
    """
    return np.stack(list(iterate_frames(path)))


def iterate_frames(path: str | os.PathLike) -> Iterator[np.ndarray]:
    """Yields the frames of the video stream as they are shown, (H, W, 3) uint8 RGB; at least one.

    Raises:
      InputError: the file does not exist, is damaged, holds no video, or is to be shown at an angle
        other than a multiple of 90 degrees.
    """
    with _opened(path) as (container, stream):
        aspect, is_empty = _pixel_aspect(stream), True
        for frame in container.decode(stream):
            is_empty = False
            yield _as_shown(frame, aspect, path)[0]
    if is_empty:
        raise InputError(f"{path} holds no video frames")


def video_facts(path: str | os.PathLike, *, decode: bool = False) -> VideoFacts:
    """Counts the frames that are shown, whether or not the file's header has a count.

    The count is that of the packets, without those that an edit list discards. A few formats store
    packets that are never shown, and damaged packets cannot be shown: `decode` counts exactly, and
    takes the time of decoding the whole video.

    Raises:
      InputError: as for `iterate_frames`.
    """
    with _opened(path) as (container, stream):
        if decode:
            stamps = [frame.pts for frame in container.decode(stream)]
        else:
            packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
            stamps = [p.dts if p.pts is None else p.pts for p in packets]
        rate = stream.average_rate
        times = _times(stamps, stream.time_base, rate)
    with _opened(path) as (container, stream):
        picture, stored = _as_shown(next(container.decode(stream)), _pixel_aspect(stream), path)
    return VideoFacts(times, (picture.shape[1], picture.shape[0]), stored)


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple[Any, Any]]:
    """Yields the container and its video stream; a cover picture is no video."""
    av = require_av()
    try:
        with av.open(os.fspath(path), metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None:
                raise InputError(f"{path} holds no video")
            yield container, stream
    except InputError:
        raise
    # FFmpeg's errors; PyAV's own, such as UnicodeDecodeError for names of a damaged file
    except (av.FFmpegError, StopIteration, ValueError, LookupError, ArithmeticError) as error:
        raise InputError(f"cannot read {path} as a video") from error


def _times(stamps: list[int | None], base: Fraction | None, rate: Fraction | None) -> np.ndarray:
    if base is not None and all(stamp is not None for stamp in stamps):
        times = np.sort(np.array(stamps, np.float64)) * float(base)
        if (np.diff(times) > 0).all():
            return times
    return np.arange(len(stamps)) / float(rate) if rate else np.zeros(len(stamps))


def _pixel_aspect(stream: Any) -> float:
    """Width of a stored pixel in heights."""
    aspect = float(stream.sample_aspect_ratio or 0)
    return aspect if 1 / _WIDEST_PIXEL < aspect < _WIDEST_PIXEL else 1.0


def _as_shown(
    frame: Any, aspect: float, path: str | os.PathLike
) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns a frame as it is shown, and its upright (width, height) with pixels as stored."""
    pixels = frame.to_ndarray(format="rgb24")
    height, width = pixels.shape[:2]
    if aspect != 1:
        shown = (max(1, round(width * aspect)), height)
        pixels = np.asarray(Image.fromarray(pixels).resize(shown, Image.Resampling.LANCZOS))
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return pixels, (width, height)
    # A point (x, y) is shown at (a x + c y, b x + d y); a video of a telephone has 90 degrees here.
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].astype(np.float64)
    size = max(abs(v) for v in (a, b, c, d)) or 1.0
    a, b, c, d = (round(v / size) for v in (a, b, c, d))
    if (a, d) == (0, 0) and b and c:
        pixels, width, height = pixels.swapaxes(0, 1), height, width
        flip_x, flip_y = c < 0, b < 0
    elif (b, c) == (0, 0) and a and d:
        flip_x, flip_y = a < 0, d < 0
    else:
        raise InputError(
            f"{path} is to be shown at an angle of {frame.rotation} degrees; re-encode it upright"
        )
    pixels = pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
    return np.ascontiguousarray(pixels), (width, height)
