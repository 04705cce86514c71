"""Causal consistency distillation: the student jumps to where the teacher's steps would lead.

Each chunk of a clip is noised, and its history is clean, as in teacher forcing. The teacher takes
one Euler step to the next lower level. The student's estimate at the higher level is drawn to that
of its own moving average at the lower level. At level 0 the estimate is the chunk itself, so the
whole way of the teacher is learned from level to level, and no pairs are stored.

Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels, K chunks
after the first.
Source: consistency distillation (arXiv 2303.01469) with the causal conditioning of Causal Forcing++
(arXiv 2605.15141).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from ml_collections import ConfigDict

from sanawm_jax.core.params import Params
from sanawm_jax.data.ode_pairs import solver_grid
from sanawm_jax.dit.state import DiTState
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.schedule import NUM_TIMESTEPS, euler_step, guide
from sanawm_jax.sampling.stage1 import Conditions
from sanawm_jax.training.engine.learner import UpdateRule, update_rule
from sanawm_jax.training.engine.recipe import Recipe
from sanawm_jax.training.engine.state import TrainState
from sanawm_jax.training.engine.step import Metrics
from sanawm_jax.training.objectives.distillation import noised_clip, pseudo_huber
from sanawm_jax.training.objectives.rollout import (
    Student,
    chunk_gradients,
    clip_cameras,
    of_chunk,
    over_chunks,
    timesteps_of_chunks,
)
from sanawm_jax.training.recipes.distill import STUDENT, TEACHER, Distillation, Network
from sanawm_jax.training.recipes.held_out import held_out_clips


def consistency_recipe(config: ConfigDict, workdir: Path) -> Recipe:
    """Student and chunk-causal teacher; see `configs/distill.py`."""
    if not 0 < config.ema_decay < 1:
        raise InputError(
            f"ema_decay={config.ema_decay}: consistency distillation needs an average of the "
            "student between 0 and 1, as its target"
        )
    run = Distillation(config, workdir)
    network = run.network(STUDENT)
    rule = update_rule(config.optimizer, config.steps, config.ema_decay)
    causal = run.forward_flops(causal=True)
    guided = config.consistency.guidance != 1.0
    return Recipe(
        abstract={STUDENT: network.abstract},
        init=lambda places: run.init({STUDENT: network}, places),
        rules={STUDENT: rule},
        update=Consistency(run, network, rule, teacher_grid(run)),
        resident=run.resident(run.frozen({STUDENT: network})),
        export=lambda best: run.export(network, best[STUDENT], workdir / "export"),
        flops=causal * (4 + 2 + (4 if guided else 2)),
        held_out=held_out_clips(run, network, workdir),
        **run.data(),
    )


def teacher_grid(run: Distillation) -> np.ndarray:
    """Timesteps of the teacher's sampler and of the student's levels, falling to 0.

    Raises:
      InputError: a teacher that takes no step.
    """
    sigmas = run.teacher_schedule().sigmas(run.config.consistency.teacher_steps)
    return NUM_TIMESTEPS * solver_grid(sigmas, run.steps)[0]


@dataclasses.dataclass(frozen=True)
class Consistency:
    """The `Update` of the recipe.

    Attributes:
      run: networks, window, steps.
      network, rule: of the student.
      grid: see `teacher_grid`.
    """

    run: Distillation
    network: Network
    rule: UpdateRule
    grid: np.ndarray

    def __call__(
        self,
        state: TrainState,
        batch: Any,
        key: jax.Array,
        *,
        resident: Any,
        wall_fraction: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        run, learner = self.run, state.learners[STUDENT]
        latents, conditions = run.rows(resident, batch)
        level_key, noise_key = jax.random.split(key)
        shape = (len(latents), len(run.starts))
        level = jax.random.randint(level_key, shape, 0, len(self.grid) - 1)
        grid, frames = jnp.asarray(self.grid), latents.shape[1]
        now, following = (
            timesteps_of_chunks(grid[level + after], frames, run.window) for after in (0, 1)
        )
        noisy = noised_clip(latents, jax.random.normal(noise_key, latents.shape), now)
        whole = self.network.whole(resident)
        assert learner.average is not None
        targets = self.targets(
            whole(learner.average), resident, latents, noisy, now, following, conditions
        )
        gradients, metrics = self.gradients(
            learner.params, resident, latents, noisy, now, targets, conditions
        )
        time = (state.step, wall_fraction)
        learner, of_rule = self.rule.update(learner, gradients, *time)
        after = dataclasses.replace(state, learners={STUDENT: learner})
        return after, {**metrics, **of_rule}

    @property
    def student(self) -> Student:
        return dataclasses.replace(self.run.student, graphdef=self.network.graphdef)

    def targets(
        self,
        average: Params,
        resident: Any,
        clean: jax.Array,
        noisy: jax.Array,
        now: jax.Array,
        following: jax.Array,
        conditions: Conditions,
    ) -> jax.Array:
        """The average's estimates (B, F, H, W, c) after one step of the teacher.

        Args:
          average: weights of the student's average.
          clean, noisy: (B, F, H, W, c).
          now, following: (B, F) timesteps before and after the teacher's step.
        """
        run, student = self.run, self.student
        teacher, weights = run.student, resident["base"][TEACHER]
        guidance = run.config.consistency.guidance
        texts = conditions[:2]
        if guidance != 1.0:
            negative = run.negative(resident, conditions)[:2]
            pairs = zip(negative, texts, strict=True)
            texts = tuple(jnp.concatenate(pair) for pair in pairs)
        copies = len(texts[0]) // len(clean)

        def step(carry: Any, chunk: Any) -> tuple[Any, jax.Array]:
            of_teacher, of_student = carry
            x, clean, now, following, cameras = chunk
            here = of_chunk(conditions, cameras)
            many = jax.tree.map(lambda a: jnp.concatenate([a] * copies), (x, clean, now, cameras))
            given = of_chunk(conditions._replace(text=texts[0], text_mask=texts[1]), many[3])
            velocity = teacher.velocity(weights, of_teacher, many[0], many[2], given)
            velocity = guide(velocity, guidance) if copies == 2 else velocity
            sigmas = (a[..., None, None, None] / NUM_TIMESTEPS for a in (now, following))
            moved = euler_step(x, velocity, *sigmas)
            found = student.estimate(average, of_student, moved, following, here)
            after = (
                teacher.remember(weights, of_teacher, many[1], given),
                student.remember(average, of_student, clean, here),
            )
            return after, found

        clip = (noisy, clean, now, following, clip_cameras(conditions))
        return lax.stop_gradient(over_chunks(step, (None, None), clip, run.window)[1])

    def gradients(
        self,
        params: Params,
        resident: Any,
        clean: jax.Array,
        noisy: jax.Array,
        now: jax.Array,
        targets: jax.Array,
        conditions: Conditions,
    ) -> tuple[Params, Metrics]:
        """Gradients of the student, and its loss."""
        student, huber = self.student, self.run.config.consistency.huber
        count = clean[:, 1:].size  # frame 0 is given

        def loss(params: Params, state: DiTState | None, example: Any, here: Conditions) -> Any:
            x, timesteps, target = example
            found = student.estimate(params, state, x, timesteps, here)
            return jnp.sum(pseudo_huber(found - target, huber)) / count, {}

        (value, _), gradients = chunk_gradients(
            student,
            params,
            clean,
            conditions,
            (noisy, now, targets),
            loss,
            base=self.network.whole(resident),
        )
        return gradients, {"loss": value}
