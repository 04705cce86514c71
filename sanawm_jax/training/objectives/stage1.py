"""The objective of stage 1: add noise to a batch, predict the velocity, and compare.

Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels, L text
tokens.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from sanawm_jax.checkpoints.initial_weights import load_initial
from sanawm_jax.core.frames import chunk_starts
from sanawm_jax.core.lora import build_adapted, init_adapters, merge_lora
from sanawm_jax.core.params import Params, apply, build, cast, init
from sanawm_jax.core.sharding import place
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.flops import forward_flops, training_flops
from sanawm_jax.dit.model import DiT
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.engine.precision import compute_dtype
from sanawm_jax.training.engine.step import Loss, Metrics, Share
from sanawm_jax.training.objectives.adapters import AdaptedLoss, lora_of
from sanawm_jax.training.objectives.flow import (
    drop_captions,
    forced_example,
    frame_errors,
    frame_weights,
    level_weights,
    noised_example,
)
from sanawm_jax.training.objectives.timesteps import mixture_probabilities

_BUCKETS = (0, 250, 500, 750, 1000)  # bounds of timesteps; each bucket has its own metric


class Stage1Objective:
    """`prepare` and `loss` of the DiT, see `training.engine.step`.

    Args:
      config: of the run, see `configs.common.stage1`; chunk_size 0 is the bidirectional model.
      model: of the network.
      frames: F of every clip.

    Attributes:
      abstract: shapes of what is trained: all weights, or with `config.lora` adapters.
      lora: the adapters, or None.

    Raises:
      InputError: a chunk layout, mixture, weight of the loss or adapters that do not exist.
    """

    def __init__(self, config: ml_collections.ConfigDict, model: DiTConfig, frames: int):
        self._config = config
        self._model = model
        self._dtype = compute_dtype(config.dtype)
        self.graphdef, self.abstract = build(DiT, model)
        self.lora = lora_of(config)
        if self.lora:
            self.graphdef, self.abstract = build_adapted(DiT, model, self.lora)
            if not config.init_weights:
                raise InputError("init_weights is empty; give the folder that the adapters are for")
        self._frames = frames
        self.starts, self.mixture = None, None
        if config.chunk_size:
            self.starts = chunk_starts(frames, config.chunk_size, config.chunk_split_strategy)
            self.mixture = dict(config.chunk_mixture)
            mixture_probabilities(self.mixture)
        if config.teacher_forcing and config.chunk_size != 1:
            raise InputError(f"teacher_forcing needs chunk_size=1, not {config.chunk_size}")
        level_weights(jnp.zeros(()), config.loss_weight)

    def init(self, shardings: Any) -> Params:
        """Random weights, those of `config.init_weights`, or adapters on them, placed.

        Raises:
          InputError: the folder of `config.init_weights` is of another network.
        """
        key = jax.random.key(self._config.seed)
        if self.lora:
            adapters = init_adapters(self.abstract, key)
            return adapters if shardings is None else place(adapters, shardings)
        if not self._config.init_weights:
            return init(DiT, self._model, key, shardings=shardings)
        params = load_initial(self._config.init_weights, self._model)
        return jax.device_put(params) if shardings is None else place(params, shardings)

    def frozen(self) -> dict[str, Params]:
        """The frozen base of adapters, in the compute dtype; empty if all weights are trained."""
        if not self.lora:
            return {}
        return {"base": cast(load_initial(self._config.init_weights, self._model), self._dtype)}

    def merged(self, params: Params) -> Params:
        """The weights of the whole network, adapters merged into their base."""
        if not self.lora:
            return params
        base = load_initial(self._config.init_weights, self._model)
        return merge_lora(base, params, self.lora.scale)

    def flops(self, grid: tuple[int, ...], text: int) -> float:
        """FLOPs that one clip on a grid (H, W), with L = `text` tokens, adds to a training step."""
        config = self._config
        copies = 2 if config.teacher_forcing else 1
        forward = copies * forward_flops(
            self._model,
            self._frames,
            grid[0],
            grid[1],
            text,
            chunk_size=config.chunk_size,
            split=config.chunk_split_strategy,
            camera=config.use_camera,
        )
        return training_flops(forward, frozen=self.lora is not None)

    def prepare(
        self, rows: dict[str, jax.Array], null: tuple[jax.Array, jax.Array], key: jax.Array
    ) -> dict[str, jax.Array]:
        """Examples with noise.

        Args:
          rows: latents (B, F, H, W, c), camera (B, F, 20), plucker (B, F, H, W, 48), text
            (B, L, width) and text_mask (B, L).
          null: text (L, width) and mask (L,) of the empty caption.
        """
        config, dtype = self._config, self._dtype
        noise_key, drop_key = jax.random.split(key)
        if config.teacher_forcing:
            example = forced_example(
                noise_key,
                rows["latents"],
                flow_shift=config.flow_shift,
                history_noise=config.history_noise,
            )
            names = ("camera", "plucker")
            rows = {**rows, **{n: jnp.concatenate([rows[n]] * 2, 1) for n in names}}
        else:
            example = noised_example(
                noise_key,
                rows["latents"],
                flow_shift=config.flow_shift,
                image_prob=config.image_prob,
                chunk_starts=self.starts,
                chunk_mixture=self.mixture,
            )
        text, mask = drop_captions(
            drop_key, rows["text"], rows["text_mask"], *null, config.caption_dropout
        )
        # a network that gets no poses runs without camera branch and rays
        cameras = {
            "camera": rows["camera"],  # float32: poses lose centimetres in bfloat16
            "plucker": rows["plucker"].astype(dtype),
        }
        return {
            "latents": example.noisy.astype(dtype),
            "timesteps": example.timesteps,
            "text": text.astype(dtype),
            "text_mask": mask,
            **(cameras if config.use_camera else {}),
            "target": example.target,
            "weights": frame_weights(
                example.mask * level_weights(example.timesteps, config.loss_weight)
            ),
        }

    @property
    def loss(self) -> Loss:
        """See `training.engine.step.Loss`; its metrics are mean errors by timestep."""
        return AdaptedLoss(self._loss) if self.lora else self._loss

    def _loss(self, params: Params, examples: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        inputs: dict[str, Any] = dict(examples)
        target, weights = inputs.pop("target"), inputs.pop("weights")
        forced, starts = self._config.teacher_forcing, self.starts
        if forced:
            starts = tuple(range(2 * self._frames))
        velocity = apply(
            self.graphdef,
            params,
            **inputs,
            chunk_starts=starts,
            cached_chunks=self._config.cached_chunks or None,
            teacher_forced=forced,
            remat=self._config.remat,
            unroll=self._config.unroll,
        )
        errors = frame_errors(velocity, target)
        return jnp.mean(jnp.sum(errors * weights, axis=1)), _by_timestep(
            errors, examples["timesteps"], weights
        )


def _by_timestep(errors: jax.Array, timesteps: jax.Array, weights: jax.Array) -> Metrics:
    """Mean errors of the frames to predict, for each bucket of timesteps; arguments are (B, F)."""
    metrics: Metrics = {}
    for low, high in itertools.pairwise(_BUCKETS):
        inside = (timesteps >= low) & (timesteps < high) & (weights > 0)
        chosen = inside.astype(jnp.float32)
        totals = (jnp.sum(errors * chosen, 1), jnp.sum(chosen, 1))
        metrics[f"loss_t{low}_{high}"] = Share(*map(jnp.mean, totals))
    return metrics
