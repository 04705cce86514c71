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
from jax import lax

from sanawm_jax.core.params import Params, apply
from sanawm_jax.dit.state import DiTState, Window
from sanawm_jax.sampling.schedule import euler_step, frame_timesteps, guide
from sanawm_jax.sampling.stage1 import Conditions


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
      noise: (1, F, H, W, C) standard normal.
      first_latent: (1, 1, H, W, C) of the given image, which stays frame 0 of the first chunk at
        timestep 0; None in every later chunk.
      conditions: of the chunk's frames. With guidance their batch is 2, [negative, prompt], and so
        is the state's.
      sigmas: (steps + 1,) falling noise levels, from 1 down to 0.
      guidance: () classifier-free guidance scale, read only with a batch of 2.
      window: of the stream.
      dtype: compute dtype of the network; the latents stay float32 between steps.

    Returns:
      (1, F, H, W, C) float32, and the state for the next chunk.

    Raises:
      InputError: see `DiT.stream`.
    """
    batch, frames = len(conditions.text), noise.shape[1]
    conditioned = (jnp.arange(frames) == 0) & (first_latent is not None)

    def repeat(a: jax.Array) -> jax.Array:
        return jnp.broadcast_to(a, (batch, *a.shape[1:]))

    def predict(latents: jax.Array, sigma: Any) -> tuple[jax.Array, DiTState]:
        return apply(
            graphdef,
            params,
            repeat(latents).astype(dtype),
            frame_timesteps(sigma, conditioned, batch),
            conditions.text,
            conditions.text_mask,
            repeat(conditions.camera),
            repeat(conditions.plucker),
            window=window,
            state=state,
            method="stream",
        )

    def step(latents: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        sigma, next_sigma = pair
        velocity, _ = predict(latents, sigma)
        if batch == 2:
            velocity = guide(velocity, guidance)
        return euler_step(latents, velocity, sigma, next_sigma, conditioned), None

    latents = noise.astype(jnp.float32)
    if first_latent is not None:
        latents = jnp.concatenate([first_latent.astype(jnp.float32), latents[:, 1:]], 1)
    latents, _ = lax.scan(step, latents, (sigmas[:-1], sigmas[1:]))
    return latents, predict(latents, 0.0)[1]
