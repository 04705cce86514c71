"""The Gaussian distribution of the latents, and their normalisation for the diffusion model.

Axis letters: c latent channels, after all other axes of the latents.
Sources: diffusers' `DiagonalGaussianDistribution` and the encode and decode steps of
`SanaWMPipeline`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def clip_logvar(logvar: Float[Array, "*rest c"]) -> Float[Array, "*rest c"]:
    """Clips the log-variance so that its exponential is finite."""
    return jnp.clip(logvar, -30.0, 20.0)


def mode_posterior(
    mean: Float[Array, "*rest c"], logvar: Float[Array, "*rest c"]
) -> Float[Array, "*rest c"]:
    """Returns the most likely latents."""
    del logvar
    return mean


def sample_posterior(
    mean: Float[Array, "*rest c"], logvar: Float[Array, "*rest c"], noise: Float[Array, "*rest c"]
) -> Float[Array, "*rest c"]:
    """Draws latents from the posterior.

    Args:
      mean, logvar: from the encoder.
      noise: standard normal noise.
    """
    return mean + jnp.exp(0.5 * clip_logvar(logvar)) * noise


def kl_divergence(
    mean: Float[Array, "*rest c"], logvar: Float[Array, "*rest c"]
) -> Float32[Array, "*rest"]:
    """KL divergence to the standard normal, in nats per latent location."""
    mean, logvar = mean.astype(jnp.float32), clip_logvar(logvar.astype(jnp.float32))
    return 0.5 * jnp.sum(mean * mean + jnp.exp(logvar) - 1.0 - logvar, axis=-1)


def normalise(
    latents: Float[Array, "*rest c"],
    mean: Float[Array, "c"],
    std: Float[Array, "c"],
    scaling_factor: float = 1.0,
) -> Float[Array, "*rest c"]:
    """Converts VAE latents to those of the diffusion model."""
    mean, std = mean.astype(latents.dtype), std.astype(latents.dtype)
    return (latents - mean) * scaling_factor / std


def denormalise(
    latents: Float[Array, "*rest c"],
    mean: Float[Array, "c"],
    std: Float[Array, "c"],
    scaling_factor: float = 1.0,
) -> Float[Array, "*rest c"]:
    """Inverse of `normalise`."""
    mean, std = mean.astype(latents.dtype), std.astype(latents.dtype)
    return latents / scaling_factor * std + mean
