"""The states directly from the tokens, as a Mosaic GPU kernel for Hopper; see `gpu_hopper`.

A thread block works on one frame of one head. It computes the maps of the frame, waits for the
state of the previous frame, multiplies, and signals the block of the next frame. Another block
computes the previous state and signals it with a semaphore. The maps are written to memory only if
a gradient or another run needs them. Blocks start in the order of the grid, with all heads of a
frame before the next frame. A block therefore never waits for a block that starts after it.
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
# From this number of heads (over all clips) on, it is faster to compute the maps in the forward run
# and to start the second run afterwards. With 20 heads on an H100, this takes 1.10 ms, while maps
# in their own kernel, followed by both directions side by side, take 0.97 ms.
CHAINS = 40


def _kernel(*refs: Any, frames: int, heads: int, steps: int, run: Run, keeps_maps: bool) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    *sources, decay_ref, initial_ref, reset_ref = refs[:6]
    states_ref, final_ref, *kept = refs[6 : 10 if keeps_maps else 8]
    maps, ready, *memory = refs[-7:]
    # the grid's chain axis includes batch and heads
    turn, chain = lax.axis_index("turn"), lax.axis_index("chain")
    item, head = lax.div(chain, jnp.int32(heads)), lax.rem(chain, jnp.int32(heads))
    told = pl.get_global(plgpu.SemaphoreType.REGULAR((frames, initial_ref.shape[0], 2)))
    size = maps.shape[1]

    def frame_at(turn: Any) -> Any:
        return frames - 1 - turn if run.reverse else turn

    def at(turn: Any) -> Any:
        """Returns the index in (B F, ...) of the frame that runs at position `turn`."""
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
        plgpu.barrier_wait(ready)  # wait for the rows of the other warpgroup

        def tell(state: jax.Array, turn: Any) -> None:
            states_ref[at(turn), head, rows] = state

        def go_on() -> jax.Array:
            plgpu.semaphore_wait(told.at[turn, chain, group], decrement=False, memory_scope="gpu")
            before = frame if run.exclusive else at(jnp.maximum(turn - 1, 0))
            return hopper.load(states_ref.at[before, head, rows])

        state = lax.cond(turn == 0, lambda: hopper.load(initial_ref.at[chain, rows]), go_on)
        if run.exclusive:  # the previous block wrote this state and applied the reset
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
    """Returns the states of every frame and the state after the last frame, for one run.

    The sizes must be those that `gpu_hopper.takes` allows.

    Args:
      k, v, beta, decay: as in `gdn.reference.frame_transitions`.
      initial: (B, N, D, D).
      reset: (F,) float32, 1 where the incoming state is set to zero.
      keeps_maps: also return the maps.

    Returns:
      (B, F, N, D, D) and (B, N, D, D) float32. With `keeps_maps`, also w and u (B, F, N, D, D).
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
        grid=(frames, chains),  # the last axis runs fastest
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
