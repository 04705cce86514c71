"""SIGTERM and Ctrl-C as a wish that the loop reads.

Schedulers send SIGTERM before they take a machine away.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from sanawm_jax.runtime.failures import INTERRUPTED

# how much a process wishes to stop; among several the largest counts
GO_ON, TIME_IS_UP, TERMINATED = 0.0, 1.0, 2.0


class Stopped(Exception):
    """The run was asked to end by a signal and did, in order; the same command goes on with it.

    Args:
      step: steps done.
      checkpoint: where they are saved; None if they are not.
      is_interrupted: by Ctrl-C, after which a shell must not go on as after success.
    """

    def __init__(self, step: int, checkpoint: Path | None, *, is_interrupted: bool = False):
        self.step, self.checkpoint = step, checkpoint
        self.status = INTERRUPTED if is_interrupted else 0
        saved = "nothing new is saved" if checkpoint is None else f"saved in {checkpoint}"
        super().__init__(f"stopped at step {step}, {saved}; the same command goes on with it")


class TerminationSignal:
    """Notes the first SIGTERM or Ctrl-C within a `with` block.

    A second signal does what it did before. Outside of the main thread, where Python has no
    signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.is_set = self.is_interrupted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> TerminationSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # a shell's background process ignores Ctrl-C, and goes on doing so
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
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
        if number == signal.SIGINT:
            self.is_interrupted = True
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        self._restore()

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
