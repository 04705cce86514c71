"""Which checkpoints stay, and what a full disk leaves of them."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from absl import logging

from sanawm_jax.training.engine.checkpoint import Checkpoints
from sanawm_jax.training.engine.state import TrainState, create_state


def _state(step: int, size: int = 8) -> TrainState:
    values = np.random.default_rng(step).normal(size=(size, 64)).astype(np.float32)
    params = {"a": {"kernel": jax.numpy.asarray(values)}}
    state = create_state(params, optax.sgd(1.0), average=False, guarded=True)
    return TrainState(**{**vars(state), "step": jax.numpy.int32(step)})


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
    np.testing.assert_array_equal(restored.params["a"]["kernel"], _state(1).params["a"]["kernel"])
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
