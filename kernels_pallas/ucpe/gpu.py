"""Features, rotation and ray transforms of heads as a Triton kernel that reads tokens once.

A program works on a few tokens of one frame and loops over their heads, so that it loads matrices
and rotations once for all heads. It holds a head as eight blocks of (tokens, D/8): channels 4g + j
of the first half and of the second half. A 4x4 product and two rotated pairs are then sums of whole
blocks, and a sum over the head is a sum of blocks followed by one reduction. Everything runs in
float32 and is rounded once, at the end. The XLA implementation rounds there too, or more often.
Axis letters: B batch, F frames, P tokens per frame, N heads, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.triton import fma

Quad = tuple[jax.Array, ...]  # channels 4g, 4g + 1, 4g + 2, 4g + 3 of half a head
Rotation = tuple[jax.Array, ...]  # cosine and sine


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a program.

    Attributes:
      tokens: tokens per program, a power of two.
      warps: groups of 32 threads.
    """

    tokens: int = 16
    warps: int = 4


@dataclasses.dataclass(frozen=True)
class Form:
    """What the kernel does to a head.

    Attributes:
      moves: transform the first half by matrices and rotate the second half; otherwise rotate the
        whole head.
      rotated: whether there are angles.
      measured: write the head's squared inflation as a second result.
      capped: of a measured head, first scale it back to its former size where it grew.
      plain: also write the head before its rotation, as a second result.
      featured: normalise the head first, by 1 / RMS per token and a weight per channel.
      relu: apply a ReLU after the norm.
    """

    moves: bool = False
    rotated: bool = True
    measured: bool = False
    capped: bool = True
    plain: bool = False
    featured: bool = False
    relu: bool = False

    def inputs(self) -> list[str]:
        names = ["x"] + ["matrices"] * self.moves + ["cos", "sin"] * self.rotated
        return names + ["inverse", "weight"] * self.featured

    def name(self) -> str:
        parts = ["ucpe" if self.moves else "rope"]
        parts += [name for name in ("measured", "plain", "featured") if getattr(self, name)]
        return "_".join(parts)


class _Tokens:
    """The part of the arrays that one program reads and writes; refs are flat, one per frame."""

    def __init__(self, size: tuple[int, int, int], tiles: Tiles, interpret: bool):
        self.tokens, self.heads, self.dim = size
        self.tiles = tiles
        self.fma = functools.partial(fma, plain=interpret)
        self.groups = self.dim // 8
        wide = pl.next_power_of_2(self.groups)
        self.row = pl.program_id(0) * tiles.tokens + jnp.arange(tiles.tokens)
        self.group = jnp.arange(wide)
        self.real = self.row < self.tokens
        self.mask = self.real[:, None] & (self.group < self.groups)[None, :]

    def load_scalars(self, ref: Any, width: int, at: int) -> jax.Array:
        """Loads (tokens,): entry `at` of the `width` entries of every token."""
        return plgpu.load(ref.at[self.row * width + at], mask=self.real, other=0.0)

    def store_scalars(self, ref: Any, value: jax.Array, width: int, at: Any) -> None:
        plgpu.store(ref.at[self.row * width + at], value, mask=self.real)

    def load_pairs(self, ref: Any, width: int, start: int) -> jax.Array:
        """Loads (tokens, D/8) from a table (P, width): pairs start + 2g."""
        place = self.row[:, None] * width + (2 * self.group[None, :] + start)
        return plgpu.load(ref.at[place], mask=self.mask, other=0.0)

    def load_rotation(self, refs: list[Any], width: int, half: int) -> list[Rotation]:
        """Cosines and sines of pairs (0, 1) and (2, 3) of every group of half a head.

        Args:
          refs: cosines and sines; an empty list means no rotation.
          width: pairs per token in the tables: those of a head, or those of its second half.
        """
        first = half * 2 * self.groups if width == 4 * self.groups else 0
        pairs = [tuple(self.load_pairs(ref, width, first + at) for ref in refs) for at in range(2)]
        return pairs if refs else []

    def load(self, ref: Any, head: Any, *, is_shared: bool = False) -> tuple[Any, Any]:
        """Loads both halves of a head in their dtype, for `quad`.

        Args:
          is_shared: all tokens have the same values.
        """
        places = [self._places(head, half, is_shared) for half in range(2)]
        first, second = (plgpu.load(ref.at[at], mask=mask, other=0.0) for at, mask in places)
        return first, second

    def quad(self, loaded: jax.Array) -> Quad:
        """Converts one half of a head from `load` to four float32 blocks."""
        pairs = loaded.reshape(self.tiles.tokens, -1, 2, 2)
        even, odd = (jnp.unstack(a, axis=-1) for a in jnp.unstack(pairs, axis=-1))
        quad = (even[0], odd[0], even[1], odd[1])
        return tuple(a.astype(jnp.float32) for a in quad)

    def store(self, ref: Any, head: Any, half: int, values: Quad) -> None:
        values = tuple(value.astype(ref.dtype) for value in values)
        even, odd = (jnp.stack([values[j], values[j + 2]], -1) for j in range(2))
        place, mask = self._places(head, half)
        joined = jnp.stack([even, odd], -1).reshape(self.tiles.tokens, -1)
        plgpu.store(ref.at[place], joined, mask=mask)

    def _places(self, head: Any, half: int, is_shared: bool = False) -> tuple[jax.Array, jax.Array]:
        """Returns the positions of the channels of half a head, and the mask of valid ones."""
        row = self.row[:, None] * (0 if is_shared else self.heads * self.dim)
        start = row + (head * self.dim + half * self.dim // 2)
        channel = jnp.arange(4 * self.group.shape[0])
        return start + channel[None, :], self.real[:, None] & (channel < self.dim // 2)[None, :]


def _squares(tile: _Tokens, *quads: Quad) -> jax.Array:
    """Sum of squares over a head, (tokens,)."""
    first, *others = [a for quad in quads for a in quad]
    return jnp.sum(
        functools.reduce(lambda total, a: tile.fma(a, a, total), others, first * first), 1
    )


def _rotate(tile: _Tokens, x: Quad, rotation: list[Rotation]) -> Quad:
    """Rotates the pairs (0, 1) and (2, 3) by (cos, sin) each, if there is a rotation."""
    if not rotation:
        return x
    pairs = ((x[2 * i], x[2 * i + 1], *rotation[i]) for i in range(2))
    turned = ((tile.fma(a, cos, -(b * sin)), tile.fma(a, sin, b * cos)) for a, b, cos, sin in pairs)
    return tuple(value for pair in turned for value in pair)


def _move(tile: _Tokens, m_ref: Any, rotation_refs: list[Any]) -> Any:
    """Returns the function `apply_ucpe` of both halves of a head."""
    matrix = [
        [tile.load_scalars(m_ref, 16, 4 * i + j)[:, None] for j in range(4)] for i in range(4)
    ]
    rotation = tile.load_rotation(rotation_refs, 2 * tile.groups, 1)

    def move(x: tuple[Quad, Quad]) -> tuple[Quad, Quad]:
        moved = []
        for row in matrix:
            total = row[0] * x[0][0]
            for j in range(1, 4):
                total = tile.fma(row[j], x[0][j], total)
            moved.append(total)
        return tuple(moved), _rotate(tile, x[1], rotation)

    return move


def _features(tile: _Tokens, inverse_ref: Any, weight_ref: Any, relu: bool) -> Any:
    """Returns the function that normalises both halves of a head, given the head's index."""
    inverse = tile.load_scalars(inverse_ref, 1, 0)[:, None]

    def features(x: tuple[Quad, Quad], head: Any) -> tuple[Quad, Quad]:
        weight = [tile.quad(half) for half in tile.load(weight_ref, head, is_shared=True)]
        x = jax.tree.map(lambda a, w: a * inverse * w, x, tuple(weight))
        return jax.tree.map(lambda a: jnp.maximum(a, 0.0), x) if relu else x

    return features


def _measured(
    tile: _Tokens, before: tuple[Quad, Quad], after: tuple[Quad, Quad], capped: bool
) -> tuple[tuple[Quad, Quad], jax.Array]:
    """A head, if `capped` scaled down to its former RMS, and its squared inflation (tokens,)."""
    eps = 1e-6
    squares = [_squares(tile, *before), _squares(tile, *after)]
    if not capped:
        before_size, after_size = (jnp.maximum(a, 1e-12) for a in squares)
        return after, after_size / before_size
    rms = [jnp.sqrt(a / tile.dim + eps) for a in squares]
    scale = jnp.minimum(rms[0] / jnp.maximum(rms[1], eps), 1.0)
    # The rounding that comes next changes the size of a head by far less than one channel.
    sizes = [jnp.maximum(a, eps) for a in (jnp.sqrt(squares[0]), scale * jnp.sqrt(squares[1]))]
    ratio = sizes[1] / sizes[0]
    return jax.tree.map(lambda a: a * scale[:, None], after), ratio * ratio


def _kernel(
    *refs: Any, size: tuple[int, int, int], tiles: Tiles, form: Form, interpret: bool
) -> None:
    tile = _Tokens(size, tiles, interpret)
    named = dict(zip(form.inputs(), refs, strict=False))
    outputs = refs[len(named) :]
    rotation_refs = [named[name] for name in ("cos", "sin") if name in named]
    featured = move = None
    if form.featured:
        featured = _features(tile, named["inverse"], named["weight"], form.relu)
    rotations: list[Any] = []
    if form.moves:
        move = _move(tile, named["matrices"], rotation_refs)
    else:
        rotations = [tile.load_rotation(rotation_refs, 4 * tile.groups, half) for half in range(2)]

    def step(head: Any, loaded: Any) -> Any:
        # this load starts before the work on the current head, which hides its latency
        following = tile.load(named["x"], jnp.minimum(head + 1, tile.heads - 1))
        x = (tile.quad(loaded[0]), tile.quad(loaded[1]))
        if featured is not None:
            x = featured(x, head)
        if move is not None:
            found = move(x)
            if form.measured:
                found, inflation = _measured(tile, x, found, form.capped)
                tile.store_scalars(outputs[1], inflation, tile.heads, head)
            results = [found]
        else:
            turned = tuple(_rotate(tile, x[half], rotations[half]) for half in range(2))
            results = [turned, x]
        for ref, halves in zip(outputs, results, strict=False):
            for half, values in enumerate(halves):
                tile.store(ref, head, half, values)
        return following

    lax.fori_loop(0, tile.heads, step, tile.load(named["x"], 0))


def run(
    form: Form, arrays: dict[str, jax.Array], tiles: Tiles, *, interpret: bool
) -> list[jax.Array]:
    """Runs the kernel.

    Args:
      form: what the kernel does.
      arrays: the arrays of `form.inputs()`. x is (B, F, P, N, D), where D is a multiple of 8. The
        others are float32: matrices (B, F, P, 4, 4), cos and sin (F, P, pairs), inverse
        (B, F, P, 1), weight (N D,).

    Returns:
      Heads of x's shape, then the second result of `Form`; all have five axes.
    """
    batch, frames, tokens, heads, dim = arrays["x"].shape
    inputs = []
    for name in form.inputs():
        lead = {"cos": (frames,), "sin": (frames,), "weight": ()}.get(name, (batch, frames))
        inputs.append(arrays[name].reshape(*lead, -1))
    like = jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype)
    outputs = [like, like] if form.plain else [like]
    if form.measured:
        outputs.append(jax.ShapeDtypeStruct((batch, frames, tokens * heads), jnp.float32))

    def spec(a: Any) -> pl.BlockSpec:
        if len(a.shape) == 1:
            return pl.BlockSpec(a.shape, lambda t, f, b: (0,))
        if len(a.shape) == 2:
            return pl.BlockSpec((None, a.shape[-1]), lambda t, f, b: (f, 0))
        return pl.BlockSpec((None, None, a.shape[-1]), lambda t, f, b: (b, f, 0))

    found = pl.pallas_call(
        functools.partial(
            _kernel, size=(tokens, heads, dim), tiles=tiles, form=form, interpret=interpret
        ),
        grid=(pl.cdiv(tokens, tiles.tokens), frames, batch),
        in_specs=[spec(a) for a in inputs],
        out_specs=[spec(a) for a in outputs],
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=2),
        interpret=interpret,
        name=form.name(),
    )(*inputs)
    return [a.reshape(batch, frames, tokens, heads, -1) for a in found]
