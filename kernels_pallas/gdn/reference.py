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
G runs: the directions of the recurrence, or the ranks of a mesh, whose
maps are composed.
Everything is float32 at the highest matmul precision. The recurrence amplifies rounding errors, and
the default precision (TF32 on a GPU, bfloat16 on a TPU) is not enough.
Reference: diffusers `torch_chunk_sana_gdn`, `torch_chunk_cam_single_path_delta_rule`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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
        run = functools.partial(scan_states, reverse=reverse, exclusive=exclusive, reset=reset)
        return scan_over_ranks(_side_by_side(run), transition, initial, axis_name, [reverse])
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


def _side_by_side(*runs: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., Any]:
    """The `scan` of `scan_over_ranks` that computes one run after the other."""

    def scan(transition: Transition, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = [run(transition, start) for run, start in zip(runs, starts, strict=True)]
        states, finals = zip(*found, strict=True)
        return jnp.stack(states), jnp.stack(finals)

    return scan


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


def scan_over_ranks(
    scan: Callable[[Transition, jax.Array], tuple[jax.Array, jax.Array]],
    transition: Transition,
    initial: Float[Array, "B N V D"] | None,
    axis_name: str,
    is_reverse: Sequence[bool],
) -> tuple[Float[Array, "B F N V D"], Float[Array, "B N V D"]]:
    """Runs the recurrence, under `jax.shard_map`, over frames that ranks hold in order.

    Each rank scans from zero. It also scans without inputs from the identity, which gives the
    product of the maps up to every frame, and so what a state before the rank's frames becomes
    there. The maps of whole ranks are gathered and composed. `reset` and `exclusive` need no
    attention here: the scan applies them to both.

    Args:
      scan: computes G runs over one rank's frames, from maps (B, F, N, ...) and the states before
        each run (G, B, N, V, D). Returns the states (G, B, F, N, V, D), and the states after each
        run (G, B, N, V, D).
      transition: the maps of this rank's frames.
      initial: the state before the first run, of the whole clip. Other runs start from zero.
      is_reverse: of each run, whether it goes from the last frame to the first.

    Returns:
      The sum of the states of all runs, and the final state of the first one over the whole clip.
    """
    w, u = transition
    runs = len(is_reverse)
    start = jnp.zeros_like(u[:, 0])
    local, added = scan(transition, jnp.stack([start] * runs))
    identity = jnp.zeros_like(w[:, 0]) + jnp.eye(w.shape[-1], dtype=w.dtype)
    through, mapped = scan(Transition(w, jnp.zeros_like(w)), jnp.stack([identity] * runs))

    gathered = lax.all_gather(Transition(mapped, added), axis_name)
    incoming, final = [], []
    for run, reverse in enumerate(is_reverse):
        order, composites = lax.axis_index(axis_name), Transition(*(a[:, run] for a in gathered))
        if reverse:
            composites = Transition(*(a[::-1] for a in composites))
            order = lax.axis_size(axis_name) - 1 - order
        first = start if run or initial is None else initial
        before, last = compose_states(composites, first)
        incoming.append(lax.dynamic_index_in_dim(before, order, keepdims=False))
        final.append(last)
    carried = einsum("gbnvd,gbfnde->bfnve", jnp.stack(incoming), through)
    return jnp.sum(local, 0) + carried, final[0]


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
    # the backward run enters a chunk at its last frame
    back = functools.partial(scan_states, reverse=True, exclusive=True, reset=chunk_ends)
    if axis_name is not None:
        scan = _side_by_side(scan_states, back)
        return scan_over_ranks(scan, transition, initial, axis_name, [False, True])
    forward, final = scan_states(transition, initial)
    backward, _ = back(transition)
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
