"""Self-forcing to the truth: what the student makes of its own history is drawn to real clips.

Where a world can be rendered, the true frames of any camera path exist, whatever the student made
before. In a growing share of the batches each chunk sees the student's own clip as its history,
with some noise, instead of the real one. The chunk itself is real and noised, and the loss is the
squared error of the student's estimate. There is no critic and no teacher.

Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

from sanawm_jax.core.params import Params
from sanawm_jax.dit.state import DiTState
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.schedule import add_noise
from sanawm_jax.sampling.stage1 import Conditions
from sanawm_jax.training.engine.learner import UpdateRule, update_rule
from sanawm_jax.training.engine.recipe import Recipe
from sanawm_jax.training.engine.state import TrainState
from sanawm_jax.training.engine.step import Metrics, Share
from sanawm_jax.training.objectives.distillation import noised_clip, pseudo_huber
from sanawm_jax.training.objectives.rollout import (
    Student,
    chunk_gradients,
    roll_out,
    timesteps_of_chunks,
)
from sanawm_jax.training.recipes.distill import STUDENT, Distillation, Network
from sanawm_jax.training.recipes.held_out import held_out_clips


def to_truth_recipe(config: ConfigDict, workdir: Path) -> Recipe:
    """The student alone; see `configs/distill.py`."""
    run = Distillation(config, workdir)
    check_share(config)
    network = run.network(STUDENT)
    rule = update_rule(config.optimizer, config.steps, config.ema_decay)
    causal, truth = run.forward_flops(causal=True), config.truth
    share = (truth.share_first + truth.share_last) / 2
    return Recipe(
        abstract={STUDENT: network.abstract},
        init=lambda places: run.init({STUDENT: network}, places),
        rules={STUDENT: rule},
        update=ToTruth(run, network, rule),
        resident=run.resident(run.frozen({STUDENT: network}, teacher=False)),
        export=lambda best: run.export(network, best[STUDENT], workdir / "export"),
        flops=causal * (4 + share * len(run.steps)),
        held_out=held_out_clips(run, network, workdir),
        **run.data(),
    )


def check_share(config: ConfigDict) -> None:
    """Checks the fields of `config.truth`.

    Raises:
      InputError: a share or a noise level is not in 0..1, or the ramp has no length.
    """
    truth = config.truth
    named = {n: truth[n] for n in ("share_first", "share_last", "history_noise")}
    wrong = [f"{n}={value}" for n, value in named.items() if not 0 <= value <= 1]
    if wrong or not truth.ramp > 0:
        raise InputError(f"truth.{', '.join(wrong) or f'ramp={truth.ramp}'} is out of range")


def share_of_own(config: ConfigDict, step: jax.Array) -> jax.Array:
    """() chance that a batch sees its own history; it grows over the first part of the run."""
    truth = config.truth
    done = jnp.clip(step / (truth.ramp * config.steps), 0.0, 1.0)
    return truth.share_first + (truth.share_last - truth.share_first) * done


@dataclasses.dataclass(frozen=True)
class ToTruth:
    """The `Update` of the recipe.

    Attributes:
      run: window, steps.
      network, rule: of the student.
    """

    run: Distillation
    network: Network
    rule: UpdateRule

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
        own_key, roll_key, history_key, level_key, noise_key = jax.random.split(key, 5)
        is_own = jax.random.bernoulli(own_key, share_of_own(run.config, state.step))
        levels = len(run.steps) - 1

        def own() -> jax.Array:
            return roll_out(
                self.student,
                self.network.whole(resident)(learner.params),
                latents[:, :1],
                conditions,
                jax.random.normal(roll_key, (levels, *latents.shape)),
                jnp.int32(levels - 1),
                run.steps,
                renoise=run.config.renoise,
            ).made

        history = lax.cond(is_own, own, lambda: latents)
        shown = {"own_history_error": _error_of_history(history, latents, is_own)}
        history = self.noised_history(history, history_key)

        shape = (len(latents), len(run.starts))
        times = jnp.asarray(run.steps, jnp.float32)
        drawn = times[jax.random.randint(level_key, shape, 0, levels)]
        timesteps = timesteps_of_chunks(drawn, latents.shape[1], run.window)
        noisy = noised_clip(latents, jax.random.normal(noise_key, latents.shape), timesteps)
        loss, gradients = self.gradients(
            learner.params, resident, history, noisy, timesteps, latents, conditions
        )
        learner, of_rule = self.rule.update(learner, gradients, state.step, wall_fraction)
        after = dataclasses.replace(state, learners={STUDENT: learner})
        return after, {"loss": loss, **of_rule, **shown}

    @property
    def student(self) -> Student:
        return dataclasses.replace(self.run.student, graphdef=self.network.graphdef)

    def noised_history(self, history: jax.Array, key: jax.Array) -> jax.Array:
        """A history with noise of a random level of each clip; the given frame has none."""
        level_key, noise_key = jax.random.split(key)
        largest = self.run.config.truth.history_noise
        sigma = jax.random.uniform(level_key, (len(history), 1, 1, 1, 1), maxval=largest)
        noisy = add_noise(history, jax.random.normal(noise_key, history.shape), sigma)
        return jnp.concatenate([history[:, :1], noisy[:, 1:]], 1)

    def gradients(
        self,
        params: Params,
        resident: Any,
        history: jax.Array,
        noisy: jax.Array,
        timesteps: jax.Array,
        truth: jax.Array,
        conditions: Conditions,
    ) -> tuple[jax.Array, Params]:
        """The loss of the student's estimates, and its gradients."""
        student, huber = self.student, self.run.config.truth.huber
        count = truth[:, 1:].size  # frame 0 is given

        def loss(params: Params, state: DiTState | None, example: Any, here: Conditions) -> Any:
            x, times, target = example
            found = student.estimate(params, state, x, times, here)
            return jnp.sum(pseudo_huber(found - target, huber)) / count, {}

        (value, _), gradients = chunk_gradients(
            student,
            params,
            history,
            conditions,
            (noisy, timesteps, truth),
            loss,
            base=self.network.whole(resident),
        )
        return value, gradients


def _error_of_history(history: jax.Array, truth: jax.Array, is_own: jax.Array) -> Share:
    """Mean squared error of the student's own clips; no value where the history is real."""
    error = jnp.mean(jnp.square(history - truth)[:, 1:])
    weight = is_own.astype(jnp.float32)
    return Share(error * weight, weight)
