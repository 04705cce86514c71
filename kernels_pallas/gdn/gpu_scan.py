"""The recurrence over frames as a Triton kernel; on Hopper `gdn.gpu_scan_hopper` replaces it.

The rows of a state are independent, because S W acts on its columns. A program therefore carries a
few rows of one head through all frames on the chip. All programs of a head read the same maps, from
the cache. Axis letters are those of `gdn.gpu`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas import choice
from kernels_pallas.gdn import gpu_scan_hopper
from kernels_pallas.gdn.gpu import Run, Tiles, matrix_mask, padded, product, way_of


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int], exact: bool) -> jax.Array:
    if len(a) == 1:  # one row is too small for the tensor cores
        row, across = jnp.sum(a, 0), axes[1]
        return jnp.sum((row[None, :] if across else row[:, None]) * b, across)[None, :]
    return product(a, b, axes, exact)


def _kernel(*refs: Any, frames: int, sizes: tuple[int, int], options: dict[str, Any]) -> None:
    """Forward: reset the state, then S w + u. Adjoint: add du, S w^T, reset, frames reversed."""
    w_ref, u_ref, initial_ref, reset_ref, states_ref, final_ref = refs
    rows, wide = states_ref.shape[1:]
    values, size = sizes
    row_mask = matrix_mask(rows, wide, (values - pl.program_id(0) * rows, size))
    map_mask = matrix_mask(wide, wide, (size, size))
    adjoint, runs = options["adjoint"], options["runs"]
    backwards, exclusive = way_of(runs, pl.program_id(3), adjoint)

    def load(i: Any) -> tuple[Any, jax.Array, jax.Array]:
        i = jnp.minimum(i, frames - 1)
        frame = i + backwards * (frames - 1 - 2 * i)
        w = plgpu.load(w_ref.at[frame, :, :], mask=map_mask, other=0.0)
        return frame, w, plgpu.load(u_ref.at[frame, :, :], mask=row_mask, other=0.0)

    def step(i: Any, carry: Any) -> Any:
        state, (frame, w, u) = carry
        # this load starts before the product of the current frame, which hides its latency
        following = load(i + 1)
        keep = 1.0 - reset_ref[frame]
        if adjoint:  # u holds the gradient of the returned states
            told = state + (1.0 - exclusive) * u
            after = _dot(told, w, (1, 1), options["exact"])
            state = keep * (after + exclusive * u)
        else:
            state = keep * state
            after = _dot(state, w, (1, 0), options["exact"]) + u
            told, state = jnp.where(exclusive > 0, state, after), after
        plgpu.store(states_ref.at[frame, :, :], told, mask=row_mask)
        return state, following

    start = plgpu.load(initial_ref.at[:, :], mask=row_mask, other=0.0)
    final, _ = lax.fori_loop(0, frames, step, (start, load(0)))
    plgpu.store(final_ref.at[:, :], final, mask=row_mask)


def scan(
    w: jax.Array,
    u: jax.Array,
    initial: jax.Array,
    reset: jax.Array,
    runs: tuple[Run, ...],
    tiles: Tiles,
    *,
    adjoint: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns the states of every frame and the state after the last frame, for G runs at once.

    A run waits for memory most of the time, so two runs take little longer than one.

    Args:
      w: (B, F, N, D, D) float32, shared by all runs.
      u: (G, B, F, N, V, D) float32, or with a leading 1 if all runs share it.
      initial: (G, B, N, V, D).
      reset: (G, F) float32, 1 where the incoming state is set to zero.
      runs: one or two; the runs of the forward pass, also for the adjoint.
      adjoint: u is the gradient of the states, and initial that of the final state. The results are
        the gradients of the forward pass's u and of its initial state.

    Returns:
      (G, B, F, N, V, D) and (G, B, N, V, D).
    """
    _, batch, frames, heads, values, size = u.shape
    is_hopper = not (interpret or tiles.scan_exact) and choice.capability() == choice.HOPPER
    if is_hopper and gpu_scan_hopper.takes(values, size, frames):
        return gpu_scan_hopper.scan(w, u, initial, reset, runs, adjoint=adjoint)
    shares_u = len(u) == 1
    count, wide = len(runs), padded(size)
    rows = 1 if values == 1 else min(tiles.scan_rows, padded(values))
    maps = pl.BlockSpec((None, frames, None, wide, wide), lambda r, n, b, d: (b, 0, n, 0, 0))
    line = (None, None, frames, None, rows, wide)
    added = pl.BlockSpec(line, lambda r, n, b, d: (0 if shares_u else d, b, 0, n, r, 0))
    told = pl.BlockSpec(line, lambda r, n, b, d: (d, b, 0, n, r, 0))
    state = pl.BlockSpec((None, None, None, rows, wide), lambda r, n, b, d: (d, b, n, r, 0))
    flags = pl.BlockSpec((None, frames), lambda r, n, b, d: (d, 0))
    options = {"runs": runs, "adjoint": adjoint, "exact": tiles.scan_exact}
    states, final = pl.pallas_call(
        functools.partial(_kernel, frames=frames, sizes=(values, size), options=options),
        grid=(pl.cdiv(values, rows), heads, batch, count),
        in_specs=[maps, added, state, flags],
        out_specs=[told, state],
        out_shape=[
            jax.ShapeDtypeStruct((count, *u.shape[1:]), jnp.float32),
            jax.ShapeDtypeStruct(initial.shape, jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tiles.scan_warps, num_stages=1),
        interpret=interpret,
        name="gdn_scan_adjoint" if adjoint else "gdn_scan",
    )(w, u, initial, reset)
    return states, final
