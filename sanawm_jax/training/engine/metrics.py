"""`metrics.jsonl`: one JSON object a step, written a little after the device made it."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging

from sanawm_jax.training.engine.line_file import LineFile
from sanawm_jax.training.engine.spikes import NORM_LIMIT, SKIPPED_IN_ROW, SpikePolicy
from sanawm_jax.training.engine.step import STOP


class TrainingDiverged(FloatingPointError):
    """The loss is not a finite number any more, or steps are skipped again and again."""


class RowSink(Protocol):
    """Gets every row that `metrics.jsonl` gets: `step`, `seconds`, metrics (null is None)."""

    def row(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Appends metrics to `workdir/metrics.jsonl`, flushed, without stalling the device.

    Values are fetched `delay` calls late, when the device is already busy with later steps; that
    also bounds how far the host runs ahead. Steps that were skipped have a line in
    `skipped.jsonl`, beside it, with the indices of their batch.

    Args:
      path: the file; None, in a process that is not the first, decides alike and writes nothing.
      step: restored step; later lines of an interrupted run are cut off.
      seed: named when the loss diverges.
      delay: calls to keep in flight.
      seconds: training time before this process.
      spike: ends the run by its patience.
      sinks: what else shows the rows.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        step: int,
        seed: int,
        delay: int = 2,
        seconds: float = 0.0,
        spike: SpikePolicy | None = None,
        sinks: Sequence[RowSink] = (),
    ):
        self._file = path and LineFile(path, step)
        self._skipped = path and LineFile(path.with_name("skipped.jsonl"), step)
        self._pending: collections.deque = collections.deque()
        self.seed, self._delay, self._spike, self._sinks = seed, delay, spike, sinks
        self._losses: list[float] = []
        self._start = time.monotonic() - seconds
        self.stop = 0.0  # the strongest wish to stop among all processes, see `engine.loop`

    @property
    def seconds(self) -> float:
        """Training time so far, earlier processes included."""
        return time.monotonic() - self._start

    def push(
        self, first_step: int, metrics: dict[str, jax.Array], indices: np.ndarray | None = None
    ) -> None:
        """Queues the metrics, each (K,), of the steps `first_step`... (the first update is 1).

        Args:
          indices: (K, B) of the examples of each batch.

        Raises:
          TrainingDiverged: of an earlier step, see `spike.policy`.
        """
        self._pending.append((first_step, metrics, indices))
        while len(self._pending) > self._delay:
            self._write(*self._pending.popleft())

    def drain(self) -> None:
        """Writes all that is queued, to the disk; waits for the device.

        Raises:
          TrainingDiverged: as `push` does.
        """
        while self._pending:
            self._write(*self._pending.popleft())
        for file in (self._file, self._skipped):
            if file:
                file.flush(sync=True)

    def mean_loss(self) -> float | None:
        """Mean over the updates made since this was last asked; None if there were none."""
        losses, self._losses = self._losses, []
        return float(np.mean(losses)) if losses else None

    def close(self) -> None:
        """Closes the files; what is queued and unwritten is lost."""
        for part in (self._file, self._skipped, *self._sinks):
            if part:
                part.close()

    def _write(
        self, first_step: int, metrics: dict[str, jax.Array], indices: np.ndarray | None
    ) -> None:
        host = {name: np.asarray(value) for name, value in jax.device_get(metrics).items()}
        self.stop = max(self.stop, float(np.max(host.pop(STOP, 0.0))))
        in_row = host.pop(SKIPPED_IN_ROW, np.zeros_like(host["loss"]))
        limits = host.pop(NORM_LIMIT, np.full_like(host["loss"], np.inf))
        seconds = round(self.seconds, 3)
        for i, loss in enumerate(host["loss"]):
            step = first_step + i
            skipped = in_row[i] > 0
            if not math.isfinite(loss) and not skipped:
                self._flush()
                raise TrainingDiverged(
                    f"loss is {loss} at step {step} (seed {self.seed}, gradient norm "
                    f"{host['grad_norm'][i]}); lower learning_rate or clip_norm and resume from "
                    "the last checkpoint"
                )
            # non-finite metrics are null: NaN is not JSON
            row: dict[str, Any] = {"step": step, "seconds": seconds}
            row |= {k: float(v[i]) if np.isfinite(v[i]) else None for k, v in host.items()}
            if self._file:
                self._file.add(row)
            for sink in self._sinks:
                sink.row(row)
            if skipped:
                self._skip(row, host, i, float(limits[i]), indices, int(in_row[i]))
            else:
                self._losses.append(float(loss))
        self._flush()

    def _skip(
        self,
        row: dict[str, Any],
        host: dict[str, np.ndarray],
        i: int,
        limit: float,
        indices: np.ndarray | None,
        in_row: int,
    ) -> None:
        """Records a step whose update was left out; `skip` and `stop` differ in what follows."""
        loss, norm, step = host["loss"][i], host["grad_norm"][i], row["step"]
        is_spike = math.isfinite(loss) and math.isfinite(norm)
        what = f"gradient norm {norm:.4g}" + (f" above {limit:.4g}" if is_spike else "")
        what = f"step {step} was skipped: loss {loss:.4g}, {what}"
        record = {name: row[name] for name in ("step", "loss", "grad_norm")}
        record["reason"] = "spike" if is_spike else "not finite"
        record["limit"] = limit if math.isfinite(limit) else None
        record["indices"] = None if indices is None else np.asarray(indices[i]).tolist()
        if self._skipped:
            self._skipped.add(record)
            logging.warning("%s", what)
        if self._spike is None:
            return
        if self._spike.policy == "stop":
            self._flush()
            raise TrainingDiverged(
                f"{what} (spike.policy=stop); skipped.jsonl names its batch. Resume with "
                "--config.spike.policy=skip, or a lower learning_rate"
            )
        if in_row >= self._spike.patience:
            self._flush()
            raise TrainingDiverged(
                f"{what}, the {in_row}th in a row (spike.patience); skipped.jsonl names the "
                "batches. Lower learning_rate or raise spike.factor, and resume from the last "
                "checkpoint"
            )

    def _flush(self) -> None:
        for file in (self._file, self._skipped):
            if file:
                file.flush()
