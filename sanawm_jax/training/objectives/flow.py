"""The flow-matching objective of stage 1, as pure functions of arrays.

Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels, L text
tokens, C text width. Source: NVlabs/Sana, stage-1 training.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sanawm_jax.core.frames import FrameLayout
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.schedule import shift_sigma
from sanawm_jax.training.objectives.timesteps import NUM_STEPS, sample_chunk_steps, sample_steps

LOSS_WEIGHTS = ("velocity", "ramp")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlowExample:
    """One noised batch.

    Attributes:
      noisy: (B, F, H, W, c) float32, (1 - sigma) * clean + sigma * noise.
      timesteps: (B, F) float32 whole numbers, what the network is told.
      target: (B, F, H, W, c) float32, noise - clean.
      mask: (B, F) float32, 0 on frames that are given.
    """

    noisy: jax.Array
    timesteps: jax.Array
    target: jax.Array
    mask: jax.Array


@functools.cache
def noise_levels(flow_shift: float) -> tuple[np.ndarray, np.ndarray]:
    """sigma and network timestep of the integer steps 0..999, both (1000,) float32.

    sigma = shift * s / (1 + (shift - 1) * s) with s = step / 1000. The timestep is
    floor(1000 * sigma), as in the reference, although sigma itself is exact.
    """
    # in float64: float32 would floor some whole numbers one down
    s = np.arange(NUM_STEPS, dtype=np.float64) / NUM_STEPS
    sigma = shift_sigma(s, flow_shift)
    timestep = np.floor(np.round(NUM_STEPS * sigma, 9))
    return sigma.astype(np.float32), timestep.astype(np.float32)


def noised_example(
    key: jax.Array,
    latents: jax.Array,
    *,
    flow_shift: float,
    image_prob: float,
    chunk_starts: tuple[int, ...] | None = None,
    chunk_mixture: Mapping[str, float] | None = None,
) -> FlowExample:
    """Noises a batch of clean latents, each at one step or, with a mixture, at one a chunk.

    Args:
      latents: (B, F, H, W, c) normalised.
      flow_shift: larger puts more of the training on high noise.
      image_prob: chance of a sample to keep its first frame clean, at timestep 0 and out of the
        loss: the condition of image-to-video. Otherwise the sample is text-to-video.
      chunk_starts: of the chunk-causal model.
      chunk_mixture: weights of the modes of `objectives.timesteps`; None is one step a sample.

    Raises:
      InputError: bad starts or weights.
    """
    batch, frames = latents.shape[:2]
    latents = latents.astype(jnp.float32)
    step_key, noise_key, image_key = jax.random.split(key, 3)
    sigma_table, timestep_table = (jnp.asarray(a) for a in noise_levels(float(flow_shift)))
    if chunk_mixture is None:
        step = jnp.broadcast_to(sample_steps(step_key, batch)[:, None], (batch, frames))
    else:
        layout = FrameLayout(frames, chunk_starts or (0,))
        step = sample_chunk_steps(step_key, batch, layout, chunk_mixture)
    has_image = jax.random.bernoulli(image_key, image_prob, (batch, 1))
    given = has_image & (jnp.arange(frames) == 0)  # B F
    step = jnp.where(given, 0, step)
    noise = jax.random.normal(noise_key, latents.shape)
    return _example(latents, noise, sigma_table[step], timestep_table[step], given)


def forced_example(
    key: jax.Array, latents: jax.Array, *, flow_shift: float, history_noise: float
) -> FlowExample:
    """A batch for teacher forcing: the clip as history, and again with noise to predict.

    All frames of a history have one noise level, uniform up to `history_noise`, and a quarter of
    the histories have none. The model then knows how far it can trust a history, and one that it
    made itself is no surprise. The other frames draw their levels one by one, since none sees
    another. The first frame is given.

    Args:
      latents: (B, F, H, W, c) normalised.
      flow_shift: see `noised_example`.
      history_noise: highest noise level of a history, below 1.

    Returns:
      Examples of 2 F frames, for `core.teacher_forcing`.
    """
    batch, frames = latents.shape[:2]
    latents = jnp.tile(latents.astype(jnp.float32), (1, 2, 1, 1, 1))
    level_key, step_key, noise_key = jax.random.split(key, 3)
    level = jax.random.uniform(
        level_key, (batch, 1), minval=-history_noise / 3, maxval=history_noise
    )
    history = jnp.broadcast_to(jnp.maximum(level, 0.0), (batch, frames))
    sigma_table, timestep_table = (jnp.asarray(a) for a in noise_levels(float(flow_shift)))
    step = sample_steps(step_key, batch * frames).reshape(batch, frames)
    first = jnp.tile(jnp.arange(frames) == 0, 2)  # 2 F
    sigma = jnp.where(first, 0.0, jnp.concatenate([history, sigma_table[step]], 1))
    timesteps = jnp.concatenate([jnp.floor(NUM_STEPS * history), timestep_table[step]], 1)
    noise = jax.random.normal(noise_key, latents.shape)
    return _example(latents, noise, sigma, jnp.where(first, 0.0, timesteps), sigma == 0)


def _example(
    latents: jax.Array, noise: jax.Array, sigma: jax.Array, timesteps: jax.Array, given: jax.Array
) -> FlowExample:
    """Of latents (B, F, H, W, c) at noise levels (B, F); the loss leaves `given` frames out."""
    level = sigma[..., None, None, None]
    return FlowExample(
        noisy=(1 - level) * latents + level * noise,
        timesteps=timesteps,
        target=noise - latents,
        mask=1.0 - given.astype(jnp.float32),
    )


def level_weights(timesteps: jax.Array, how: str) -> jax.Array:
    """Weight of a frame's squared velocity error by its noise level sigma = timestep / 1000.

    `velocity` is 1. `ramp` is 8 sigma^2 (1 - 0.9 sigma), whose mean is near 1: the error of the
    clean latents x - sigma v is sigma times that of the velocity, and a ramp gives frames without
    signal a tenth of the weight of those without noise (arXiv 2509.24527). At low noise the
    velocity is mostly noise that nothing can predict, and an unweighted loss spends the network on
    it.

    Args:
      timesteps: any shape, 0 to 1000.

    Raises:
      InputError: another name.
    """
    if how not in LOSS_WEIGHTS:
        raise InputError(f"loss_weight={how!r}; use one of {', '.join(LOSS_WEIGHTS)}")
    if how == "velocity":
        return jnp.ones_like(timesteps)
    sigma = timesteps / NUM_STEPS
    return 8.0 * jnp.square(sigma) * (1.0 - 0.9 * sigma)


def drop_captions(
    key: jax.Array,
    text: jax.Array,
    text_mask: jax.Array,
    null_text: jax.Array,
    null_mask: jax.Array,
    prob: float,
) -> tuple[jax.Array, jax.Array]:
    """Replaces captions by the empty prompt, so that guidance has an unconditional model.

    Args:
      text, text_mask: (B, L, C) and (B, L).
      null_text, null_mask: (L, C) and (L,).
      prob: chance of each sample.

    Returns:
      text and mask of the same shapes.
    """
    drop = jax.random.bernoulli(key, prob, (text.shape[0],))
    text = jnp.where(drop[:, None, None], null_text.astype(text.dtype), text)
    return text, jnp.where(drop[:, None], null_mask.astype(text_mask.dtype), text_mask)


def frame_weights(mask: jax.Array) -> jax.Array:
    """Weights that make a mean over rows the mean over all frames, weighted by the mask: (B, F).

    They are fixed for the whole batch, so that its parts add up to it whatever each part masks.
    """
    return mask * (mask.shape[0] / jnp.maximum(jnp.sum(mask), 1.0))


def frame_errors(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared errors of every frame, (B, F, H, W, c) twice -> (B, F) float32."""
    error = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    return jnp.mean(error, axis=(2, 3, 4))


def velocity_loss(prediction: jax.Array, target: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean over rows of the weighted squared errors of their frames; () float32.

    Args:
      prediction, target: (B, F, H, W, c).
      weights: (B, F), see `frame_weights`.
    """
    return jnp.mean(jnp.sum(frame_errors(prediction, target) * weights, axis=1))
