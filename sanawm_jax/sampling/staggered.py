"""The sampler of the chunk-causal teacher that is not distilled: chunks start one after the other.

Chunk i starts i * interval * steps steps after the first one. At each global step all chunks that
have started are computed together: a finished chunk stays clean at timestep 0, the others are each
at a noise level of their own. A chunk sees only itself and those before it.

Axis letters: B batch, F latent frames, H W latent rows and columns, C channels.
Reference: upstream's `chunk_flow_euler`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sanawm_jax.core.params import Params, apply
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.schedule import guide
from sanawm_jax.sampling.stage1 import Conditions, is_condition, network_inputs, start_latents

_LENGTHS = 4  # programs that are compiled: the clip's frames in so many steps


class Step(NamedTuple):
    """One global step.

    Attributes:
      frames: latent frames of the chunks that have started.
      sigmas, nexts: (F,) noise levels before and after, 0 and 0 for finished and waiting chunks.
    """

    frames: int
    sigmas: np.ndarray
    nexts: np.ndarray


def plan(
    frames: int, starts: Sequence[int], sigmas: np.ndarray, interval: float | None = None
) -> list[Step]:
    """All global steps of a clip.

    Args:
      frames: F of the clip.
      starts: first frame of every chunk.
      sigmas: (steps + 1,) falling noise levels down to 0.
      interval: which part of a chunk's steps passes before the next chunk starts; None takes one
        over the number of chunks.

    Raises:
      InputError: an interval that is not positive.
    """
    steps, chunks = len(sigmas) - 1, len(starts)
    interval = 1 / chunks if interval is None else interval
    if not interval > 0:
        raise InputError(f"the interval between chunks is {interval}; it must be positive")
    begin = [int(i * interval * steps) for i in range(chunks)]
    ends = [*starts[1:], frames]
    levels = np.append(np.asarray(sigmas, np.float32), np.float32(0))
    found = []
    for now in range(begin[-1] + steps):
        before, after = np.zeros((2, frames), np.float32)
        last = 0
        for start, end, first in zip(starts, ends, begin, strict=True):
            if now >= first:
                at = min(now - first, steps)
                before[start:end], after[start:end], last = levels[at], levels[at + 1], end
        found.append(Step(last, before, after))
    return found


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "dtype", "starts", "frames"),
    donate_argnames=("latents",),
)
def staggered_step(
    graphdef: nnx.GraphDef,
    params: Params,
    latents: jax.Array,
    conditions: Conditions,
    sigmas: jax.Array,
    nexts: jax.Array,
    active: jax.Array,
    guidance: jax.Array,
    *,
    starts: tuple[int, ...],
    frames: int,
    dtype: Any,
) -> jax.Array:
    """One global step.

    Args:
      latents: (1, F, H, W, C) float32, donated.
      conditions: of the whole clip; with guidance the text has batch 2, [negative, prompt].
      sigmas, nexts: (F,), see `Step`.
      active: () frames of the chunks that have started.
      starts: first frame of every chunk.
      frames: frames that are computed, at least `active`; those from `active` on are hidden.
      dtype: compute dtype of the network.
    """
    text, text_mask, *cameras = conditions
    cut = Conditions(text, text_mask, *(None if a is None else a[:, :frames] for a in cameras))
    part, conditioned = latents[:, :frames], is_condition(latents)[:frames]
    inputs = network_inputs(part, cut, sigmas[:frames], conditioned, dtype)
    mask = jnp.broadcast_to(jnp.arange(frames) < active, (len(text), frames))
    velocity = apply(
        graphdef,
        params,
        *inputs,
        frame_mask=mask,
        chunk_starts=tuple(start for start in starts if start < frames),
    )
    velocity = guide(velocity, guidance) if len(text) == 2 * len(latents) else velocity
    move = jnp.where(conditioned, 0.0, nexts[:frames] - sigmas[:frames])
    part = part + move[:, None, None, None] * velocity.astype(jnp.float32)
    return latents.at[:, :frames].set(part)


def denoise_staggered(
    graphdef: nnx.GraphDef,
    params: Params,
    noise: jax.Array,
    first_latent: jax.Array,
    conditions: Conditions,
    sigmas: np.ndarray,
    starts: tuple[int, ...],
    *,
    guidance: float,
    dtype: Any,
    interval: float | None = None,
    progress: bool = True,
) -> jax.Array:
    """Runs the sampler.

    Args:
      graphdef, params, noise, first_latent, conditions, sigmas, guidance, dtype, progress: see
        `stage1.denoise`.
      starts: first frame of every chunk.
      interval: see `plan`.

    Returns:
      (1, F, H, W, C) float32.
    """
    from tqdm import tqdm

    latents = start_latents(first_latent, noise)
    frames = latents.shape[1]
    lengths = [-(-frames * i // _LENGTHS) for i in range(1, _LENGTHS + 1)]
    steps = plan(frames, starts, sigmas, interval)
    for step in tqdm(steps, desc="sampling", unit="step", disable=not progress):
        latents = staggered_step(
            graphdef,
            params,
            latents,
            conditions,
            step.sigmas,
            step.nexts,
            np.int32(step.frames),
            np.float32(guidance),
            starts=starts,
            frames=next(length for length in lengths if length >= step.frames),
            dtype=dtype,
        )
        latents.block_until_ready()  # the bar shows finished steps, not queued ones
    return latents
