"""SIGTERM, which schedulers send before they take a machine away, as a wish that the loop reads."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

# how much a process wishes to stop; among several the largest counts
GO_ON, TIME_IS_UP, TERMINATED = 0.0, 1.0, 2.0


class Stopped(Exception):
    """The run was asked to end by SIGTERM and did, in order; the same command goes on with it.

    Args:
      step: steps done.
      checkpoint: where they are saved; None if they are not.
    """

    def __init__(self, step: int, checkpoint: Path | None):
        self.step, self.checkpoint = step, checkpoint
        saved = "nothing new is saved" if checkpoint is None else f"saved in {checkpoint}"
        super().__init__(f"stopped at step {step}, {saved}; the same command goes on with it")


class TerminationSignal:
    """Notes the first SIGTERM within a `with` block; a second one does what it did before.

    Outside of the main thread, where Python has no signals, it notes nothing.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._before: Any = None

    def __enter__(self) -> TerminationSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
