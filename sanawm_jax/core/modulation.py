"""Features of the timestep, from which networks compute the modulation of adaptive layer norms."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def timestep_features(timesteps: jax.Array, width: int = 256) -> jax.Array:
    """Returns sinusoidal features (..., width) float32 of timesteps (...) from 0 to 1000.

    The first half holds the cosines, the second half the sines.
    """
    half = width // 2
    frequency = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = timesteps.astype(jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
