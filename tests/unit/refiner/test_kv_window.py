"""The ring buffer of the KV cache against concatenation and trimming."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.refiner.kv_window import (
    KeyValue,
    KVWindow,
    append_block,
    open_window,
    with_block,
)

LAYERS, BATCH, TOKENS, HEADS, HEAD = 2, 1, 3, 2, 4
FORMS = ["stacked", "separate"]


def frames_of(numbers: list[int], form: str) -> KeyValue:
    """Returns keys and values that contain the number of their frame."""
    frames = jnp.asarray(numbers, jnp.float32).reshape(1, 1, -1, 1, 1, 1)
    shape = (LAYERS, BATCH, len(numbers), TOKENS, HEADS, HEAD)
    made = KeyValue(jnp.broadcast_to(frames, shape), jnp.broadcast_to(-frames, shape))
    return made if form == "stacked" else jax.tree.map(tuple, made)


def placed(k: jax.Array, start: Any = 0) -> jax.Array:
    """Replaces the rotation by the position, with a value that no frame has."""
    return k + 1000.0 + start


def layer(part: Any, i: int) -> Any:
    return jax.tree.map(lambda a: a[i], part, is_leaf=lambda a: isinstance(a, tuple))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("slots", [3, 4, 5, 6, 100])
@pytest.mark.parametrize("lengths", [[3] * 5, [3, 3, 3, 1], [1] * 7, [2]])
def test_keeps_the_newest_frames(slots: int, lengths: list[int], form: str) -> None:
    window = open_window(frames_of([0], form), placed, history_slots=slots)

    def step(window: KVWindow, block: KeyValue, frames: int) -> KVWindow:
        written = block
        if form == "separate":
            parts = [
                with_block(layer(window.keys, i), layer(block, i), window.slots(frames))
                for i in range(LAYERS)
            ]
            written = jax.tree.map(lambda *parts: parts, *parts)
        return append_block(window, written, frames, placed)

    step = jax.jit(step, donate_argnums=0, static_argnums=2)
    done: list[int] = []
    for length in lengths:
        new = list(range(len(done) + 1, len(done) + 1 + length))
        kept, valid = done[-slots:], int(window.history_frames)
        sink = int(window.sink_start)
        assert int(window.block_start) == new[0] and valid == len(kept)
        # the sink sits just before the oldest frame that is left
        assert sink + window.sink_frames == (kept or new)[0]
        for i in range(LAYERS):
            seen = layer(window.keys, i)
            k, v = (np.asarray(a)[0, : 1 + valid, 0, 0, 0] for a in (seen.k, seen.v))
            assert k[0] == 1000.0 + sink and v[0] == 0
            assert sorted(k[1:]) == kept
            np.testing.assert_array_equal(v[1:], -k[1:])
        window = step(window, frames_of(new, form), length)
        done += new
    assert window.history_slots == slots


@pytest.mark.parametrize("form", FORMS)
def test_is_a_pytree_of_arrays_alone(form: str) -> None:
    window = open_window(frames_of([0, 1], form), placed, history_slots=4)
    copied = jax.tree.map(lambda a: a, window)
    assert isinstance(copied, KVWindow)
    assert len(jax.tree.leaves(window)) == (4 if form == "stacked" else 3 * LAYERS + 1)
    assert window.sink_frames == 2 and window.history_slots == 4
    assert window.is_separate == (form == "separate")
