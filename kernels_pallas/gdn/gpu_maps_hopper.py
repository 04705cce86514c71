"""The maps of a frame and their gradient as Mosaic GPU kernels for Hopper; see `gpu_hopper`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.gdn import gpu_hopper as hopper

_F32, _B16 = jnp.float32, jnp.bfloat16
# registers per thread: of a warpgroup that multiplies, and of the one that loads tiles. The three
# warpgroups of a block have 512 together.
_MULTIPLY_REGISTERS, _BRING_REGISTERS = 240, 24


def by_head(beta: jax.Array) -> jax.Array:
    """Rearranges (B, F, P, N) to (B F, N, P'), where P' is padded to whole tiles.

    The copy engine copies whole tiles of a row, so the values past the end must exist.
    """
    tokens = beta.shape[2]
    found = jnp.swapaxes(hopper.flat(beta), 1, 2).astype(_F32)
    return jnp.pad(found, ((0, 0), (0, 0), (0, -tokens % hopper.ROWS)))


def token_memory(slots: int, size: int) -> tuple[Any, ...]:
    """Shared memory and barriers of a block of three warpgroups; see `bring_tokens`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return (
        hopper.tiles(slots, hopper.ROWS, size),
        hopper.plain_tiles(slots, hopper.ROWS, size),
        plgpu.SMEM((slots, hopper.ROWS), _F32),
        plgpu.Barrier(num_arrivals=3, num_barriers=slots),
        plgpu.Barrier(num_arrivals=2, num_barriers=slots),
    )


def bring_tokens(sources: Any, memory: Any, frame: Any, head: Any, steps: int) -> None:
    """The work of the third warpgroup: it loads keys, values and beta, tile by tile.

    Args:
      sources: keys and values, (B F, P, N, D) each, and beta (B F, N, P').
      memory: as in `token_memory`.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.set_max_registers(_BRING_REGISTERS, action="decrease")
    k_ref, v_ref, beta_ref = sources
    keys, values, betas, full, free = memory
    slots = keys.shape[0]

    def ask(i: Any) -> None:
        at, rows = hopper.ring(i, slots), hopper.rows(i)
        for source, to in ((k_ref, keys), (v_ref, values)):
            plgpu.copy_gmem_to_smem(source.at[frame, rows, head], to.at[at], full.at[at])
        plgpu.copy_gmem_to_smem(beta_ref.at[frame, head, rows], betas.at[at], full.at[at])

    for i in range(min(slots, steps)):
        ask(jnp.int32(i))

    def step(i: Any, _: None) -> None:
        plgpu.barrier_wait(free.at[hopper.ring(i, slots)])
        pl.when(i + slots < steps)(lambda: ask(i + slots))

    lax.fori_loop(0, steps, step, None)


def multiply_tokens(memory: Any, decay: Any, start: int, steps: int) -> tuple[jax.Array, jax.Array]:
    """The work of each of the other two warpgroups: ROWS rows of w and u, from row `start` on.

    The left operands are the transposes of beta k and beta v, scaled and split in registers. The
    right operand is the keys in shared memory.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")
    keys, values, betas, full, free = memory
    slots, _, size = keys.shape
    layout = plgpu.Layout.WGMMA
    columns = pl.ds(start, hopper.ROWS)

    def step(i: Any, sums: tuple[Any, ...]) -> tuple[Any, ...]:
        at = hopper.ring(i, slots)
        plgpu.barrier_wait(full.at[at])
        beta = hopper.load(betas.at[at], 0)

        def scaled(tiles: Any) -> jax.Array:
            turned = hopper.load(tiles.at[at].at[:, columns].transpose((1, 0))).astype(_F32)
            return turned * lax.broadcast_in_dim(beta, turned.shape, [1])

        k = scaled(keys).astype(_B16)  # W does not need the low part; see `gdn.gpu`
        high, low = hopper.split_of(scaled(values))
        # the smallest products come first
        sums = hopper.add_products(
            sums, lambda: ((j, a, keys.at[at]) for j, a in ((0, k), (1, low), (1, high)))
        )
        plgpu.commit_smem()  # from here on, the copy engine may write there
        plgpu.barrier_arrive(free.at[at])
        return sums

    zero = plgpu.layout_cast(jnp.zeros((hopper.ROWS, size), _F32), layout)
    outer, u = lax.fori_loop(0, steps, step, (zero, zero))
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, outer.shape, axis, layout=layout) for axis in (0, 1)
    )
    return decay * (jnp.where(row + start == column, 1.0, 0.0) - outer), u


def _maps_kernel(*refs: Any, steps: int, size: int) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    *sources, decay_ref, w_ref, u_ref = refs[:6]
    results, *memory = refs[6:]
    head, frame = lax.axis_index("head"), lax.axis_index("frame")

    def multiply(group: int, start: int) -> None:
        w, u = multiply_tokens(memory, decay_ref[frame, head], start, steps)
        # the first warpgroup writes the rows in the middle
        new = hopper.ROWS if group == 0 else size - hopper.ROWS
        own = pl.ds(hopper.ROWS - new, new)

        def write(ref: Any, matrix: jax.Array) -> None:
            hopper.store(results.at[group], matrix)
            plgpu.commit_smem()
            to = ref.at[frame, head, pl.ds(start + hopper.ROWS - new, new)]
            plgpu.copy_smem_to_gmem(results.at[group].at[own], to)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        if new:
            write(w_ref, w)
            write(u_ref, u)

    group = lax.axis_index("group")
    for i, start in enumerate(hopper.halves(size)):
        pl.when(group == i)(functools.partial(multiply, i, start))
    pl.when(group == 2)(lambda: bring_tokens(sources, memory, frame, head, steps))


def maps(
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    decay: jax.Array,
    *,
    slots: int = 5,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """As the kernel `maps` of `gdn.gpu`, for sizes that `gpu_hopper.takes` allows."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, frames, tokens, heads, size = k.shape
    matrix = jax.ShapeDtypeStruct((batch * frames, heads, size, size), _F32)
    kernel = hopper.over_heads(
        functools.partial(_maps_kernel, steps=pl.cdiv(tokens, hopper.ROWS), size=size),
        (matrix, matrix),
        (plgpu.SMEM((2, hopper.ROWS, size), _F32), *token_memory(slots, size)),
        k,
        groups=3,
        interpret=interpret,
    )
    w, u = kernel(hopper.flat(k), hopper.flat(v), by_head(beta), hopper.flat(decay))
    shape = (batch, frames, heads, size, size)
    return w.reshape(shape), u.reshape(shape)


def _maps_gradient_kernel(*refs: Any, has_values: bool, steps: int, slots: int, size: int) -> None:
    """As the kernel of `gdn.gpu`, with two warpgroups that take every second tile.

    It writes k . through_u and half of k . through_w for each token. The gradients of the scalars
    are computed from these.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    v_ref: Any = None
    dv_ref: Any = None
    values: Any = None
    if has_values:
        k_ref, v_ref, beta_ref, decay_ref, dw_ref, du_ref, dk_ref, dv_ref, *rest = refs
        through_u_ref, energy_ref, keys, values, betas, scalars, parts, full, ready = rest
    else:
        k_ref, beta_ref, decay_ref, dw_ref, du_ref, dk_ref, through_u_ref, energy_ref, *rest = refs
        keys, betas, scalars, parts, full, ready = rest
    layout = plgpu.Layout.WGMMA
    head, frame = lax.axis_index("head"), lax.axis_index("frame")
    group = lax.axis_index("group")
    keys, betas, scalars = (ref.at[group] for ref in (keys, betas, scalars))
    values = values.at[group] if has_values else None
    own_steps = lax.div(jnp.int32(steps + 1) - group, jnp.int32(2))

    def is_full(i: Any) -> Any:
        return full.at[group * slots + hopper.ring(i, slots)]

    def rows(i: Any) -> Any:
        return hopper.rows(2 * i + group)

    def ask(i: Any) -> None:
        at = hopper.ring(i, slots)
        for source, place in ((k_ref, keys), (v_ref, values)):
            if source is not None:
                plgpu.copy_gmem_to_smem(source.at[frame, rows(i), head], place.at[at], is_full(i))
        plgpu.copy_gmem_to_smem(beta_ref.at[frame, head, rows(i)], betas.at[at], is_full(i))

    for i in range(slots):
        pl.when(i < own_steps)(functools.partial(ask, jnp.int32(i)))

    def write(ref: Any, first: int) -> None:
        hopper.split(parts, ref.at[frame, head], hopper.halves(size), first=first)

    pl.when(group == 0)(lambda: write(dw_ref, 0))
    du: Any = None
    if has_values:
        pl.when(group == 1)(lambda: write(du_ref, 2 * size))
    else:
        du = hopper.load(du_ref.at[frame, head, 0], 0)
    plgpu.commit_smem()
    plgpu.barrier_arrive(ready)
    plgpu.barrier_wait(ready)
    decay = decay_ref[frame, head]
    high, low = (parts.at[pl.ds(j * size, size)] for j in range(2))
    from_w = [w for part in (low, high) for w in (part, part.transpose((1, 0)))]
    from_u = [parts.at[pl.ds(j * size, size)] for j in (3, 2)] if has_values else []

    def step(i: Any, carry: Any) -> Any:
        at = hopper.ring(i, slots)
        plgpu.barrier_wait(is_full(i))
        # the product with dw + dw^T
        through_w = hopper.products((hopper.ROWS, size), *((keys.at[at], w) for w in from_w))
        # the results of the previous step are stored, so their slot is free
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pl.when((i > 0) & (i + slots - 1 < own_steps))(lambda: ask(i + slots - 1))
        k = plgpu.layout_cast(keys[at], layout).astype(_F32)
        energy = 0.5 * jnp.sum(k * through_w, 1)
        beta = hopper.load(betas.at[at], 1)
        if values is not None:
            (dk,) = hopper.add_products(
                (-decay * through_w,), lambda: ((0, values.at[at], u) for u in from_u)
            )
        else:
            dk = lax.broadcast_in_dim(du, k.shape, [1]) - decay * through_w
        scalars[0] = jnp.sum(k * dk, 1) + 2.0 * decay * energy
        scalars[1] = energy
        if values is not None:
            turned = (u.transpose((1, 0)) for u in from_u)
            dv = hopper.products((hopper.ROWS, size), *((keys.at[at], u) for u in turned))
            values[at] = (dv * hopper.by_rows(beta, dv)).astype(_B16)
        keys[at] = (dk * hopper.by_rows(beta, dk)).astype(_B16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(keys.at[at], dk_ref.at[frame, rows(i), head])
        if values is not None:
            plgpu.copy_smem_to_gmem(values.at[at], dv_ref.at[frame, rows(i), head])
        plgpu.copy_smem_to_gmem(scalars.at[0], through_u_ref.at[frame, head, rows(i)])
        plgpu.copy_smem_to_gmem(scalars.at[1], energy_ref.at[frame, head, rows(i)])
        return carry

    lax.fori_loop(0, own_steps, step, None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def maps_gradient(
    k: jax.Array,
    v: jax.Array | None,
    beta: jax.Array,
    decay: jax.Array,
    dw: jax.Array,
    du: jax.Array,
    *,
    slots: int = 2,
    interpret: Any = None,
) -> tuple[jax.Array | None, ...]:
    """As the kernel `maps_gradient` of `gdn.gpu`, or as `rows_gradient` without v.

    The sizes must be those that `gpu_hopper.takes` allows.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, frames, tokens, heads, size = k.shape
    flat = batch * frames
    given = [k] if v is None else [k, v]
    token = jax.ShapeDtypeStruct((flat, tokens, heads, size), k.dtype)
    by_token = by_head(beta)
    scalar = jax.ShapeDtypeStruct(by_token.shape, _F32)
    kernel = hopper.over_heads(
        functools.partial(
            _maps_gradient_kernel,
            has_values=v is not None,
            steps=pl.cdiv(tokens, hopper.ROWS),
            slots=slots,
            size=size,
        ),
        (*[token] * len(given), scalar, scalar),
        (
            *[hopper.tiles(2, slots, hopper.ROWS, size)] * len(given),
            plgpu.SMEM((2, slots, hopper.ROWS), _F32),
            plgpu.SMEM((2, 2, hopper.ROWS), _F32),
            hopper.tiles(2 * size * len(given), size),
            plgpu.Barrier(num_arrivals=1 + len(given), num_barriers=2 * slots),
            plgpu.Barrier(num_arrivals=2),
        ),
        k,
        groups=2,
        interpret=interpret,
    )
    *found, through_u, energy = kernel(
        *(hopper.flat(a) for a in given),
        by_token,
        hopper.flat(decay),
        hopper.flat(dw),
        hopper.flat(du),
    )
    d_beta = (through_u - hopper.flat(decay)[..., None] * energy)[..., :tokens]
    d_beta = jnp.swapaxes(d_beta, 1, 2).reshape(beta.shape)
    lost = jnp.sum(by_token * energy, -1).reshape(decay.shape)
    d_decay = jnp.trace(dw, axis1=-2, axis2=-1) - lost
    dk, dv = [a.reshape(k.shape) for a in found] + [None] * (2 - len(found))
    return dk, dv, d_beta.astype(beta.dtype), d_decay
