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
from sanawm_jax.sampling.schedule import (
    euler_rollout,
    euler_step,
    frame_timesteps,
    guide,
    next_sigmas,
)


class Conditions(NamedTuple):
    """What steers B videos; with guidance the text has batch 2 B, [negative, prompt]."""

    text: jax.Array  # B L C
    text_mask: jax.Array  # B L
    camera: jax.Array | None  # B F 20; None runs the network without cameras
    plucker: jax.Array | None  # B F H W 48


def network_inputs(
    latents: jax.Array,
    conditions: Conditions,
    sigma: jax.Array | float,
    conditioned: jax.Array,
    dtype: Any,
) -> tuple[jax.Array | None, ...]:
    """The six positional arguments of `DiT.__call__`, latents and cameras repeated for the text.

    Args:
      latents: (B, F, H, W, C).
      conditions: see `Conditions`.
      sigma: noise level of the frames that are not `conditioned` (F,) bool; those are at 0.
      dtype: compute dtype of the network.
    """
    text, text_mask, *cameras = conditions
    batch = len(text)

    def repeat(a: jax.Array) -> jax.Array:  # all rows, and then all rows again
        copies = jnp.broadcast_to(a, (batch // len(a), *a.shape))
        return copies.reshape(batch, *a.shape[1:])

    return (
        repeat(latents).astype(dtype),
        frame_timesteps(sigma, conditioned, batch),
        text,
        text_mask,
        *[None if a is None else repeat(a) for a in cameras],
    )


def guided_velocity(
    graphdef: nnx.GraphDef,
    params: Params,
    latents: jax.Array,
    conditions: Conditions,
    sigma: jax.Array,
    guidance: jax.Array,
    dtype: Any,
    chunk_starts: tuple[int, ...] | None = None,
) -> jax.Array:
    """The network's velocity (B, F, H, W, C) at a noise level, with classifier-free guidance.

    Args:
      latents: (B, F, H, W, C); frame 0 is the condition, at timestep 0.
      conditions: see `Conditions`; with guidance the text has batch 2 B [negative, prompt].
      guidance: read only with such a text.
      dtype: compute dtype of the network.
      chunk_starts: see `DiT.__call__`.
    """
    conditioned = is_condition(latents)
    text, text_mask, *cameras = conditions

    def predict(*texts: jax.Array) -> jax.Array:
        inputs = network_inputs(latents, Conditions(*texts, *cameras), sigma, conditioned, dtype)
        return apply(graphdef, params, *inputs, chunk_starts=chunk_starts)

    copies = len(text) // len(latents)
    if len(latents) == 1 and copies * widest_elements(params, latents) > INDEX_LIMIT:
        # a long clip fills the device alone, and its widest layer would outgrow 32-bit indices
        pairs = (text[:, None], text_mask[:, None])
        velocity = lax.map(lambda pair: predict(*pair)[0], pairs)
    else:
        velocity = predict(text, text_mask)
    return guide(velocity, guidance) if copies == 2 else velocity


def is_condition(latents: jax.Array) -> jax.Array:
    """(F,) bool: frame 0 of (B, F, H, W, C) is given and never changes."""
    return jnp.arange(latents.shape[1]) == 0


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
    velocity = guided_velocity(graphdef, params, latents, conditions, sigma, guidance, dtype)
    # On a mesh the network shares the frames out. The latents are small and stay whole on every
    # device, so that every step finds them where the first step did.
    moved = euler_step(latents, velocity, sigma, next_sigma, is_condition(latents))
    return shard(moved, "one t h w C")


@jax.jit(static_argnames=("graphdef", "dtype", "chunk_starts"))
def denoise_batch(
    graphdef: nnx.GraphDef,
    params: Params,
    noise: jax.Array,
    first_latent: jax.Array,
    conditions: Conditions,
    sigmas: jax.Array,
    nexts: jax.Array,
    guidance: jax.Array,
    dtype: Any,
    chunk_starts: tuple[int, ...] | None = None,
) -> jax.Array:
    """`denoise` of a batch (B, F, H, W, C) in one program; see there and `guided_velocity`."""

    def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return guided_velocity(
            graphdef, params, x, conditions, sigma, guidance, dtype, chunk_starts
        )

    start = start_latents(first_latent, noise)
    return euler_rollout(velocity, start, sigmas, nexts, is_condition(start))


def widest_elements(params: Params, latents: jax.Array) -> int:
    """Elements of the widest layer's output for latents (B, F, H, W, C)."""
    width = max(a.shape[-1] for a in jax.tree.leaves(params) if a.ndim > 1)
    return latents.size // latents.shape[-1] * width


@jax.jit
def start_latents(first_latent: jax.Array, noise: jax.Array) -> jax.Array:
    """The first frame, then noise (B, F, H, W, C), float32."""
    return jnp.concatenate([first_latent, noise[:, 1:]], 1).astype(jnp.float32)


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
      run: how the compiled step is called, see `memory.streaming`.
      mesh: the ranks of its `context` axis share the latent frames; `params` are whole on all.

    Returns:
      (1, F, H, W, C) float32.
    """
    from tqdm import tqdm

    latents = start_latents(first_latent, noise)
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
