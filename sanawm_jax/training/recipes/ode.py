"""ODE regression: the student learns where the stored trajectories of a teacher end.

Each chunk of a clip is at a level of its own, with the teacher's state of that level as its
latents. One chunk-causal pass over the whole clip estimates the clean clip.
Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels, K levels.
Source: NVlabs/Sana, the trainer of the distilled SANA-WM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sanawm_jax.core.params import Params
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.engine.learner import update_rule
from sanawm_jax.training.engine.recipe import Recipe
from sanawm_jax.training.engine.state import TrainState
from sanawm_jax.training.engine.step import Metrics
from sanawm_jax.training.objectives.distillation import ode_loss
from sanawm_jax.training.recipes.distill import STUDENT, Distillation
from sanawm_jax.training.recipes.held_out import held_out_clips


def ode_recipe(config: ConfigDict, workdir: Path) -> Recipe:
    """The student alone, on a store of `data/ode_pairs.py`; see `configs/distill.py`."""
    if config.data.format != "ode_lmdb":
        raise InputError(f"data.format={config.data.format!r}: ODE regression reads ode_lmdb")
    run = Distillation(config, workdir)
    network = run.network(STUDENT)
    rule = update_rule(config.optimizer, config.steps, config.ema_decay)

    def update(
        state: TrainState, batch: Any, key: jax.Array, *, resident: Any, wall_fraction: jax.Array
    ) -> tuple[TrainState, Metrics]:
        learner = state.learners[STUDENT]
        latents, conditions = run.rows(resident, batch)
        trajectory = batch["trajectory"][:, :, : run.frames].astype(jnp.float32)
        noisy, timesteps = states_of_chunks(key, trajectory, run)

        def loss(params: Params) -> jax.Array:
            velocity = run.clip_velocity(
                network,
                network.whole(resident)(params),
                noisy,
                timesteps,
                conditions,
                causal=True,
            )
            return ode_loss(velocity, noisy, timesteps, latents)

        value, gradients = jax.value_and_grad(loss)(learner.params)
        learner, metrics = rule.update(learner, gradients, state.step, wall_fraction)
        after = TrainState(state.step, {STUDENT: learner}, state.guard)
        return after, {"loss": value, "ode_loss": value, **metrics}

    return Recipe(
        abstract={STUDENT: network.abstract},
        init=lambda places: run.init({STUDENT: network}, places),
        rules={STUDENT: rule},
        update=update,
        resident=run.resident(run.frozen({STUDENT: network}, teacher=False)),
        export=lambda best: run.export(network, best[STUDENT], workdir / "export"),
        flops=3 * run.forward_flops(causal=True),
        held_out=held_out_clips(run, network, workdir),
        **run.data(),
    )


def states_of_chunks(
    key: jax.Array, trajectory: jax.Array, run: Distillation
) -> tuple[jax.Array, jax.Array]:
    """The states (B, F, H, W, c) at a uniform level of each row's chunks, and timesteps (B, F).

    Args:
      trajectory: (B, K, F, H, W, c), the clean clip last. Frame 0 is given.
    """
    batch, levels, frames = trajectory.shape[:3]
    drawn = jax.random.randint(key, (batch, len(run.starts)), 0, levels)
    lengths = jnp.diff(jnp.array((*run.starts, frames)))
    level = jnp.repeat(drawn, lengths, axis=1, total_repeat_length=frames)
    level = level.at[:, 0].set(levels - 1)
    states = jnp.take_along_axis(trajectory, level[:, None, :, None, None, None], 1)[:, 0]
    return states, jnp.asarray(run.steps, jnp.float32)[level]
