"""Features of the noise level, from which adaptive layer norms are modulated.

Axis letters: C features.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def timestep_features(timesteps: Num[Array, "*rest"], width: int = 256) -> Float[Array, "*rest C"]:
    """Sinusoidal features of timesteps in 0..1000: C = width, cosines first, float32."""
    half = width // 2
    frequency = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = timesteps.astype(jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
