"""Measures a run on examples that it does not train on, keeps its best weights, and stops it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging

from sanawm_jax.core.params import Params
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.engine.line_file import LineFile
from sanawm_jax.training.engine.state import TrainState

ERROR = "error"  # the measure that decides


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """How a recipe is measured.

    Attributes:
      every: steps between two measurements.
      patience: that many measurements in a row that are no better than the best end the run; with 0
        none does.
      measure: (best weights of each learner, resident data) -> numbers by name; a smaller `error`
        is better.
      keep: best weights of each learner -> writes them.

    Raises:
      InputError: the numbers are out of range.
    """

    every: int
    patience: int
    measure: Callable[[dict[str, Params], Any], dict[str, float]]
    keep: Callable[[dict[str, Params]], None]

    def __post_init__(self) -> None:
        if self.every < 1 or self.patience < 0:
            raise InputError(
                f"held_out.every={self.every} must be at least 1, and held_out.patience="
                f"{self.patience} at least 0"
            )


class HeldOutWatcher:
    """The `Watcher` of it; appends to `held_out.jsonl`.

    Args:
      held_out: of the recipe.
      resident: its data.
      path: of the file; None in a process that is not the first.
      step: restored step; later lines of an interrupted run are cut off.
    """

    def __init__(self, held_out: HeldOut, resident: Any, path: Path | None, step: int):
        self._of, self._resident = held_out, resident
        self._file = path and LineFile(path, step)
        self._best, self._since = math.inf, 0
        lines = path.read_text(encoding="utf-8").splitlines() if path else []
        for line in lines:
            self._count(json.loads(line)[ERROR])

    def _count(self, error: float) -> bool:
        """Whether this error is the smallest so far."""
        is_best = error < self._best
        self._best, self._since = min(error, self._best), 0 if is_best else self._since + 1
        return is_best

    def after(self, before: int, step: int, state: TrainState) -> bool:
        """Whether the run ends here."""
        of = self._of
        if before // of.every == step // of.every:
            return False
        best = state.best
        values = of.measure(best, self._resident)
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        logging.info("step %d, held-out examples: %s", step, shown)
        if self._file:
            self._file.add({"step": step, **values})
            self._file.flush(sync=True)
        if self._count(values[ERROR]):
            of.keep(best)
        is_over = 0 < of.patience <= self._since
        if is_over:
            logging.info("step %d: no better for %d measurements, the run ends", step, self._since)
        return is_over

    def close(self) -> None:
        if self._file:
            self._file.close()
