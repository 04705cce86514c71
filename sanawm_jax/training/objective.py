"""The objective of stage 1 as a step runs it: noise a batch, predict the velocity, compare.

Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels, L text
tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sanawm_jax.core.frames import chunk_starts
from sanawm_jax.core.params import Params, apply, build, init
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.model import DiT
from sanawm_jax.errors import InputError
from sanawm_jax.pipeline.folder import Stage1Folder
from sanawm_jax.training.flow import drop_captions, frame_weights, noised_example, velocity_loss
from sanawm_jax.training.step import Metrics
from sanawm_jax.training.timesteps import mixture_probabilities


def compute_dtype(name: str) -> jnp.dtype:
    """`auto` is bfloat16 on an accelerator and float32 on a CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


class Stage1Objective:
    """`prepare` and `loss` of the DiT, see `training.step`.

    Args:
      config: of the run: dtype, remat, unroll, seed, flow_shift, image_prob, caption_dropout,
        chunk_size (0 is the bidirectional model), chunk_split_strategy, chunk_mixture.
      model: of the network.
      frames: F of every clip.

    Raises:
      InputError: a chunk layout or mixture that does not exist.
    """

    def __init__(self, config: ml_collections.ConfigDict, model: DiTConfig, frames: int):
        self._config = config
        self._model = model
        self._dtype = compute_dtype(config.dtype)
        self._graphdef, self.abstract = build(DiT, model)
        self.starts, self.mixture = None, None
        if config.chunk_size:
            self.starts = chunk_starts(frames, config.chunk_size, config.chunk_split_strategy)
            self.mixture = dict(config.chunk_mixture)
            mixture_probabilities(self.mixture)

    def init(self, shardings: Any) -> Params:
        """Random weights, or those of `config.weights`, placed.

        Raises:
          InputError: the folder of `config.weights` is of another network.
        """
        folder = self._config.get("weights", "")
        if not folder:
            return init(DiT, self._model, jax.random.key(self._config.seed), shardings=shardings)
        found, _, params = Stage1Folder(folder).load_dit(np.float32)
        if build(DiT, found)[1] != self.abstract:
            raise InputError(f"weights={folder} is of another network than config.dit")
        return jax.device_put(params, shardings)

    def prepare(
        self, rows: dict[str, jax.Array], null: tuple[jax.Array, jax.Array], key: jax.Array
    ) -> dict[str, jax.Array]:
        """Noised examples.

        Args:
          rows: latents (B, F, H, W, c), camera (B, F, 20), plucker (B, F, H, W, 48), text
            (B, L, width) and text_mask (B, L).
          null: text (L, width) and mask (L,) of the empty caption.
        """
        config, dtype = self._config, self._dtype
        noise_key, drop_key = jax.random.split(key)
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
        return {
            "latents": example.noisy.astype(dtype),
            "timesteps": example.timesteps,
            "text": text.astype(dtype),
            "text_mask": mask,
            "camera": rows["camera"],  # float32: poses lose centimetres in bfloat16
            "plucker": rows["plucker"].astype(dtype),
            "target": example.target,
            "weights": frame_weights(example.mask),
        }

    def loss(self, params: Params, examples: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        """Mean over the rows, and no further metrics."""
        inputs: dict[str, Any] = dict(examples)
        target, weights = inputs.pop("target"), inputs.pop("weights")
        velocity = apply(
            self._graphdef,
            params,
            **inputs,
            chunk_starts=self.starts,
            remat=self._config.remat,
            unroll=self._config.unroll,
        )
        return velocity_loss(velocity, target, weights), {}
