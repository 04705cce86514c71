"""Noise steps of every frame for chunk-causal training: a mixture of four modes.

A sample draws a mode and a base step b, logit-normal. Then, over its chunks,

    same_t                 every chunk at b
    incremental            non-decreasing, one random chunk at b
    last_chunk_anchor      non-decreasing, the last chunk at b
    teacher_forcing_clean  as last_chunk_anchor, then a random number of first chunks clean

Non-decreasing sequences are drawn uniformly from all of those that hold the anchor: counts of
the ways to go on to each side give the conditional of the next chunk. Counts overflow any float
(1000 steps and 40 chunks have 10^70 sequences), so they are logarithms, in float64 on the host.
Axis letters: B batch, F latent frames, K chunks.
Source: NVlabs/Sana, stage-1 training, `chunk_mixture_probs` and `IncrementalTimesteps`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sanawm_jax.core.frames import FrameLayout
from sanawm_jax.runtime.errors import InputError

NUM_STEPS = 1000
MODES = ("same_t", "incremental", "last_chunk_anchor", "teacher_forcing_clean")


def sample_steps(key: jax.Array, batch: int) -> jax.Array:
    """Logit-normal integer steps in 0..999, (B,) int32."""
    u = jax.nn.sigmoid(jax.random.normal(key, (batch,)))
    return jnp.minimum(jnp.floor(NUM_STEPS * u), NUM_STEPS - 1).astype(jnp.int32)


@functools.cache
def completion_counts(chunks: int, steps: int = NUM_STEPS) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of how many non-decreasing sequences go on from each step of each chunk.

    Returns:
      to the right and to the left, both (K, steps) float64.
    """
    right = np.zeros((chunks, steps))
    # sequences that go on from t: the ones that go on from a later step of the next chunk
    for chunk in range(chunks - 2, -1, -1):
        right[chunk] = np.logaddexp.accumulate(right[chunk + 1, ::-1])[::-1]
    return right, right[::-1, ::-1].copy()  # to the left is the same, mirrored


def sample_monotone(
    key: jax.Array, base: jax.Array, anchor: jax.Array, chunks: int, steps: int = NUM_STEPS
) -> jax.Array:
    """Uniform non-decreasing sequences with a given step at a given chunk.

    Args:
      base: (B,) int32 step of the anchor.
      anchor: (B,) int32 chunk that has it.
      chunks: K.

    Returns:
      (B, K) int32.
    """
    right, left = (
        # the largest is 0: float32 then keeps the digits that matter
        jnp.asarray(table - table.max(1, keepdims=True), jnp.float32)
        for table in completion_counts(chunks, steps)
    )
    right_key, left_key = jax.random.split(key)
    every = jnp.arange(steps)

    def draw(key: jax.Array, counts: jax.Array, allowed: jax.Array) -> jax.Array:
        logits = jnp.where(allowed, counts, -jnp.inf)  # B steps
        return jax.random.categorical(key, logits).astype(jnp.int32)

    def rightwards(before: jax.Array, chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(right_key, chunk)
        drawn = draw(key, right[chunk], every >= before[:, None])
        step = jnp.where(chunk > anchor, drawn, base)
        return step, step

    def leftwards(
        after: jax.Array, chunk_and_step: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        chunk, step = chunk_and_step
        key = jax.random.fold_in(left_key, chunk)
        drawn = draw(key, left[chunk], every <= after[:, None])
        step = jnp.where(chunk < anchor, drawn, step)
        return step, step

    order = jnp.arange(chunks)
    base = base.astype(jnp.int32)
    _, sequence = lax.scan(rightwards, base, order)
    _, sequence = lax.scan(leftwards, base, (order, sequence), reverse=True)
    return sequence.T


def mixture_probabilities(mixture: Mapping[str, float]) -> np.ndarray:
    """Probabilities of `MODES`, (4,) float64, from weights by name; absent ones are 0.

    Raises:
      InputError: an unknown mode, a negative weight, or none above 0.
    """
    unknown = sorted(set(mixture) - set(MODES))
    if unknown:
        raise InputError(f"chunk_mixture has no mode {unknown[0]!r}; use {', '.join(MODES)}")
    weights = np.array([float(mixture.get(mode, 0.0)) for mode in MODES])
    if not np.all(np.isfinite(weights)) or weights.min() < 0 or weights.sum() <= 0:
        raise InputError(f"chunk_mixture={dict(mixture)} needs weights of 0 or more, one above 0")
    return weights / weights.sum()


def sample_chunk_steps(
    key: jax.Array, batch: int, layout: FrameLayout, mixture: Mapping[str, float]
) -> jax.Array:
    """Integer steps of every frame, equal in a chunk: (B, F) int32.

    Args:
      layout: frames and chunks of the clip.
      mixture: weight of each mode by name.

    Raises:
      InputError: see `mixture_probabilities`.
    """
    probabilities = mixture_probabilities(mixture)
    chunks = len(layout.starts)
    mode_key, base_key, anchor_key, sequence_key, prefix_key = jax.random.split(key, 5)
    logits = [math.log(p) if p > 0 else -math.inf for p in probabilities]
    mode = jax.random.categorical(mode_key, jnp.array(logits), shape=(batch,))
    base = sample_steps(base_key, batch)
    anchor = jax.random.randint(anchor_key, (batch,), 0, chunks)
    last = (mode == MODES.index("last_chunk_anchor")) | (
        mode == MODES.index("teacher_forcing_clean")
    )
    anchor = jnp.where(last, chunks - 1, anchor)
    steps = sample_monotone(sequence_key, base, anchor, chunks)  # B K
    steps = jnp.where((mode == MODES.index("same_t"))[:, None], base[:, None], steps)
    if chunks > 1:
        clean = jax.random.randint(prefix_key, (batch,), 1, chunks)
        forced = (mode == MODES.index("teacher_forcing_clean"))[:, None]
        steps = jnp.where(forced & (jnp.arange(chunks) < clean[:, None]), 0, steps)
    lengths = [end - start for start, end in layout.chunks]
    return jnp.repeat(steps, np.array(lengths), axis=1, total_repeat_length=layout.frames)
