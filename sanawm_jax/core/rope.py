"""Angles of the rotary position embedding over (frame, row, column), for interleaved pairs.

`kernels_pallas.ucpe` rotates heads by them.
Axis letters: F latent frames, H W rows and columns of tokens, D head size, A rotated pairs of a
head.
Reference: diffusers `SanaWMRotaryPosEmbed` (Wan's split of a head).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int


def pair_split(head_dim: int) -> tuple[int, int, int]:
    """Returns how many rotated pairs of a head belong to frames, rows and columns."""
    space = head_dim // 6
    return head_dim // 2 - 2 * space, space, space


def rope_angles(
    head_dim: int,
    grid: tuple[int, int, int],
    *,
    pairs: tuple[int, int, int] | None = None,
    theta: float = 10000.0,
    first_frame: int | Int[Array, ""] = 0,
) -> Float32[Array, "F H W A"]:
    """Rotation angle of every pair at every position, float32.

    Args:
      head_dim: head size D, which determines the frequencies.
      grid: (F, H, W).
      pairs: the numbers of pairs to keep of each axis, `pair_split` of a smaller head. The camera
        branch rotates half a head with the first frequencies of the whole head.
      theta: base of the frequencies.
      first_frame: absolute index of the first frame.

    Returns:
      Angles in radians; A = sum(pairs), those of frames first, then rows, then columns.
    """
    split = pair_split(head_dim)
    kept = pairs or split
    frames, rows, columns = grid
    positions = (
        first_frame + jnp.arange(frames, dtype=jnp.float32),
        jnp.arange(rows, dtype=jnp.float32),
        jnp.arange(columns, dtype=jnp.float32),
    )
    shapes = ((frames, 1, 1), (1, rows, 1), (1, 1, columns))
    angles = []
    for position, shape, count, keep in zip(positions, shapes, split, kept, strict=True):
        frequency = (theta ** -(np.arange(keep) / count)).astype(np.float32)
        angle = position.reshape(*shape, 1) * frequency
        angles.append(jnp.broadcast_to(angle, (frames, rows, columns, keep)))
    return jnp.concatenate(angles, -1)
