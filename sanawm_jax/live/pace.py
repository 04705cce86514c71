"""When chunks are begun and when their pictures are shown."""

from __future__ import annotations

import collections
from statistics import median

SPARE = 0.02  # seconds by which a chunk is begun earlier than the last ones took
_REMEMBERED = 6  # chunks whose time says how long the next one takes


class Pace:
    """Shows pictures at the video's rate, and begins a chunk as late as it can be.

    A chunk is ready when the one before has been shown, if it takes no longer than the slowest of
    the last ones. A model that is slower than the video shows its pictures evenly at its own rate.
    Times are those of one clock, in seconds.

    Args:
      fps: pictures per second of the video.

    Attributes:
      begin_at: when the next chunk is begun.
      free_at: when all pictures are shown.
    """

    def __init__(self, fps: float):
        self._frame = self._interval = 1 / fps
        self._took: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self.restart()

    def restart(self) -> None:
        """Nothing is to be shown: the next chunk is begun at once."""
        self.begin_at = self.free_at = 0.0

    def add(self, now: float, took: float, pictures: int) -> tuple[float, float]:
        """A chunk is ready; returns when its first picture is due, and the time between two.

        Args:
          now: the present time.
          took: of the chunk.
          pictures: of the chunk.
        """
        self._took.append(took)
        interval = max(self._frame, median(self._took) / max(pictures, 1))
        start = max(now, self.free_at)
        self.free_at = start + pictures * interval
        self.begin_at = self.free_at - max(self._took) - SPARE
        self._interval = interval
        return start, interval

    def ahead(self, now: float) -> int:
        """Pictures that are ready and not yet shown."""
        return round(max(0.0, self.free_at - now) / self._interval)
