"""Chunk layouts, and the frames that a convolution over frames reads."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sanawm_jax.core.frames import FrameLayout, chunk_starts, neighbours
from sanawm_jax.dit.attention import ShortConv
from sanawm_jax.runtime.errors import InputError


@pytest.mark.parametrize(
    ("frames", "size", "strategy", "expected"),
    [
        (121, 3, "first_chunk_plus_one", (0, *range(4, 121, 3))),
        (122, 3, "first_chunk_plus_one", (0, *range(4, 121, 3))),
        (43, 3, "first_chunk_plus_one", (0, *range(4, 43, 3))),
        (4, 3, "first_chunk_plus_one", (0,)),
        (6, 3, "first_chunk_plus_one", (0,)),
        (7, 3, "first_chunk_plus_one", (0, 4)),
        (7, 3, "uniform", (0, 3)),
        (9, 3, "uniform", (0, 3, 6)),
        (5, 3, "uniform", (0,)),
        (8, 3, "first_frame", (0, 1, 4)),
        (7, 3, "first_frame", (0, 1, 4)),
        (6, 3, "first_frame", (0, 1)),
        (4, 3, "first_frame", (0, 1)),
        (3, 3, "first_frame", (0,)),
        (1, 3, "first_frame", (0,)),
    ],
)
def test_chunk_starts(frames, size, strategy, expected):
    starts = chunk_starts(frames, size, strategy)
    assert starts == expected
    FrameLayout(frames, starts)


def test_chunk_counts_of_the_release():
    assert len(chunk_starts(121, 3)) == 40
    assert len(chunk_starts(43, 3)) == 14


@pytest.mark.parametrize("starts", [(1, 2), (0, 2, 2), (0, 5), (0, 3, 1)])
def test_bad_starts(starts):
    with pytest.raises(InputError, match="ascend from 0"):
        FrameLayout(5, starts)


def test_bad_strategy_and_size():
    with pytest.raises(InputError, match="first_chunk_plus_one, uniform, first_frame"):
        chunk_starts(9, 3, "last")
    with pytest.raises(InputError, match="chunk_size=0"):
        chunk_starts(9, 0)


def test_neighbours_see_the_future_of_their_own_chunk_alone():
    x = np.arange(1.0, 8.0).reshape(1, 7, 1, 1) * np.ones((1, 1, 2, 3))
    seen = neighbours(jax.numpy.asarray(x), 2, FrameLayout(7, (0, 3, 4)))
    rows = [np.asarray(a)[0, :, 0, 0].tolist() for a in seen]
    assert rows == [
        [0, 0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 6],
        [1, 2, 3, 4, 5, 6, 7],
        [2, 3, 0, 0, 6, 7, 0],
        [3, 0, 0, 0, 7, 0, 0],
    ]


@pytest.mark.parametrize("starts", [(0,), (0, 4, 5)])
def test_short_conv_is_causal_plus_anticausal_minus_centre(starts, rng):
    x = rng.normal(size=(1, 9, 1, 2)).astype(np.float32)
    conv = ShortConv(2, 4)
    taps = rng.normal(size=(4, 2)).astype(np.float32)
    conv.taps[...] = jax.numpy.asarray(taps)

    def causal(a):  # (F, C), the last tap on the frame itself
        padded = np.concatenate([np.zeros((3, 2)), a])
        return sum(padded[i : i + len(a)] * taps[i] for i in range(4))

    expected = causal(x[0, :, 0]) - x[0, :, 0] * taps[-1]
    for start, end in FrameLayout(9, starts).chunks:
        expected[start:end] += causal(x[0, start:end, 0][::-1])[::-1]
    found = conv(jax.numpy.asarray(x), FrameLayout(9, starts))
    np.testing.assert_allclose(found[0, :, 0], expected, atol=1e-5)
