"""Shared code of the Mosaic GPU kernels for Hopper that read tokens.

`gpu_maps_hopper`, `gpu_read_hopper` and `gpu_states_hopper` use it. As in the Triton kernels of
`gdn.gpu`, a program works on one head of one frame and loops over tiles of 64 tokens. The copy
engine (TMA) loads and stores the tiles, and it loads a few tiles in advance. The tensor cores
(wgmma) read the tiles directly from shared memory, and read float32 matrices as two bfloat16 parts.
Axis letters are those of `gdn.gpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

_F32, _B16 = jnp.float32, jnp.bfloat16
ROWS = 64  # rows of a wgmma instruction, and tokens of a tile
_WIDEST = 112  # largest head size; with it, the shared memory of `read_gradient` is full
COLUMNS = 16  # bfloat16 columns of a swizzled tile; 112 is a multiple of it


def takes(tokens: int, size: int) -> bool:
    """Whether wgmma and TMA support this number of tokens per frame and this head size."""
    is_whole = tokens % 8 == 0 and size % COLUMNS == 0
    # older versions of JAX have other functions to read memory
    return is_whole and ROWS <= size <= _WIDEST and jax.__version_info__ >= (0, 11)


def tiles(*shape: int) -> Any:
    """bfloat16 tiles (..., rows, columns) in shared memory, in the layout that wgmma reads."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    transforms = (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(2 * COLUMNS))
    return plgpu.SMEM(shape, _B16, transforms=transforms)


def plain_tiles(*shape: int) -> Any:
    """bfloat16 tiles (..., rows, columns) in shared memory, in row-major order.

    The copy engine moves their rows of 224 bytes faster than the rows of 32 bytes of `tiles`. wgmma
    can only take them from registers.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.SMEM(shape, _B16)


def split_of(a: jax.Array) -> list[jax.Array]:
    """`gdn.gpu.bfloat16_parts` with a barrier, so that the compiler rounds two values at once."""
    high = lax.optimization_barrier(a.astype(_B16))
    return [high, (a - high.astype(_F32)).astype(_B16)]


def add_products(
    starts: tuple[Any, ...], terms: Callable[[], Iterable[tuple[int, Any, Any]]]
) -> tuple[Any, ...]:
    """Adds products to the sums `starts`, which are float32 in the wgmma layout.

    Args:
      terms: returns triples (index of the sum, a, b), for the product a b. It is a function that
        indexes the shared memory itself.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(sums: Any) -> None:
        for i, a, b in terms():
            plgpu.wgmma(sums[i], a, b)

    found: Any = pl.run_state(run)(tuple(plgpu.ACC.init(start) for start in starts))
    return found


def products(shape: tuple[int, int], *pairs: tuple[Any, Any]) -> jax.Array:
    """Computes the sum of products a b, in float32 in the wgmma layout."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(sums: Any) -> jax.Array:
        for a, b in pairs:
            plgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(run, plgpu.ACC(shape, _F32))


def ring(i: Any, count: int) -> Any:
    """Returns the slot of tile i in a ring buffer of `count` slots."""
    return lax.rem(i, jnp.int32(count))


def rows(i: Any) -> Any:
    """Returns the token range of tile i."""
    return pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)


def load(ref: Any, summed: int | None = None) -> jax.Array:
    """Loads memory of any kind into the wgmma layout of tiles (ROWS, D).

    Args:
      summed: for a vector, the axis of the tile that it does not have.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout: Any = plgpu.Layout.WGMMA
    read: Any = plgpu.load
    layout = layout if summed is None else layout.reduce(summed)
    return read(ref, layout=layout, optimized=False)


def split(parts: Any, matrix: Any, starts: Iterable[int], *, first: int = 0) -> None:
    """Writes rows of a float32 matrix to shared memory, as their high and low bfloat16 parts.

    Args:
      parts: (.., D), the high parts of all rows and then the low parts.
      matrix: (V, D) in memory of any kind.
      starts: first rows of groups of ROWS rows.
      first: first row of `parts` to write to.
    """
    for start in starts:
        _write_parts(parts, split_of(load(matrix.at[pl.ds(start, ROWS), :])), matrix, first + start)


def split_in_place(parts: Any, matrix: Any) -> None:
    """As `split`, for all rows, where `parts` (2 D, D) and `matrix` (D, D) share their memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    starts = halves(matrix.shape[0])
    found = [split_of(load(matrix.at[pl.ds(start, ROWS), :])) for start in starts]
    plgpu.commit_smem()  # every thread has finished reading
    for start, both in zip(starts, found, strict=True):
        _write_parts(parts, both, matrix, start)


def _write_parts(parts: Any, both: Iterable[jax.Array], matrix: Any, start: int) -> None:
    for j, part in enumerate(both):
        parts[pl.ds(start + j * matrix.shape[0], ROWS)] = part


def halves(size: int) -> tuple[int, int]:
    """Returns the first rows of the two tiles of a matrix; rows in the middle may be in both."""
    return 0, size - ROWS


def store(ref: Any, value: jax.Array) -> None:
    """Writes rows to memory of any kind, whether or not they fill whole lines."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    write = getattr(plgpu, "store", None)
    if write is None:
        ref[...] = value
    else:  # from JAX 0.12 on, an assignment can only write whole lines
        write(ref, value, optimized=False)


def by_rows(a: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(a, like.shape, [0])


def flat(a: jax.Array) -> jax.Array:
    """Reshapes (B, F, ...) to (B F, ...), because the copy engine supports few axes."""
    return a.reshape(-1, *a.shape[2:])


def over_heads(
    kernel: Callable[..., None],
    out_type: Any,
    scratch: Iterable[Any],
    like: jax.Array,
    *,
    groups: int,
    interpret: Any,
) -> Callable[..., Any]:
    """Runs the kernel over the grid axes `frame` and `head`, with warpgroups along `group`.

    Args:
      like: (B, F, P, N, D), for the sizes.
      groups: number of warpgroups; a single one has no axis.
      interpret: parameters of the interpreter, or None.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, frames, _, heads, _ = like.shape
    threads = {} if groups == 1 else {"num_threads": groups, "thread_name": "group"}
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=tuple(scratch),
        # the last axis runs fastest, because heads share the cache lines of a token
        grid=(batch * frames, heads),
        grid_names=("frame", "head"),
        **threads,
        **({} if interpret is None else {"interpret": interpret}),
    )
