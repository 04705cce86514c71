"""What people watch while a run trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_collections
from absl import logging
from jax.sharding import Mesh

from sanawm_jax.core.processes import is_first
from sanawm_jax.training.metrics import RowSink
from sanawm_jax.training.state import TrainState
from sanawm_jax.training.tasks import Task


class Watcher(Protocol):
    """Is told after every call of the compiled steps that it went from step `before` to `step`."""

    def after(self, before: int, step: int, state: TrainState) -> None: ...

    def close(self) -> None: ...


class ProgressLine:
    """A line of the log every `log_every` steps, with means over the steps since the last.

    Args:
      log_every: steps.
    """

    def __init__(self, log_every: int):
        self._log_every = log_every
        self._rows: list[dict[str, Any]] = []

    def row(self, row: dict[str, Any]) -> None:
        if row["step"] % self._log_every == 0:
            shown = " ".join(
                f"{k} {v:.4g}"
                for k, v in row.items()
                if v is not None and k not in ("step", "seconds")
            )
            logging.info("step %d, %.0f s: %s", row["step"], row["seconds"], shown)

    def close(self) -> None:
        pass


def make_sinks(
    config: ml_collections.ConfigDict, workdir: Path, task: Task, mesh: Mesh
) -> Sequence[RowSink]:
    """What shows the metrics besides `metrics.jsonl`, in the first process."""
    return [ProgressLine(config.log_every)] if is_first() else []


def make_watchers(
    config: ml_collections.ConfigDict, workdir: Path, task: Task, mesh: Mesh, resident: Any
) -> Sequence[Watcher]:
    """What looks at the state while it trains."""
    return []
