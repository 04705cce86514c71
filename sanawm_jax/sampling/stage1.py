"""Stage 1: noise, first frame, text and camera to latents.

Axis letters: F latent frames, H W latent rows and columns, C channels, L text tokens.
Reference: diffusers `SanaWMPipeline.__call__`.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sanawm_jax.core.params import Params, apply
from sanawm_jax.core.sharding import shard
from sanawm_jax.memory.programs import INDEX_LIMIT
from sanawm_jax.memory.streaming import Runner, call
from sanawm_jax.sampling.schedule import euler_step, frame_timesteps, guide


class Conditions(NamedTuple):
    """What steers the video; batch B is 2 with guidance [negative, prompt], else 1."""

    text: jax.Array  # B L C
    text_mask: jax.Array  # B L
    camera: jax.Array  # 1 F 20
    plucker: jax.Array  # 1 F H W 48


@jax.jit(static_argnames=("graphdef", "dtype"), donate_argnames=("latents",))
def denoise_step(
    graphdef: nnx.GraphDef,
    params: Params,
    latents: jax.Array,
    conditions: Conditions,
    sigma: jax.Array,
    next_sigma: jax.Array,
    guidance: jax.Array,
    dtype: Any,
) -> jax.Array:
    """One guided Euler step; the first frame is the condition and never changes.

    Args:
      latents: (1, F, H, W, C) float32, donated.
      sigma, next_sigma, guidance: scalars, traced, so every step runs the same program.
      dtype: compute dtype of the network.
    """
    batch = conditions.text.shape[0]
    conditioned = jnp.arange(latents.shape[1]) == 0

    def predict(text: jax.Array, text_mask: jax.Array) -> jax.Array:
        def repeat(a: jax.Array) -> jax.Array:
            return jnp.broadcast_to(a, (len(text), *a.shape[1:]))

        return apply(
            graphdef,
            params,
            repeat(latents).astype(dtype),
            frame_timesteps(sigma, conditioned, len(text)),
            text,
            text_mask,
            repeat(conditions.camera),
            repeat(conditions.plucker),
        )

    text, text_mask = conditions.text, conditions.text_mask
    if batch * widest_elements(params, latents) > INDEX_LIMIT:
        # a long clip fills the device alone, and its widest layer would outgrow 32-bit indices
        pairs = (text[:, None], text_mask[:, None])
        velocity = lax.map(lambda pair: predict(*pair)[0], pairs)
    else:
        velocity = predict(text, text_mask)
    if batch == 2:
        velocity = guide(velocity, guidance)
    # on a mesh the network shares the frames out; latents are small and whole on every device, so
    # that each step finds them where the first one did
    return shard(euler_step(latents, velocity, sigma, next_sigma, conditioned), "one t h w C")


def widest_elements(params: Params, latents: jax.Array) -> int:
    """Elements of the widest layer's output for one clip (1, F, H, W, C)."""
    width = max(a.shape[-1] for a in jax.tree.leaves(params) if a.ndim > 1)
    return latents.size // latents.shape[-1] * width


@jax.jit
def _start(first_latent: jax.Array, noise: jax.Array) -> jax.Array:
    """Noise (1, F, H, W, C) behind the first frame, float32."""
    return jnp.concatenate([first_latent, noise[:, 1:]], 1).astype(jnp.float32)


def next_sigmas(sigmas: np.ndarray) -> np.ndarray:
    """For every level but the last the largest one below it, as per-token stepping finds it."""
    return np.array(
        [max((s for s in sigmas if s < now - 1e-6), default=0.0) for now in sigmas[:-1]],
        np.float32,
    )


def denoise(
    graphdef: nnx.GraphDef,
    params: Params,
    noise: jax.Array,
    first_latent: jax.Array,
    conditions: Conditions,
    sigmas: np.ndarray,
    *,
    guidance: float,
    dtype: Any,
    progress: bool = True,
    run: Runner = call,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Runs the sampler.

    Args:
      graphdef, params: the DiT.
      noise: (1, F, H, W, C) standard normal.
      first_latent: (1, 1, H, W, C) of the given image, kept as frame 0.
      conditions: see `Conditions`.
      sigmas: noise levels down to 0, `Schedule.sigmas`.
      guidance: classifier-free guidance scale; read only when the conditions have batch 2.
      dtype: compute dtype of the network; the latents stay float32 between steps.
      progress: show a progress bar.
      run: how the compiled step is called, see `core.streaming`.
      mesh: its `context` ranks share the latent frames out; `params` are whole on all of them.

    Returns:
      (1, F, H, W, C) float32.
    """
    from tqdm import tqdm

    latents = _start(first_latent, noise)
    pairs = list(zip(sigmas[:-1], next_sigmas(sigmas), strict=True))
    if mesh is not None:
        whole = NamedSharding(mesh, PartitionSpec())
        latents, conditions = jax.device_put((latents, conditions), whole)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for sigma, next_sigma in tqdm(pairs, desc="sampling", unit="step", disable=not progress):
            latents = run(
                denoise_step,
                graphdef,
                params,
                latents,
                conditions,
                np.float32(sigma),
                np.float32(next_sigma),
                np.float32(guidance),
                dtype=dtype,
            )
            latents.block_until_ready()  # the bar shows finished steps, not queued ones
    return latents if mesh is None else latents.addressable_data(0)
