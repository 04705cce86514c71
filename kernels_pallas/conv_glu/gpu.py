"""The gated convolution as Triton kernels.

A program works on a band of rows and a block of channels of one frame, and loops over the columns.
Both axes of the convolution are plain indices: rows are unrolled and columns are a loop. Triton's
vectors therefore hold only channels. There are no shifted loads and there is no shared memory, and
every element of a band is read once. Biases, SiLU and products run in float32. Values are rounded
only where the XLA implementation also rounds, or less often.

Axis letters: F frames, H W rows and columns, C channels per half. x and its gradient have two
halves, value and gate. Biases (2, 2, C) are first those of x and then those of the convolution.
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

Rows = tuple[jax.Array, ...]  # one vector of channels per row
_OUTSIDE = -9984.0  # The value of x outside the frame. Its SiLU is 0 for any bias.


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a program.

    Attributes:
      rows: rows of a band in the forward pass; the program reads two more. The time of Triton's
        compiler grows with about the cube of this number: seconds for 4, half a minute for 6,
        minutes for 11.
      channels: channels of a block, a power of two.
      warps: groups of 32 threads; they divide the channels of the block.
      gate_rows: rows of a band where the backward pass recomputes the convolution.
      dx_rows: rows of a band of the transposed convolution.
    """

    rows: int = 4
    channels: int = 64
    warps: int = 1
    gate_rows: int = 4
    dx_rows: int = 4


class _Band:
    """The part of the arrays that one program reads and writes.

    Refs are flat and an index is one scalar, so that addresses need few vector instructions.
    """

    def __init__(self, size: tuple[int, int, int], rows: int, block: int, is_exact: bool):
        self.height, self.width, self.channels = size
        self.is_exact = is_exact
        self.fma = functools.partial(fma, plain=is_exact)
        self.rows = rows
        self.block = block
        self.first = pl.program_id(1) * rows
        self.channel = pl.program_id(0) * block
        # None if every block is full
        at = self.channel + jnp.arange(block)
        self.real = at < self.channels if self.channels % block else None

    def _at(self, row: Any, column: Any, halves: int, half: int) -> Any:
        place = (row * self.width + column) * halves + half
        return pl.ds(place * self.channels + self.channel, self.block)

    def _mask(self, inside: Any) -> jax.Array:
        if self.real is None:
            return jnp.broadcast_to(inside, (self.block,))
        return self.real & inside

    def load(
        self, ref: Any, row: int, column: Any, halves: int = 1, half: int = 0, other: float = 0.0
    ) -> jax.Array:
        """Loads the channels at a row, counted from the band's first row, and a column.

        Outside the frame the result is `other`.
        """
        y = self.first + row
        inside = (y >= 0) & (y < self.height) & (column < self.width)
        y, column = jnp.clip(y, 0, self.height - 1), jnp.minimum(column, self.width - 1)
        at = self._at(y, column, halves, half)
        return plgpu.load(ref.at[at], mask=self._mask(inside), other=other)

    def store(
        self, ref: Any, value: jax.Array, row: int, column: Any, halves: int = 1, half: int = 0
    ) -> None:
        y = self.first + row
        at = self._at(jnp.minimum(y, self.height - 1), column, halves, half)
        mask = self.real if self.height % self.rows == 0 else self._mask(y < self.height)
        plgpu.store(ref.at[at], value.astype(ref.dtype), mask=mask)

    def parameter(self, ref: Any, place: int) -> jax.Array:
        """Loads the channels of row `place` of a table of width C."""
        at = pl.ds(place * self.channels + self.channel, self.block)
        return plgpu.load(ref.at[at], mask=self.real, other=None if self.real is None else 0.0)

    def taps(self, ref: Any, halves: int = 1, half: int = 0) -> list[list[jax.Array]]:
        return [
            [self.parameter(ref, (3 * i + j) * halves + half) for j in range(3)] for i in range(3)
        ]

    def silu(self, x: jax.Array) -> jax.Array:
        return self.silu_and_sigmoid(x)[0]

    def silu_and_sigmoid(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.is_exact:
            sigmoid = 1.0 / (1.0 + jnp.exp(-x))
            return x * sigmoid, sigmoid
        # This is one instruction with an error of 2^-11. An exponential and a division would be
        # twenty instructions and would limit the kernel. The result is rounded to bfloat16, with
        # an error of 2^-9.
        half = 0.5 * x
        turn = plgpu.approx_tanh(half)
        return fma(half, turn, half), 0.5 + 0.5 * turn

    def silu_and_slope(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        silu, sigmoid = self.silu_and_sigmoid(x)
        return silu, self.fma(silu, 1.0 - sigmoid, sigmoid)

    def window(
        self, columns: tuple[Rows, Rows, Rows], row: int, taps: list[list[jax.Array]], start: Any
    ) -> jax.Array:
        """`start` plus the correlation at a row; `columns` has it at `row + 1`."""
        total = start
        for i in range(3):
            for j in range(3):
                total = self.fma(columns[j][row + i], taps[i][j], total)
        return total

    def walk(self, fetch: Any, prepare: Any, use: Any, carry: Any) -> Any:
        """Calls `use(column, (left, centre, right), own, carry)` for every column.

        Args:
          fetch: column -> (vectors, own). It only loads, and gives zeros right of the frame. The
            loads start one column early, so that their latency is hidden by the work of a column.
          prepare: vectors of a column -> what the neighbouring columns read.
          use: returns the next carry; `own` belongs to the column and not to its neighbours.
        """
        vectors, own = fetch(0)
        centre = prepare(vectors)
        left = jax.tree.map(jnp.zeros_like, centre)

        def step(column: jax.Array, state: Any) -> Any:
            left, centre, own, (vectors, later), carry = state
            following = fetch(column + 2)
            right = prepare(vectors)
            carry = use(column, (left, centre, right), own, carry)
            return centre, right, later, following, carry

        state = (left, centre, own, fetch(1), carry)
        return lax.fori_loop(0, self.width, step, state)[-1]


def _gated(band: _Band, x_ref: Any, w_ref: Any, b_ref: Any, use: Any, own: Any = None) -> None:
    """Calls `use(column, row, value, gate, own)` with both halves of the convolution's result.

    Args:
      own: column -> one vector per row, which `use` receives.
    """
    taps = [band.taps(w_ref, 2, half) for half in range(2)]
    x_bias, bias = ([band.parameter(b_ref, i + half) for half in range(2)] for i in (0, 2))

    def fetch(column: Any) -> tuple[Any, Any]:
        def one(half: int, row: int) -> jax.Array:
            return band.load(x_ref, row - 1, column, 2, half, _OUTSIDE)

        value, gate = (tuple(one(h, r) for r in range(band.rows + 2)) for h in range(2))
        return (value, gate), own(column) if own else None

    def prepare(halves: tuple[Rows, Rows]) -> Any:
        def one(half: int, x: jax.Array) -> jax.Array:
            return band.silu(x.astype(jnp.float32) + x_bias[half])

        return tuple(tuple(one(h, x) for x in halves[h]) for h in range(2))

    def at_column(column: jax.Array, seen: Any, own: Any, carry: None) -> None:
        for row in range(band.rows):
            value, gate = (
                band.window(tuple(c[half] for c in seen), row, taps[half], bias[half])
                for half in range(2)
            )
            use(column, row, value, gate, own)

    band.walk(fetch, prepare, at_column, None)


def _forward_kernel(x_ref: Any, w_ref: Any, b_ref: Any, y_ref: Any, *, band: Any) -> None:
    tile = band()

    def use(column: jax.Array, row: int, value: jax.Array, gate: jax.Array, _: None) -> None:
        tile.store(y_ref, value * tile.silu(gate), row, column)

    _gated(tile, x_ref, w_ref, b_ref, use)


def _gate_kernel(x_ref: Any, w_ref: Any, b_ref: Any, dy_ref: Any, d_ref: Any, *, band: Any) -> None:
    """Gradient with respect to the convolution's result, which is recomputed."""
    tile = band()

    def own(column: Any) -> Rows:
        return tuple(tile.load(dy_ref, row, column) for row in range(tile.rows))

    def use(column: jax.Array, row: int, value: jax.Array, gate: jax.Array, own: Rows) -> None:
        dy = own[row].astype(jnp.float32)
        activated, slope = tile.silu_and_slope(gate)
        tile.store(d_ref, dy * activated, row, column, 2, 0)
        tile.store(d_ref, dy * value * slope, row, column, 2, 1)

    _gated(tile, x_ref, w_ref, b_ref, use, own)


def _dx_kernel(
    x_ref: Any, w_ref: Any, b_ref: Any, d_ref: Any, dx_ref: Any, dw_ref: Any, *, band: Any
) -> None:
    """Gradients of x, and of taps and biases summed over this band.

    Both halves are treated in the same way here.
    """
    tile = band()
    taps, x_bias = tile.taps(w_ref), tile.parameter(b_ref, 0)
    turned = [row[::-1] for row in taps[::-1]]
    zero = jnp.zeros((tile.block,), jnp.float32)

    def fetch(column: Any) -> tuple[Rows, Rows]:
        d = tuple(tile.load(d_ref, row - 1, column) for row in range(tile.rows + 2))
        return d, tuple(tile.load(x_ref, r, column, other=_OUTSIDE) for r in range(tile.rows))

    def prepare(d: Rows) -> Rows:
        return tuple(row.astype(jnp.float32) for row in d)

    def use(column: jax.Array, seen: Any, own: Rows, sums: Rows) -> Rows:
        found = list(sums)
        for row in range(tile.rows):
            x = own[row].astype(jnp.float32) + x_bias
            activated, slope = tile.silu_and_slope(x)
            dx = tile.window(seen, row, turned, zero) * slope
            tile.store(dx_ref, dx, row, column)
            for i in range(3):
                for j in range(3):
                    known = found[3 * i + j]
                    found[3 * i + j] = tile.fma(activated, seen[2 - j][row + 2 - i], known)
            # the last rows of a band may be below the frame, where slope and d are zero
            found[9] += dx
            found[10] += seen[1][row + 1]
        return tuple(found)

    for i, total in enumerate(tile.walk(fetch, prepare, use, (zero,) * 11)):
        at = pl.ds(i * tile.channels + tile.channel, tile.block)
        plgpu.store(dw_ref.at[at], total, mask=tile.real)


def _call(
    body: Any,
    inputs: list[jax.Array],
    outputs: list[jax.ShapeDtypeStruct],
    size: tuple[int, int, int],
    rows: int,
    tiles: Tiles,
    interpret: bool,
) -> list[jax.Array]:
    """Runs `body` on flat arrays: (N,) for all, (F, N) per frame, (F, bands, N) per band."""
    block = tiles.channels
    # the interpreter has no approximate instructions
    is_exact = interpret or inputs[0].dtype == jnp.float32

    def spec(a: Any) -> pl.BlockSpec:
        if len(a.shape) == 1:
            return pl.BlockSpec(a.shape, lambda c, r, f: (0,))
        if len(a.shape) == 2:
            return pl.BlockSpec((None, a.shape[-1]), lambda c, r, f: (f, 0))
        return pl.BlockSpec((None, None, a.shape[-1]), lambda c, r, f: (f, r, 0))

    return pl.pallas_call(
        functools.partial(body, band=lambda: _Band(size, rows, block, is_exact)),
        # the first axis runs fastest, because neighbouring blocks of channels share cache lines
        grid=(pl.cdiv(size[2], block), pl.cdiv(size[0], rows), outputs[0].shape[0]),
        in_specs=[spec(a) for a in inputs],
        out_specs=[spec(a) for a in outputs],
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=2),
        interpret=interpret,
        name="conv_glu" + body.__name__.removesuffix("_kernel"),
    )(*inputs)


def forward(
    x: jax.Array, w: jax.Array, b: jax.Array, tiles: Tiles, *, interpret: bool
) -> jax.Array:
    """Computes y (F, H, W, C) from x (F, H, W, 2, C).

    w (3, 3, 2, C) and b (2, 2, C) are float32.
    """
    frames, height, width, _, channels = x.shape
    size = (height, width, channels)
    inputs = [x.reshape(frames, -1), w.reshape(-1), b.reshape(-1)]
    outputs = [jax.ShapeDtypeStruct((frames, height * width * channels), x.dtype)]
    y = _call(_forward_kernel, inputs, outputs, size, tiles.rows, tiles, interpret)[0]
    return y.reshape(frames, *size)


def backward(
    x: jax.Array, w: jax.Array, b: jax.Array, dy: jax.Array, tiles: Tiles, *, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x, w and b, with their shapes; those of w and b are float32."""
    frames, height, width, _, channels = x.shape
    size = (height, width, channels)
    flat, taps = x.reshape(frames, -1), w.reshape(-1)
    inputs = [flat, taps, b.reshape(-1), dy.reshape(frames, -1)]
    wide = jax.ShapeDtypeStruct(flat.shape, x.dtype)
    (d,) = _call(_gate_kernel, inputs, [wide], size, tiles.gate_rows, tiles, interpret)
    # from here on, value and gate are treated in the same way
    size = (height, width, 2 * channels)
    bands = pl.cdiv(height, tiles.dx_rows)
    outputs = [wide, jax.ShapeDtypeStruct((frames, bands, 22 * channels), jnp.float32)]
    inputs = [flat, taps, b.reshape(-1), d]
    dx, sums = _call(_dx_kernel, inputs, outputs, size, tiles.dx_rows, tiles, interpret)
    sums = jnp.sum(sums, (0, 1)).reshape(11, 2, channels)
    return dx.reshape(x.shape), sums[:9].reshape(w.shape), sums[9:]
