"""The recurrence over frames as a Mosaic GPU kernel for Hopper.

A warpgroup carries 64 rows of a state in registers and feeds them, split in two bfloat16 parts, to
the matrix unit (wgmma) as they are: nothing of the state passes through shared memory. One more
warpgroup brings maps and inputs in ahead of time. Axis letters as in `gdn.gpu`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.gdn.gpu import Ring, bfloat16_parts

if TYPE_CHECKING:
    from kernels_pallas.gdn.gpu_scan import Run

_F32, _B16 = jnp.float32, jnp.bfloat16
ROWS = 64  # of the matrix unit
_COLUMNS = 16  # bfloat16 ones that a row of a swizzled tile holds: 112 is whole numbers of it
_SHARED = 220 * 1024  # bytes of it that a program has for matrices
_FLAGS = 128  # frames' flags are padded to this, memory is copied in units of 16 bytes


def takes(values: int, size: int, ring: Ring) -> bool:
    """Whether states (values, size) fit the matrix unit, and their program its shared memory."""
    held = (ring.maps + ring.raw) * size + ring.inputs * ring.groups * ROWS
    is_whole = values % 8 == 0 and size % _COLUMNS == 0
    return is_whole and ROWS <= values <= 2 * ROWS and 4 * size * held <= _SHARED


def split_maps(w: jax.Array) -> jax.Array:
    """(X, D, D) float32 -> (X, 2 D, D) bfloat16, high parts above low ones, in XLA."""
    # rounded by name: XLA takes a cast there and back for nothing
    high = lax.reduce_precision(w, 8, 7)
    return jnp.concatenate([high.astype(_B16), (w - high).astype(_B16)], 1)


def _multiply(
    start: jax.Array, parts: Any, maps: Any, adjoint: bool, meanwhile: Callable[[], None]
) -> jax.Array:
    """start + S W or, for the adjoint, start + S W^T, of both's high and low parts.

    Args:
      maps: (2 D, D), high parts above low ones.
      meanwhile: what is done while the matrix unit works.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    size = maps.shape[1]

    def run(sums: Any) -> None:
        high, low = (maps.at[pl.ds(j * size, size)] for j in range(2))
        if adjoint:
            high, low = high.transpose((1, 0)), low.transpose((1, 0))
        # smallest first; low times low is below the rest's rounding
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
    ring: Ring,
    adjoint: bool,
    shares_u: bool,
) -> None:
    """As `gpu_scan._kernel`; arrays of (B F N or R B N, ...) so that one index picks a matrix."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    w_ref, u_ref, initial_ref, reset_ref, states_ref, final_ref = refs[:6]
    maps, inputs, raw, flags = refs[6:10]
    map_full, map_free, input_full, input_free, raw_full, once = refs[10:]
    values, size = sizes
    group = lax.axis_index("wg")
    direction, row, head = lax.axis_index("run"), lax.axis_index("row"), lax.axis_index("head")
    item = lax.div(head, jnp.int32(heads))  # head counts over the batch
    place = lax.rem(head, jnp.int32(heads))

    def of_run(field: str) -> Any:
        first, *others = [int(getattr(run, field)) for run in runs]
        return direction * (others[0] - first) + first if others else jnp.int32(first)

    backwards = of_run("reverse")
    if adjoint:
        backwards = 1 - backwards
    exclusive = of_run("exclusive").astype(_F32)

    def at(i: Any) -> tuple[Any, Any, Any]:
        """The frame that is run i-th, and where its map and its input are."""
        frame = i + backwards * (frames - 1 - 2 * i)
        own = (item * frames + frame) * heads + place
        return frame, own, own + direction * (batch * frames * heads)

    def slot(i: Any, count: int) -> Any:
        return lax.rem(i, jnp.int32(count))

    # the last rows' program starts earlier: it repeats rows, and none of it is past the end
    first = [jnp.minimum((row * ring.groups + g) * ROWS, values - ROWS) for g in range(ring.groups)]

    def carry() -> None:
        mine = jnp.minimum((row * ring.groups + group) * ROWS, values - ROWS)
        rows = pl.ds(pl.multiple_of(mine, 8), ROWS)
        plgpu.barrier_wait(once)
        state_at = direction * (batch * heads) + head
        load: Any = plgpu.load
        start = load(initial_ref.at[state_at, rows, :], layout=plgpu.Layout.WGMMA, optimized=False)

        def step(i: Any, state: Any) -> Any:
            frame, _, told_at = at(i)
            if not adjoint:
                # before the first frame nothing is to be told; what is written is written over
                told_at = at(jnp.maximum(i - 1 + exclusive.astype(jnp.int32), 0))[2]
            keep = 1.0 - flags[frame]
            place_w, place_u = slot(i, ring.maps), slot(i, ring.inputs)
            plgpu.barrier_wait(input_full.at[place_u])
            u = plgpu.layout_cast(inputs[place_u, group], plgpu.Layout.WGMMA)
            if adjoint:
                state = state + (1.0 - exclusive) * u
                u = exclusive * u
                told = state
            else:
                # what was the state after the frame before, or is that before this one
                told = state * (1.0 - exclusive * (1.0 - keep))
                state = state * keep
            parts = bfloat16_parts(state)
            u, *parts = lax.optimization_barrier((u, *parts))
            plgpu.barrier_arrive(input_free.at[place_u])
            plgpu.barrier_wait(map_full.at[place_w])

            def tell() -> None:
                states_ref[told_at, rows, :] = told

            after = _multiply(u, parts, maps.at[place_w], adjoint, tell)
            plgpu.barrier_arrive(map_free.at[place_w])
            return keep * after if adjoint else after

        final = lax.fori_loop(0, frames, step, start)
        if not adjoint:

            @pl.when(exclusive < 0.5)
            def _last() -> None:
                states_ref[at(jnp.int32(frames - 1))[2], rows, :] = final

        final_ref[state_at, rows, :] = final

    def bring_input(i: Any) -> None:
        _, own, of_run = at(i)
        index, place_u = own if shares_u else of_run, slot(i, ring.inputs)

        for g in range(ring.groups):
            plgpu.copy_gmem_to_smem(
                u_ref.at[index, pl.ds(pl.multiple_of(first[g], 8), ROWS), :],
                inputs.at[place_u, g],
                input_full.at[place_u],
            )

    def bring_map(i: Any) -> None:
        if ring.raw:
            place_w = slot(i, ring.raw)
            plgpu.copy_gmem_to_smem(w_ref.at[at(i)[1]], raw.at[place_w], raw_full.at[place_w])
        else:
            place_w = slot(i, ring.maps)
            plgpu.copy_gmem_to_smem(w_ref.at[at(i)[1]], maps.at[place_w], map_full.at[place_w])

    def bring() -> None:
        plgpu.copy_gmem_to_smem(reset_ref.at[direction], flags, once)
        for i in range(min(ring.inputs, frames)):
            bring_input(jnp.int32(i))
        for i in range(min(ring.raw or ring.maps, frames)):
            bring_map(jnp.int32(i))

        def step(i: Any, _: None) -> None:
            if ring.raw:
                convert(i)
            plgpu.barrier_wait(input_free.at[slot(i, ring.inputs)])
            pl.when(i + ring.inputs < frames)(lambda: bring_input(i + ring.inputs))
            if not ring.raw:
                plgpu.barrier_wait(map_free.at[slot(i, ring.maps)])
                pl.when(i + ring.maps < frames)(lambda: bring_map(i + ring.maps))

        lax.fori_loop(0, frames, step, None)
        if ring.raw:  # what `convert` did not wait for
            for i in range(max(frames - ring.maps, 0), frames):
                plgpu.barrier_wait(map_free.at[slot(jnp.int32(i), ring.maps)])

    def convert(i: Any) -> None:
        place_r, place_w = slot(i, ring.raw), slot(i, ring.maps)
        plgpu.barrier_wait(raw_full.at[place_r])
        # rows in the matrix unit's layout, 64 at once; of the middle ones some twice
        starts = sorted({0, size - ROWS})
        chunks = []
        for s in starts:
            w = plgpu.layout_cast(raw[place_r, pl.ds(s, ROWS)], plgpu.Layout.WGMMA)
            chunks.append(bfloat16_parts(w))

        @pl.when(i >= ring.maps)
        def _wait() -> None:
            plgpu.barrier_wait(map_free.at[place_w])

        for s, parts in zip(starts, chunks, strict=True):
            for j in range(2):
                maps[place_w, pl.ds(j * size + s, ROWS)] = parts[j]
        plgpu.commit_smem()
        plgpu.barrier_arrive(map_full.at[place_w])

        @pl.when(i + ring.raw < frames)
        def _next() -> None:
            bring_map(i + ring.raw)

    # three warpgroups share 504 registers a thread; one that only copies needs few
    is_uneven = ring.groups > 1 and not ring.raw

    @pl.when(group < ring.groups)
    def _carry() -> None:
        if is_uneven:
            plgpu.set_max_registers(232, action="increase")
        carry()

    @pl.when(group == ring.groups)
    def _bring() -> None:
        if is_uneven:
            plgpu.set_max_registers(40, action="decrease")
        bring()


def scan(
    w: jax.Array,
    u: jax.Array,
    initial: jax.Array,
    reset: jax.Array,
    runs: tuple[Run, ...],
    ring: Ring,
    *,
    adjoint: bool,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `gpu_scan.scan`; states of sizes that `takes` allows."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    _, batch, frames, heads, values, size = u.shape
    count = len(runs)
    flat_w = w.reshape(-1, size, size)
    if not ring.raw:
        flat_w = split_maps(flat_w)
    flags = jnp.pad(reset, ((0, 0), (0, -frames % _FLAGS)))
    tiling = plgpu.TilingTransform((8, _COLUMNS))
    narrow, wide = ((tiling, plgpu.SwizzleTransform(b * _COLUMNS)) for b in (2, 4))
    kernel = functools.partial(
        _kernel,
        frames=frames,
        heads=heads,
        batch=batch,
        sizes=(values, size),
        runs=runs,
        ring=ring,
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
            plgpu.SMEM((ring.maps, 2 * size, size), _B16, transforms=narrow),
            plgpu.SMEM((ring.inputs, ring.groups, ROWS, size), _F32, transforms=wide),
            plgpu.SMEM((ring.raw, size, size), _F32, transforms=wide) if ring.raw else None,
            plgpu.SMEM((flags.shape[1],), _F32),
            plgpu.Barrier(num_barriers=ring.maps),
            plgpu.Barrier(num_arrivals=ring.groups, num_barriers=ring.maps),
            plgpu.Barrier(num_arrivals=ring.groups, num_barriers=ring.inputs),
            plgpu.Barrier(num_arrivals=ring.groups, num_barriers=ring.inputs),
            plgpu.Barrier(num_barriers=max(ring.raw, 2)),
            plgpu.Barrier(),
        ),
        grid=(pl.cdiv(values, ROWS * ring.groups), batch * heads, count),
        grid_names=("row", "head", "run"),
        num_threads=ring.groups + 1,
        thread_name="wg",
        **({} if interpret is None else {"interpret": interpret}),
    )(flat_w, u.reshape(-1, values, size), initial.reshape(-1, values, size), flags)
    return states.reshape(count, *u.shape[1:]), final.reshape(initial.shape)
