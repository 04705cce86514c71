"""Timesteps of chunks: the monotone sampler against enumeration, and properties of all modes."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.core.frames import FrameLayout, chunk_starts
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.objectives.timesteps import (
    MODES,
    completion_counts,
    mixture_probabilities,
    sample_chunk_steps,
    sample_monotone,
    sample_steps,
)

LAYOUT = FrameLayout(14, chunk_starts(14, 3))  # 4, 3, 3 and 4 frames
BATCH = 4000


def test_steps_are_logit_normal():
    steps = np.asarray(sample_steps(jax.random.key(0), 20000))
    assert steps.min() >= 0 and steps.max() <= 999
    assert np.median(steps) == pytest.approx(500, abs=15)
    # sigmoid(+-1) are the quantiles of one standard deviation
    assert np.mean(steps < 268.9) == pytest.approx(0.1587, abs=0.01)
    assert np.mean(steps < 731.1) == pytest.approx(0.8413, abs=0.01)


def _sequences(chunks, steps, anchor, base):
    every = itertools.combinations_with_replacement(range(steps), chunks)
    return [s for s in every if s[anchor] == base]


def _softmax(a):
    p = np.exp(a - a.max())
    return p / p.sum()


@pytest.mark.parametrize(("chunks", "steps"), [(1, 4), (2, 5), (3, 5), (4, 4)])
def test_tables_give_uniform_sequences(chunks, steps):
    """The product of the conditional probabilities is exactly one over the number of sequences."""
    right, left = completion_counts(chunks, steps)
    for anchor, base in itertools.product(range(chunks), range(steps)):
        sequences = _sequences(chunks, steps, anchor, base)
        for s in sequences:
            p = 1.0
            for f in range(anchor + 1, chunks):
                p *= _softmax(right[f, s[f - 1] :])[s[f] - s[f - 1]]
            for f in range(anchor - 1, -1, -1):
                p *= _softmax(left[f, : s[f + 1] + 1])[s[f]]
            assert p == pytest.approx(1 / len(sequences), rel=1e-12)


@pytest.mark.parametrize(("anchor", "base"), [(0, 1), (1, 2), (2, 3)])
def test_samples_are_uniform(anchor, base):
    n = 20_000
    sample = jax.jit(sample_monotone, static_argnames=("chunks", "steps"))
    drawn = sample(
        jax.random.key(0), jnp.full((n,), base), jnp.full((n,), anchor), chunks=3, steps=5
    )
    found, counts = np.unique(np.asarray(drawn), axis=0, return_counts=True)
    expected = sorted(_sequences(3, 5, anchor, base))
    assert [tuple(row) for row in found.tolist()] == expected
    np.testing.assert_allclose(counts / n, 1 / len(expected), atol=0.015)


def test_tables_of_the_release_are_finite_and_exact():
    from math import comb, log

    right, left = completion_counts(40)
    assert np.isfinite(right).all() and np.isfinite(left).all()
    # from step t of chunk f: C((999 - t) + (39 - f), 39 - f)
    for f, t in [(0, 0), (3, 500), (38, 10), (39, 7)]:
        assert right[f, t] == pytest.approx(log(comb(999 - t + 39 - f, 39 - f)), rel=1e-10)
        assert left[39 - f, 999 - t] == right[f, t]


def _chunks_of(mode, key=0):
    draw = jax.jit(lambda k: sample_chunk_steps(k, BATCH, LAYOUT, {mode: 1.0}))
    steps = np.asarray(draw(jax.random.key(key)))
    assert steps.shape == (BATCH, 14) and steps.min() >= 0 and steps.max() <= 999
    for start, end in LAYOUT.chunks:
        assert np.all(steps[:, start:end] == steps[:, start : start + 1])
    return steps[:, list(LAYOUT.starts)]


def _is_logit_normal(steps):
    low, middle, high = (np.mean(steps < limit) for limit in (268.9, 500, 731.1))
    return np.allclose([low, middle, high], [0.1587, 0.5, 0.8413], atol=0.03)


def test_same_t():
    chunks = _chunks_of("same_t")
    assert np.all(chunks == chunks[:, :1]) and _is_logit_normal(chunks[:, 0])


def test_incremental():
    chunks = _chunks_of("incremental")
    assert np.all(np.diff(chunks, axis=1) >= 0) and np.any(np.diff(chunks, axis=1) > 0)
    # any chunk may be the anchor: the last is later than b, the first earlier
    assert np.mean(chunks[:, -1]) > 600 and np.mean(chunks[:, 0]) < 400
    assert not _is_logit_normal(chunks[:, -1])


def test_last_chunk_anchor():
    chunks = _chunks_of("last_chunk_anchor")
    assert np.all(np.diff(chunks, axis=1) >= 0) and _is_logit_normal(chunks[:, -1])
    # given b, the earlier three are sorted uniforms below it
    np.testing.assert_allclose(
        np.mean(chunks[:, :3] / np.maximum(chunks[:, 3:], 1), 0), [0.25, 0.5, 0.75], atol=0.02
    )


def test_teacher_forcing_clean():
    chunks = _chunks_of("teacher_forcing_clean")
    assert _is_logit_normal(chunks[:, -1]) and np.all(chunks[:, 0] == 0)
    clean = np.sum(np.cumsum(chunks, axis=1) == 0, axis=1)
    # one to three of the four, each as often; a drawn 0 is rare
    np.testing.assert_allclose(np.bincount(clean, minlength=4)[1:4] / BATCH, 1 / 3, atol=0.03)
    assert np.all(np.diff(chunks, axis=1) >= 0)


def test_one_chunk_is_the_base_step():
    for mode in MODES:
        steps = np.asarray(sample_chunk_steps(jax.random.key(0), 500, FrameLayout(4), {mode: 1}))
        assert np.all(steps == steps[:, :1]) and np.mean(steps == 0) < 0.05


def test_modes_are_drawn_by_their_weights():
    weights = {"same_t": 0.1, "incremental": 0.4, "last_chunk_anchor": 0.4}
    weights["teacher_forcing_clean"] = 0.1
    steps = np.asarray(sample_chunk_steps(jax.random.key(0), BATCH, LAYOUT, weights))
    assert np.mean(steps[:, 0] == steps[:, -1]) == pytest.approx(0.1, abs=0.02)
    assert np.mean(steps[:, 0] == 0) == pytest.approx(0.1, abs=0.03)
    again = np.asarray(sample_chunk_steps(jax.random.key(0), BATCH, LAYOUT, weights))
    np.testing.assert_array_equal(steps, again)


def test_weights_are_normalised_and_checked():
    np.testing.assert_allclose(
        mixture_probabilities({"same_t": 1, "incremental": 3}), [0.25, 0.75, 0, 0]
    )
    with pytest.raises(InputError, match="no mode 'other'"):
        mixture_probabilities({"other": 1.0})
    for bad in ({"same_t": -1.0, "incremental": 2.0}, {"same_t": 0.0}, {}):
        with pytest.raises(InputError, match="one above 0"):
            mixture_probabilities(bad)
