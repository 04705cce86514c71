"""The frame recurrence of SANA-WM. This is its only definition.

A frame updates a D x D state with an affine map, S_f = S_{f-1} W_f + U_f, where

    W_f = g_f (I - K_f^T diag(beta_f) K_f)        U_f = V_f^T diag(beta_f) K_f

All P tokens of a frame enter at once, and g is the decay of the frame. The state of the normaliser
is a vector, s_f = W_f s_{f-1} + u_f with u_f = K_f^T beta_f. The computation of the maps and the
read-out of the states are parallel over frames; only `scan_states` is sequential. Chunk-causal
runs, streaming with a carried state, and context parallelism are all ways to call `scan_states` on
the same maps. Context parallelism needs no second pass over the frames, because the maps of one
rank compose to one map.

Axis letters: B batch, F latent frames, P tokens per frame, N heads, D key size, V value size.
Everything is float32 at the highest matmul precision. The recurrence amplifies rounding errors, and
the default precision (TF32 on a GPU, bfloat16 on a TPU) is not enough.
Reference: diffusers `torch_chunk_sana_gdn`, `torch_chunk_cam_single_path_delta_rule`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

einsum = functools.partial(
    jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


class Transition(NamedTuple):
    """One affine map per frame: `state @ w + u`."""

    w: jax.Array  # B F N D D, symmetric
    u: jax.Array  # B F N V D; V is the value size, 1 for the normaliser


def frame_transitions(k: jax.Array, v: jax.Array, beta: jax.Array, decay: jax.Array) -> Transition:
    """The maps of the numerator.

    Args:
      k: keys (B, F, P, N, D), already scaled by D^-1/2 P^-1/2.
      v: values (B, F, P, N, D).
      beta: write strength of each token, (B, F, P, N) in [0, 1].
      decay: g of each frame, (B, F, N) in (0, 1].
    """
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    k_beta = k * beta[..., None]
    return Transition(_decayed(k_beta, k, decay), einsum("bfpnv,bfpnd->bfnvd", v, k_beta))


def normaliser_transitions(k: jax.Array, beta: jax.Array, decay: jax.Array) -> Transition:
    """The maps of the denominator, whose state is a row; arguments as in `frame_transitions`."""
    k = k.astype(jnp.float32)
    k_beta = k * beta[..., None]
    return Transition(_decayed(k_beta, k, decay), jnp.sum(k_beta, axis=2)[..., None, :])


def _decayed(k_beta: jax.Array, k: jax.Array, decay: jax.Array) -> jax.Array:
    outer = einsum("bfpnd,bfpne->bfnde", k_beta, k)
    return decay[..., None, None] * (jnp.eye(k.shape[-1], dtype=outer.dtype) - outer)


def scan_states(
    transition: Transition,
    initial: jax.Array | None = None,
    *,
    reverse: bool = False,
    exclusive: bool = False,
    reset: jax.Array | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the recurrence over frames.

    Args:
      transition: maps with frames on axis 1.
      initial: (B, N, V, D), the state before the first frame of the run; zeros by default.
      reverse: run from the last frame to the first.
      exclusive: return the state before the frame's own map instead of the state after it.
      reset: (F,) bool. Where it is true, the state is set to zero before the frame runs, so that a
        chunk sees nothing of the chunk that ran before it.
      axis_name: mesh axis over which frames are divided in order, for a call under
        `jax.shard_map`. The other arguments are then those of this rank's frames, and `initial` is
        the state before the whole clip.

    Returns:
      states (B, F, N, V, D) in frame order, and the final state (B, N, V, D) of the whole clip.
    """
    if axis_name is not None:
        return _scan_ranks(
            transition, initial, axis_name, reverse=reverse, exclusive=exclusive, reset=reset
        )
    if initial is None:
        initial = jnp.zeros_like(transition.u[:, 0])
    if reset is None:
        reset = jnp.zeros((transition.u.shape[1],), bool)

    def step(state: jax.Array, frame: tuple[Transition, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (w, u), drop = frame
        before = jnp.where(drop, 0.0, state)
        after = einsum("bnvd,bnde->bnve", before, w) + u
        return after, before if exclusive else after

    frames_first = Transition(*(jnp.moveaxis(a, 1, 0) for a in transition))
    final, states = lax.scan(step, initial, (frames_first, reset), reverse=reverse)
    return jnp.moveaxis(states, 0, 1), final


def compose_states(composites: Transition, incoming: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the states before each of R composed maps, and the state after the last one.

    Args:
      composites: maps in their order along axis 0, (R, B, N, D, D) and (R, B, N, V, D).
      incoming: (B, N, V, D), the state before the first map.

    Returns:
      (R, B, N, V, D) and (B, N, V, D).
    """
    before, state = [], incoming
    for w, u in zip(*composites, strict=True):
        before.append(state)
        state = einsum("bnvd,bnde->bnve", state, w) + u
    return jnp.stack(before), state


def _scan_ranks(
    transition: Transition, initial: jax.Array | None, axis_name: str, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """`scan_states` over ranks: scan from zero, compose the ranks' maps, correct the states."""
    w, u = transition
    values, size = u.shape[-2:]
    # Rows of the identity that run without input become the product of the maps so far. This
    # product carries the state of earlier ranks to every frame. `reset` and `exclusive` apply to it
    # in the same way.
    rows = jnp.concatenate([u, jnp.zeros_like(u, shape=(*u.shape[:-2], size, size))], -2)
    start = jnp.zeros_like(rows[:, 0]).at[..., values:, :].set(jnp.eye(size, dtype=u.dtype))
    states, final = scan_states(Transition(w, rows), start, **options)
    local, through = states[..., :values, :], states[..., values:, :]

    order = lax.axis_index(axis_name)
    composites = lax.all_gather(
        Transition(final[..., values:, :], final[..., :values, :]), axis_name
    )
    if options["reverse"]:
        composites = Transition(*(a[::-1] for a in composites))
        order = lax.axis_size(axis_name) - 1 - order
    if initial is None:
        initial = jnp.zeros_like(u[:, 0])
    before, last = compose_states(composites, initial)
    incoming = lax.dynamic_index_in_dim(before, order, keepdims=False)
    return local + einsum("bnvd,bfnde->bfnve", incoming, through), last


def bidirectional_states(
    transition: Transition,
    initial: jax.Array | None = None,
    *,
    chunk_ends: jax.Array | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of the inclusive forward states and the exclusive backward states.

    A frame sees itself and its past through the forward run, and its future through the backward
    run. It sees each frame once.

    Args:
      initial: (B, N, V, D), the carried state before the forward run.
      chunk_ends: (F,) bool, true for the last frame of each chunk. The backward run then starts
        from zero in each chunk (chunk-causal model), and the forward run does not.
      axis_name: see `scan_states`.

    Returns:
      states (B, F, N, V, D), and the final state of the forward run (B, N, V, D).
    """
    forward, final = scan_states(transition, initial, axis_name=axis_name)
    # the backward run enters a chunk at its last frame
    backward, _ = scan_states(
        transition, reverse=True, exclusive=True, reset=chunk_ends, axis_name=axis_name
    )
    return forward + backward, final


def read_out(states: jax.Array, q: jax.Array) -> jax.Array:
    """Reads every token's value: states (B, F, N, V, D), q (B, F, P, N, D) -> (B, F, P, N, V)."""
    return einsum("bfnvd,bfpnd->bfpnv", states, q.astype(jnp.float32))


def normalised_read_out(
    states: jax.Array, normaliser: jax.Array, q: jax.Array, plain_q: jax.Array, eps: float
) -> jax.Array:
    """Numerator divided by denominator, for every token.

    Args:
      states: (B, F, N, V, D), the states of the numerator.
      normaliser: (B, F, N, 1, D), the states of the denominator.
      q: (B, F, P, N, D), the queries of the numerator.
      plain_q: (B, F, P, N, D), the queries before their rotation, for the denominator.
      eps: added to the denominator.

    Returns:
      (B, F, P, N, V) float32.
    """
    return read_out(states, q) / (read_out(normaliser, plain_q) + eps)
