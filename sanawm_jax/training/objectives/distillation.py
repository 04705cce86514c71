"""Losses of distillation, as pure functions of arrays.

Distribution matching distillation compares two estimates of the clean clip at a noise level: that
of the frozen teacher (the real score), and that of a critic which is trained on the student's clips
(the fake score). Their difference is the gradient of the student's clip.

Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels.
Source: NVlabs/Sana, the trainer of the distilled SANA-WM; DMD2 (arXiv 2405.14867).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sanawm_jax.sampling.schedule import NUM_TIMESTEPS, add_noise, shift_sigma
from sanawm_jax.training.objectives.rollout import clean_estimate


class ScoreLevel(NamedTuple):
    """How noisy the clips are that the scores see.

    Attributes:
      shift: moves levels towards 1.
      lowest, highest: bounds of the timestep after the shift.
      guidance: weight of (conditional - unconditional), which is added to the conditional estimate
        of the teacher. In the usual convention the scale is one more.
    """

    shift: float = 10.0
    lowest: float = 20.0
    highest: float = 980.0
    guidance: float = 3.0

    def timestep(self, raw: jax.Array) -> jax.Array:
        """Timesteps of uniform ones in 0..999."""
        shifted = NUM_TIMESTEPS * shift_sigma(raw / NUM_TIMESTEPS, self.shift)
        return jnp.clip(shifted, self.lowest, self.highest)

    def draw(self, key: jax.Array, batch: int) -> jax.Array:
        """(B,) timesteps."""
        return self.timestep(jax.random.randint(key, (batch,), 0, NUM_TIMESTEPS).astype("float32"))

    def guided(self, conditional: jax.Array, unconditional: jax.Array) -> jax.Array:
        """The teacher's estimate."""
        return conditional + self.guidance * (conditional - unconditional)


def noised_clip(clip: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
    """(B, F, H, W, c) float32 at the timesteps (B, F) of its frames."""
    return add_noise(clip, noise, timesteps[..., None, None, None] / NUM_TIMESTEPS)


def frame_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over all elements (B, F, H, W, c) of the frames whose mask (B, F) is 1; () float32."""
    each = jnp.mean(values.astype(jnp.float32), (2, 3, 4))
    return jnp.sum(each * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def mask_of_made(timesteps: jax.Array) -> jax.Array:
    """1 on frames (B, F) with noise, 0 on given ones."""
    return (timesteps > 0).astype(jnp.float32)


class Matching(NamedTuple):
    """Distribution matching of a batch of clips.

    Attributes:
      loss: () float32; its gradient with respect to the clip is `cotangent`.
      cotangent: (B, F, H, W, c).
      direction: () mean absolute value of the normalised difference of the scores.
      normaliser: (B,).
    """

    loss: jax.Array
    cotangent: jax.Array
    direction: jax.Array
    normaliser: jax.Array


def distribution_matching(
    clip: jax.Array, fake: jax.Array, real: jax.Array, mask: jax.Array
) -> Matching:
    """Half the mean squared difference of the scores, divided by a normaliser of each clip.

    Args:
      clip: (B, F, H, W, c) that the student made.
      fake, real: estimates of the critic and of the teacher for the noised clip; on given frames
        they are the clip itself.
      mask: (B, F), 0 on given frames. They count in the normaliser, with an error of zero.
    """
    clip, fake, real = (a.astype(jnp.float32) for a in (clip, fake, real))
    normaliser = jnp.maximum(jnp.mean(jnp.abs(clip - real), (1, 2, 3, 4)), 1e-6)
    difference = jnp.nan_to_num((fake - real) / normaliser[:, None, None, None, None])
    weights = mask / (jnp.maximum(jnp.sum(mask), 1.0) * clip[0, 0].size)
    return Matching(
        0.5 * frame_mean(jnp.square(difference), mask),
        difference * weights[..., None, None, None],
        jnp.mean(jnp.abs(difference)),
        normaliser,
    )


def flow_loss(velocity: jax.Array, clip: jax.Array, noise: jax.Array, mask: jax.Array) -> jax.Array:
    """The critic's loss: squared error of a velocity on the frames whose mask is 1; () float32."""
    error = velocity.astype(jnp.float32) - (noise - clip).astype(jnp.float32)
    return frame_mean(jnp.square(error), mask)


def ode_loss(
    velocity: jax.Array, noisy: jax.Array, timesteps: jax.Array, clean: jax.Array
) -> jax.Array:
    """Squared error of the clean clip that a velocity leads to, on frames with noise; () float32.

    Args:
      velocity, noisy, clean: (B, F, H, W, c).
      timesteps: (B, F) of the frames of `noisy`.
    """
    error = clean_estimate(noisy, velocity, timesteps) - clean.astype(jnp.float32)
    return frame_mean(jnp.square(error), mask_of_made(timesteps))


def pseudo_huber(error: jax.Array, size: float) -> jax.Array:
    """sqrt(error^2 + size^2) - size, about |error| where it is large; size 0 is error^2."""
    if size == 0:
        return jnp.square(error)
    return jnp.sqrt(jnp.square(error) + size**2) - size
