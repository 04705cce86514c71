"""The loss of a training step of the refiner: which frames, which noise, which history.

Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels, L text
tokens, C text width.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from ml_collections import ConfigDict

from sanawm_jax.core.lora import combine
from sanawm_jax.core.params import Params
from sanawm_jax.errors import InputError
from sanawm_jax.refiner.rope import VideoRope
from sanawm_jax.training import refiner_history as history
from sanawm_jax.training.refiner_flow import (
    LEVELS,
    START_SIGMA,
    ChunkLayout,
    augment_stage1,
    chunk_layouts,
    clip_sequence,
    predict_velocity,
    sample_sigmas,
    sequence_loss,
    stream_sequence,
)
from sanawm_jax.training.step import Metrics

OBJECTIVES = ("clip", "stream")


@dataclasses.dataclass(frozen=True)
class Objective:
    """What an example is.

    Attributes:
      levels: sampler of noise levels, see `refiner_flow.LEVELS`.
      augment: (low, high) amount of noise added to stage 1; high 0 is off.
      sink_frames: of a whole clip, given as stage 1 has them.
      layouts: of a stream, empty for whole clips.
      first, chunk: latent frames of the first and of the other chunks.
      curriculum, corruption: of a stream's history.
    """

    levels: str
    augment: tuple[float, float] = (0.0, 0.0)
    sink_frames: int = 1
    layouts: tuple[ChunkLayout, ...] = ()
    first: int = 1
    chunk: int = 3
    curriculum: history.Curriculum = dataclasses.field(default_factory=history.Curriculum)
    corruption: history.Corruption = dataclasses.field(default_factory=history.Corruption)


def make_objective(config: ConfigDict, frames: int) -> Objective:
    """The objective that a configuration names for clips of `frames` latent frames.

    Raises:
      InputError: unknown names, or sizes that do not fit the clips.
    """
    if config.objective not in OBJECTIVES:
        raise InputError(f"objective={config.objective!r}; use one of {', '.join(OBJECTIVES)}")
    if config.levels not in LEVELS:
        raise InputError(f"levels={config.levels!r}; use one of {', '.join(LEVELS)}")
    low, high = config.stage1_noise
    if not 0 <= low <= high <= 1:
        raise InputError(f"stage1_noise={(low, high)} must rise inside 0 to 1")
    if config.objective == "clip":
        if not 0 <= config.sink_frames < frames:
            raise InputError(
                f"sink_frames={config.sink_frames} must leave some of the {frames} latent frames"
            )
        return Objective(config.levels, (low, high), config.sink_frames)
    stream = config.stream
    layouts = chunk_layouts(frames, first=stream.first, chunk=stream.chunk, window=stream.window)
    return Objective(
        config.levels,
        (low, high),
        layouts=tuple(layouts),
        first=stream.first,
        chunk=stream.chunk,
        curriculum=history.Curriculum(**stream.curriculum.to_dict()),
        corruption=history.Corruption(**stream.corruption.to_dict()),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class RefinerLoss:
    """See `training.step.Loss`; a batch is rows of `resident["stage1"]`.

    `resident` holds latents (n, F, H, W, c), stage1 (s n, F, H, W, c), caption (n,), refiner_text
    (U, L, C) and, if adapters are trained, the frozen base.

    Attributes:
      graphdef: of the `Refiner`, adapted if adapters are trained.
      rope: tables of the whole clip.
      clips: n.
      dtype, remat: see `refiner_flow.predict_velocity`.
    """

    graphdef: nnx.GraphDef
    rope: VideoRope
    objective: Objective
    clips: int
    dtype: Any
    remat: str = "none"

    def __call__(
        self, params: Params, resident: dict[str, Any], batch: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The loss of step 0."""
        return self.at_step(jnp.int32(0))(params, resident, batch, key)

    def at_step(self, step: jax.Array) -> Callable[..., tuple[jax.Array, Metrics]]:
        """The loss of a step, on which a stream's history depends."""

        def loss(
            params: Params, resident: dict[str, Any], batch: jax.Array, key: jax.Array
        ) -> tuple[jax.Array, Metrics]:
            if "base" in resident:
                params = combine(resident["base"], params)
            clip = batch % self.clips
            example = _Example(
                params,
                resident["stage1"][batch].astype(jnp.float32),
                resident["latents"][clip].astype(jnp.float32),
                resident["refiner_text"][resident["caption"][clip]],
            )
            run = self._stream if self.objective.layouts else self._clip
            return run(example, key, step), {}

        return loss

    def _sigmas(self, key: jax.Array, noised: jax.Array) -> jax.Array:
        batch, frames, height, width, _ = noised.shape
        return sample_sigmas(key, batch, frames * height * width, self.objective.levels)

    def _clip(self, example: _Example, key: jax.Array, step: jax.Array) -> jax.Array:
        del step
        sigma_key, noise_key, augment_key = jax.random.split(key, 3)
        sink, truth = self.objective.sink_frames, example.truth
        stage1 = augment_stage1(augment_key, example.stage1, *self.objective.augment)
        # what is given at sampling is not augmented
        stage1 = jnp.concatenate([example.stage1[:, :sink], stage1[:, sink:]], 1)
        sequence = clip_sequence(
            stage1,
            truth,
            jax.random.normal(noise_key, truth.shape),
            self._sigmas(sigma_key, truth[:, sink:]),
            sink,
        )
        return sequence_loss(
            self.graphdef,
            example.params,
            sequence,
            example.text,
            self.rope,
            dtype=self.dtype,
            remat=self.remat,
        )

    def _stream(self, example: _Example, key: jax.Array, step: jax.Array) -> jax.Array:
        """One chunk, drawn uniformly for the whole batch: positions have no batch axis."""
        draw_key, *keys = jax.random.split(key, 5)
        drawn = jax.random.randint(draw_key, (), 0, len(self.objective.layouts))
        # layouts of one length share a program
        lengths = [tuple(map(len, layout)) for layout in self.objective.layouts]
        kinds = sorted(set(lengths))
        branches = []
        for kind in kinds:
            rows = [i for i, length in enumerate(lengths) if length == kind]
            place = np.searchsorted(rows, np.arange(len(lengths))).clip(0, len(rows) - 1)
            context, current = (
                np.array([self.objective.layouts[i][part] for i in rows], np.int32)
                for part in range(2)
            )

            def branch(
                example: _Example,
                context: np.ndarray = context,
                current: np.ndarray = current,
                place: np.ndarray = place,
            ) -> jax.Array:
                row = jnp.asarray(place)[drawn]
                frames = jnp.asarray(context)[row], jnp.asarray(current)[row]
                return self._chunk(example, *frames, step, keys)

            branches.append(branch)
        which = jnp.asarray([kinds.index(length) for length in lengths])[drawn]
        return lax.switch(which, branches, example)

    def _chunk(
        self,
        example: _Example,
        context: jax.Array,
        current: jax.Array,
        step: jax.Array,
        keys: list[jax.Array],
    ) -> jax.Array:
        """The loss of one chunk; context and current are absolute frames, (F,) and (f,)."""
        sigma_key, noise_key, augment_key, history_key = keys
        truth = example.truth[:, current]
        sequence = stream_sequence(
            self._history(example, context, step, history_key),
            augment_stage1(augment_key, example.stage1[:, current], *self.objective.augment),
            truth,
            jax.random.normal(noise_key, truth.shape),
            self._sigmas(sigma_key, truth),
            jnp.concatenate([context, current]),
        )
        return sequence_loss(
            self.graphdef,
            example.params,
            sequence,
            example.text,
            self.rope,
            dtype=self.dtype,
            remat=self.remat,
        )

    def _history(
        self, example: _Example, context: jax.Array, step: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Latents of the context: the sink as it is, then history of the kind that is drawn."""
        objective, first = self.objective, self.objective.first
        true = example.truth[:, context]
        if len(context) <= first:
            return true
        kind_key, strength_key, damage_key, rollout_key = jax.random.split(key, 4)

        def damaged() -> jax.Array:
            strength = jax.random.uniform(strength_key, (len(true),))
            # sampling gives the sink exactly, so it is never damaged
            rest = history.corrupt(damage_key, true[:, first:], strength, objective.corruption)
            return jnp.concatenate([true[:, :first], rest], 1)

        kinds = [lambda: true, damaged]
        if objective.curriculum.has_rollouts:
            kinds.append(lambda: self._rollout(example, context, rollout_key))
        kind = history.draw_history_kind(kind_key, step, objective.curriculum)
        return lax.stop_gradient(lax.switch(jnp.minimum(kind, len(kinds) - 1), kinds))

    def _rollout(self, example: _Example, context: jax.Array, key: jax.Array) -> jax.Array:
        """History chunk by chunk as the present weights sample it, without a gradient."""
        example = lax.stop_gradient(example)
        steps_key, noise_key = jax.random.split(key)
        steps, first = history.draw_rollout_steps(steps_key), self.objective.first
        stage1 = example.stage1[:, context]
        noise = jax.random.normal(noise_key, stage1.shape)
        start = (1 - START_SIGMA) * stage1 + START_SIGMA * noise
        given = example.truth[:, context[:first]]
        cuts = [*range(first, len(context), self.objective.chunk), len(context)]
        for begin, end in itertools.pairwise(cuts):

            def velocity(
                x: jax.Array, sigma: jax.Array, given: jax.Array = given, end: int = end
            ) -> jax.Array:
                return predict_velocity(
                    self.graphdef,
                    example.params,
                    jnp.concatenate([given, x], 1),
                    sigma,
                    example.text,
                    self.rope,
                    context[:end],
                    context_frames=given.shape[1],
                    dtype=self.dtype,
                )

            sampled = history.euler_rollout(velocity, start[:, begin:end], steps)
            given = jnp.concatenate([given, sampled], 1)
        return given


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Example:
    """Weights and data of one batch."""

    params: Params
    stage1: jax.Array  # B F H W c
    truth: jax.Array  # B F H W c
    text: jax.Array  # B L C
