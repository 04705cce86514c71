"""What the Mosaic GPU kernels of tokens for Hopper share, `gpu_maps_hopper` and `gpu_read_hopper`.

As in the Triton kernels of `gdn.gpu`, a program is one head of one frame and goes over tiles of 64
of its tokens. Tiles come and go by the copy engine (TMA), a few ahead of time; the matrix unit
(wgmma) reads them where they lie, and float32 matrices as two bfloat16 parts beside them. Axis
letters as in `gdn.gpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

_F32, _B16 = jnp.float32, jnp.bfloat16
ROWS = 64  # of the matrix unit, tokens of a tile
_WIDEST = 112  # of a head: the shared memory of `read_gradient` is full
COLUMNS = 16  # bfloat16 ones that a row of a swizzled tile holds: 112 is whole numbers of it


def takes(tokens: int, size: int) -> bool:
    """Whether tokens of this many a frame and this head size fit the matrix unit and TMA."""
    is_whole = tokens % 8 == 0 and size % COLUMNS == 0
    # older versions of JAX read memory by other calls
    return is_whole and ROWS <= size <= _WIDEST and jax.__version_info__ >= (0, 11)


def tiles(*shape: int) -> Any:
    """bfloat16 tiles (..., rows, columns) in shared memory, as the matrix unit reads them."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    transforms = (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(2 * COLUMNS))
    return plgpu.SMEM(shape, _B16, transforms=transforms)


def plain_tiles(*shape: int) -> Any:
    """bfloat16 tiles (..., rows, columns) in shared memory, row after row.

    The copy engine moves their rows of 224 bytes faster than the 32 bytes of `tiles`; the matrix
    unit takes them from registers alone.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.SMEM(shape, _B16)


def split_of(a: jax.Array) -> list[jax.Array]:
    """`gdn.gpu.bfloat16_parts`, where the barrier makes the compiler round in pairs, not singly."""
    high = lax.optimization_barrier(a.astype(_B16))
    return [high, (a - high.astype(_F32)).astype(_B16)]


def add_products(
    starts: tuple[Any, ...], terms: Callable[[], Iterable[tuple[int, Any, Any]]]
) -> tuple[Any, ...]:
    """The sums `starts`, float32 in the matrix unit's layout, with products added.

    Args:
      terms: gives (which of the sums, a, b) to add a b; it indexes shared memory itself.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(sums: Any) -> None:
        for i, a, b in terms():
            plgpu.wgmma(sums[i], a, b)

    found: Any = pl.run_state(run)(tuple(plgpu.ACC.init(start) for start in starts))
    return found


def products(shape: tuple[int, int], *pairs: tuple[Any, Any]) -> jax.Array:
    """The sum of products a b, float32 in the matrix unit's layout."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(sums: Any) -> jax.Array:
        for a, b in pairs:
            plgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(run, plgpu.ACC(shape, _F32))


def ring(i: Any, count: int) -> Any:
    """Which of `count` places in turn is the i-th's."""
    return lax.rem(i, jnp.int32(count))


def rows(i: Any) -> Any:
    """Tokens of the i-th tile."""
    return pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)


def load(ref: Any, summed: int | None = None) -> jax.Array:
    """Memory of any kind in the matrix unit's layout of tiles (ROWS, D).

    Args:
      summed: of a vector, the axis of a tile over which it is the sum.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout: Any = plgpu.Layout.WGMMA
    read: Any = plgpu.load
    layout = layout if summed is None else layout.reduce(summed)
    return read(ref, layout=layout, optimized=False)


def split(parts: Any, matrix: Any, starts: Iterable[int], *, first: int = 0) -> None:
    """Writes rows of a float32 matrix as their high and low parts to shared memory.

    Args:
      parts: (.., D), the high parts of all rows, then the low ones.
      matrix: (V, D) in memory of any kind.
      starts: of the rows, ROWS from each.
      first: row of `parts` where they begin.
    """
    for start in starts:
        _write_parts(parts, split_of(load(matrix.at[pl.ds(start, ROWS), :])), matrix, first + start)


def split_in_place(parts: Any, matrix: Any) -> None:
    """As `split` of all rows; `parts` (2 D, D) lies in the memory of `matrix` (D, D)."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    starts = halves(matrix.shape[0])
    found = [split_of(load(matrix.at[pl.ds(start, ROWS), :])) for start in starts]
    plgpu.commit_smem()  # all have read
    for start, both in zip(starts, found, strict=True):
        _write_parts(parts, both, matrix, start)


def _write_parts(parts: Any, both: Iterable[jax.Array], matrix: Any, start: int) -> None:
    for j, part in enumerate(both):
        parts[pl.ds(start + j * matrix.shape[0], ROWS)] = part


def halves(size: int) -> tuple[int, int]:
    """First rows of a matrix's two tiles; of rows in the middle, some are in both."""
    return 0, size - ROWS


def store(ref: Any, value: jax.Array) -> None:
    """Writes rows of any kind of memory, be they whole lines of it or not."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    write = getattr(plgpu, "store", None)
    if write is None:
        ref[...] = value
    else:  # from JAX 0.12 on an assignment writes whole lines alone
        write(ref, value, optimized=False)


def by_rows(a: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(a, like.shape, [0])


def flat(a: jax.Array) -> jax.Array:
    """(B, F, ...) to (B F, ...): fewer axes than the copy engine counts."""
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
    """The kernel over the axes `frame` and `head` of tokens, by warpgroups along `group`.

    Args:
      like: (B, F, P, N, D).
      groups: how many; a single one has no axis.
      interpret: parameters of the interpreter, or None.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, frames, _, heads, _ = like.shape
    threads = {} if groups == 1 else {"num_threads": groups, "thread_name": "group"}
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=tuple(scratch),
        grid=(batch * frames, heads),  # the last runs fastest: heads share the lines of a token
        grid_names=("frame", "head"),
        **threads,
        **({} if interpret is None else {"interpret": interpret}),
    )
