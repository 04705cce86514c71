"""Which checkpoints are kept, and that a full disk does not damage them."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl import logging

from sanawm_jax.training.engine.checkpoint import Checkpoints
from sanawm_jax.training.engine.learner import MODEL, Learner, UpdateRule
from sanawm_jax.training.engine.optimizer import make_optimizer
from sanawm_jax.training.engine.spikes import Guard
from sanawm_jax.training.engine.state import TrainState, create_state


def _state(step: int, size: int = 8) -> TrainState:
    values = np.random.default_rng(step).normal(size=(size, 64)).astype(np.float32)
    params = {"a": {"kernel": jax.numpy.asarray(values)}}
    rule = UpdateRule(optax.sgd(1.0), lambda step, fraction: step)
    state = create_state({MODEL: params}, {MODEL: rule}, guarded=True)
    return dataclasses.replace(state, step=jax.numpy.int32(step))


def test_a_checkpoint_from_before_learners_had_names_is_restored(tmp_path: Path) -> None:
    values = jax.random.normal(jax.random.key(0), (2, 8, 4))
    params, gradients = ({"a": {"kernel": value, "bias": value[0]}} for value in values)
    optimizer = make_optimizer()
    _, moments = optimizer.update(gradients, optimizer.init(params), params)
    zero = jax.numpy.int32(0)
    guard = Guard(jax.numpy.float32(0.7), zero + 3, zero + 1, zero)
    average = jax.tree.map(lambda a: 0.9 * a, params)
    before = {"step": zero + 4, "params": params, "opt_state": moments, "ema": average}
    with ocp.CheckpointManager(tmp_path) as manager:
        state = ocp.args.StandardSave({**before, "guard": guard})
        run = ocp.args.JsonSave({"seed": 5, "seconds": 1.5})
        manager.save(4, args=ocp.args.Composite(state=state, run=run))

    rule = UpdateRule(optimizer, lambda step, fraction: step, decay=0.9)
    zeros = jax.tree.map(jax.numpy.zeros_like, params)
    checkpoints = Checkpoints(tmp_path)
    restored, run = checkpoints.restore(create_state({MODEL: zeros}, {MODEL: rule}, guarded=True))
    expected = TrainState(zero + 4, {MODEL: Learner(params, moments, average)}, guard)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert run == {"seed": 5, "seconds": 1.5}
    checkpoints.close()


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_the_latest_the_best_and_the_periodic_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, keep_best=1, keep_period=4)
    losses = {1: 0.5, 2: 0.1, 3: 0.3, 4: 0.4, 5: None, 6: 0.2, 7: 0.6}
    for step, loss in losses.items():
        checkpoints.save(_state(step), {"seed": 0}, loss=loss)
        assert checkpoints.wait()
    assert _steps(tmp_path) == [2, 4, 6, 7]
    assert checkpoints.best() == 2
    checkpoints.close()
    assert not [path for path in tmp_path.iterdir() if not path.name.isdigit()]
    # a resumed run knows which one is the best
    checkpoints = Checkpoints(tmp_path, keep=1, keep_best=1)
    assert (checkpoints.best(), checkpoints.latest()) == (2, 7)
    checkpoints.save(_state(8), {"seed": 0}, loss=0.05)
    checkpoints.close()
    assert _steps(tmp_path) == [8]


@contextlib.contextmanager
def _limited_file_size(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# of a thread of Orbax whose write has failed
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_one_warning_and_older_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(_state(1), {"seed": 0})
    checkpoints.wait()
    # half a megabyte of noise does not fit a file of this size
    with _limited_file_size(100_000):
        checkpoints.save(_state(2, 2048), {"seed": 0})
        assert not checkpoints.wait()
        assert checkpoints.wait() and len(warnings) == 1
        # reported when the next one is to be saved, if nobody waits
        checkpoints.save(_state(3, 2048), {"seed": 0})
        checkpoints.save(_state(4, 2048), {"seed": 0})
        assert not checkpoints.wait()
    assert len(warnings) == 3
    assert "could not be written" in warnings[0] and "the newest is of step 1" in warnings[0]
    assert "File too large" in warnings[0]
    assert checkpoints.latest() == 1 and [p.name for p in tmp_path.iterdir()] == ["1"]
    restored, run = checkpoints.restore(_state(0))
    np.testing.assert_array_equal(
        restored.model.params["a"]["kernel"], _state(1).model.params["a"]["kernel"]
    )
    assert run == {"seed": 0}

    assert checkpoints.save(_state(5, 2048), {"seed": 0})
    checkpoints.close()
    assert _steps(tmp_path) == [5]
    assert len(warnings) == 3


def test_what_a_killed_run_left_goes_away(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(_state(3), {"seed": 0})
    checkpoints.close()
    for name in ("6.orbax-checkpoint-tmp", ".deleted"):
        (tmp_path / name / "state").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 3
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
    checkpoints.close()
