"""Rotary position embedding of LTX-2, for video and for text.

The highest frequency rotates a position of 1 by 10^4 pi / 2 radians, where a float32 angle has an
error of at least 1e-3. The released weights were trained with exactly these rounding errors. The
angles are therefore computed on the host, with the same operations as in the reference, and only
their cosines and sines go to the device. The axes are independent, so one table per axis is
enough.

Axis letters: F latent frames, H W rows and columns, J frequencies of an axis, T tokens of the
sequence (a video or a text), N heads, D head size, A = D/2 rotated pairs of a head, B batch.
Reference: diffusers `LTX2AudioVideoRotaryPosEmbed`, `LTX2RotaryPosEmbed1d`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from kernels_pallas.ucpe import rotate_pairs
from sanawm_jax.refiner.config import INTERLEAVED, ConnectorsConfig, RefinerConfig

Rotation = tuple[Float32[Array, "T N A"], Float32[Array, "T N A"]]  # cosines and sines


class VideoRope(NamedTuple):
    """Cosines and sines [..., 0] and [..., 1] of every frequency at every position of an axis."""

    frames: Float32[Array | np.ndarray, "F J 2"]
    rows: Float32[Array | np.ndarray, "H J 2"]
    columns: Float32[Array | np.ndarray, "W J 2"]


def frequencies(count: int, theta: float, *, double_precision: bool) -> Float32[np.ndarray, "J"]:
    """Returns frequencies: theta^0 to theta^1 in geometric steps, times pi / 2."""
    if double_precision:
        powers = np.power(theta, np.linspace(0.0, 1.0, count))
        return (powers * np.pi / 2.0).astype(np.float32)
    # float32 exponents from both ends with one rounding each, as torch.linspace computes them
    step = np.float64(np.float32(1.0) / np.float32(max(count - 1, 1)))
    i = np.arange(count)
    exponents = np.where(i < count // 2, i * step, 1.0 - (count - 1 - i) * step)
    powers = np.power(theta, exponents.astype(np.float32).astype(np.float64))
    return powers.astype(np.float32) * np.float32(np.pi) / np.float32(2.0)


def _turns(fraction: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """Returns cosines and sines (positions, J, 2) at fractions of the base range, float32."""
    one, two = np.float32(1.0), np.float32(2.0)
    angle = (fraction.astype(np.float32)[:, None] * two - one) * frequency
    exact = angle.astype(np.float64)  # cosine and sine of the rounded angle are exact
    return np.stack([np.cos(exact), np.sin(exact)], -1).astype(np.float32)


def video_rope(
    config: RefinerConfig, num_frames: int, height: int, width: int, fps: float
) -> VideoRope:
    """Returns tables for latent frames 0..num_frames-1 of a height x width latent grid.

    The position of a token is the middle of the pixels that it represents. Time is in seconds.

    Args:
      fps: pixel frames per second.
    """
    frequency = frequencies(
        config.width // 6, config.rope_theta, double_precision=config.rope_double_precision
    )
    bases = (config.pos_embed_max_pos, config.base_height, config.base_width)

    def edges(count: int, axis: int) -> np.ndarray:
        return np.arange(count + 1, dtype=np.float32) * np.float32(config.vae_scale_factors[axis])

    tables = []
    for axis, count in enumerate((num_frames, height, width)):
        edge = edges(count, axis)
        if axis == 0:  # the first latent frame represents one pixel frame
            offset = np.float32(config.causal_offset)
            edge = edge + offset - np.float32(config.vae_scale_factors[0])
            edge = np.maximum(edge, np.float32(0.0)) / np.float32(fps)
        middle = (edge[:-1] + edge[1:]) / np.float32(2.0)
        tables.append(_turns(middle / np.float32(bases[axis]), frequency))
    return VideoRope(*tables)


def frame_window(rope: VideoRope, first: int | Int[Array, ""], count: int) -> VideoRope:
    """Returns the tables of frames first..first+count-1; `first` may be a traced value."""
    frames = lax.dynamic_slice_in_dim(jnp.asarray(rope.frames), first, count)
    return rope._replace(frames=frames)


def _per_head(turns: jax.Array, heads: int, head_dim: int) -> Rotation:
    """Pads rotations (T, pairs, 2) in front with identities, and divides them over the heads."""
    missing = heads * head_dim // 2 - turns.shape[1]
    still = jnp.broadcast_to(jnp.array([1.0, 0.0], jnp.float32), (turns.shape[0], missing, 2))
    turns = jnp.concatenate([still, turns], 1).reshape(-1, heads, head_dim // 2, 2)
    return turns[..., 0], turns[..., 1]


def rotations(rope: VideoRope, heads: int, head_dim: int) -> Rotation:
    """Returns cosines and sines of the grid, T = F H W; frames vary slowest."""
    frames, rows, columns = (jnp.asarray(table) for table in rope)
    grid = (len(frames), len(rows), len(columns))
    shape = (*grid, *frames.shape[1:])
    # for each frequency, the three axes alternate
    turns = jnp.stack(
        [
            jnp.broadcast_to(frames[:, None, None], shape),
            jnp.broadcast_to(rows[None, :, None], shape),
            jnp.broadcast_to(columns[None, None], shape),
        ],
        -2,
    )  # F H W J 3 2
    return _per_head(turns.reshape(grid[0] * grid[1] * grid[2], -1, 2), heads, head_dim)


def text_rotations(config: ConnectorsConfig, length: int) -> Rotation:
    """Returns cosines and sines of text positions 0..length-1, T = length."""
    frequency = frequencies(
        config.width // 2, config.rope_theta, double_precision=config.rope_double_precision
    )
    position = np.arange(length, dtype=np.float32) / np.float32(config.connector_rope_base_seq_len)
    return _per_head(
        jnp.asarray(_turns(position, frequency)),
        config.video_connector_num_attention_heads,
        config.video_connector_attention_head_dim,
    )


def rotate(
    x: Float[Array, "*rest T N D"], rotation: Rotation, rope_type: str
) -> Float[Array, "*rest T N D"]:
    """Rotates the pairs of every head in float32; the result has x's dtype."""
    cos, sin = rotation
    return rotate_pairs(x, cos, sin, interleaved=rope_type == INTERLEAVED)
