"""A stream, one chunk per call with a carried state, equals one pass over the whole clip."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sanawm_jax.core.params import apply, build
from sanawm_jax.dit.model import DiT
from sanawm_jax.dit.numerics import PRESETS
from sanawm_jax.dit.state import DiTState, Window
from sanawm_jax.runtime.errors import InputError
from tests.tiny_dit import CONFIG, GRAPHDEF, random_inputs, random_params

PER_FRAME = ("latents", "timesteps", "camera", "plucker")
PARAMS = random_params()


@jax.jit(static_argnames=("starts", "cached", "sink", "graphdef"))
def whole(params, inputs, starts, cached=None, sink=True, graphdef=GRAPHDEF):
    return apply(graphdef, params, **inputs, chunk_starts=starts, cached_chunks=cached, sink=sink)


@jax.jit(static_argnames=("window", "graphdef"))
def chunk(params, inputs, window, state=None, graphdef=GRAPHDEF):
    return apply(graphdef, params, **inputs, window=window, state=state, method="stream")


def cut(inputs: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    return {k: a[:, start:end] if k in PER_FRAME else a for k, a in inputs.items()}


def starts_of(window: Window, chunks: int) -> tuple[int, ...]:
    return (0, *(window.first + i * window.size for i in range(chunks - 1)))


def stream(
    inputs: dict[str, Any], window: Window, state: DiTState | None = None, graphdef: Any = GRAPHDEF
) -> Any:
    """Returns the velocities of all frames after a state, and the last state."""
    frames, at, out = inputs["latents"].shape[1], 0 if state is None else int(state.frame), []
    while at < frames:
        end = at + (window.first if state is None else window.size)
        velocity, state = chunk(PARAMS, cut(inputs, at, end), window, state, graphdef)
        assert state is not None and int(state.frame) == end
        out.append(velocity)
        at = end
    return jnp.concatenate(out, 1), state


def relative(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("frames", "size", "first", "all_cached"),
    [
        (31, 3, 4, 9),
        (13, 3, 4, 3),
        (12, 3, 3, 3),
        (11, 3, 5, 2),
        (4, 1, 1, 3),
        (4, 2, 2, 1),
        (4, 3, 4, 1),
    ],
)
def test_the_chunks_of_a_clip(frames: int, size: int, first: int, all_cached: int) -> None:
    assert Window.of_clip(frames, size) == Window(first, size, 2)
    every = Window.of_clip(frames, size, -1, sink=False)
    assert (every.first, every.cached, every.sink) == (first, all_cached, False)
    assert every.slots == max(frames - size, first)  # all that the last chunk can see before itself


def check(window: Window, chunks: int) -> None:
    starts = starts_of(window, chunks)
    inputs = random_inputs(1, starts[-1] + (window.size if chunks > 1 else window.first))
    expected = whole(PARAMS, inputs, starts, window.cached, window.sink)
    assert relative(stream(inputs, window)[0], expected) < 1e-5


@pytest.mark.parametrize(
    ("window", "chunks"),
    [
        (Window(2, 1, 1, sink=False), 4),
        (Window(3, 1, 2, sink=False), 5),
        (Window(1, 1, 1), 3),
        (Window(4, 3, 2), 4),
        (Window(3, 2, 3), 5),
    ],
)
def test_a_stream_is_the_whole_clip_with_the_same_keys_seen(window: Window, chunks: int) -> None:
    check(window, chunks)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    first=st.integers(0, 2),
    size=st.integers(1, 3),
    chunks=st.integers(1, 5),
    cached=st.integers(1, 4),
    sink=st.booleans(),
)
def test_streams_of_drawn_windows(first, size, chunks, cached, sink):
    check(Window(size + first, size, cached, sink), chunks)


def test_with_all_chunks_cached_it_is_the_chunk_causal_model():
    window = Window(4, 3, 4)
    inputs = random_inputs(2, 13)  # two streams with different text and paths
    expected = whole(PARAMS, inputs, (0, 4, 7, 10))
    found, state = stream(inputs, window)
    assert relative(found, expected) < 1e-5
    assert relative(whole(PARAMS, inputs, (0, 4, 7, 10), 2), expected) > 1e-3  # the window matters
    shapes = jax.tree.map(jnp.shape, chunk(PARAMS, cut(inputs, 0, 4), window)[1])
    assert jax.tree.map(jnp.shape, state) == shapes  # a state does not grow


@pytest.mark.parametrize("name", PRESETS)
def test_in_every_numerics_preset(name: str) -> None:
    """A preset whose layers see the whole clip is for whole clips alone, and says so."""
    graphdef, _ = build(DiT, dataclasses.replace(CONFIG, numerics=PRESETS[name]))
    window, inputs = Window(4, 3, 2), random_inputs(1, 10)
    if name == "chunk_causal":
        with pytest.raises(InputError, match="whole clip"):
            stream(cut(inputs, 0, 4), window, graphdef=graphdef)
        return
    expected = whole(PARAMS, inputs, (0, 4, 7), 2, graphdef=graphdef)
    assert relative(stream(inputs, window, graphdef=graphdef)[0], expected) < 1e-5


def test_one_program_serves_every_chunk_but_the_first():
    window = Window(3, 2, 2)
    chunk.clear_cache()
    stream(random_inputs(1, 13), window)
    assert chunk._cache_size() == 2


def test_branches_of_one_state_leave_each_other_alone():
    window = Window(4, 3, 2)
    inputs, others = random_inputs(1, 13), random_inputs(1, 13, seed=1)
    _, state = stream(cut(inputs, 0, 7), window)
    first, _ = stream(inputs, window, state)
    stream(others, window, state)
    np.testing.assert_array_equal(stream(inputs, window, state)[0], first)
    np.testing.assert_array_equal(stream(inputs, window)[0][:, 7:], first)


def test_streams_of_a_batch_equal_each_alone():
    window, inputs = Window(3, 2, 2), random_inputs(2, 7)  # with different text and paths
    both, _ = stream(inputs, window)
    for i in range(2):
        alone, _ = stream({name: a[i : i + 1] for name, a in inputs.items()}, window)
        assert relative(both[i : i + 1], alone) < 1e-5


def test_no_frame_depends_on_a_later_chunk():
    window, inputs, others = Window(3, 2, 2), random_inputs(1, 7), random_inputs(1, 7, seed=1)
    mixed = {
        name: jnp.concatenate([a[:, :5], others[name][:, 5:]], 1) if name in PER_FRAME else a
        for name, a in inputs.items()
    }
    found, _ = stream(inputs, window)
    np.testing.assert_array_equal(stream(mixed, window)[0][:, :5], found[:, :5])
    assert relative(stream(mixed, window)[0][:, 5:], found[:, 5:]) > 1e-3


def test_gradients_through_a_chunk_are_those_of_the_whole_clip():
    """The gradient of the last chunk equals that of a whole clip whose earlier frames are fixed."""
    window, starts = Window(4, 3, 2), (0, 4, 7, 10)
    inputs = random_inputs(1, 13)
    _, state = stream(cut(inputs, 0, 10), window)
    weights = jnp.sin(jnp.arange(3.0))[:, None, None, None]

    def of_chunk(latents):
        last = {**cut(inputs, 10, 13), "latents": latents}
        return jnp.sum(jnp.square(chunk(PARAMS, last, window, state)[0]) * weights)

    def of_clip(latents):
        every = {**inputs, "latents": inputs["latents"].at[:, 10:].set(latents)}
        return jnp.sum(jnp.square(whole(PARAMS, every, starts, 2)[:, 10:]) * weights)

    at = inputs["latents"][:, 10:]
    assert relative(jax.grad(of_chunk)(at), jax.grad(of_clip)(at)) < 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(1, 2, 1), "no shorter"),
        (lambda: Window(0, 0, 1), "at least one frame"),
        (lambda: Window(2, 2, 0), "num_cached_blocks=0"),
        (lambda: Window.of_clip(3, 3), "too few for chunks of 3"),
        (lambda: Window.of_clip(5, 0), "too few for chunks of 0"),
        (lambda: chunk(PARAMS, random_inputs(1, 3), Window(4, 3, 1)), "window takes 4"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_refuses_a_state_of_another_window():
    inputs = random_inputs(1, 7)
    _, state = chunk(PARAMS, cut(inputs, 0, 4), Window(4, 3, 2))
    with pytest.raises(InputError, match="the state is of a stream"):
        chunk(PARAMS, cut(inputs, 4, 7), Window(4, 3, 1), state)
