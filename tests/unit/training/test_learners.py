"""A recipe with two learners and a frozen teacher runs on the engine without any change to it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from configs import common
from sanawm_jax.training.engine.learner import update_rule
from sanawm_jax.training.engine.loop import train
from sanawm_jax.training.engine.recipe import Recipe
from sanawm_jax.training.engine.state import TrainState
from sanawm_jax.training.engine.step import every_nth
from sanawm_jax.training.recipes.registry import RECIPES

_ROOT = Path(__file__).parents[3]


def _apply(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["final"]["kernel"]


def _error(params: Any, x: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(_apply(params, x) - target))


def toy_recipe(config: ConfigDict, workdir: Path) -> Recipe:
    """The critic imitates the teacher in every step, the student the critic in every fifth."""
    rules = {
        "student": update_rule(config.student, config.steps, config.ema_decay),
        "critic": update_rule(config.critic, config.steps, 0.0),
    }
    teacher, inputs = np.random.default_rng(0).normal(size=(2, 16, 16)).astype(np.float32)
    abstract = {"final": {"kernel": jax.ShapeDtypeStruct((16, 16), jnp.float32)}}

    def init(places: Any) -> Any:
        return jax.device_put({name: {"final": {"kernel": jnp.eye(16)}} for name in rules}, places)

    def update(
        state: TrainState, batch: Any, key: jax.Array, *, resident: Any, wall_fraction: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        student, critic = state.learners["student"], state.learners["critic"]
        x = batch + 0.1 * jax.random.normal(key, batch.shape)
        now = (state.step, wall_fraction)

        def of_student() -> Any:
            target = _apply(critic.params, x)
            loss, gradients = jax.value_and_grad(_error)(student.params, x, target)
            after, metrics = rules["student"].update(student, gradients, *now)
            return after, {"student_loss": loss, "student_norm": metrics["grad_norm"]}

        student, shown = every_nth(5, state.step, of_student, student)
        target = _apply(resident["base"]["teacher"], x)
        loss, gradients = jax.value_and_grad(_error)(critic.params, x, target)
        critic, metrics = rules["critic"].update(critic, gradients, *now)
        learners = {"student": student, "critic": critic}
        return dataclasses.replace(state, learners=learners), {"loss": loss, **metrics, **shown}

    reads = []

    def read(indices: np.ndarray) -> np.ndarray:
        reads.append(indices)
        if len(reads) == config.killed_at:
            while not (workdir / "checkpoints" / "4").is_dir():  # written in the background
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        return inputs[indices]

    def export(best: Any) -> None:
        np.savez(workdir / "best.npz", **{n: _apply(p, jnp.eye(16)) for n, p in best.items()})

    return Recipe(
        abstract=dict.fromkeys(rules, abstract),
        init=init,
        rules=rules,
        update=update,
        resident={"base": {"teacher": {"final": {"kernel": teacher}}}},
        size=16,
        export=export,
        read=read,
    )


def run(workdir: Path, killed_at: int = 0) -> TrainState:
    """Twelve steps; `killed_at` is the number of a call of the compiled steps, two in each."""
    RECIPES["toy"] = f"{__name__}:toy_recipe"
    config = common.training("toy")
    config.update(steps=12, steps_per_call=2, save_every=4, batch_size=4, ema_decay=0.5)
    config.update(curves=False, killed_at=killed_at)
    config.optimizer.update(warmup_steps=1)
    config.student, config.critic = (ConfigDict(config.optimizer.to_dict()) for _ in range(2))
    config.student.update(learning_rate=0.1, moments_dtype="bfloat16")
    config.critic.update(name="muon", learning_rate=0.2)
    try:
        return train(config, workdir)
    finally:
        del RECIPES["toy"]


def _rows(workdir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_two_learners_that_are_killed_resume_bit_equal(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    code = f"import sys, pathlib; from {__name__} import run; run(pathlib.Path(sys.argv[1]), 4)"
    command = [sys.executable, "-c", code, str(tmp_path / "killed")]
    killed = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    names = os.listdir(tmp_path / "killed" / "checkpoints")
    assert "4" in names and "12" not in names
    resumed = run(tmp_path / "killed")
    assert jax.tree.structure(resumed) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    rows = _rows(tmp_path / "whole")
    assert _rows(tmp_path / "killed") == rows

    # the student makes an update in every fifth step alone, with its own optimizer and average
    assert [row["step"] for row in rows if row["student_loss"] is not None] == [1, 6, 11]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    student, critic = whole.learners["student"], whole.learners["critic"]
    count = optax.tree_utils.tree_get_all_with_path
    for learner, updates in ((student, 3), (critic, 12)):
        assert {int(value) for _, value in count(learner.moments, "count")} == {updates}
    assert critic.average is None and student.average is not None
    kernels = [tree["final"]["kernel"] for tree in (student.params, student.average)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(student.moments)}
    assert dtypes == {"int32", "float32", "bfloat16"}
    with np.load(tmp_path / "killed" / "best.npz") as best:
        np.testing.assert_array_equal(best["student"], kernels[1])
        assert set(best) == {"student", "critic"}
