"""The parallel parts of the frame recurrence as Triton kernels: frame maps and read-out.

A program works on one head of one frame and loops over tiles of its tokens. Keys, values and
queries are read once, in their own dtype, and D x D matrices stay on the chip. Tensor cores take
bfloat16. A float32 operand (a state, a map, beta k) is split into two bfloat16 parts; the error of
their products is 2^-17, while the rounding of the inputs is 2^-9. float32 inputs are multiplied in
float32.

Axis letters: B batch, F frames, P tokens per frame, N heads, D key size, V value size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


@dataclasses.dataclass(frozen=True)
class Tile:
    """Tokens that a program reads at once, its warps, and how many tiles it loads in advance."""

    tokens: int = 64
    warps: int = 8
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the kernels' programs; the defaults are the fastest on an H100.

    Attributes:
      maps, maps_gradient: tiles for the maps of the numerator.
      rows, rows_gradient: tiles for the maps of the normaliser, whose u is a row.
      read, read_gradient: tiles for the read-out.
      scan_rows, scan_warps: rows of the state that one program of the recurrence carries, and its
        warps.
      scan_exact: compute the products of the recurrence in float32, for tests; the Mosaic GPU
        kernel for Hopper does not do this.
      mosaic: kernels that read tokens and run in Mosaic GPU on Hopper; see `gdn.gpu_hopper`.
    """

    maps: Tile = Tile(stages=3)
    maps_gradient: Tile = Tile(tokens=32, warps=4, stages=3)
    rows: Tile = Tile(stages=3)
    rows_gradient: Tile = Tile()
    read: Tile = Tile()
    read_gradient: Tile = Tile()
    scan_rows: int = 32
    scan_warps: int = 8
    scan_exact: bool = False
    mosaic: tuple[str, ...] = (
        "states",
        "maps",
        "maps_gradient",
        "rows_gradient",
        "read",
        "read_gradient",
    )

    @classmethod
    def of(cls, tile: Tile, **others: Any) -> Tiles:
        """The same tile for every kernel that reads tokens."""
        fields = dataclasses.fields(cls)
        names = [field.name for field in fields if isinstance(field.default, Tile)]
        return cls(**{name: tile for name in names}, **others)


class Run(NamedTuple):
    """In which way one run of the recurrence goes over the frames; see `gdn.scan_states`."""

    reverse: bool
    exclusive: bool


def way_of(runs: tuple[Run, ...], index: Any, adjoint: bool) -> tuple[Any, jax.Array]:
    """Returns, for run number `index` of one or two: 1 if it runs backwards, and 1 if exclusive.

    Both are values inside the program and the second one is float32. The first one is a Python
    number if all runs agree.
    """

    def of_run(field: str) -> Any:
        first, *others = [int(getattr(run, field)) for run in runs]
        return index * (others[0] - first) + first if others else first

    backwards = of_run("reverse")
    return 1 - backwards if adjoint else backwards, jnp.float32(of_run("exclusive"))


def padded(size: int) -> int:
    """Returns the next power of two that the tensor cores take."""
    return max(16, pl.next_power_of_2(size))


def bfloat16_parts(a: jax.Array) -> list[jax.Array]:
    """Splits a float32 array into bfloat16 arrays whose sum has an error of 2^-17."""
    high = a.astype(jnp.bfloat16)
    return [high, (a - high.astype(jnp.float32)).astype(jnp.bfloat16)]


def product(
    a: jax.Array, b: jax.Array, axes: tuple[int, int], exact: bool, start: Any = 0.0
) -> jax.Array:
    """`start` plus the contraction of two matrices over one axis each, in float32.

    Args:
      exact: multiply in float32. Otherwise multiply in bfloat16, with float32 operands split into
        two parts.
      start: the sum to which products are added one by one, so that the tensor cores can add them.
    """
    dims = (((axes[0],), (axes[1],)), ((), ()))

    def dot(a: jax.Array, b: jax.Array, precision: Any = None) -> jax.Array:
        return lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)

    if exact:
        return start + dot(a.astype(jnp.float32), b.astype(jnp.float32), lax.Precision.HIGHEST)
    parts_a = bfloat16_parts(a) if a.dtype == jnp.float32 else [a]
    parts_b = bfloat16_parts(b) if b.dtype == jnp.float32 else [b]
    # The smallest products come first. Low times low is smaller than the rounding of the rest.
    pairs = [(i, j) for i in range(len(parts_a)) for j in range(len(parts_b)) if i + j < 2]
    for i, j in sorted(pairs, key=sum, reverse=True):
        start = start + dot(parts_a[i], parts_b[j])
    return start


class Head:
    """Tiles of the tokens and matrices of one program; refs are padded, and the padding reads 0."""

    def __init__(self, tokens: int, tile: int, exact: bool):
        self.tokens, self.tile, self.exact = tokens, tile, exact
        self.steps = pl.cdiv(tokens, tile)

    def rows(self, step: Any) -> tuple[Any, jax.Array]:
        return pl.ds(step * self.tile, self.tile), (
            step * self.tile + jnp.arange(self.tile) < self.tokens
        )

    def load(self, ref: Any, step: Any, size: int) -> jax.Array:
        """Loads (tile, padded size) tokens in their dtype."""
        at, real = self.rows(step)
        mask = real[:, None] & (jnp.arange(ref.shape[1]) < size)[None]
        return plgpu.load(ref.at[at, :], mask=mask, other=0.0)

    def store(self, ref: Any, step: Any, value: jax.Array, size: int) -> None:
        at, real = self.rows(step)
        mask = real[:, None] & (jnp.arange(ref.shape[1]) < size)[None]
        plgpu.store(ref.at[at, :], value.astype(ref.dtype), mask=mask)

    def load_scalars(self, ref: Any, step: Any) -> jax.Array:
        at, real = self.rows(step)
        return plgpu.load(ref.at[at], mask=real, other=0.0).astype(jnp.float32)

    def dot(self, a: jax.Array, b: jax.Array, axes: tuple[int, int], start: Any = 0.0) -> jax.Array:
        return product(a, b, axes, self.exact, start)


def matrix_mask(rows: int, columns: int, size: tuple[int, int]) -> jax.Array:
    """Returns (rows, columns) bool, true inside `size`."""
    inside = jnp.arange(rows)[:, None] < size[0]
    return inside & (jnp.arange(columns)[None, :] < size[1])


def load_matrix(ref: Any, size: tuple[int, int]) -> jax.Array:
    return plgpu.load(ref.at[:, :], mask=matrix_mask(ref.shape[0], ref.shape[1], size), other=0.0)


def store_matrix(ref: Any, value: jax.Array, size: tuple[int, int]) -> None:
    plgpu.store(ref.at[:, :], value, mask=matrix_mask(ref.shape[0], ref.shape[1], size))


def load_row(ref: Any, size: int) -> jax.Array:
    """Loads (D,), a state that is a vector."""
    return plgpu.load(ref.at[:], mask=jnp.arange(ref.shape[0]) < size, other=0.0)


def _maps_kernel(*refs: Any, head: Head, size: int) -> None:
    """Computes w and u of the numerator's maps (with v) or of the normaliser's (u is a vector)."""
    k_ref, *v_ref, beta_ref, decay_ref, w_ref, u_ref = refs
    wide = w_ref.shape[0]

    def step(i: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        outer, u = sums
        k = head.load(k_ref, i, size)
        k_beta = k.astype(jnp.float32) * head.load_scalars(beta_ref, i)[:, None]
        # k_beta is rounded like k here. W is near the identity, and hundreds of tokens average the
        # rounding errors out, so that the states change by 1e-5. In u the values have both signs,
        # and the errors do not average out.
        outer = head.dot(k, k_beta.astype(k.dtype), (0, 0), outer)
        if v_ref:
            return outer, head.dot(head.load(v_ref[0], i, size), k_beta, (0, 0), u)
        return outer, u + k_beta

    zero = jnp.zeros((wide, wide), jnp.float32)
    start = zero if v_ref else jnp.zeros((head.tile, wide), jnp.float32)
    outer, u = lax.fori_loop(0, head.steps, step, (zero, start))
    eye = (jnp.arange(wide)[:, None] == jnp.arange(wide)[None, :]).astype(jnp.float32)
    store_matrix(w_ref, decay_ref[...] * (eye - outer), (size, size))
    if v_ref:
        store_matrix(u_ref, u, (size, size))
    else:
        plgpu.store(u_ref.at[:], jnp.sum(u, 0), mask=jnp.arange(wide) < size)


def _maps_gradient_kernel(*refs: Any, head: Head, size: int) -> None:
    """Gradient of w = g (I - A) and u = V^T diag(beta) K, where A = K^T diag(beta) K."""
    has_values = len(refs) == 10
    if has_values:
        k_ref, v_ref, beta_ref, decay_ref, dw_ref, du_ref, dk_ref, dv_ref, db_ref, dg_ref = refs
        du = load_matrix(du_ref, (size, size))
    else:
        k_ref, beta_ref, decay_ref, dw_ref, du_ref, dk_ref, db_ref, dg_ref = refs
        v_ref = dv_ref = None
        du = load_row(du_ref, size)
    decay = decay_ref[...]
    dw = load_matrix(dw_ref, (size, size))
    both = dw + dw.T

    def step(i: Any, total: jax.Array) -> jax.Array:
        k = head.load(k_ref, i, size)
        k32, beta = k.astype(jnp.float32), head.load_scalars(beta_ref, i)
        through_w = head.dot(k, both, (1, 0))
        if v_ref is not None:
            through_u = head.dot(head.load(v_ref, i, size), du, (1, 0))
            dv = head.dot(k, du, (1, 1)) * beta[:, None]
            head.store(dv_ref, i, dv, size)
        else:
            through_u = jnp.broadcast_to(du[None, :], k32.shape)
        head.store(dk_ref, i, beta[:, None] * (through_u - decay * through_w), size)
        energy = 0.5 * jnp.sum(k32 * through_w, 1)  # k dw k^T
        at, real = head.rows(i)
        d_beta = jnp.sum(k32 * through_u, 1) - decay * energy
        plgpu.store(db_ref.at[at], d_beta, mask=real)
        return total + beta * energy

    energy = jnp.sum(lax.fori_loop(0, head.steps, step, jnp.zeros((head.tile,), jnp.float32)))
    wide = dw.shape[0]
    diagonal = jnp.arange(wide)[:, None] == jnp.arange(wide)[None, :]
    dg_ref[...] = jnp.sum(jnp.sum(jnp.where(diagonal, dw, 0.0), 1), 0) - energy


def _read_kernel(*refs: Any, head: Head, size: int, eps: float | None) -> None:
    """y = q S^T, divided by plain queries times the normaliser if there is one."""
    states_ref, q_ref, *normaliser, y_ref = refs
    states = load_matrix(states_ref, (size, size))
    z, eps = (load_row(normaliser[0], size) if normaliser else None), eps or 0.0

    def step(i: Any, carry: None) -> None:
        y = head.dot(head.load(q_ref, i, size), states, (1, 1))
        if z is not None:
            plain = head.load(normaliser[1], i, size).astype(jnp.float32)
            # one division per token; one per element would limit the kernel
            y = y * (1.0 / (jnp.sum(plain * z[None, :], 1) + eps))[:, None]
        head.store(y_ref, i, y, size)

    lax.fori_loop(0, head.steps, step, None)


def _read_gradient_kernel(*refs: Any, head: Head, size: int, eps: float | None) -> None:
    if eps is None:
        states_ref, q_ref, dy_ref, ds_ref, dq_ref = refs
        z_ref = plain_ref = dz_ref = dp_ref = z = None
    else:
        states_ref, q_ref, z_ref, plain_ref, dy_ref, ds_ref, dq_ref, dz_ref, dp_ref = refs
        z = load_row(z_ref, size)
    states = load_matrix(states_ref, (size, size))
    wide = states.shape[0]

    def step(i: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        ds, dz = sums
        q, dy = head.load(q_ref, i, size), head.load(dy_ref, i, size)
        if z is None:
            head.store(dq_ref, i, head.dot(dy, states, (1, 0)), size)
            return head.dot(dy, q, (0, 0), ds), dz
        plain = head.load(plain_ref, i, size).astype(jnp.float32)
        # the last rows of a tile may be past the end, where dy is 0
        inverse = 1.0 / (jnp.sum(plain * z[None, :], 1) + (eps or 0.0))
        d_numerator = dy.astype(jnp.float32) * inverse[:, None]
        dq = head.dot(d_numerator, states, (1, 0))
        head.store(dq_ref, i, dq, size)
        # sum_v dy_v y_v equals sum_d q_d dq_d, so the numerator is not needed again
        d_denominator = -jnp.sum(q.astype(jnp.float32) * dq, 1) * inverse
        head.store(dp_ref, i, d_denominator[:, None] * z[None, :], size)
        dz = dz + jnp.sum(d_denominator[:, None] * plain, 0)
        return head.dot(d_numerator, q, (0, 0), ds), dz

    start = (jnp.zeros((wide, wide), jnp.float32), jnp.zeros((wide,), jnp.float32))
    ds, dz = lax.fori_loop(0, head.steps, step, start)
    store_matrix(ds_ref, ds, (size, size))
    if dz_ref is not None:
        plgpu.store(dz_ref.at[:], dz, mask=jnp.arange(wide) < size)


def _spec(a: Any, kind: str, tile: int) -> pl.BlockSpec:
    """Block of one program: tokens (B, F, P, N, D), scalars (B, F, P, N), matrix, row or number."""
    wide = padded(a.shape[-1])
    if kind == "tokens":
        long = pl.cdiv(a.shape[2], tile) * tile
        return pl.BlockSpec((None, None, long, None, wide), lambda n, f, b: (b, f, 0, n, 0))
    if kind == "scalars":
        long = pl.cdiv(a.shape[2], tile) * tile
        return pl.BlockSpec((None, None, long, None), lambda n, f, b: (b, f, 0, n))
    if kind == "matrix":
        return pl.BlockSpec((None, None, None, wide, wide), lambda n, f, b: (b, f, n, 0, 0))
    if kind == "row":  # (B, F, N, 1, D)
        return pl.BlockSpec((None, None, None, None, wide), lambda n, f, b: (b, f, n, 0, 0))
    return pl.BlockSpec((None, None, None), lambda n, f, b: (b, f, n))


def run(
    kernel: str,
    inputs: list[tuple[str, jax.Array]],
    outputs: list[tuple[str, jax.ShapeDtypeStruct]],
    tiles: Tiles,
    *,
    interpret: bool,
    **static: Any,
) -> list[jax.Array]:
    """Runs a kernel over (B, F, N) programs.

    Args:
      kernel: the name of a field of `Tiles` that is a `Tile`.
      inputs: pairs of a kind of `_spec` and an array; the first array of tokens gives the sizes.
      outputs: pairs of a kind and a shape.
      static: further arguments of the kernel.
    """
    tile: Tile = getattr(tiles, kernel)
    body = {
        "maps": _maps_kernel,
        "maps_gradient": _maps_gradient_kernel,
        "rows": _maps_kernel,
        "rows_gradient": _maps_gradient_kernel,
        "read": _read_kernel,
        "read_gradient": _read_gradient_kernel,
    }[kernel]
    batch, frames, tokens, heads, size = next(a.shape for kind, a in inputs if kind == "tokens")
    exact = any(kind == "tokens" and a.dtype == jnp.float32 for kind, a in inputs)
    return pl.pallas_call(
        functools.partial(body, head=Head(tokens, tile.tokens, exact), size=size, **static),
        # heads run fastest, because they share the cache lines of a token's row
        grid=(heads, frames, batch),
        in_specs=[_spec(a, kind, tile.tokens) for kind, a in inputs],
        out_specs=[_spec(a, kind, tile.tokens) for kind, a in outputs],
        out_shape=[a for _, a in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"gdn_{kernel}",
    )(*(a for _, a in inputs))
