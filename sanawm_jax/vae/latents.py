"""The Gaussian distribution of the latents, and their normalisation for the diffusion model.

Sources: diffusers' `DiagonalGaussianDistribution` and the encode and decode steps of
`SanaWMPipeline`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def clip_logvar(logvar: jax.Array) -> jax.Array:
    """Clips the log-variance so that its exponential is finite."""
    return jnp.clip(logvar, -30.0, 20.0)


def mode_posterior(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """Returns the most likely latents, (B, f, h, w, C)."""
    del logvar
    return mean


def sample_posterior(mean: jax.Array, logvar: jax.Array, noise: jax.Array) -> jax.Array:
    """Draws latents from the posterior.

    Args:
      mean, logvar: (B, f, h, w, C) from the encoder.
      noise: standard normal noise of the same shape.
    """
    return mean + jnp.exp(0.5 * clip_logvar(logvar)) * noise


def kl_divergence(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL divergence to the standard normal, in nats per latent location: (B, f, h, w) float32."""
    mean, logvar = mean.astype(jnp.float32), clip_logvar(logvar.astype(jnp.float32))
    return 0.5 * jnp.sum(mean * mean + jnp.exp(logvar) - 1.0 - logvar, axis=-1)


def normalise(
    latents: jax.Array, mean: jax.Array, std: jax.Array, scaling_factor: float = 1.0
) -> jax.Array:
    """Converts VAE latents to those of the diffusion model; mean and std are (C,)."""
    mean, std = mean.astype(latents.dtype), std.astype(latents.dtype)
    return (latents - mean) * scaling_factor / std


def denormalise(
    latents: jax.Array, mean: jax.Array, std: jax.Array, scaling_factor: float = 1.0
) -> jax.Array:
    """Inverse of `normalise`."""
    mean, std = mean.astype(latents.dtype), std.astype(latents.dtype)
    return latents / scaling_factor * std + mean
