"""Which checkpoints are kept, and that a full disk does not damage them."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl import logging

from sanawm_jax.runtime.errors import InputError
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


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("three")
    checkpoints = Checkpoints(folder, keep=3, keep_best=1)
    for step in (1, 2, 3):
        checkpoints.save(_state(step), {"seed": step}, loss=0.5)
    checkpoints.close()
    return folder


def _damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    left = {"half": content[: len(content) // 2], "empty": b"", "zeros": bytes(len(content))}
    file.unlink() if how == "gone" else file.write_bytes(left[how])


@pytest.mark.parametrize("how", ["half", "empty", "zeros", "gone"])
@pytest.mark.parametrize("part", ["_METADATA", "manifest.ocdbt", "d/*", "metadata"])
def test_the_one_before_a_damaged_checkpoint_is_used(
    part: str, how: str, three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    for file in (folder / "3" / ("run" if part == "metadata" else "state")).glob(part):
        _damage(file, how)
    checkpoints = Checkpoints(folder, keep=3, keep_best=1)
    restored, run = checkpoints.restore(_state(0))
    assert (int(restored.step), run) == (2, {"seed": 2})
    ours = [line for line in warnings if line.startswith("checkpoint 3 is damaged (")]
    assert len(ours) == 1 and "\n" not in ours[0]
    assert checkpoints.save(_state(3), {"seed": 0}, loss=0.5)
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3", "3.damaged"]


def test_damaged_losses_and_no_whole_checkpoint(three: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    _damage(folder / "3/metrics/metrics", "half")
    checkpoints = Checkpoints(folder, keep=3, keep_best=1)
    assert int(checkpoints.restore(_state(0))[0].step) == 3
    checkpoints.close()
    for step in (1, 2, 3):
        shutil.rmtree(folder / str(step) / "state")
    checkpoints = Checkpoints(folder)
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read"):
        checkpoints.restore(_state(0))
    checkpoints.close()
    assert _steps(folder) == [1, 2, 3]  # nothing was renamed


def test_another_model_is_one_line_and_no_damage(three: Path) -> None:
    checkpoints = Checkpoints(three)
    with pytest.raises(InputError) as caught:
        checkpoints.restore(_state(0, 16))
    line = (
        f"{three}/3 does not fit this configuration (params.a.kernel is (8, 64) there and (16, 64)"
    )
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert _steps(three) == [1, 2, 3]
    checkpoints.close()
