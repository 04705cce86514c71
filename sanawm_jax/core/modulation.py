"""Features of the noise level, from which adaptive layer norms are modulated."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def timestep_features(timesteps: jax.Array, width: int = 256) -> jax.Array:
    """Sinusoidal features, cosines first: timesteps (...) in 0..1000 -> (..., width) float32."""
    half = width // 2
    frequency = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = timesteps.astype(jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
