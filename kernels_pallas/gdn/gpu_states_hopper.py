"""States straight from tokens as a Mosaic GPU kernel for Hopper, see `gpu_hopper`.

A block is a frame of a head. It makes the frame's maps, waits for the state of the frame that is
run before (another block's, told by a semaphore), multiplies, and tells the block of the next
frame. Maps are read and written by nobody unless a gradient or another run wants them. Blocks are
started in the order of the grid, frames before heads, so that whom a block waits for is never
behind it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.gdn import gpu_hopper as hopper
from kernels_pallas.gdn import gpu_scan_hopper
from kernels_pallas.gdn.gpu import Run
from kernels_pallas.gdn.gpu_maps_hopper import (
    bring_tokens,
    by_head,
    multiply_tokens,
    token_memory,
)

_F32 = jnp.float32
# Heads of all clips from which on another run pays that waits for this one's maps: of 20, maps and
# then both directions side by side take 0.97 ms on an H100, and this way 1.10.
CHAINS = 40


def _kernel(*refs: Any, frames: int, heads: int, steps: int, run: Run, keeps_maps: bool) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    *sources, decay_ref, initial_ref, reset_ref = refs[:6]
    states_ref, final_ref, *kept = refs[6 : 10 if keeps_maps else 8]
    maps, ready, *memory = refs[-7:]
    turn, chain = lax.axis_index("turn"), lax.axis_index("chain")  # chain counts over the batch
    item, head = lax.div(chain, jnp.int32(heads)), lax.rem(chain, jnp.int32(heads))
    told = pl.get_global(plgpu.SemaphoreType.REGULAR((frames, initial_ref.shape[0], 2)))
    size = maps.shape[1]

    def frame_at(turn: Any) -> Any:
        return frames - 1 - turn if run.reverse else turn

    def at(turn: Any) -> Any:
        """Where the frame that is run `turn`-th is in (B F, ...)."""
        return item * frames + frame_at(turn)

    def keep(turn: Any) -> Any:
        return 1.0 - reset_ref[frame_at(turn)]

    frame = at(turn)
    following, is_last = jnp.minimum(turn + 1, frames - 1), turn == frames - 1

    def multiply(group: int, start: int) -> None:
        w, u = multiply_tokens(memory, decay_ref[frame, head], start, steps)
        rows = pl.ds(start, hopper.ROWS)
        for ref, matrix in zip(kept, (w, u), strict=keeps_maps):
            ref[frame, head, rows] = matrix
        for j, part in enumerate(hopper.split_of(w)):
            maps[pl.ds(start + j * size, hopper.ROWS)] = part
        plgpu.commit_smem()
        plgpu.barrier_arrive(ready)
        plgpu.barrier_wait(ready)  # the other warpgroup's rows

        def tell(state: jax.Array, turn: Any) -> None:
            states_ref[at(turn), head, rows] = state

        def go_on() -> jax.Array:
            plgpu.semaphore_wait(told.at[turn, chain, group], decrement=False, memory_scope="gpu")
            before = frame if run.exclusive else at(jnp.maximum(turn - 1, 0))
            return hopper.load(states_ref.at[before, head, rows])

        state = lax.cond(turn == 0, lambda: hopper.load(initial_ref.at[chain, rows]), go_on)
        if run.exclusive:  # told, and dropped where it is to be, by the block before
            state = state * jnp.where(turn == 0, keep(turn), 1.0)
            pl.when(turn == 0)(lambda: tell(state, turn))
        else:
            state = state * keep(turn)
        after = gpu_scan_hopper._multiply(u, hopper.split_of(state), maps, False, lambda: None)
        if run.exclusive:
            pl.when(~is_last)(lambda: tell(after * keep(following), following))
        else:
            tell(after, turn)

        @pl.when(is_last)
        def _final() -> None:
            final_ref[chain, rows] = after

        @pl.when(~is_last)
        def _signal() -> None:
            plgpu.semaphore_signal(told.at[following, chain, group], memory_scope="gpu")

    group = lax.axis_index("group")
    for i, start in enumerate(hopper.halves(size)):
        pl.when(group == i)(functools.partial(multiply, i, start))
    pl.when(group == 2)(lambda: bring_tokens(sources, memory, frame, head, steps))


def states(
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    decay: jax.Array,
    initial: jax.Array,
    reset: jax.Array,
    run: Run,
    *,
    keeps_maps: bool,
    slots: int = 5,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """States of every frame, and the state after the last, of one run; sizes as `takes` allows.

    Args:
      k, v, beta, decay: as `gdn.reference.frame_transitions`.
      initial: (B, N, D, D).
      reset: (F,) float32, 1 where the incoming state is dropped.
      keeps_maps: also report the maps.

    Returns:
      (B, F, N, D, D) and (B, N, D, D) float32; and, if asked for, w and u (B, F, N, D, D).
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, frames, tokens, heads, size = k.shape
    chains = batch * heads
    matrix = jax.ShapeDtypeStruct((batch * frames, heads, size, size), _F32)
    found, final, *maps = plgpu.kernel(
        functools.partial(
            _kernel,
            frames=frames,
            heads=heads,
            steps=pl.cdiv(tokens, hopper.ROWS),
            run=run,
            keeps_maps=keeps_maps,
        ),
        out_type=(
            matrix,
            jax.ShapeDtypeStruct((chains, size, size), _F32),
            *[matrix] * (2 * keeps_maps),
        ),
        scratch_types=(
            hopper.tiles(2 * size, size),
            plgpu.Barrier(num_arrivals=2),
            *token_memory(slots, size),
        ),
        grid=(frames, chains),  # the last runs fastest
        grid_names=("turn", "chain"),
        num_threads=3,
        thread_name="group",
        **({} if interpret is None else {"interpret": interpret}),
    )(
        hopper.flat(k),
        hopper.flat(v),
        by_head(beta),
        hopper.flat(decay),
        initial.reshape(chains, size, size),
        reset,
    )
    shape = (batch, frames, heads, size, size)
    return found.reshape(shape), final.reshape(initial.shape), *(a.reshape(shape) for a in maps)
