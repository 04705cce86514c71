"""`prepare` and `loss` of the refiner, see `engine.step`: which frames, noise, history.

Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels, L text
tokens, C text width.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from ml_collections import ConfigDict

from sanawm_jax.core.lora import combine
from sanawm_jax.core.params import Params
from sanawm_jax.refiner.rope import VideoRope
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.engine.step import Metrics
from sanawm_jax.training.objectives import refiner_history as history
from sanawm_jax.training.objectives.refiner_flow import (
    LEVELS,
    START_SIGMA,
    ChunkLayout,
    Sequence,
    augment_stage1,
    chunk_layouts,
    clip_sequence,
    predict_velocity,
    sample_sigmas,
    sequence_loss,
    stream_sequence,
)

OBJECTIVES = ("clip", "stream")


@dataclasses.dataclass(frozen=True)
class Objective:
    """What an example is.

    Attributes:
      levels: sampler of noise levels, see `refiner_flow.LEVELS`.
      start: s, where sampling starts.
      augment: (low, high) amount of noise added to stage 1; high 0 is off.
      sink_frames: of a whole clip, given as stage 1 has them.
      layouts: of a stream, empty for whole clips.
      first, chunk: latent frames of the first and of the other chunks.
      curriculum, corruption: of a stream's history.
    """

    levels: str
    start: float = START_SIGMA
    augment: tuple[float, float] = (0.0, 0.0)
    sink_frames: int = 1
    layouts: tuple[ChunkLayout, ...] = ()
    first: int = 1
    chunk: int = 3
    curriculum: history.Curriculum = dataclasses.field(default_factory=history.Curriculum)
    corruption: history.Corruption = dataclasses.field(default_factory=history.Corruption)


def make_objective(config: ConfigDict, frames: int, start: float = START_SIGMA) -> Objective:
    """The objective that a configuration names for clips of `frames` latent frames.

    Args:
      start: s, the first of the refiner's noise levels.

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
        return Objective(config.levels, start, (low, high), config.sink_frames)
    stream = config.stream
    layouts = chunk_layouts(frames, first=stream.first, chunk=stream.chunk, window=stream.window)
    return Objective(
        config.levels,
        start,
        (low, high),
        layouts=tuple(layouts),
        first=stream.first,
        chunk=stream.chunk,
        curriculum=history.Curriculum(**stream.curriculum.to_dict()),
        corruption=history.Corruption(**stream.corruption.to_dict()),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class PrepareRefiner:
    """Rows of `resident["stage1"]` to examples, with all that is random about them.

    `resident` holds latents (n, F, H, W, c), stage1 (s n, F, H, W, c), caption (n,) and
    refiner_text (U, L, C).

    Attributes:
      objective: what an example is.
      clips: n.
      step: () int32, which the mixture of a stream's history depends on.
    """

    objective: Objective
    clips: int
    step: jax.Array | int = 0

    def at_step(self, step: jax.Array) -> PrepareRefiner:
        return dataclasses.replace(self, step=step)

    def __call__(
        self, resident: dict[str, Any], batch: jax.Array, key: jax.Array
    ) -> dict[str, jax.Array]:
        sigma_key, noise_key, augment_key, *stream_keys = jax.random.split(key, 7)
        objective, clip = self.objective, batch % self.clips
        stage1 = resident["stage1"][batch].astype(jnp.float32)
        truth = resident["latents"][clip].astype(jnp.float32)
        text = resident["refiner_text"][resident["caption"][clip]]
        sink = objective.sink_frames
        augmented = augment_stage1(augment_key, stage1, *objective.augment)
        rows, frames, height, width, _ = truth.shape
        noise = jax.random.normal(noise_key, truth.shape)
        if not objective.layouts:
            tokens = (frames - sink) * height * width
            # what sampling gives as it is stays as it is
            stage1 = jnp.concatenate([stage1[:, :sink], augmented[:, sink:]], 1)
            sigma = sample_sigmas(sigma_key, rows, tokens, objective.levels, objective.start)
            sequence = clip_sequence(stage1, truth, noise, sigma, sink, objective.start)
            return {
                "latents": sequence.latents,
                "sigma": sequence.sigma,
                "target": sequence.target,
                "text": text,
            }
        layout_key, kind_key, steps_key, seed_key = stream_keys
        tokens = objective.chunk * height * width
        # one draw for all rows: positions have no batch axis, and a rollout is for all or none
        shared = {
            "layout": jax.random.randint(layout_key, (), 0, len(objective.layouts)),
            "history": history.draw_history_kind(
                kind_key, jnp.asarray(self.step), objective.curriculum
            ),
            "rollout_steps": history.draw_rollout_steps(steps_key),
        }
        return {
            **{name: jnp.broadcast_to(value, (rows,)) for name, value in shared.items()},
            "stage1": stage1,
            "augmented": augmented,
            "truth": truth,
            "noise": noise,
            "sigma": sample_sigmas(sigma_key, rows, tokens, objective.levels, objective.start),
            "text": text,
            # a row's own randomness for what happens to its history
            "seed": jax.random.key_data(jax.random.split(seed_key, rows)),
        }


@dataclasses.dataclass(frozen=True, eq=False)
class RefinerLoss:
    """Mean squared error of the velocity on the noised frames of `PrepareRefiner`'s examples.

    Attributes:
      graphdef: of the `Refiner`, adapted if adapters are trained.
      rope: tables of the whole clip.
      objective: what an example is.
      dtype, remat: see `refiner_flow.predict_velocity`.
      base: frozen weights under the adapters, if adapters are trained.
    """

    graphdef: nnx.GraphDef
    rope: VideoRope
    objective: Objective
    dtype: Any
    remat: str = "none"
    base: Params | None = None

    def given(self, resident: dict[str, Any]) -> RefinerLoss:
        return dataclasses.replace(self, base=resident.get("base"))

    def __call__(self, params: Params, examples: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        if self.base is not None:
            params = combine(self.base, params)
        if self.objective.layouts:
            return self._stream(params, examples), {}
        latents = examples["latents"]
        positions = jnp.arange(latents.shape[1])
        sequence = Sequence(latents, examples["sigma"], examples["target"], positions)
        return self._loss(params, sequence, examples["text"]), {}

    def _loss(self, params: Params, sequence: Sequence, text: jax.Array) -> jax.Array:
        return sequence_loss(
            self.graphdef,
            params,
            sequence,
            text,
            self.rope,
            dtype=self.dtype,
            remat=self.remat,
        )

    def _stream(self, params: Params, examples: dict[str, jax.Array]) -> jax.Array:
        """The loss of the chunk that was drawn; layouts of one length share a program."""
        layouts = self.objective.layouts
        lengths = [(len(layout.context), len(layout.current)) for layout in layouts]
        kinds = sorted(set(lengths))
        drawn = examples["layout"][0]
        branches = []
        for kind in kinds:
            rows = [i for i, length in enumerate(lengths) if length == kind]
            # where a layout is among those of its kind; others never come here
            place = np.searchsorted(rows, np.arange(len(layouts))).clip(0, len(rows) - 1)
            tables = (
                np.array([layouts[i].context for i in rows]),
                np.array([layouts[i].current for i in rows]),
            )

            def branch(
                params: Params,
                examples: dict[str, jax.Array],
                place: np.ndarray = place,
                tables: tuple[np.ndarray, np.ndarray] = tables,
            ) -> jax.Array:
                row = jnp.asarray(place)[drawn]
                context, current = (jnp.asarray(table)[row] for table in tables)
                return self._chunk(params, examples, context, current)

            branches.append(branch)
        which = jnp.asarray([kinds.index(length) for length in lengths])[drawn]
        return lax.switch(which, branches, params, examples)

    def _chunk(
        self,
        params: Params,
        examples: dict[str, jax.Array],
        context: jax.Array,
        current: jax.Array,
    ) -> jax.Array:
        """The loss of one chunk; context and current are absolute frames, (F,) and (f,)."""
        parts = (examples[name][:, current] for name in ("augmented", "truth", "noise"))
        sequence = stream_sequence(
            self._history(params, examples, context),
            *parts,
            sigma=examples["sigma"],
            positions=jnp.concatenate([context, current]),
            start=self.objective.start,
        )
        return self._loss(params, sequence, examples["text"])

    def _history(
        self, params: Params, examples: dict[str, jax.Array], context: jax.Array
    ) -> jax.Array:
        """Latents of the context: the sink as it is, then history of the kind that was drawn."""
        objective, first = self.objective, self.objective.first
        true = examples["truth"][:, context]
        if len(context) <= first:
            return true
        keys = jax.vmap(jax.random.wrap_key_data)(examples["seed"])

        def damaged() -> jax.Array:
            def one(key: jax.Array, frames: jax.Array) -> jax.Array:
                strength_key, damage_key = jax.random.split(key)
                strength = jax.random.uniform(strength_key, (1,))
                return history.corrupt(damage_key, frames[None], strength, objective.corruption)[0]

            # sampling gives the sink exactly, so it is never damaged
            return jnp.concatenate([true[:, :first], jax.vmap(one)(keys, true[:, first:])], 1)

        kinds = [lambda: true, damaged]
        if objective.curriculum.has_rollouts:
            kinds.append(lambda: self._rollout(params, examples, context, keys))
        kind = jnp.minimum(examples["history"][0], len(kinds) - 1)
        return lax.stop_gradient(lax.switch(kind, kinds))

    def _rollout(
        self, params: Params, examples: dict[str, jax.Array], context: jax.Array, keys: jax.Array
    ) -> jax.Array:
        """History chunk by chunk as the present weights sample it, without a gradient."""
        params, first = lax.stop_gradient(params), self.objective.first
        stage1 = examples["stage1"][:, context]
        noise = jax.vmap(lambda key: jax.random.normal(key, stage1.shape[1:]))(keys)
        level = self.objective.start
        start = (1 - level) * stage1 + level * noise
        given = examples["truth"][:, context[:first]]
        cuts = [*range(first, len(context), self.objective.chunk), len(context)]
        for begin, end in itertools.pairwise(cuts):

            def velocity(
                x: jax.Array, sigma: jax.Array, given: jax.Array = given, end: int = end
            ) -> jax.Array:
                return predict_velocity(
                    self.graphdef,
                    params,
                    jnp.concatenate([given, x], 1),
                    sigma,
                    examples["text"],
                    self.rope,
                    context[:end],
                    context_frames=given.shape[1],
                    dtype=self.dtype,
                )

            steps = examples["rollout_steps"][0]
            sampled = history.euler_rollout(velocity, start[:, begin:end], steps, level)
            given = jnp.concatenate([given, sampled], 1)
        return given
