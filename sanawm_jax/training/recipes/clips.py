"""Clips of a data set, and all of their pixels in the device's memory.

Axis letters: n clips, B batch, F frames, H W pixel rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from jax import lax

from sanawm_jax.data.latent_cache import read_clips


def open_source(config: ml_collections.ConfigDict) -> Sequence:
    """Clips of the set in `config.data_dir`; without one, `config.synthetic` clips are rendered."""
    if config.data_dir:
        from sanawm_jax.small_world.tfds import open_clips

        return open_clips(config.data_dir, "train")
    from sanawm_jax.small_world.clip import make_clips

    made = config.synthetic
    logging.warning("no data_dir is given: training on %d clips rendered now", made.clips)
    return list(make_clips(range(made.clips), made.num_frames, made.height, made.width))


def pack_clips(clips: Sequence) -> np.ndarray:
    """All videos, (n, F, H, W * 3 / 4) uint32; each number holds four bytes."""
    first = clips[0]["video"]
    # packed, a set that fits an accelerator stays below 2^31 elements, which 32-bit indices reach
    packed = np.empty((len(clips), *first.shape[:2], first.shape[2] * 3 // 4), np.uint32)
    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(clips), 64):
            indices = range(start, min(start + 64, len(clips)))
            for i, clip in zip(indices, read_clips(clips, indices, pool), strict=True):
                rows = np.ascontiguousarray(clip["video"]).reshape(*first.shape[:2], -1)
                packed[i] = rows.view(np.uint32)
    return packed


def crop_clips(packed: jax.Array, indices: jax.Array, starts: jax.Array, frames: int) -> jax.Array:
    """Consecutive frames of some clips, (B, frames, H, W, 3) uint8.

    Args:
      packed: all clips, see `pack_clips`.
      indices, starts: (B,) of the clips, and of the first frame in each.
      frames: how many frames of each clip are taken.
    """

    def one(index: jax.Array, start: jax.Array) -> jax.Array:
        size = (1, frames, *packed.shape[2:])
        return lax.dynamic_slice(packed, (index, start, 0, 0), size)[0]

    crop = jax.vmap(one)(indices, starts)
    pixels = lax.bitcast_convert_type(crop, jnp.uint8)  # B F H W*3/4 4
    return pixels.reshape(*crop.shape[:3], -1, 3)
