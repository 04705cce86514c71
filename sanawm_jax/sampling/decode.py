"""Latents to frames, window by window.

Axis letters: N pixel frames, F latent frames, H W rows and columns, C channels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sanawm_jax.core.params import Params, apply
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.precision import matmul_precision
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.state import DecoderState
from sanawm_jax.vae.tiling import LONG_VIDEO, Tiling, decode_windows


def decode_tiling(tiling: str | Tiling, num_frames: int) -> Tiling:
    """The VAE tiles in which a video is decoded.

    Args:
      tiling: `none` decodes everything at once. `always` takes the tiles of `LONG_VIDEO` along
        each axis that is longer than a tile, as the reference does. `auto` does so too, but decodes
        up to 97 frames, the length of one window, without cutting them in time. A `Tiling` is taken
        as it is.
      num_frames: pixel frames of the video.

    Raises:
      InputError: unknown name.
    """
    if isinstance(tiling, Tiling):
        return tiling
    if tiling == "none":
        return Tiling(use_tiling=False, use_framewise=False)
    if tiling == "always":
        return LONG_VIDEO
    if tiling == "auto":
        is_long = num_frames > LONG_VIDEO.tile_sample_min_num_frames + 1
        return dataclasses.replace(LONG_VIDEO, use_framewise=is_long)
    raise InputError(f"VAE tiling {tiling!r} is unknown; use auto, none or always")


def decode_stream(
    graphdef: nnx.GraphDef,
    params: Params,
    latents: jax.Array,
    config: VAEConfig,
    tiling: str | Tiling,
    dtype: Any,
) -> Iterator[np.ndarray]:
    """Decodes window by window, so that only one window is in memory.

    Args:
      graphdef, params: the `VideoDecoder`.
      latents: (1, F, H, W, C), normalised.
      tiling: see `decode_tiling`.
      dtype: compute dtype.

    Yields:
      (n, H, W, 3) float32 in [0, 1]: the frames of each window in their order.
    """
    tiles = decode_tiling(tiling, config.video_shape(*latents.shape[1:4])[0])

    # around each tile, since a context around the loop would last while the caller works
    def decode_tile(latents: jax.Array) -> jax.Array:
        with matmul_precision(dtype):
            return decode_latents(graphdef, params, latents)

    for window in decode_windows(decode_tile, latents.astype(dtype), config, tiles):
        yield np.asarray(to_unit(window))


@jax.jit(static_argnames="graphdef")
def decode_latents(graphdef: nnx.GraphDef, params: Params, latents: jax.Array) -> jax.Array:
    """Normalised latents (1, F, H, W, C) to a video in [-1, 1], in one program."""
    plain = apply(graphdef, params, latents, method="denormalise")
    return apply(graphdef, params, plain, method="decode")


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"), donate_argnames=("state",))
def decode_chunk(
    graphdef: nnx.GraphDef,
    params: Params,
    latents: jax.Array,
    state: DecoderState | None,
    *,
    dtype: Any,
) -> tuple[jax.Array, DecoderState]:
    """The frames (n, H, W, 3) in [0, 1] of the latents (1, F, h, w, C) that follow a state.

    Args:
      graphdef, params: the `VideoDecoder`.
      state: donated; None at the start of the stream.
      dtype: compute dtype.
    """
    video, new = apply(graphdef, params, latents.astype(dtype), state, method="decode_stream")
    return to_unit(video), new


@jax.jit
def to_unit(video: jax.Array) -> jax.Array:
    """Video (1, n, H, W, 3) in [-1, 1] to frames (n, H, W, 3) float32 in [0, 1]."""
    return jnp.clip(video[0].astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)
