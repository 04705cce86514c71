"""The frame recurrence; `kernels_pallas.choice` chooses the implementation.

Shapes and meanings are those of the functions with the same names in `gdn.reference`. Tokens have
the compute dtype. Maps and states are float32 in every implementation. On a GPU, the Pallas kernels
that read tokens take bfloat16, and float32 tokens always go through XLA.
Axis letters: those of `gdn.reference`; G runs of the recurrence at the same time (forward and
backward).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas import choice
from kernels_pallas.gdn import (
    gpu,
    gpu_hopper,
    gpu_maps_hopper,
    gpu_read_hopper,
    gpu_scan,
    gpu_states_hopper,
    reference,
)
from kernels_pallas.gdn.gpu import Run, Tiles
from kernels_pallas.gdn.reference import Transition

_F32 = jnp.float32
_BOTH = (Run(reverse=False, exclusive=False), Run(reverse=True, exclusive=True))
_Scan = tuple[Tiles, bool, tuple[Run, ...], bool]  # interpret; whether the states are summed


def _is_hopper(kernel: str, tiles: Tiles, interpret: bool, tokens: jax.Array) -> bool:
    """Whether a kernel that reads tokens (B, F, P, N, D) runs in its Mosaic GPU form for Hopper."""
    if interpret or kernel not in tiles.mosaic or tokens.dtype != jnp.bfloat16:
        return False
    is_fit = gpu_hopper.takes(tokens.shape[2], tokens.shape[-1])
    return is_fit and choice.capability() == choice.HOPPER


def _is_pallas(impl: str | None, dtype: Any = None) -> bool:
    return choice.is_pallas("gdn", impl, dtype)


def frame_transitions(
    k: Float[Array, "B F P N D"],
    v: Float[Array, "B F P N V"],
    beta: Float[Array, "B F P N"],
    decay: Float[Array, "B F N"],
    *,
    impl: str | None = None,
    tiles: Tiles | None = None,
) -> Transition:
    """See `reference.frame_transitions`; k and v have the same dtype."""
    if not _is_pallas(impl, k.dtype):
        return reference.frame_transitions(k, v, beta, decay)
    maps: Any = _maps(tiles or Tiles(), choice.interpret(), k, v, beta, decay)
    return Transition(*maps)


def normaliser_transitions(
    k: Float[Array, "B F P N D"],
    beta: Float[Array, "B F P N"],
    decay: Float[Array, "B F N"],
    *,
    impl: str | None = None,
    tiles: Tiles | None = None,
) -> Transition:
    """See `reference.normaliser_transitions`."""
    if not _is_pallas(impl, k.dtype):
        return reference.normaliser_transitions(k, beta, decay)
    maps: Any = _maps(tiles or Tiles(), choice.interpret(), k, None, beta, decay)
    return Transition(*maps)


def scan_states(
    transition: Transition,
    initial: Float[Array, "B N V D"] | None = None,
    *,
    reverse: bool = False,
    exclusive: bool = False,
    reset: Bool[Array, "F"] | None = None,
    axis_name: str | None = None,
    impl: str | None = None,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "B F N V D"], Float[Array, "B N V D"]]:
    """See `reference.scan_states`."""
    if not _is_pallas(impl):
        return reference.scan_states(
            transition,
            initial,
            reverse=reverse,
            exclusive=exclusive,
            reset=reset,
            axis_name=axis_name,
        )
    return _run_maps(transition, initial, [reset], (Run(reverse, exclusive),), tiles, axis_name)


def bidirectional_states(
    transition: Transition,
    initial: Float[Array, "B N V D"] | None = None,
    *,
    chunk_ends: Bool[Array, "F"] | None = None,
    axis_name: str | None = None,
    impl: str | None = None,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "B F N V D"], Float[Array, "B N V D"]]:
    """See `reference.bidirectional_states`; Pallas runs both directions at the same time."""
    if not _is_pallas(impl):
        return reference.bidirectional_states(
            transition, initial, chunk_ends=chunk_ends, axis_name=axis_name
        )
    return _run_maps(transition, initial, [None, chunk_ends], _BOTH, tiles, axis_name)


def token_states(
    k: Float[Array, "B F P N D"],
    v: Float[Array, "B F P N V"],
    beta: Float[Array, "B F P N"],
    decay: Float[Array, "B F N"],
    initial: Float[Array, "B N V D"] | None = None,
    *,
    reverse: bool = False,
    exclusive: bool = False,
    reset: Bool[Array, "F"] | None = None,
    axis_name: str | None = None,
    impl: str | None = None,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "B F N V D"], Float[Array, "B N V D"]]:
    """`scan_states` of `frame_transitions`; one fused kernel on Hopper, with its maps on chip."""
    if _is_fused(impl, axis_name, tiles, k):
        runs = (Run(reverse, exclusive),)
        return _run_tokens((k, v, beta, decay), initial, [reset], runs, tiles)
    maps = frame_transitions(k, v, beta, decay, impl=impl, tiles=tiles)
    return scan_states(
        maps, initial, reverse=reverse, exclusive=exclusive, reset=reset, axis_name=axis_name,
        impl=impl, tiles=tiles,
    )  # fmt: skip


def bidirectional_token_states(
    k: Float[Array, "B F P N D"],
    v: Float[Array, "B F P N V"],
    beta: Float[Array, "B F P N"],
    decay: Float[Array, "B F N"],
    initial: Float[Array, "B N V D"] | None = None,
    *,
    chunk_ends: Bool[Array, "F"] | None = None,
    axis_name: str | None = None,
    impl: str | None = None,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "B F N V D"], Float[Array, "B N V D"]]:
    """`bidirectional_states` of `frame_transitions`; on Hopper the forward run also makes maps."""
    is_wide = k.shape[0] * k.shape[3] >= gpu_states_hopper.CHAINS
    if is_wide and _is_fused(impl, axis_name, tiles, k):
        return _run_tokens((k, v, beta, decay), initial, [None, chunk_ends], _BOTH, tiles)
    maps = frame_transitions(k, v, beta, decay, impl=impl, tiles=tiles)
    return bidirectional_states(
        maps, initial, chunk_ends=chunk_ends, axis_name=axis_name, impl=impl, tiles=tiles
    )


def _is_fused(impl: str | None, axis_name: str | None, tiles: Tiles | None, k: jax.Array) -> bool:
    # ranks scan their maps twice, so these have to be in memory
    is_pallas = axis_name is None and _is_pallas(impl, k.dtype)
    return is_pallas and _is_hopper("states", tiles or Tiles(), choice.interpret(), k)


def _run_maps(
    transition: Transition,
    initial: jax.Array | None,
    resets: list[jax.Array | None],
    runs: tuple[Run, ...],
    tiles: Tiles | None,
    axis_name: str | None,
) -> tuple[jax.Array, jax.Array]:
    drop = _flags(resets, transition.u.shape[1])

    def scan(maps: Transition, starts: jax.Array, is_summed: bool = False) -> Any:
        static = (tiles or Tiles(), choice.interpret(), runs, is_summed)
        return _scan(static, *maps, starts, drop)

    if axis_name is not None:
        is_reverse = [run.reverse for run in runs]
        return reference.scan_over_ranks(scan, transition, initial, axis_name, is_reverse)
    start = jnp.zeros_like(transition.u[:, 0]) if initial is None else initial
    states, finals = scan(transition, _first_of(len(runs), start), is_summed=True)
    return states, finals[0]


def _run_tokens(
    tokens: tuple[jax.Array, ...],
    initial: jax.Array | None,
    resets: list[jax.Array | None],
    runs: tuple[Run, ...],
    tiles: Tiles | None,
) -> tuple[jax.Array, jax.Array]:
    batch, frames, _, heads, size = tokens[0].shape
    start = jnp.zeros((batch, heads, size, size), _F32) if initial is None else initial
    return _fused((tiles or Tiles(), False, runs), *tokens, start, _flags(resets, frames))


def _flags(resets: list[jax.Array | None], frames: int) -> jax.Array:
    """(G, F) float32: 1 where a run sets the incoming state to zero."""
    never = jnp.zeros((frames,), _F32)
    return jnp.stack([never if reset is None else reset.astype(_F32) for reset in resets])


def read_out(
    states: Float[Array, "B F N V D"],
    q: Float[Array, "B F P N D"],
    *,
    impl: str | None = None,
    tiles: Tiles | None = None,
) -> Float[Array, "B F P N V"]:
    """See `reference.read_out`; the result has q's dtype with Pallas and is float32 otherwise."""
    if not _is_pallas(impl, q.dtype):
        return reference.read_out(states, q)
    return _read((tiles or Tiles(), choice.interpret(), None), states, q, None, None)


def normalised_read_out(
    states: Float[Array, "B F N V D"],
    normaliser: Float[Array, "B F N 1 D"],
    q: Float[Array, "B F P N D"],
    plain_q: Float[Array, "B F P N D"],
    eps: float,
    *,
    impl: str | None = None,
    tiles: Tiles | None = None,
) -> Float[Array, "B F P N V"]:
    """See `reference.normalised_read_out`; in q's dtype with Pallas, otherwise float32."""
    if not _is_pallas(impl, q.dtype):
        return reference.normalised_read_out(states, normaliser, q, plain_q, eps)
    return _read((tiles or Tiles(), choice.interpret(), eps), states, q, normaliser, plain_q)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _maps(
    tiles: Tiles,
    interpret: bool,
    k: jax.Array,
    v: jax.Array | None,
    beta: jax.Array,
    decay: jax.Array,
) -> Sequence[jax.Array]:
    if v is not None and _is_hopper("maps", tiles, interpret, k):
        return list(gpu_maps_hopper.maps(k, v, beta, decay))
    batch, frames, _, heads, size = k.shape
    tokens = [("tokens", k)] if v is None else [("tokens", k), ("tokens", v)]
    matrix = ("matrix", jax.ShapeDtypeStruct((batch, frames, heads, size, size), _F32))
    row = ("row", jax.ShapeDtypeStruct((batch, frames, heads, 1, size), _F32))
    inputs = [*tokens, ("scalars", beta), ("number", decay)]
    outputs = [matrix, row if v is None else matrix]
    return gpu.run("rows" if v is None else "maps", inputs, outputs, tiles, interpret=interpret)


def _maps_forward(tiles: Tiles, interpret: bool, *args: Any) -> tuple[Sequence[jax.Array], Any]:
    return _maps(tiles, interpret, *args), args


def _maps_backward(tiles: Tiles, interpret: bool, saved: Any, gradients: Any) -> tuple[Any, ...]:
    k, v, beta, decay = saved
    dw, du = gradients
    if _is_hopper("rows_gradient" if v is None else "maps_gradient", tiles, interpret, k):
        return gpu_maps_hopper.maps_gradient(k, v, beta, decay, dw, du)
    like = [("tokens", k)] if v is None else [("tokens", k), ("tokens", v)]
    inputs = [*like, ("scalars", beta), ("number", decay)]
    inputs += [("matrix", dw), ("row" if v is None else "matrix", du)]
    outputs = [
        (kind, jax.ShapeDtypeStruct(a.shape, a.dtype))
        for kind, a in [*like, ("scalars", beta), ("number", decay)]
    ]
    kernel = "rows_gradient" if v is None else "maps_gradient"
    found = gpu.run(kernel, inputs, outputs, tiles, interpret=interpret)
    return (found[0], None, *found[1:]) if v is None else tuple(found)


_maps.defvjp(_maps_forward, _maps_backward)


def _first_of(count: int, a: jax.Array) -> jax.Array:
    """Stacks `a` for the first of `count` runs and zeros for the others."""
    return jnp.stack([a, *[jnp.zeros_like(a)] * (count - 1)])


def _scan_kernel(
    static: _Scan, w: jax.Array, u: jax.Array, starts: jax.Array, drop: jax.Array, *, adjoint: bool
) -> tuple[jax.Array, jax.Array]:
    tiles, interpret, runs, _ = static
    return gpu_scan.scan(w, u, starts, drop, runs, tiles, adjoint=adjoint, interpret=interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(static: _Scan, *args: jax.Array) -> Any:
    """The states (G, B, F, N, V, D) of G runs, or their sum, and the state after each run.

    `args` are w, u, the states before each run (G, B, N, V, D), and the flags of `_flags`.
    """
    return _scan_forward(static, *args)[0]


def _scan_forward(static: _Scan, *args: Any) -> tuple[Any, Any]:
    w, u, starts, drop = args
    states, finals = _scan_kernel(static, w, u[None], starts, drop, adjoint=False)
    told = _sum(states) if static[-1] else states
    return (told, finals), (w, starts, drop, states)


def _sum(states: Any) -> jax.Array:
    first, *others = states
    return functools.reduce(jnp.add, others, first)


def _scan_backward(static: _Scan, saved: Any, gradients: Any) -> tuple[Any, ...]:
    runs, is_summed = static[2:]
    w, starts, drop, states = saved
    d_states, d_finals = gradients
    # the gradient of the sum is the gradient of the states of every run
    d_states = d_states[None] if is_summed else d_states
    du, d_starts = _scan_kernel(static, w, d_states, d_finals, drop, adjoint=True)
    dw = jnp.zeros_like(w)
    for i, run in enumerate(runs):
        before = states[i]
        if not run.exclusive:  # a frame starts from the returned state of the previous frame
            parts = [starts[i, :, None], before[:, :-1]]
            if run.reverse:
                parts = [before[:, 1:], starts[i, :, None]]
            before = (1.0 - drop[i])[:, None, None, None] * jnp.concatenate(parts, 1)
        dw += reference.einsum("bfnvd,bfnve->bfnde", before, du[i])
    return dw, jnp.sum(du, 0), d_starts, jnp.zeros_like(drop)


_scan.defvjp(_scan_forward, _scan_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(static: tuple[Tiles, bool, tuple[Run, ...]], *args: jax.Array) -> Any:
    """As `_scan`, with the arguments k, v, beta, decay, initial, drop."""
    states, final, _ = _run_fused(static, args, keeps_maps=False)
    return _sum(states), final


def _run_fused(static: Any, args: Any, *, keeps_maps: bool) -> tuple[list[jax.Array], Any, Any]:
    """The states of every run, the final state of the first run, and the maps."""
    tiles, interpret, (run, *others) = static
    k, v, beta, decay, initial, drop = args
    states, final, *maps = gpu_states_hopper.states(
        k, v, beta, decay, initial, drop[0], run, keeps_maps=keeps_maps or bool(others)
    )
    found = [states]
    if others:
        rest = (tiles, interpret, tuple(others), False)
        w, u = maps
        starts = jnp.zeros((len(others), *initial.shape), _F32)
        found.extend(_scan_kernel(rest, w, u[None], starts, drop[1:], adjoint=False)[0])
    return found, final, maps


def _fused_forward(static: Any, *args: Any) -> tuple[Any, Any]:
    states, final, maps = _run_fused(static, args, keeps_maps=True)
    *tokens, initial, drop = args
    starts = _first_of(len(static[-1]), initial)
    return (_sum(states), final), (tokens, (maps[0], starts, drop, states))


def _fused_backward(static: Any, saved: Any, gradients: Any) -> tuple[Any, ...]:
    tiles, interpret, runs = static
    tokens, of_scan = saved
    d_states, d_final = gradients
    gradients = d_states, _first_of(len(runs), d_final)
    dw, du, d_starts, d_drop = _scan_backward((*static, True), of_scan, gradients)
    return (*_maps_backward(tiles, interpret, tokens, (dw, du)), d_starts[0], d_drop)


_fused.defvjp(_fused_forward, _fused_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(
    static: tuple[Tiles, bool, float | None],
    states: jax.Array,
    q: jax.Array,
    normaliser: jax.Array | None,
    plain_q: jax.Array | None,
) -> jax.Array:
    tiles, interpret, eps = static
    if _is_hopper("read", tiles, interpret, q):
        return gpu_read_hopper.read(states, q, normaliser, plain_q, eps)
    inputs = [("matrix", states), ("tokens", q)]
    if normaliser is not None and plain_q is not None:
        inputs += [("row", normaliser), ("tokens", plain_q)]
    outputs = [("tokens", jax.ShapeDtypeStruct(q.shape, q.dtype))]
    return gpu.run("read", inputs, outputs, tiles, interpret=interpret, eps=eps)[0]


def _read_forward(static: Any, *args: Any) -> tuple[jax.Array, Any]:
    return _read(static, *args), args


def _read_backward(static: Any, saved: Any, dy: jax.Array) -> tuple[Any, ...]:
    tiles, interpret, eps = static
    states, q, normaliser, plain_q = saved
    if _is_hopper("read_gradient", tiles, interpret, q):
        found = gpu_read_hopper.read_gradient(states, q, normaliser, plain_q, dy, eps)
        return (*found, None, None) if eps is None else found
    kinds = ("matrix", "tokens", "row", "tokens")
    given = [(kind, a) for kind, a in zip(kinds, saved, strict=True) if a is not None]
    outputs = [(kind, jax.ShapeDtypeStruct(a.shape, a.dtype)) for kind, a in given]
    inputs = [*given, ("tokens", dy)]
    found = gpu.run("read_gradient", inputs, outputs, tiles, interpret=interpret, eps=eps)
    return (*found, None, None) if eps is None else tuple(found)


_read.defvjp(_read_forward, _read_backward)
