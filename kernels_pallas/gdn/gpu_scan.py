"""The recurrence over frames as a Triton kernel.

Rows of a state do not see each other (S W acts on columns), so a program carries a few rows of one
head through all frames, on the chip; a head's programs read the same maps, from the cache.
Axis letters as in `gdn.gpu`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.gdn.gpu import Tiles, matrix_mask, padded, product

_PRESETS = {"tf32x3": lax.DotAlgorithmPreset.TF32_TF32_F32_X3}


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int], precision: str) -> jax.Array:
    if precision in _PRESETS:
        dims = (((axes[0],), (axes[1],)), ((), ()))
        return lax.dot_general(a, b, dims, _PRESETS[precision], preferred_element_type=jnp.float32)
    return product(a, b, axes, exact=precision == "ieee")


def _kernel(*refs: Any, frames: int, sizes: tuple[int, int], options: dict[str, Any]) -> None:
    """Forward: state -> drop -> S w + u. Its adjoint: + du -> S w^T -> drop, frames reversed."""
    w_ref, u_ref, initial_ref, reset_ref, *addend_ref, states_ref, final_ref = refs
    rows, wide = states_ref.shape[1:]
    values, size = sizes
    left = values - pl.program_id(0) * rows
    row_mask = matrix_mask(rows, wide, (left, size))
    map_mask = matrix_mask(wide, wide, (size, size))
    exclusive, adjoint = options["exclusive"], options["adjoint"]

    def load(ref: Any, frame: Any) -> jax.Array:
        return plgpu.load(ref.at[frame, :, :], mask=row_mask, other=0.0)

    def step(i: Any, state: jax.Array) -> jax.Array:
        frame = frames - 1 - i if options["reverse"] else i
        w = plgpu.load(w_ref.at[frame, :, :], mask=map_mask, other=0.0)
        u, keep = load(u_ref, frame), 1.0 - reset_ref[frame]
        if adjoint:  # u holds the gradient of the reported states
            state = state if exclusive else state + u
            told = state
            state = _dot(state, w, (1, 1), options["precision"])
            state = keep * (state + u if exclusive else state)
        else:
            state = keep * state
            after = _dot(state, w, (1, 0), options["precision"]) + u
            told, state = (state if exclusive else after), after
        if addend_ref:
            told = told + load(addend_ref[0], frame)
        plgpu.store(states_ref.at[frame, :, :], told, mask=row_mask)
        return state

    start = plgpu.load(initial_ref.at[:, :], mask=row_mask, other=0.0)
    final = lax.fori_loop(0, frames, step, start)
    plgpu.store(final_ref.at[:, :], final, mask=row_mask)


def scan(
    w: jax.Array,
    u: jax.Array,
    initial: jax.Array,
    reset: jax.Array,
    addend: jax.Array | None,
    tiles: Tiles,
    *,
    reverse: bool,
    exclusive: bool,
    adjoint: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """States of every frame, with `addend` added, and the state after the last.

    Args:
      w, u: maps (B, F, N, D, D) and (B, F, N, V, D), float32.
      initial: (B, N, V, D).
      reset: (F,) float32, 1 where the incoming state is dropped.
      addend: (B, F, N, V, D) or None.
      reverse, exclusive: see `gdn.scan_states`; of the forward run, also for its adjoint.
      adjoint: u is the gradient of the states and initial that of the final state; reported are
        the gradients of the forward's u and of its initial state.
    """
    batch, frames, heads, values, size = u.shape
    wide = padded(size)
    rows = min(tiles.scan_rows, padded(values))
    maps = pl.BlockSpec((None, frames, None, wide, wide), lambda r, n, b: (b, 0, n, 0, 0))
    lines = pl.BlockSpec((None, frames, None, rows, wide), lambda r, n, b: (b, 0, n, r, 0))
    state = pl.BlockSpec((None, None, rows, wide), lambda r, n, b: (b, n, r, 0))
    flags = pl.BlockSpec((frames,), lambda r, n, b: (0,))
    options = {
        "reverse": reverse != adjoint,
        "exclusive": exclusive,
        "adjoint": adjoint,
        # an interpreter has no such units
        "precision": "ieee" if interpret and tiles.scan_precision in _PRESETS else None,
    }
    options["precision"] = options["precision"] or tiles.scan_precision
    extra = [] if addend is None else [addend]
    states, final = pl.pallas_call(
        functools.partial(_kernel, frames=frames, sizes=(values, size), options=options),
        grid=(pl.cdiv(values, rows), heads, batch),
        in_specs=[maps, lines, state, flags, *[lines] * len(extra)],
        out_specs=[lines, state],
        out_shape=[
            jax.ShapeDtypeStruct(u.shape, jnp.float32),
            jax.ShapeDtypeStruct(initial.shape, jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tiles.scan_warps, num_stages=tiles.stages),
        interpret=interpret,
        name="gdn_scan_adjoint" if adjoint else "gdn_scan",
    )(w, u, initial, reset, *extra)
    return states, final
