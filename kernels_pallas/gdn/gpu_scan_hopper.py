"""The recurrence over frames as a Mosaic GPU kernel for Hopper.

A program has 64 rows of a state and two warpgroups. The first warpgroup carries the rows in
registers and passes them, split into two bfloat16 parts, directly to wgmma. The state never goes
through shared memory. The second warpgroup loads maps and inputs in advance, and splits the next
map while the current one is multiplied. Axis letters are those of `gdn.gpu`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.gdn import gpu_hopper as hopper
from kernels_pallas.gdn.gpu import Run, way_of

_F32 = jnp.float32
_AHEAD = 2  # frames whose maps are held, in float32 and split, together with the input of one frame
_SHARED = 225 * 1024  # bytes of shared memory that a program has for all of them
_FLAGS = 128  # the flags of the frames are padded to this; memory is copied in units of 16 bytes
_MOST_FLAGS = 256  # flags that the copy engine can load at once


def takes(values: int, size: int, frames: int) -> bool:
    """Whether wgmma supports states (values, size), and the program fits in shared memory."""
    # a split map takes as much memory as the map in float32
    held = 4 * size * (2 * _AHEAD * size + hopper.ROWS)
    is_whole = values % 8 == 0 and size % hopper.COLUMNS == 0
    is_fit = hopper.ROWS <= values <= 2 * hopper.ROWS and size >= hopper.ROWS and held <= _SHARED
    # older versions of JAX have other functions to read memory
    return is_whole and is_fit and frames <= _MOST_FLAGS and jax.__version_info__ >= (0, 11)


def _multiply(
    start: jax.Array, parts: Any, maps: Any, adjoint: bool, meanwhile: Callable[[], None]
) -> jax.Array:
    """Computes start + S W, or start + S W^T for the adjoint, from high and low parts of both.

    Args:
      parts: the high part and the low part of S.
      maps: (2 D, D), the high parts of W and below them the low parts.
      meanwhile: called while the tensor cores work.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    size = maps.shape[1]

    def run(sums: Any) -> None:
        high, low = (maps.at[pl.ds(j * size, size)] for j in range(2))
        if adjoint:
            high, low = high.transpose((1, 0)), low.transpose((1, 0))
        # The smallest products come first. Low times low is smaller than the rounding of the rest.
        plgpu.wgmma(sums, parts[1], high)
        plgpu.wgmma(sums, parts[0], low)
        plgpu.wgmma(sums, parts[0], high)
        meanwhile()

    found: Any = pl.run_state(run)(plgpu.ACC.init(start))
    return found


def _kernel(
    *refs: Any,
    frames: int,
    heads: int,
    batch: int,
    sizes: tuple[int, int],
    runs: tuple[Run, ...],
    adjoint: bool,
    shares_u: bool,
) -> None:
    """As `gpu_scan._kernel`; arrays are (B F N, ...) or (G B N, ...), with one matrix per index."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    w_ref, u_ref, initial_ref, reset_ref, states_ref, final_ref = refs[:6]
    held_maps, held_input, split, flags = refs[6:10]
    map_full, input_full, input_free, split_full, split_free, once = refs[10:]
    values, size = sizes
    direction, row, head = lax.axis_index("run"), lax.axis_index("row"), lax.axis_index("head")
    # the grid's head axis includes the batch
    item, own_head = lax.div(head, jnp.int32(heads)), lax.rem(head, jnp.int32(heads))

    backwards, exclusive = way_of(runs, direction, adjoint)

    def at(i: Any) -> tuple[Any, Any, Any]:
        """Returns the frame that runs i-th, and the indices of its map and of its input."""
        frame = i + backwards * (frames - 1 - 2 * i)
        own = (item * frames + frame) * heads + own_head
        return frame, own, own + direction * (batch * frames * heads)

    # The program of the last rows starts earlier. It repeats some rows and never goes past the end.
    rows = pl.ds(
        pl.multiple_of(jnp.minimum(row * hopper.ROWS, values - hopper.ROWS), 8), hopper.ROWS
    )

    def slot(i: Any) -> Any:
        return hopper.ring(i, _AHEAD)

    def carry() -> None:
        plgpu.barrier_wait(once)
        state_at = direction * (batch * heads) + head
        start = hopper.load(initial_ref.at[state_at, rows, :])

        def step(i: Any, state: Any) -> Any:
            frame, _, told_at = at(i)
            if not adjoint:
                # Before the first frame there is no state to return. What is written here is
                # overwritten later.
                told_at = at(jnp.maximum(i - 1 + exclusive.astype(jnp.int32), 0))[2]
            keep = 1.0 - flags[frame]
            place = slot(i)
            plgpu.barrier_wait(input_full)
            u = hopper.load(held_input)
            if adjoint:
                state = state + (1.0 - exclusive) * u
                u = exclusive * u
                told = state
            else:
                # the state after the previous frame, or the state before this frame
                told = state * (1.0 - exclusive * (1.0 - keep))
                state = state * keep
            parts = hopper.split_of(state)
            u, *parts = lax.optimization_barrier((u, *parts))
            plgpu.commit_smem()  # from here on, the copy engine may write there
            plgpu.barrier_arrive(input_free)
            plgpu.barrier_wait(split_full.at[place])

            def tell() -> None:
                states_ref[told_at, rows, :] = told

            after = _multiply(u, parts, split.at[place], adjoint, tell)
            plgpu.barrier_arrive(split_free.at[place])
            return keep * after if adjoint else after

        final = lax.fori_loop(0, frames, step, start)
        if not adjoint:

            @pl.when(exclusive < 0.5)
            def _last() -> None:
                states_ref[at(jnp.int32(frames - 1))[2], rows, :] = final

        final_ref[state_at, rows, :] = final

    def ask_for_input(i: Any) -> None:
        _, shared, own = at(i)
        source = u_ref.at[shared if shares_u else own, rows, :]
        plgpu.copy_gmem_to_smem(source, held_input, input_full)

    def ask_for_map(i: Any) -> None:
        place = slot(i)
        plgpu.copy_gmem_to_smem(w_ref.at[at(i)[1]], held_maps.at[place], map_full.at[place])

    def bring() -> None:
        plgpu.copy_gmem_to_smem(reset_ref.at[direction], flags, once)
        ask_for_input(jnp.int32(0))
        for i in range(min(_AHEAD, frames)):
            ask_for_map(jnp.int32(i))

        def step(i: Any, _: None) -> None:
            place = slot(i)
            plgpu.barrier_wait(map_full.at[place])
            pl.when(i >= _AHEAD)(lambda: plgpu.barrier_wait(split_free.at[place]))
            hopper.split(split.at[place], held_maps.at[place], hopper.halves(size))
            plgpu.commit_smem()
            pl.when(i + _AHEAD < frames)(lambda: ask_for_map(i + _AHEAD))
            plgpu.barrier_arrive(split_full.at[place])
            plgpu.barrier_wait(input_free)
            pl.when(i + 1 < frames)(lambda: ask_for_input(i + 1))

        lax.fori_loop(0, frames, step, None)
        for i in range(max(frames - _AHEAD, 0), frames):
            plgpu.barrier_wait(split_free.at[slot(jnp.int32(i))])

    group = lax.axis_index("group")
    pl.when(group == 0)(carry)
    pl.when(group == 1)(bring)


def scan(
    w: jax.Array,
    u: jax.Array,
    initial: jax.Array,
    reset: jax.Array,
    runs: tuple[Run, ...],
    *,
    adjoint: bool,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `gpu_scan.scan`; the states must have sizes that `takes` allows."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    _, batch, frames, heads, values, size = u.shape
    count = len(runs)
    flags = jnp.pad(reset, ((0, 0), (0, -frames % _FLAGS)))
    kernel = functools.partial(
        _kernel,
        frames=frames,
        heads=heads,
        batch=batch,
        sizes=(values, size),
        runs=runs,
        adjoint=adjoint,
        shares_u=len(u) == 1,
    )
    states, final = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((count * batch * frames * heads, values, size), _F32),
            jax.ShapeDtypeStruct((count * batch * heads, values, size), _F32),
        ),
        scratch_types=(
            plgpu.SMEM((_AHEAD, size, size), _F32),
            plgpu.SMEM((hopper.ROWS, size), _F32),
            hopper.tiles(_AHEAD, 2 * size, size),
            plgpu.SMEM((flags.shape[1],), _F32),
            plgpu.Barrier(num_barriers=_AHEAD),
            *[plgpu.Barrier()] * 2,
            *[plgpu.Barrier(num_barriers=_AHEAD)] * 2,
            plgpu.Barrier(),
        ),
        grid=(pl.cdiv(values, hopper.ROWS), batch * heads, count),
        grid_names=("row", "head", "run"),
        num_threads=2,
        thread_name="group",
        **({} if interpret is None else {"interpret": interpret}),
    )(
        w.reshape(-1, size, size),
        u.reshape(-1, values, size),
        initial.reshape(-1, values, size),
        flags,
    )
    return states.reshape(count, *u.shape[1:]), final.reshape(initial.shape)
