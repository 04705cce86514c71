"""Ray transforms of heads as a Triton kernel: one read and one write of the tokens.

A program owns a few tokens of a frame and walks over their heads, so that matrices and rotations
are loaded once for all heads. A head is eight blocks of (tokens, D/8): channels 4g + j of its first
and of its second half. A 4x4 product and two rotated pairs are then sums of whole blocks, and a
sum over the head is a sum of blocks and one reduction. Everything runs in float32 and is rounded
once, at the end, which is where the XLA form rounds, or rarer.
Axis letters: B batch, F frames, P tokens a frame, N heads, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

Quad = tuple[jax.Array, ...]  # channels 4g, 4g + 1, 4g + 2, 4g + 3 of half a head


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a program.

    Attributes:
      tokens: that it owns, a power of two.
      warps: of 32 threads.
      joined: read and write half a head as one block of neighbouring channels, which is taken
        apart and put together on the chip; else as four blocks of every fourth channel.
    """

    tokens: int = 16
    warps: int = 4
    joined: bool = True


class _Tokens:
    """What a program may read and write; refs are flat, one frame each."""

    def __init__(self, size: tuple[int, int, int], tiles: Tiles):
        self.tokens, self.heads, self.dim = size
        self.tiles = tiles
        self.groups = self.dim // 8
        wide = pl.next_power_of_2(self.groups)
        self.row = pl.program_id(0) * tiles.tokens + jnp.arange(tiles.tokens)
        self.group = jnp.arange(wide)
        self.real = self.row < self.tokens
        self.mask = self.real[:, None] & (self.group < self.groups)[None, :]

    def load_scalars(self, ref: Any, width: int, at: int) -> jax.Array:
        """(tokens,) entry `at` of the `width` that every token has."""
        return plgpu.load(ref.at[self.row * width + at], mask=self.real, other=0.0)

    def store_scalars(self, ref: Any, value: jax.Array, width: int, at: Any) -> None:
        plgpu.store(ref.at[self.row * width + at], value, mask=self.real)

    def load_rotation(self, ref: Any, at: int) -> jax.Array:
        """(tokens, D/8) of a table (P, D/4): pairs 2g + at."""
        place = self.row[:, None] * (2 * self.groups) + 2 * self.group[None, :]
        return plgpu.load(ref.at[place + at], mask=self.mask, other=0.0)

    def load(self, ref: Any, head: Any) -> tuple[Any, Any]:
        """Both halves of a head in their dtype, for `quad`."""
        first, second = (
            tuple(
                plgpu.load(ref.at[place], mask=mask, other=0.0)
                for place, mask in self._places(head, half)
            )
            for half in range(2)
        )
        return first, second

    def quad(self, loaded: tuple[jax.Array, ...]) -> Quad:
        """What `load` gave of half a head, in float32."""
        if self.tiles.joined:
            pairs = loaded[0].reshape(self.tiles.tokens, -1, 2, 2)
            even, odd = (jnp.unstack(a, axis=-1) for a in jnp.unstack(pairs, axis=-1))
            loaded = (even[0], odd[0], even[1], odd[1])
        return tuple(a.astype(jnp.float32) for a in loaded)

    def store(self, ref: Any, head: Any, half: int, values: Quad) -> None:
        values = tuple(value.astype(ref.dtype) for value in values)
        if self.tiles.joined:
            even, odd = (jnp.stack([values[j], values[j + 2]], -1) for j in range(2))
            values = (jnp.stack([even, odd], -1).reshape(self.tiles.tokens, -1),)
        for (place, mask), value in zip(self._places(head, half), values, strict=True):
            plgpu.store(ref.at[place], value, mask=mask)

    def _places(self, head: Any, half: int) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Where the blocks of half a head are, and which of their elements exist."""
        row = self.row[:, None] * (self.heads * self.dim)
        start = row + (head * self.dim + half * self.dim // 2)
        if self.tiles.joined:
            channel = jnp.arange(4 * self.group.shape[0])
            yield start + channel[None, :], self.real[:, None] & (channel < self.dim // 2)[None, :]
            return
        for j in range(4):
            yield start + 4 * self.group[None, :] + j, self.mask


def _squares(*quads: Quad) -> jax.Array:
    """Sum of squares over a head, (tokens,)."""
    total = functools.reduce(jnp.add, (a * a for quad in quads for a in quad))
    return jnp.sum(total, 1)


def _rotate(x: Quad, rotation: list[tuple[jax.Array, jax.Array]]) -> Quad:
    """Turns the pairs (0, 1) and (2, 3) by (cos, sin) each."""
    pairs = ((x[2 * i], x[2 * i + 1], *rotation[i]) for i in range(2))
    turned = ((a * cos - b * sin, a * sin + b * cos) for a, b, cos, sin in pairs)
    return tuple(value for pair in turned for value in pair)


def _kernel(*refs: Any, size: tuple[int, int, int], tiles: Tiles, bounded: bool) -> None:
    x_ref, m_ref, *rotation_refs, y_ref = refs[:-1] if bounded else refs
    tile = _Tokens(size, tiles)
    matrix = [
        [tile.load_scalars(m_ref, 16, 4 * i + j)[:, None] for j in range(4)] for i in range(4)
    ]
    rotation: list[Any] = [
        tuple(tile.load_rotation(ref, at) for ref in rotation_refs) for at in range(2)
    ]

    def step(head: Any, loaded: Any) -> Any:
        # asked for before this head's work, so that memory's delay hides behind it
        following = tile.load(x_ref, jnp.minimum(head + 1, tile.heads - 1))
        x = tile.quad(loaded[0]), tile.quad(loaded[1])
        first = tuple(
            functools.reduce(jnp.add, (row[j] * x[0][j] for j in range(4))) for row in matrix
        )
        second = _rotate(x[1], rotation) if rotation_refs else x[1]
        if bounded:
            eps = 1e-6
            before, after = _squares(*x), _squares(first, second)
            rms = [jnp.sqrt(a / tile.dim + eps) for a in (before, after)]
            scale = jnp.minimum(rms[0] / jnp.maximum(rms[1], eps), 1.0)
            first, second = (tuple(a * scale[:, None] for a in quad) for quad in (first, second))
            # rounding, which comes next, moves a head's size by far less than one channel
            sizes = [jnp.maximum(a, eps) for a in (jnp.sqrt(before), scale * jnp.sqrt(after))]
            ratio = sizes[1] / sizes[0]
            tile.store_scalars(refs[-1], ratio * ratio, tile.heads, head)
        tile.store(y_ref, head, 0, first)
        tile.store(y_ref, head, 1, second)
        return following

    lax.fori_loop(0, tile.heads, step, tile.load(x_ref, 0))


def transform(
    x: jax.Array,
    matrices: jax.Array,
    rotation: tuple[jax.Array, jax.Array] | None,
    tiles: Tiles,
    *,
    bounded: bool,
    interpret: bool,
) -> list[jax.Array]:
    """Heads transformed, and if `bounded` scaled back, with each one's squared inflation.

    Args:
      x: (B, F, P, N, D), D a multiple of 8.
      matrices: (B, F, P, 4, 4) float32.
      rotation: cosines and sines (F, P, D/4) float32, None for no rotation.

    Returns:
      Heads like x; if `bounded` also (B, F, P, N) float32.
    """
    batch, frames, tokens, heads, dim = x.shape
    inputs = [x.reshape(batch, frames, -1), matrices.reshape(batch, frames, -1)]
    inputs += [] if rotation is None else [a.reshape(frames, -1) for a in rotation]
    outputs = [jax.ShapeDtypeStruct(inputs[0].shape, x.dtype)]
    if bounded:
        outputs.append(jax.ShapeDtypeStruct((batch, frames, tokens * heads), jnp.float32))

    def spec(a: Any) -> pl.BlockSpec:
        if len(a.shape) == 2:
            return pl.BlockSpec((None, a.shape[-1]), lambda t, f, b: (f, 0))
        return pl.BlockSpec((None, None, a.shape[-1]), lambda t, f, b: (b, f, 0))

    found = pl.pallas_call(
        functools.partial(_kernel, size=(tokens, heads, dim), tiles=tiles, bounded=bounded),
        grid=(pl.cdiv(tokens, tiles.tokens), frames, batch),
        in_specs=[spec(a) for a in inputs],
        out_specs=[spec(a) for a in outputs],
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=2),
        interpret=interpret,
        name="ucpe_bounded" if bounded else "ucpe",
    )(*inputs)
    return [a.reshape(*x.shape[:4], *x.shape[4 + i :]) for i, a in enumerate(found)]
