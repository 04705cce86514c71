"""The autoencoder's objective: reconstruction at several scales, edges, and a light KL.

Axis letters: B batch, F pixel frames, H W rows and columns; f h w C of the latents.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import reduce

from sanawm_jax.vae.latents import kl_divergence


@dataclasses.dataclass(frozen=True)
class VAELossWeights:
    """Weights of the terms of `vae_loss`; `scales` counts halvings of the picture, 1 is none."""

    charbonnier: float = 1.0
    squared: float = 1.0
    edges: float = 0.5
    kl: float = 1e-4
    scales: int = 2


def charbonnier(difference: jax.Array, eps: float = 1e-3) -> jax.Array:
    """Mean of a smooth absolute value; () float32."""
    return jnp.mean(jnp.sqrt(jnp.square(difference) + eps * eps) - eps)


def edge_loss(difference: jax.Array) -> jax.Array:
    """Mean absolute error of the derivatives along rows, columns and frames.

    Args:
      difference: (B, F, H, W, 3) reconstruction - video. Differentiation is linear, so the error
        of the derivatives is the derivative of the error.
    """
    terms = [jnp.mean(jnp.abs(jnp.diff(difference, axis=axis))) for axis in (2, 3)]
    if difference.shape[1] > 1:
        terms.append(jnp.mean(jnp.abs(jnp.diff(difference, axis=1))))
    return sum(terms[1:], terms[0]) / len(terms)


def vae_loss(
    reconstruction: jax.Array,
    video: jax.Array,
    mean: jax.Array,
    logvar: jax.Array,
    weights: VAELossWeights,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum and its terms, all () float32.

    Args:
      reconstruction, video: (B, F, H, W, 3) in [-1, 1].
      mean, logvar: (B, f, h, w, C) of the posterior.

    Returns:
      loss and a dict with charbonnier, squared, edges, kl (nats a latent number) and psnr in dB
      of pictures in [0, 1].
    """
    difference = reconstruction.astype(jnp.float32) - video.astype(jnp.float32)
    terms = {
        "squared": jnp.mean(jnp.square(difference)),
        "edges": edge_loss(difference),
        "kl": jnp.mean(kl_divergence(mean, logvar)) / mean.shape[-1],
    }
    # peak to peak is 2 here
    psnr = 10 * jnp.log10(4.0 / jnp.maximum(terms["squared"], 1e-10))
    total = 0.0
    for scale in range(weights.scales):
        if scale:
            pool = "B F (H p) (W q) C -> B F H W C"
            difference = reduce(difference, pool, "mean", p=2, q=2)
        total += charbonnier(difference)
    terms["charbonnier"] = jnp.asarray(total / weights.scales)
    loss = sum(getattr(weights, name) * value for name, value in terms.items())
    return jnp.asarray(loss), {**terms, "psnr": psnr}
