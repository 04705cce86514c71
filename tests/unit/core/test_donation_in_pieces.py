"""A program in pieces writes in place what is given away, and nothing else."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.core.stack import over_layers
from sanawm_jax.core.streaming import Streamer, keep_layers, keep_separate_layers

COUNT, WIDTH = 3, 4
WEIGHTS = np.random.default_rng(0).standard_normal((COUNT, WIDTH, WIDTH)).astype(np.float32)


def jitted(*donated: str) -> Any:
    return functools.partial(jax.jit, static_argnames="graphdef", donate_argnames=donated)


def windows(seed: int) -> tuple[jax.Array, ...]:
    """Three frames a layer."""
    return tuple(jax.random.normal(jax.random.key(seed), (COUNT, 3, WIDTH)))


def layer(x: jax.Array, leaves: Any) -> tuple[jax.Array, jax.Array]:
    """Reads a window, and gives it with one frame replaced."""
    weight, seen = leaves
    x = jnp.tanh(x @ weight) + seen.sum(0)
    return x, seen.at[0].set(x)


def run_both(function: Any, *args: Any) -> tuple[Any, Any]:
    """Results of the pieces, for these arguments, and of the whole program, for copies of them."""
    expected = function(None, tuple(WEIGHTS), *jax.tree.map(jnp.array, args))
    streamed = keep_separate_layers("blocks.w", WEIGHTS)
    got = Streamer()(function, None, streamed, *args)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    return got, expected


def are_deleted(tree: Any) -> list[bool]:
    return [a.is_deleted() for a in jax.tree.leaves(tree)]


def places(tree: Any) -> list[int]:
    return [a.unsafe_buffer_pointer() for a in jax.tree.leaves(tree)]


def test_each_layer_writes_its_own() -> None:
    """As the refiner: steps that read the window, a pass that writes it, more to write after it."""

    @jitted("window", "small")
    def move(graphdef: None, params: Any, window: Any, kept: Any, x: Any, small: Any) -> Any:
        def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return over_layers(layer, x, [params, window])[0], None

        x, _ = jax.lax.scan(step, x, length=2)
        x, written = over_layers(layer, x, [params, window])
        return x, jax.tree.map(lambda a, k: a.at[1].set(k), written, kept), small.sum()

    window, kept = windows(0), tuple(a[0] for a in windows(1))
    x, small = jnp.ones((2, WIDTH))
    before = places(window)
    (_, after, _), _ = run_both(move, window, kept, x, small)
    assert all(are_deleted(window)) and places(after) == before
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
    (_, after, _), _ = run_both(move, window, jnp.ones(WIDTH))
    assert (places(after) == before) is not is_read_later
    assert all(are_deleted(window)) is not is_read_later


def test_a_layer_leaves_something_to_wait_for() -> None:
    """Else nothing would say when it has run, and its weights are free."""

    @jitted("window")
    def move(graphdef: None, params: Any, window: jax.Array) -> Any:
        return over_layers(lambda x, w: (jnp.tanh(x @ w), None), window, params)[0] + 1.0

    x = jnp.ones(WIDTH)
    run_both(move, x)
    assert x.is_deleted()


def _same(a: Any) -> Any:
    return a


@jax.jit
def _in_a_function(params: Any, x: jax.Array, window: Any, kept: Any) -> Any:
    x, written = over_layers(layer, x, [params, window])
    return x, written, kept


def _between(params: Any, x: jax.Array, window: Any, kept: Any) -> Any:
    kept = jax.tree.map(jax.jit(_same), kept)
    return x, jax.tree.map(lambda a: a * 2.0, window), kept


def _by_a_layer(params: Any, x: jax.Array, window: Any, kept: Any) -> Any:
    def passes(x: jax.Array, leaves: Any) -> Any:
        weight, seen, other = leaves
        return *layer(x, [weight, seen]), other

    def both(x: jax.Array, leaves: Any) -> Any:
        x, seen, other = passes(x, leaves)
        return x, {"seen": seen, "other": other}

    x, given = over_layers(both, x, [params, window, kept])
    return x, given["seen"], given["other"]


def _by_a_loop(params: Any, x: jax.Array, window: Any, kept: Any) -> Any:
    def turn(carry: Any, _: None) -> Any:
        x, window, kept = carry
        x, written = over_layers(layer, x, [params, window])
        return (x, written, kept), None

    return jax.lax.scan(turn, (x, window, kept), length=2)[0]


@pytest.mark.parametrize("passed_on", [_between, _in_a_function, _by_a_layer, _by_a_loop])
def test_an_array_under_two_names_is_never_given_away(passed_on: Any) -> None:
    """Neither one that the caller keeps, which a later layer could write, nor one of its own."""

    @jitted("window", "small")
    def move(graphdef: None, params: Any, x: jax.Array, window: Any, kept: Any, small: Any) -> Any:
        x, written, again = passed_on(params, x, window, kept)
        x, more = over_layers(layer, x, [params, again])
        # and of `small`, which the program may write, one name is written and the other is read
        other = jax.jit(_same)(small)
        x, _ = over_layers(lambda x, w: (x @ w + small, None), x, params)
        return x, written, more, small * 2.0, other

    window, kept = windows(0), windows(1)
    run_both(move, jnp.ones(WIDTH), window, kept, jnp.ones(WIDTH))
    assert not any(are_deleted(kept))
    # a loop's turns have one program, and the first does not own what it is given
    assert all(are_deleted(window)) is (passed_on is not _by_a_loop)
