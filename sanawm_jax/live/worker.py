"""A thread that makes chunks, and does other jobs between two of them."""

from __future__ import annotations

import collections
import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any

from sanawm_jax.runtime.errors import InputError

_ENDED = "the session has ended; reload the page"


class Worker:
    """Owns what its jobs and steps use; a base class.

    `start`, `close`, `join` and `do` may be called from any thread, and return at once. The rest
    runs on the worker's thread. `_wake` guards what both sides use.
    """

    def __init__(self, name: str):
        self._wake = threading.Condition()
        self._jobs: collections.deque[tuple[Callable[[], Any], concurrent.futures.Future]]
        self._jobs = collections.deque()
        self._is_closed, self._ending = False, ""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self, reason: str = "") -> None:
        """Ends the thread after the step or job at hand."""
        with self._wake:
            self._is_closed, self._ending = True, reason
            self._wake.notify()

    def join(self, seconds: float) -> bool:
        """Waits for the end of the thread; whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def do(self, job: Callable[[], Any]) -> concurrent.futures.Future:
        """Runs a function between two steps; the future has its result, or its `InputError`."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._wake:
            if self._is_closed:
                future.set_exception(InputError(_ENDED))
            else:
                self._jobs.append((job, future))
                self._wake.notify()
        return future

    def _open(self) -> None:
        """The first job."""
        raise NotImplementedError

    def _step_at(self) -> float | None:
        """`time.monotonic` of the next step; None until something changes."""
        raise NotImplementedError

    def _step(self) -> None:
        raise NotImplementedError

    def _refused(self, error: InputError) -> None:
        """A job has raised it."""
        raise NotImplementedError

    def _end(self, reason: str) -> None:
        """The last job: gives back what it holds. After a failure, `reason` is in words."""
        raise NotImplementedError

    def _run(self) -> None:
        try:
            self._open()
            while self._turn():
                pass
        except Exception as error:
            self._ending = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            raise
        finally:
            with self._wake:
                self._is_closed = True
                jobs, self._jobs = self._jobs, collections.deque()
            for _, future in jobs:
                if future.set_running_or_notify_cancel():
                    future.set_exception(InputError(_ENDED))
            self._end(self._ending)

    def _turn(self) -> bool:
        """Does one job or step; False at the end."""
        entry = None
        with self._wake:
            while not self._is_closed and not self._jobs:
                at = self._step_at()
                wait = None if at is None else at - time.monotonic()
                if wait is not None and wait <= 0:
                    break
                self._wake.wait(wait)
            if self._is_closed:
                return False
            if self._jobs:
                entry = self._jobs.popleft()
        if entry is None:
            self._step()
            return True
        job, future = entry
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(job())
            except InputError as error:
                self._refused(error)
                future.set_exception(error)
        return True
