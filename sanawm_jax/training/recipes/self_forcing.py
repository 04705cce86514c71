"""Self-forcing with distribution matching: student, critic and a frozen teacher.

In every step the student makes clips. The critic is trained on them and, in the steps 0, n, 2n...,
the student before it.
Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels.
Source: NVlabs/Sana, the trainer of the distilled SANA-WM.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

from sanawm_jax.checkpoints.export import export_transformer
from sanawm_jax.core.params import Params
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.stage1 import Conditions
from sanawm_jax.training.engine.learner import Learner, UpdateRule, update_rule
from sanawm_jax.training.engine.recipe import Recipe
from sanawm_jax.training.engine.state import TrainState
from sanawm_jax.training.engine.step import Metrics, every_nth
from sanawm_jax.training.objectives.distillation import (
    Matching,
    ScoreLevel,
    distribution_matching,
    flow_loss,
    mask_of_made,
    noised_clip,
)
from sanawm_jax.training.objectives.rollout import (
    Rollout,
    Student,
    clean_estimate,
    follow,
    roll_out,
    timesteps_of_frames,
)
from sanawm_jax.training.recipes.distill import CRITIC, STUDENT, TEACHER, Distillation, Network
from sanawm_jax.training.recipes.held_out import held_out_clips


def self_forcing_recipe(config: ConfigDict, workdir: Path) -> Recipe:
    """Student, critic and teacher; see `configs/distill.py`."""
    run = Distillation(config, workdir)
    networks = {name: run.network(name) for name in (STUDENT, CRITIC)}
    rules = {
        STUDENT: update_rule(config.optimizer, config.steps, config.ema_decay),
        CRITIC: update_rule(config.critic.optimizer, config.steps, 0.0),
    }
    if config.student_every < 1:
        raise InputError(f"student_every={config.student_every} must be at least 1")

    def export(best: dict[str, Params]) -> None:
        folder = workdir / "export"
        run.export(networks[STUDENT], best[STUDENT], folder)
        # the critic of a run is where that of the next one starts
        critic = run.merged(CRITIC, networks[CRITIC], best[CRITIC])
        name = folder / CRITIC / "transformer"
        export_transformer(run.model, critic, name, config.export_dtype)

    return Recipe(
        abstract={name: network.abstract for name, network in networks.items()},
        init=lambda places: run.init(networks, places),
        rules=rules,
        update=SelfForcing(run, networks, rules),
        resident=run.resident(run.frozen(networks)),
        export=export,
        flops=update_flops(run),
        held_out=held_out_clips(run, networks[STUDENT], workdir),
        **run.data(),
    )


def update_flops(run: Distillation) -> float:
    """Of the mean update of one clip, as `Recipe.flops` counts.

    The rollout leaves at a random level, and then makes the state. The student's gradient makes
    each state again and differentiates one pass. The teacher runs twice, for guidance.
    """
    causal, whole = (run.forward_flops(causal=c) for c in (True, run.config.score.causal))
    rollout = causal * ((len(run.steps) - 1 + 1) / 2 + 1)
    student = causal * (1 + 3) + 3 * whole
    return rollout + 3 * whole + student / run.config.student_every


@dataclasses.dataclass(frozen=True)
class SelfForcing:
    """The `Update` of the recipe.

    Attributes:
      run: networks, window, steps.
      networks, rules: of the student and of the critic.
    """

    run: Distillation
    networks: dict[str, Network]
    rules: dict[str, UpdateRule]

    def __call__(
        self,
        state: TrainState,
        batch: Any,
        key: jax.Array,
        *,
        resident: Any,
        wall_fraction: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        latents, conditions = self.run.rows(resident, batch)
        now = (state.step, wall_fraction)
        every = self.run.config.student_every
        roll_key, student_key, critic_key = jax.random.split(key, 3)
        before, critic = state.learners[STUDENT], state.learners[CRITIC]
        rollout, exit_level = self.roll(before.params, resident, latents, conditions, roll_key)

        def of_student() -> tuple[Learner, Metrics]:
            gradients, metrics = self.student_gradients(
                before.params, critic.params, resident, rollout, exit_level, conditions, student_key
            )
            after, of_rule = self.rules[STUDENT].update(before, gradients, *now)
            metrics |= saturation(rollout.made, latents)
            return after, {**metrics, "generator_grad_norm": of_rule["grad_norm"]}

        student, metrics = every_nth(every, state.step, of_student, before)
        loss, gradients = self.critic_gradients(
            critic.params, resident, rollout.made, conditions, critic_key
        )
        critic, of_rule = self.rules[CRITIC].update(critic, gradients, *now)
        # the guard sees a student's update that is no number; its usual values do not count
        made = state.step % every == 0
        broken = jnp.where(made, 0.0 * metrics["generator_grad_norm"], 0.0)
        after = dataclasses.replace(state, learners={STUDENT: student, CRITIC: critic})
        return after, {"loss": loss + broken, "critic_loss": loss, **of_rule, **metrics}

    def roll(
        self,
        params: Params,
        resident: Any,
        latents: jax.Array,
        conditions: Conditions,
        key: jax.Array,
    ) -> tuple[Rollout, jax.Array]:
        """Clips of the student's that begin as `latents` do, and the level at which it left."""
        steps = self.run.steps
        levels = len(steps) - 1
        exit_key, noise_key = jax.random.split(key)
        exit_level = jax.random.randint(exit_key, (), 0, levels)
        noises = jax.random.normal(noise_key, (levels, *latents.shape))
        whole = self.networks[STUDENT].whole(resident)(params)
        made = roll_out(
            self.student,
            whole,
            latents[:, :1],
            conditions,
            noises,
            exit_level,
            steps,
            renoise=self.run.config.renoise,
        )
        return made, exit_level

    @property
    def student(self) -> Student:
        return dataclasses.replace(self.run.student, graphdef=self.networks[STUDENT].graphdef)

    def score(
        self,
        network: Network | None,
        weights: Params,
        noisy: jax.Array,
        timesteps: jax.Array,
        conditions: Conditions,
    ) -> jax.Array:
        """The velocity of a whole clip by the critic or, with None, by the teacher."""
        causal = self.run.config.score.causal
        return self.run.clip_velocity(network, weights, noisy, timesteps, conditions, causal=causal)

    def noised(self, made: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The clip at a level of the scores, the noise, and the timesteps (B, F) of its frames."""
        time_key, noise_key = jax.random.split(key)
        timestep = score_level(self.run.config).draw(time_key, len(made))
        timesteps = timesteps_of_frames(timestep, made.shape[1], given=True)
        noise = jax.random.normal(noise_key, made.shape)
        return noised_clip(made, noise, timesteps), noise, timesteps

    def student_gradients(
        self,
        params: Params,
        critic: Params,
        resident: Any,
        rollout: Rollout,
        exit_level: jax.Array,
        conditions: Conditions,
        key: jax.Array,
    ) -> tuple[Params, Metrics]:
        """Gradients of the student, and its metrics."""
        found = self.matching(critic, resident, rollout.made, conditions, key)
        gradients = follow(
            self.student,
            params,
            rollout,
            conditions,
            exit_level,
            self.run.steps,
            found.cotangent,
            base=self.networks[STUDENT].whole(resident),
        )
        return gradients, {
            "generator_loss": found.loss,
            "dmd_gradient_norm": found.direction,
            "exit_level": exit_level.astype(jnp.float32),
        }

    def matching(
        self, critic: Params, resident: Any, made: jax.Array, conditions: Conditions, key: jax.Array
    ) -> Matching:
        """How critic and teacher judge clips at a random level."""
        noisy, _, timesteps = self.noised(made, key)
        level, of_critic = score_level(self.run.config), self.networks[CRITIC]
        negative = self.run.negative(resident, conditions)

        def estimate(network: Network | None, weights: Params, given: Conditions) -> jax.Array:
            velocity = self.score(network, weights, noisy, timesteps, given)
            return clean_estimate(noisy, velocity, timesteps)

        def of_teacher(texts: tuple[jax.Array, jax.Array]) -> jax.Array:
            given = conditions._replace(text=texts[0], text_mask=texts[1])
            return estimate(None, resident["base"][TEACHER], given)

        # one after the other, in the memory of one
        pairs = [jnp.stack(pair) for pair in zip(conditions[:2], negative[:2], strict=True)]
        real = level.guided(*lax.map(of_teacher, tuple(pairs)))
        fake = estimate(of_critic, of_critic.whole(resident)(critic), conditions)
        return distribution_matching(made, fake, real, mask_of_made(timesteps))

    def critic_gradients(
        self, params: Params, resident: Any, made: jax.Array, conditions: Conditions, key: jax.Array
    ) -> tuple[jax.Array, Params]:
        """The critic's loss on clips of the student's, and its gradients."""
        noisy, noise, timesteps = self.noised(made, key)
        network = self.networks[CRITIC]

        def loss(params: Params) -> jax.Array:
            weights = network.whole(resident)(params)
            velocity = self.score(network, weights, noisy, timesteps, conditions)
            return flow_loss(velocity, made, noise, mask_of_made(timesteps))

        return jax.value_and_grad(loss)(params)


def score_level(config: ConfigDict) -> ScoreLevel:
    """The levels that `config.score` describes."""
    score = config.score
    return ScoreLevel(score.shift, score.lowest, score.highest, score.guidance)


def saturation(made: jax.Array, truth: jax.Array) -> Metrics:
    """How much more a made clip varies than a real one: the ratio of their deviations.

    Distribution matching tends to make clips too saturated, which shows as a ratio that grows.
    """
    deviations = [jnp.std(clip.astype(jnp.float32)[:, 1:]) for clip in (made, truth)]
    return {"saturation": deviations[0] / deviations[1]}
