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

from kernels_pallas.gdn.gpu import bfloat16_parts

_F32, _B16 = jnp.float32, jnp.bfloat16
ROWS = 64  # of the matrix unit, tokens of a tile
_WIDEST = 112  # of a head: the shared memory of `read_gradient` is full
_COLUMNS = 16  # bfloat16 ones that a row of a swizzled tile holds: 112 is whole numbers of it


def takes(tokens: int, size: int) -> bool:
    """Whether tokens of this many a frame and this head size fit the matrix unit and TMA."""
    is_whole = tokens % 8 == 0 and size % _COLUMNS == 0
    # older versions of JAX read memory by other calls
    return is_whole and ROWS <= size <= _WIDEST and jax.__version_info__ >= (0, 11)


def tiles(*shape: int) -> Any:
    """bfloat16 tiles (..., rows, columns) in shared memory, as the matrix unit reads them."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    transforms = (plgpu.TilingTransform((8, _COLUMNS)), plgpu.SwizzleTransform(2 * _COLUMNS))
    return plgpu.SMEM(shape, _B16, transforms=transforms)


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


def split(parts: Any, first: int, matrix: Any, size: int) -> None:
    """Writes a float32 matrix (size, D) as its high and low parts to rows `first`... of `parts`.

    Args:
      matrix: start -> rows start .. start + 63 in the matrix unit's layout.
    """
    # 64 rows at once; of the middle ones some twice
    for start in dict.fromkeys((0, size - ROWS)):
        for j, part in enumerate(bfloat16_parts(matrix(start))):
            parts[pl.ds(first + j * size + start, ROWS)] = part


def store_row(ref: Any, row: jax.Array) -> None:
    """Writes a row to global memory, be it whole lines of the cache or not."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    store = getattr(plgpu, "store", None)
    if store is None:
        ref[...] = row
    else:  # from JAX 0.12 on an assignment writes whole lines alone
        store(ref, row, optimized=False)


def by_rows(a: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(a, like.shape, [0])


def flat(a: jax.Array) -> jax.Array:
    """(B, F, ...) to (B F, ...): fewer axes than the copy engine counts."""
    return a.reshape(-1, *a.shape[2:])
