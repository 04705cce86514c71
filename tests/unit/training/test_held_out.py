"""A run is measured on held-out examples, keeps its best weights and stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.engine.held_out import HeldOut, HeldOutWatcher
from sanawm_jax.training.engine.learner import MODEL, Learner
from sanawm_jax.training.engine.state import TrainState

ERRORS = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.0, 10: 1.0}


class Run:
    """What a recipe gives."""

    def __init__(self) -> None:
        self.kept: list[int] = []

    def measure(self, best: dict[str, Any], resident: Any) -> dict[str, float]:
        return {"error": ERRORS[int(best[MODEL]["step"])], "scale": float(resident)}

    def keep(self, best: dict[str, Any]) -> None:
        self.kept.append(int(best[MODEL]["step"]))


def state(step: int) -> TrainState:
    return TrainState(jnp.int32(step), {MODEL: Learner({"step": jnp.int32(step)}, None)})


def test_it_keeps_the_best_and_stops(tmp_path: Path) -> None:
    run, file = Run(), tmp_path / "held_out.jsonl"
    of = HeldOut(2, 2, run.measure, run.keep)
    watcher = HeldOutWatcher(of, 0.5, file, 0)
    ended = [watcher.after(step - 1, step, state(step)) for step in range(1, 7)]
    watcher.close()
    assert ended == [False] * 6 and run.kept == [2, 4]
    # a resumed run knows the best, and repeats what came after its checkpoint
    watcher = HeldOutWatcher(of, 0.5, file, 5)
    assert not watcher.after(5, 6, state(6))
    assert watcher.after(6, 8, state(8)) and run.kept == [2, 4]
    watcher.close()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["step"], row["error"]) for row in rows] == [(s, ERRORS[s]) for s in (2, 4, 6, 8)]
    assert rows[0]["scale"] == 0.5


def test_without_patience_it_goes_on(tmp_path: Path) -> None:
    run = Run()
    watcher = HeldOutWatcher(HeldOut(2, 0, run.measure, run.keep), 1, tmp_path / "f", 0)
    assert not any(watcher.after(s - 2, s, state(s)) for s in ERRORS)
    assert run.kept == [2, 4, 10]
    with pytest.raises(InputError, match=r"held_out.every=0 must be at least 1"):
        HeldOut(0, 1, run.measure, run.keep)
