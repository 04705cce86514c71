"""The frame recurrence of SANA-WM. This is its only definition.

A frame updates a D x D state with an affine map, S_f = S_{f-1} W_f + U_f, where

    W_f = g_f (I - K_f^T diag(beta_f) K_f)        U_f = V_f^T diag(beta_f) K_f

All P tokens of a frame enter at once, and g is the decay of the frame. The state of the normaliser
is a vector, s_f = W_f s_{f-1} + u_f with u_f = K_f^T beta_f. The computation of the maps and the
read-out of the states are parallel over frames; only `scan_states` is sequential. Chunk-causal
runs, streaming with a carried state, and context parallelism are all ways to call `scan_states` on
the same maps. Context parallelism needs no second pass over the frames, because the maps of one
rank compose to one map.

Axis letters: B batch, F latent frames, P tokens per frame, N heads, D key size, V value size,
G runs whose maps are composed (the ranks of a mesh).
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
from jaxtyping import Array, Bool, Float

einsum = functools.partial(
    jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


class Transition(NamedTuple):
    """One affine map per frame: `state @ w + u`."""

    w: Float[Array, "*rest D D"]  # *rest is B F N; symmetric
    u: Float[Array, "*rest V D"]  # V is the value size, 1 for the normaliser


def frame_transitions(
    k: Float[Array, "B F P N D"],
    v: Float[Array, "B F P N V"],
    beta: Float[Array, "B F P N"],
    decay: Float[Array, "B F N"],
) -> Transition:
    """The maps of the numerator.

    Args:
      k: keys, already scaled by D^-1/2 P^-1/2.
      v: values.
      beta: write strength of each token, in [0, 1].
      decay: g of each frame, in (0, 1].
    """
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    k_beta = k * beta[..., None]
    return Transition(_decayed(k_beta, k, decay), einsum("bfpnv,bfpnd->bfnvd", v, k_beta))


def normaliser_transitions(
    k: Float[Array, "B F P N D"], beta: Float[Array, "B F P N"], decay: Float[Array, "B F N"]
) -> Transition:
    """The maps of the denominator, whose state is a row; arguments as in `frame_transitions`."""
    k = k.astype(jnp.float32)
    k_beta = k * beta[..., None]
    return Transition(_decayed(k_beta, k, decay), jnp.sum(k_beta, axis=2)[..., None, :])


def _decayed(k_beta: jax.Array, k: jax.Array, decay: jax.Array) -> jax.Array:
    outer = einsum("bfpnd,bfpne->bfnde", k_beta, k)
    return decay[..., None, None] * (jnp.eye(k.shape[-1], dtype=outer.dtype) - outer)


def scan_states(
    transition: Transition,
    initial: Float[Array, "B N V D"] | None = None,
    *,
    reverse: bool = False,
    exclusive: bool = False,
    reset: Bool[Array, "F"] | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "B F N V D"], Float[Array, "B N V D"]]:
    """Runs the recurrence over frames.

    Args:
      transition: maps with frames on axis 1.
      initial: the state before the first frame of the run; zeros by default.
      reverse: run from the last frame to the first.
      exclusive: return the state before the frame's own map instead of the state after it.
      reset: where it is true, the state is set to zero before the frame runs, so that a
        chunk sees nothing of the chunk that ran before it.
      axis_name: mesh axis over which frames are divided in order, for a call under
        `jax.shard_map`. The other arguments are then those of this rank's frames, and `initial` is
        the state before the whole clip.

    Returns:
      The states in frame order, and the final state of the whole clip.
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


def compose_states(
    composites: Transition, incoming: Float[Array, "B N V D"]
) -> tuple[Float[Array, "G B N V D"], Float[Array, "B N V D"]]:
    """Returns the states before each of G composed maps, and the state after the last one.

    Args:
      composites: maps in their order along axis 0, (G, B, N, D, D) and (G, B, N, V, D).
      incoming: the state before the first map.
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
    initial: Float[Array, "B N V D"] | None = None,
    *,
    chunk_ends: Bool[Array, "F"] | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "B F N V D"], Float[Array, "B N V D"]]:
    """Returns the sum of the inclusive forward states and the exclusive backward states.

    A frame sees itself and its past through the forward run, and its future through the backward
    run. It sees each frame once.

    Args:
      initial: the carried state before the forward run.
      chunk_ends: true for the last frame of each chunk. The backward run then starts
        from zero in each chunk (chunk-causal model), and the forward run does not.
      axis_name: see `scan_states`.

    Returns:
      The states, and the final state of the forward run.
    """
    forward, final = scan_states(transition, initial, axis_name=axis_name)
    # the backward run enters a chunk at its last frame
    backward, _ = scan_states(
        transition, reverse=True, exclusive=True, reset=chunk_ends, axis_name=axis_name
    )
    return forward + backward, final


def read_out(
    states: Float[Array, "B F N V D"], q: Float[Array, "B F P N D"]
) -> Float[Array, "B F P N V"]:
    """Reads every token's value from the state of its frame, in float32."""
    return einsum("bfnvd,bfpnd->bfpnv", states, q.astype(jnp.float32))


def normalised_read_out(
    states: Float[Array, "B F N V D"],
    normaliser: Float[Array, "B F N 1 D"],
    q: Float[Array, "B F P N D"],
    plain_q: Float[Array, "B F P N D"],
    eps: float,
) -> Float[Array, "B F P N V"]:
    """Numerator divided by denominator, for every token.

    Args:
      states: those of the numerator.
      normaliser: the states of the denominator.
      q: the queries of the numerator.
      plain_q: the queries before their rotation, for the denominator.
      eps: added to the denominator.

    Returns:
      Every token's value, float32.
    """
    return read_out(states, q) / (read_out(normaliser, plain_q) + eps)
