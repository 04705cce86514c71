"""Skipped updates: what stays, what is recorded and counted, and when a run stops."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.engine.learner import MODEL, UpdateRule
from sanawm_jax.training.engine.metrics import MetricsWriter, TrainingDiverged
from sanawm_jax.training.engine.spikes import SpikePolicy
from sanawm_jax.training.engine.state import TrainState, create_state
from sanawm_jax.training.engine.step import (
    GradientUpdate,
    Share,
    accumulated_gradients,
    compile_steps,
)

_SPIKE = SpikePolicy(factor=4.0, window=3, patience=2)
_RULE = UpdateRule(optax.adam(1.0), lambda step, fraction: jnp.float32(0.1), decay=0.9)


def _steps(spike: SpikePolicy) -> Any:
    def loss(params: Any, examples: jax.Array) -> tuple[jax.Array, dict]:
        return jnp.sum(params["w"]["kernel"] * examples), {}

    update = GradientUpdate(_RULE, lambda resident, batch, key: batch, loss)
    return compile_steps(update=update, spike=spike)


def _new_state() -> TrainState:
    params = {"w": {"kernel": jnp.ones((1, 1))}}
    return create_state({MODEL: params}, {MODEL: _RULE}, guarded=True)


def _run(values: list[float], spike: SpikePolicy = _SPIKE) -> tuple[TrainState, dict]:
    """Steps whose gradient is `values`."""
    state, metrics = _steps(spike)(
        _new_state(), 0, jnp.asarray(values)[:, None], jax.random.key(0), np.float32(0)
    )
    return state, {name: np.asarray(v) for name, v in metrics.items()}


@pytest.mark.parametrize("bad", [np.nan, np.inf, 9.0], ids=str)
def test_a_bad_step_leaves_no_trace(bad: float) -> None:
    good = [1.0, 2.0, 3.0]
    before, _ = _run(good)
    state, metrics = _run([*good, bad])
    assert int(state.step) == 4
    jax.tree.map(np.testing.assert_array_equal, state.learners, before.learners)
    np.testing.assert_array_equal(metrics["skipped"], [0, 0, 0, 1])
    np.testing.assert_array_equal(metrics["skipped_in_row"], [0, 0, 0, 1])
    # and the next good one is made, as if nothing had been between
    after, metrics = _run([*good, bad, 2.0])
    expected, _ = _run([*good, 2.0])
    jax.tree.map(np.testing.assert_array_equal, after.model.params, expected.model.params)
    assert metrics["skipped_in_row"][-1] == 0
    assert float(state.guard.norm) == float(before.guard.norm)
    assert metrics["norm_limit"][3] == pytest.approx(4 * 2.0)


def test_before_the_window_is_full_only_what_is_no_number_is_bad() -> None:
    _, metrics = _run([0.1, 9.0, np.nan])
    np.testing.assert_array_equal(metrics["skipped"], [0, 0, 1])


def test_the_average_forgets() -> None:
    state, _ = _run([1.0] * 3 + [3.0] * 30)
    assert float(state.guard.norm) == pytest.approx(3.0, rel=1e-3)


def _write(tmp_path: Any, spike: SpikePolicy, values: list[float]) -> MetricsWriter:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", step=0, seed=0, delay=0, spike=spike)
    _, metrics = _run(values, spike)
    writer.push(1, metrics, np.arange(2 * len(values)).reshape(-1, 2))
    return writer


def _lines(path: Any) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_batch_is_recorded_and_the_loss_of_a_skipped_step_not_averaged(tmp_path: Any) -> None:
    writer = _write(tmp_path, _SPIKE, [1.0, np.nan, 1.0, 1.0, 9.0])
    writer.drain()
    record, spike = _lines(tmp_path / "skipped.jsonl")
    assert record["reason"] == "not finite"
    assert (record["step"], record["indices"], record["loss"]) == (2, [2, 3], None)
    assert (spike["step"], spike["indices"], spike["reason"]) == (5, [8, 9], "spike")
    assert (spike["grad_norm"], spike["limit"]) == (9.0, 4.0)
    rows = _lines(tmp_path / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 1, 1, 1, 2]
    assert rows[1]["loss"] is None and "norm_limit" not in rows[0]
    mean = np.mean([rows[i]["loss"] for i in (0, 2, 3)])
    assert writer.mean_loss() == pytest.approx(mean) and writer.mean_loss() is None
    writer.close()
    # A run that continues from step 4 has not skipped step 5 yet.
    MetricsWriter(tmp_path / "metrics.jsonl", step=4, seed=0).close()
    assert len(_lines(tmp_path / "skipped.jsonl")) == 1


def test_patience_ends(tmp_path: Any) -> None:
    with pytest.raises(TrainingDiverged, match=r"step 3 .* the 2th in a row \(spike.patience\)"):
        _write(tmp_path, _SPIKE, [1.0, np.nan, np.nan, 1.0])
    assert [row["step"] for row in _lines(tmp_path / "skipped.jsonl")] == [2, 3]


def test_policy_stop_ends_at_once(tmp_path: Any) -> None:
    spike = SpikePolicy("stop", factor=4.0, window=3)
    with pytest.raises(TrainingDiverged, match=r"step 4 .* 9 above 4 \(spike.policy=stop\)"):
        _write(tmp_path, spike, [1.0, 1.0, 1.0, 9.0, 1.0])


def test_errors_are_one_line() -> None:
    with pytest.raises(InputError, match=r"spike.policy='halt'; use one of none, skip, stop"):
        SpikePolicy("halt")
    with pytest.raises(InputError, match=r"spike.factor=1.0 must be above 1"):
        SpikePolicy(factor=1.0)


def test_a_share_is_the_mean_of_its_elements_in_any_number_of_parts() -> None:
    values = jnp.arange(8.0)

    def loss(params: jax.Array, examples: jax.Array) -> tuple[jax.Array, dict]:
        chosen = examples > 5  # none of them in some parts
        return jnp.mean(params * examples), {
            "high": Share(jnp.mean(examples * chosen), jnp.mean(chosen))
        }

    gradient = functools.partial(accumulated_gradients, loss, jnp.ones(()), values)
    for parts in (1, 2, 4):
        (_, metrics), _ = gradient(parts)
        assert float(metrics["high"].mean()) == pytest.approx(6.5)
