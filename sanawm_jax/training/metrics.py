"""`metrics.jsonl`: one JSON object a step, written a little after the device made it."""

from __future__ import annotations

import collections
import json
import math
import time
from pathlib import Path
from typing import TextIO

import jax
import numpy as np
from absl import logging


class TrainingDiverged(FloatingPointError):
    """The loss is not a finite number any more."""


class MetricsWriter:
    """Appends metrics to `workdir/metrics.jsonl`, flushed, without stalling the device.

    Values are fetched `delay` calls late, when the device is already busy with later steps; that
    also bounds how far the host runs ahead.

    Args:
      path: the file.
      step: restored step; later lines of an interrupted run are cut off.
      seed: named when the loss diverges.
      delay: calls to keep in flight.
      log_every: steps between lines of the log.
      seconds: training time before this process.
    """

    def __init__(
        self,
        path: Path,
        *,
        step: int,
        seed: int,
        delay: int = 2,
        log_every: int = 50,
        seconds: float = 0.0,
    ):
        truncate(path, step)
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._pending: collections.deque = collections.deque()
        self._seed, self._delay, self._log_every = seed, delay, log_every
        self._start = time.monotonic() - seconds

    @property
    def seconds(self) -> float:
        """Training time so far, earlier processes included."""
        return time.monotonic() - self._start

    def push(self, first_step: int, metrics: dict[str, jax.Array]) -> None:
        """Queues the metrics, each (K,), of the steps `first_step`... (the first update is 1).

        Raises:
          TrainingDiverged: an earlier step's loss was not finite.
        """
        self._pending.append((first_step, metrics))
        while len(self._pending) > self._delay:
            self._write(*self._pending.popleft())

    def drain(self) -> None:
        """Writes all that is queued; waits for the device.

        Raises:
          TrainingDiverged: a loss was not finite.
        """
        while self._pending:
            self._write(*self._pending.popleft())

    def close(self) -> None:
        """Closes the file; what is queued and unwritten is lost."""
        self._file.close()

    def _write(self, first_step: int, metrics: dict[str, jax.Array]) -> None:
        host = {name: np.asarray(value) for name, value in jax.device_get(metrics).items()}
        seconds = round(self.seconds, 3)
        for i, loss in enumerate(host["loss"]):
            step = first_step + i
            if not math.isfinite(loss):
                self._file.flush()
                raise TrainingDiverged(
                    f"loss is {loss} at step {step} (seed {self._seed}, gradient norm "
                    f"{host['grad_norm'][i]}); lower learning_rate or clip_norm and resume from "
                    "the last checkpoint"
                )
            # non-finite side metrics are null: NaN is not JSON
            row = {k: float(v[i]) if np.isfinite(v[i]) else None for k, v in host.items()}
            self._file.write(json.dumps({"step": step, "seconds": seconds, **row}) + "\n")
            if step % self._log_every == 0:
                shown = " ".join(f"{k} {v:.4g}" for k, v in row.items() if v is not None)
                logging.info("step %d, %.0f s: %s", step, seconds, shown)
        self._file.flush()


def truncate(path: Path, step: int) -> None:
    """Cuts off lines later than `step`, and a last line that was not finished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] > step:
            break
        kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")
