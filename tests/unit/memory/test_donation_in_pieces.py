"""A divided program overwrites donated arguments, and nothing else."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.core.stack import over_layers
from sanawm_jax.memory.streaming import Streamer, keep_layers, keep_separate_layers

COUNT, WIDTH = 3, 4
WEIGHTS = np.random.default_rng(0).standard_normal((COUNT, WIDTH, WIDTH)).astype(np.float32)


def jitted(*donated: str) -> Any:
    return functools.partial(jax.jit, static_argnames="graphdef", donate_argnames=donated)


def windows(seed: int) -> tuple[jax.Array, ...]:
    """Returns a KV cache with three frames per layer."""
    return tuple(jax.random.normal(jax.random.key(seed), (COUNT, 3, WIDTH)))


def layer(x: jax.Array, leaves: Any) -> tuple[jax.Array, jax.Array]:
    """Reads a KV cache, and returns it with one frame replaced."""
    weight, seen = leaves
    x = jnp.tanh(x @ weight) + seen.sum(0)
    return x, seen.at[0].set(x)


def run_both(function: Any, *args: Any, streamer: Streamer | None = None) -> Any:
    """Checks that the pieces and the whole program have equal results, and returns them."""
    expected = function(None, tuple(WEIGHTS), *jax.tree.map(jnp.array, args))
    streamed = keep_separate_layers("blocks.w", WEIGHTS)
    got = (streamer or Streamer())(function, None, streamed, *args)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    return got


def are_deleted(tree: Any) -> list[bool]:
    return [a.is_deleted() for a in jax.tree.leaves(tree)]


def places(tree: Any) -> list[int]:
    return [a.unsafe_buffer_pointer() for a in jax.tree.leaves(tree)]


def test_each_layer_writes_its_own() -> None:
    """Works as in the refiner: steps read the cache, then a pass writes it."""

    @jitted("window", "small")
    def move(graphdef: None, params: Any, window: Any, kept: Any, x: Any, small: Any) -> Any:
        def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return over_layers(layer, x, [params, window])[0], None

        x, _ = jax.lax.scan(step, x, length=2)
        x, written = over_layers(layer, x, [params, window])
        return x, jax.tree.map(lambda a, k: a.at[1].set(k), written, kept), small.sum()

    window, kept = windows(0), tuple(a[0] for a in windows(1))
    x, small = jnp.ones((2, WIDTH))
    before, streamer = places(window), Streamer()
    for _ in range(2):
        _, after, _ = run_both(move, window, kept, x, small, streamer=streamer)
        assert all(are_deleted(window)) and places(after) == before
        window = after
    # a sum cannot take the place of `small`
    assert not any(are_deleted((kept, x, small)))


def test_what_is_stacked_is_written_between_layers() -> None:
    @jitted("window", "small")
    def move(graphdef: None, params: Any, window: jax.Array, x: jax.Array, small: Any) -> Any:
        def body(x: jax.Array, leaves: Any) -> Any:
            x, _ = layer(x, leaves)
            return x, x

        x, made = jax.lax.scan(body, x, (params, window))
        return x, window.at[:, 0].set(made), small.sum()

    window, (x, small) = jnp.stack(windows(0)), jnp.ones((2, WIDTH))
    expected = move(None, WEIGHTS, *[jnp.array(a) for a in (window, x, small)])
    got = Streamer()(move, None, keep_layers("blocks.w", WEIGHTS), window, x, small)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    assert are_deleted((window, x, small)) == [True, False, False]


@pytest.mark.parametrize("is_read_later", [False, True])
def test_what_is_read_later_is_kept_until_then(is_read_later: bool) -> None:
    @jitted("window")
    def move(graphdef: None, params: Any, window: Any, x: jax.Array) -> Any:
        x, written = over_layers(layer, x, [params, window])
        return x, written, sum(window) if is_read_later else None

    window = windows(0)
    before = places(window)
    _, after, _ = run_both(move, window, jnp.ones(WIDTH))
    assert (places(after) == before) is not is_read_later
    assert all(are_deleted(window)) is not is_read_later


def test_a_layer_leaves_something_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner waits for this result, to know that the layer's weights can be released."""

    @jitted("window")
    def move(graphdef: None, params: Any, window: jax.Array) -> Any:
        return over_layers(lambda x, w: (jnp.tanh(x @ w), None), window, params)[0] + 1.0

    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    x = jnp.ones(WIDTH)
    run_both(move, x, streamer=Streamer(stays=False))
    assert x.is_deleted() and len(waited) == COUNT - 2 and all(waited)


@jax.jit
def _function(params: Any, x: jax.Array, window: Any) -> Any:
    return over_layers(layer, x, [params, window])[0], window


def _loop(params: Any, x: jax.Array, window: Any) -> Any:
    return jax.lax.scan(lambda c, _: (_function(params, *c), None), (x, window), length=2)[0]


@pytest.mark.parametrize("passes_on", [_function, _loop])
def test_one_array_under_two_names_is_never_given_away(passes_on: Any) -> None:
    @jitted("window")
    def move(graphdef: None, params: Any, x: jax.Array, window: Any) -> Any:
        x, again = passes_on(params, x, window)
        x, written = over_layers(layer, x, [params, window])
        return x, written, sum(again)

    run_both(move, jnp.ones(WIDTH), windows(0))


def test_one_array_as_two_inputs_is_never_given_away() -> None:
    @jitted("window")
    def move(graphdef: None, params: Any, x: jax.Array, window: Any) -> Any:
        def both(x: jax.Array, leaves: Any) -> Any:
            weight, seen, same = leaves
            return layer(x, [weight, seen + same])

        return over_layers(both, x, [params, window, window])

    run_both(move, jnp.ones(WIDTH), windows(0))


@pytest.mark.parametrize("results", [1, 2])
def test_what_a_function_made_is_the_programs_own(results: int) -> None:
    """A function passes on ownership, unless two of its results are the same array."""

    @jax.jit
    def inner(params: Any, x: jax.Array, window: Any) -> Any:
        x, written = over_layers(layer, x, [params, window])
        return x, *[written] * results

    @jitted("window")
    def move(graphdef: None, params: Any, x: jax.Array, window: Any) -> Any:
        x, written, *others = inner(params, x, window)
        x, again = over_layers(layer, x, [params, written])
        return x, again, [sum(other) for other in others]

    window = windows(0)
    before = places(window)
    _, after, _ = run_both(move, jnp.ones(WIDTH), window)
    assert all(are_deleted(window)) and (places(after) == before) is (results == 1)
