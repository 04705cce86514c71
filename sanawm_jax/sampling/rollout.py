"""One chunk of a stream: Euler steps from noise, then the pass that writes the state.

The sampler of the distilled model, its training and the live world all use this function.
Axis letters: B batch, F latent frames, H W latent rows and columns, C channels, L text tokens.
Reference: upstream's `SelfForcingFlowEulerCamCtrl.sample`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sanawm_jax.core.params import Params, apply
from sanawm_jax.dit.state import DiTState, Window
from sanawm_jax.sampling.schedule import euler_rollout, guide
from sanawm_jax.sampling.stage1 import Conditions, is_condition, network_inputs


@functools.partial(
    jax.jit, static_argnames=("graphdef", "window", "dtype"), donate_argnames=("state",)
)
def denoise_chunk(
    graphdef: nnx.GraphDef,
    params: Params,
    state: DiTState | None,
    noise: jax.Array,
    first_latent: jax.Array | None,
    conditions: Conditions,
    sigmas: jax.Array,
    guidance: jax.Array,
    *,
    window: Window,
    dtype: Any,
) -> tuple[jax.Array, DiTState]:
    """Denoises the chunk that follows a state, and moves the state past it.

    One program serves every chunk but the first, however old the stream is. The state sees only
    finished latents: it comes from a last pass at timestep 0.

    Args:
      graphdef, params: the DiT.
      state: after the chunks before, donated; None for the first chunk.
      noise: (B, F, H, W, C) standard normal.
      first_latent: (B, 1, H, W, C) of the given image, which stays frame 0 of the first chunk at
        timestep 0; None in every later chunk.
      conditions: of the chunk's frames. With guidance the text has batch 2 B, [negative, prompt],
        and so has the state.
      sigmas: (steps + 1,) falling noise levels, from 1 down to 0.
      guidance: () classifier-free guidance scale, read only with such a text.
      window: of the stream.
      dtype: compute dtype of the network; the latents stay float32 between steps.

    Returns:
      (B, F, H, W, C) float32, and the state for the next chunk.

    Raises:
      InputError: see `DiT.stream`.
    """
    conditioned = is_condition(noise) & (first_latent is not None)
    is_guided = len(conditions.text) == 2 * len(noise)

    def predict(latents: jax.Array, sigma: jax.Array | float) -> tuple[jax.Array, DiTState]:
        inputs = network_inputs(latents, conditions, sigma, conditioned, dtype)
        return apply(graphdef, params, *inputs, window=window, state=state, method="stream")

    def velocity(latents: jax.Array, sigma: jax.Array) -> jax.Array:
        found, _ = predict(latents, sigma)
        return guide(found, guidance) if is_guided else found

    latents = noise.astype(jnp.float32)
    if first_latent is not None:
        latents = jnp.concatenate([first_latent.astype(jnp.float32), latents[:, 1:]], 1)
    latents = euler_rollout(velocity, latents, sigmas[:-1], sigmas[1:], conditioned)
    return latents, predict(latents, 0.0)[1]
