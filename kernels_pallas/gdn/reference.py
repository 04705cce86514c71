"""The frame recurrence of SANA-WM, written once.

A frame updates a D x D state by an affine map, S_f = S_{f-1} W_f + U_f, with

    W_f = g_f (I - K_f^T diag(beta_f) K_f)        U_f = V_f^T diag(beta_f) K_f

(all P tokens of a frame enter at once; g is the frame's decay). The normaliser's state is a
vector, s_f = W_f s_{f-1} + u_f with u_f = K_f^T beta_f. Building the maps and reading the states
out is parallel over frames; only `scan_states` is sequential. Chunk-causal runs, streaming with a
carried state and context parallelism are all ways to call `scan_states` on the same maps.

Axis letters: B batch, F latent frames, P tokens a frame, N heads, D key and value size.
Everything is float32 at the highest matmul precision: the recurrence amplifies rounding, and a
GPU's default of TF32 (a TPU's of bf16) is not enough.
Reference: diffusers `torch_chunk_sana_gdn`, `torch_chunk_cam_single_path_delta_rule`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_einsum = functools.partial(
    jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


class Transition(NamedTuple):
    """Affine map of one frame a leading index: `state @ w + u`."""

    w: jax.Array  # B F N D D, symmetric
    u: jax.Array  # B F N V D; V is the value size, 1 for the normaliser


def frame_transitions(k: jax.Array, v: jax.Array, beta: jax.Array, decay: jax.Array) -> Transition:
    """The maps of the numerator.

    Args:
      k: keys (B, F, P, N, D), float32, already scaled by D^-1/2 P^-1/2.
      v: values (B, F, P, N, D), float32.
      beta: write strength of a token (B, F, P, N) in [0, 1].
      decay: g of a frame (B, F, N) in (0, 1].
    """
    k_beta = k * beta[..., None]
    return Transition(_decayed(k_beta, k, decay), _einsum("bfpnv,bfpnd->bfnvd", v, k_beta))


def normaliser_transitions(k: jax.Array, beta: jax.Array, decay: jax.Array) -> Transition:
    """The maps of the denominator, whose state is a row vector; shapes as `frame_transitions`."""
    k_beta = k * beta[..., None]
    return Transition(_decayed(k_beta, k, decay), jnp.sum(k_beta, axis=2)[..., None, :])


def _decayed(k_beta: jax.Array, k: jax.Array, decay: jax.Array) -> jax.Array:
    outer = _einsum("bfpnd,bfpne->bfnde", k_beta, k)
    return decay[..., None, None] * (jnp.eye(k.shape[-1], dtype=outer.dtype) - outer)


def scan_states(
    transition: Transition,
    initial: jax.Array | None = None,
    *,
    reverse: bool = False,
    exclusive: bool = False,
    reset: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the recurrence over frames.

    Args:
      transition: maps with frames on axis 1.
      initial: state before the first frame that is run (B, N, V, D); zeros by default.
      reverse: run from the last frame to the first.
      exclusive: report the state before the frame's own map instead of after it.
      reset: (F,) bool; where true the incoming state is dropped before the frame is run, so a
        chunk sees nothing of the one that ran before it.

    Returns:
      states (B, F, N, V, D) in frame order, and the final state (B, N, V, D).
    """
    if initial is None:
        initial = jnp.zeros_like(transition.u[:, 0])
    if reset is None:
        reset = jnp.zeros((transition.u.shape[1],), bool)

    def step(state: jax.Array, frame: tuple[Transition, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (w, u), drop = frame
        before = jnp.where(drop, 0.0, state)
        after = _einsum("bnvd,bnde->bnve", before, w) + u
        return after, before if exclusive else after

    frames_first = Transition(*(jnp.moveaxis(a, 1, 0) for a in transition))
    final, states = lax.scan(step, initial, (frames_first, reset), reverse=reverse)
    return jnp.moveaxis(states, 0, 1), final


def bidirectional_states(
    transition: Transition,
    initial: jax.Array | None = None,
    *,
    chunk_starts: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the inclusive forward and the exclusive backward states.

    A frame thus sees itself and its past through the forward run and its future through the
    backward run, each frame once.

    Args:
      initial: carried-in state of the forward run.
      chunk_starts: (F,) bool, true on the first frame of a chunk: the backward run is then
        isolated in each chunk (chunk-causal model), the forward run is not.

    Returns:
      states (B, F, N, V, D), and the forward run's final state.
    """
    forward, final = scan_states(transition, initial)
    # backwards, a chunk is entered at its last frame: the one before the next chunk's first
    reset = None if chunk_starts is None else jnp.roll(chunk_starts, -1).at[-1].set(True)
    backward, _ = scan_states(transition, reverse=True, exclusive=True, reset=reset)
    return forward + backward, final


def read_out(states: jax.Array, q: jax.Array) -> jax.Array:
    """Reads every token's value: states (B, F, N, V, D), q (B, F, P, N, D) -> (B, F, P, N, V)."""
    return _einsum("bfnvd,bfpnd->bfpnv", states, q)
