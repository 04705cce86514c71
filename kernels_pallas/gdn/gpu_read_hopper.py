"""The read-out and its gradient as Mosaic GPU kernels for Hopper; see `gpu_hopper`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.gdn import gpu_hopper as hopper

_F32, _B16 = jnp.float32, jnp.bfloat16


def _read_kernel(*refs: Any, steps: int, slots: int, size: int, eps: float | None) -> None:
    """y = q S^T, divided by plain queries times the normaliser if there is one."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    z_ref: Any = None
    plain_ref: Any = None
    plain_tiles: Any = None
    if eps is None:
        states_ref, q_ref, y_ref, tiles, *rest = refs
    else:
        states_ref, q_ref, z_ref, plain_ref, y_ref, tiles, plain_tiles, *rest = refs
    (parts, state), state_full, full = rest
    head, frame = lax.axis_index("head"), lax.axis_index("frame")

    def ask(i: Any) -> None:
        at, rows = hopper.ring(i, slots), hopper.rows(i)
        plgpu.copy_gmem_to_smem(q_ref.at[frame, rows, head], tiles.at[at], full.at[at])
        if plain_tiles is not None:
            source = plain_ref.at[frame, rows, head]
            plgpu.copy_gmem_to_smem(source, plain_tiles.at[at], full.at[at])

    plgpu.copy_gmem_to_smem(states_ref.at[frame, head], state, state_full)
    for i in range(min(slots - 1, steps)):
        ask(jnp.int32(i))
    plgpu.barrier_wait(state_full)
    hopper.split_in_place(parts, state)
    plgpu.commit_smem()
    high, low = (parts.at[pl.ds(j * size, size)].transpose((1, 0)) for j in range(2))
    z: Any = None
    if z_ref is not None:
        z = hopper.load(z_ref.at[frame, head, 0], 0)

    def step(i: Any, carry: Any) -> Any:
        at = hopper.ring(i, slots)
        plgpu.barrier_wait(full.at[at])
        q = hopper.load(tiles.at[at])
        # the smallest products come first
        y = hopper.products((hopper.ROWS, size), (q, low), (q, high))
        if plain_tiles is not None:
            plain = hopper.load(plain_tiles.at[at]).astype(_F32)
            weighted = plain * lax.broadcast_in_dim(z, plain.shape, [1])
            y = y * hopper.by_rows(1.0 / (jnp.sum(weighted, 1) + (eps or 0.0)), y)
        hopper.store(tiles.at[at], y.astype(_B16))
        plgpu.commit_smem()
        rows = hopper.rows(i)
        plgpu.copy_smem_to_gmem(tiles.at[at], y_ref.at[frame, rows, head])
        # the previous tile is stored, so its slot is free
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        pl.when(i + slots - 1 < steps)(lambda: ask(i + slots - 1))
        return carry

    lax.fori_loop(0, steps, step, None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def read(
    states: jax.Array,
    q: jax.Array,
    normaliser: jax.Array | None,
    plain_q: jax.Array | None,
    eps: float | None,
    *,
    slots: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """As the kernel `read` of `gdn.gpu`, for sizes that `gpu_hopper.takes` allows."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, frames, tokens, heads, size = q.shape
    slots = slots or (5 if eps is None else 3)
    extra = [hopper.flat(a) for a in (normaliser, plain_q) if a is not None]
    kernel = hopper.over_heads(
        functools.partial(
            _read_kernel, steps=pl.cdiv(tokens, hopper.ROWS), slots=slots, size=size, eps=eps
        ),
        jax.ShapeDtypeStruct((batch * frames, tokens, heads, size), q.dtype),
        (
            *[hopper.plain_tiles(slots, hopper.ROWS, size)] * (1 if eps is None else 2),
            plgpu.RefUnion(hopper.tiles(2 * size, size), plgpu.SMEM((size, size), _F32)),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=1 if eps is None else 2, num_barriers=slots),
        ),
        q,
        groups=1,
        interpret=interpret,
    )
    return kernel(hopper.flat(states), hopper.flat(q), *extra).reshape(q.shape)


def _read_gradient_kernel(
    *refs: Any, own_group: int, steps: int, slots: int, size: int, eps: float | None
) -> None:
    """As the kernel of `gdn.gpu`, with two warpgroups.

    Each takes 64 tokens of a step, and 64 rows of the gradient of the state.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    z_ref: Any = None
    dz_ref: Any = None
    dp_ref: Any = None
    plains: Any = None
    if eps is None:
        states_ref, q_ref, dy_ref, ds_ref, dq_ref, *scratch = refs
        queries, grads, parts, full, ready, done = scratch
        sources = ((q_ref, queries), (dy_ref, grads))
    else:
        states_ref, q_ref, z_ref, plain_ref, dy_ref, ds_ref, dq_ref, dz_ref, dp_ref, *scratch = refs
        queries, grads, plains, parts, full, ready, done = scratch
        sources = ((q_ref, queries), (dy_ref, grads), (plain_ref, plains))
    head, frame = lax.axis_index("head"), lax.axis_index("frame")
    group = lax.axis_index("group")
    start = hopper.halves(size)[own_group]  # first row of this warpgroup
    layout = plgpu.Layout.WGMMA

    def rows(i: Any) -> Any:
        return hopper.rows(2 * i + group)

    def ask(i: Any) -> None:
        at = hopper.ring(i, slots)
        for source, place in sources:
            tile = place.at[at, group]
            plgpu.copy_gmem_to_smem(source.at[frame, rows(i), head], tile, full.at[at])

    def read(tiles: Any, at: Any) -> jax.Array:
        return plgpu.layout_cast(tiles[at, group], layout).astype(_F32)

    def meet(barrier: Any) -> None:
        """Waits until both warpgroups arrive; each then sees what the other wrote."""
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)

    for i in range(min(slots, steps)):
        ask(jnp.int32(i))
    hopper.split(parts, states_ref.at[frame, head], [start])
    plgpu.commit_smem()
    meet(ready)
    high, low = (parts.at[pl.ds(j * size, size)] for j in range(2))
    z: Any = None
    if z_ref is not None:
        z = hopper.load(z_ref.at[frame, head, 0], 0)

    def step(i: Any, sums: tuple[Any, ...]) -> tuple[Any, ...]:
        ds, *dz = sums
        at = hopper.ring(i, slots)
        plgpu.barrier_wait(full.at[at])
        dy = grads.at[at, group]
        dq = hopper.products((hopper.ROWS, size), (dy, low), (dy, high))
        # the results of the previous step are stored, so their slot is free
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pl.when((i > 0) & (i + slots - 1 < steps))(lambda: ask(i + slots - 1))
        d_denominator: Any = None
        if plains is not None:
            wide_z = lax.broadcast_in_dim(z, dq.shape, [1])
            inverse = 1.0 / (jnp.sum(read(plains, at) * wide_z, 1) + (eps or 0.0))
            dq = dq * hopper.by_rows(inverse, dq)
            d_denominator = -jnp.sum(read(queries, at) * dq, 1) * inverse
            dq, d_denominator = lax.optimization_barrier((dq.astype(_B16), d_denominator))
            dz = [dz[0] + hopper.by_rows(d_denominator, dq) * read(plains, at)]
            (dz[0],) = lax.optimization_barrier((dz[0],))
            q = read(queries, at)
            # The divided queries overwrite the queries, and their low parts the plain queries.
            divided = hopper.split_of(q * hopper.by_rows(inverse, q))
            queries[at, group], plains[at, group] = divided
            plgpu.commit_smem()
            meet(ready)

        def terms() -> Any:
            for operand in (queries,) if plains is None else (plains, queries):
                for j in range(2):
                    own_rows = grads.at[at, j].at[:, pl.ds(start, hopper.ROWS)].transpose((1, 0))
                    yield 0, own_rows, operand.at[at, j]

        (ds,) = hopper.add_products((ds,), terms)
        meet(done)
        queries[at, group] = dq.astype(_B16)
        if plains is not None:
            dp = hopper.by_rows(d_denominator, ds) * lax.broadcast_in_dim(z, ds.shape, [1])
            plains[at, group] = dp.astype(_B16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(queries.at[at, group], dq_ref.at[frame, rows(i), head])
        if plains is not None:
            plgpu.copy_smem_to_gmem(plains.at[at, group], dp_ref.at[frame, rows(i), head])
        return ds, *dz

    zero = plgpu.layout_cast(jnp.zeros((hopper.ROWS, size), _F32), layout)
    ds, *dz = lax.fori_loop(0, steps, step, (zero,) * (1 if eps is None else 2))
    ds_ref[frame, head, pl.ds(start, hopper.ROWS), :] = ds
    if dz_ref is not None:
        # one warpgroup after the other, because sums over warps share their scratch memory
        if own_group == 1:
            meet(ready)
        hopper.store(dz_ref.at[frame, head, group], jnp.sum(dz[0], 0))
        if own_group == 0:
            meet(ready)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def read_gradient(
    states: jax.Array,
    q: jax.Array,
    normaliser: jax.Array | None,
    plain_q: jax.Array | None,
    dy: jax.Array,
    eps: float | None,
    *,
    slots: int = 2,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """As the kernel `read_gradient` of `gdn.gpu`, for sizes that `gpu_hopper.takes` allows."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, frames, tokens, heads, size = q.shape
    flat = batch * frames
    token = jax.ShapeDtypeStruct((flat, tokens, heads, size), q.dtype)
    matrix = jax.ShapeDtypeStruct((flat, heads, size, size), _F32)
    rows = jax.ShapeDtypeStruct((flat, heads, 2, size), _F32)
    given = [hopper.flat(a) for a in (normaliser, plain_q) if a is not None]
    run = functools.partial(
        _read_gradient_kernel,
        steps=pl.cdiv(tokens, 2 * hopper.ROWS),
        slots=slots,
        size=size,
        eps=eps,
    )

    def kernel(*refs: Any) -> None:
        group = lax.axis_index("group")
        for i in range(2):
            pl.when(group == i)(functools.partial(run, *refs, own_group=i))

    found = hopper.over_heads(
        kernel,
        (matrix, token) if eps is None else (matrix, token, rows, token),
        (
            *[hopper.tiles(slots, 2, hopper.ROWS, size)] * (2 if eps is None else 3),
            hopper.tiles(2 * size, size),
            plgpu.Barrier(num_arrivals=4 if eps is None else 6, num_barriers=slots),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
        ),
        q,
        groups=2,
        interpret=interpret,
    )(hopper.flat(states), hopper.flat(q), *given, hopper.flat(dy))
    found = [found[0].reshape(states.shape), found[1].reshape(q.shape), *found[2:]]
    if normaliser is not None:
        found[2] = jnp.sum(found[2], 2).reshape(normaliser.shape)
        found[3] = found[3].reshape(q.shape)
    return tuple(found)
