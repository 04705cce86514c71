"""The window against concatenating and trimming."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.refiner.kv_window import KeyValue, KVWindow, append_block, open_window

LAYERS, BATCH, TOKENS, HEADS, HEAD = 2, 1, 3, 2, 4


def frames_of(numbers: list[int]) -> KeyValue:
    """Keys and values that say which frame they are."""
    frames = jnp.asarray(numbers, jnp.float32).reshape(1, 1, -1, 1, 1, 1)
    shape = (LAYERS, BATCH, len(numbers), TOKENS, HEADS, HEAD)
    return KeyValue(jnp.broadcast_to(frames, shape), jnp.broadcast_to(-frames, shape))


@pytest.mark.parametrize("slots", [3, 4, 5, 6, 100])
@pytest.mark.parametrize("lengths", [[3] * 5, [3, 3, 3, 1], [1] * 7, [2]])
def test_keeps_the_newest_frames(slots: int, lengths: list[int]) -> None:
    window = open_window(frames_of([0]), slots)
    step = jax.jit(append_block, donate_argnums=0)
    done: list[int] = []
    for length in lengths:
        new = list(range(len(done) + 1, len(done) + 1 + length))
        assert int(window.block_start) == new[0]
        window = step(window, frames_of(new))
        done += new
        valid = int(window.history_frames)
        assert valid == min(len(done), slots)
        k, v = np.asarray(window.history.k), np.asarray(window.history.v)
        assert sorted(k[0, 0, :valid, 0, 0, 0]) == done[-slots:]
        np.testing.assert_array_equal(k, -v)
        # the sink sits just before the oldest frame that is left
        assert int(window.sink_start) + window.sink_frames == done[-slots:][0]
    assert window.history.k.shape[2] == slots


def test_is_a_pytree_of_arrays_alone() -> None:
    window = open_window(frames_of([0, 1]), 4)
    copied = jax.tree.map(lambda a: a, window)
    assert isinstance(copied, KVWindow)
    assert len(jax.tree.leaves(window)) == 5
    assert window.sink_frames == 2 and window.history_slots == 4
