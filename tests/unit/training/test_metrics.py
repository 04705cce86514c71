"""metrics.jsonl and checkpoints."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.engine.checkpoint import Checkpoints
from sanawm_jax.training.engine.learner import MODEL, UpdateRule
from sanawm_jax.training.engine.line_file import truncate
from sanawm_jax.training.engine.metrics import MetricsWriter, TrainingDiverged
from sanawm_jax.training.engine.optimizer import make_optimizer
from sanawm_jax.training.engine.state import create_state


def _values(*losses):
    return {"loss": jnp.array(losses), "grad_norm": jnp.ones(len(losses))}


def _steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_come_late_and_complete(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, step=0, seed=0, delay=1)
    writer.push(1, _values(0.5, 0.4))
    assert _steps(path) == []
    writer.push(3, _values(0.3, 0.2))
    assert _steps(path) == [1, 2]
    writer.drain()
    assert _steps(path) == [1, 2, 3, 4]
    writer.close()


def test_divergence_names_step_and_seed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, step=0, seed=7, delay=0)
    with pytest.raises(TrainingDiverged, match=r"loss is nan at step 12 \(seed 7"):
        writer.push(11, _values(0.5, float("nan")))
    assert _steps(path) == [11]
    writer.close()


def test_truncate(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate(path, 3)  # nothing there
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    truncate(path, 2)
    assert _steps(path) == [1, 2]
    path.write_text('{"step": 1}\n{"st')
    truncate(path, 9)
    assert _steps(path) == [1]


def test_checkpoint_round_trip(tmp_path):
    rule = UpdateRule(make_optimizer(), lambda step, fraction: step, decay=0.9)
    params = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    state = create_state({MODEL: params}, {MODEL: rule})
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    assert checkpoints.latest() is None
    checkpoints.save(state, {"loader": {"next_index": 3}, "seconds": 1.5})
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path / "c")
    like = create_state({MODEL: jax.tree.map(jnp.zeros_like, params)}, {MODEL: rule})
    restored, run = checkpoints.restore(like)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert run == {"loader": {"next_index": 3}, "seconds": 1.5}

    other = create_state({MODEL: {"b": {"kernel": jnp.zeros((2, 3))}}}, {MODEL: rule})
    with pytest.raises(InputError, match="does not fit this configuration"):
        checkpoints.restore(other)
    checkpoints.close()
