"""Layers in host memory give the same results, and use the device's memory but not more."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.core.stack import over_layers
from sanawm_jax.memory import streaming
from sanawm_jax.memory.program_pieces import Layer
from sanawm_jax.memory.streaming import Streamer, keep_layers, keep_separate_layers
from tests.streamed_layers import Layers

COUNT, WIDTH = 8, 4
BYTES = 4 * WIDTH * (WIDTH + 1)  # of one layer
WEIGHTS = {
    "w": np.random.default_rng(0).standard_normal((COUNT, WIDTH, WIDTH)).astype(np.float32),
    "b": np.random.default_rng(1).standard_normal((COUNT, WIDTH)).astype(np.float32),
}
PLACES = [keep_layers, keep_separate_layers]


@functools.partial(jax.jit, static_argnames="graphdef")
def network(graphdef: None, params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """Runs all layers twice in a loop, and once more to return their outputs."""

    def layer(x: jax.Array, leaves: Any) -> tuple[jax.Array, jax.Array]:
        # the product is a compiled function of its own
        return jnp.tanh(jnp.einsum("nc,cd->nd", x, leaves["w"]) + leaves["b"]), x.sum()

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return over_layers(layer, x, params)[0], None

    return over_layers(layer, jax.lax.scan(step, x + 1.0, length=2)[0], params)


@functools.partial(jax.jit, static_argnames="graphdef")
def biases(graphdef: None, params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """Runs layers that add a bias and return the sum."""
    return over_layers(lambda x, bias: (x + bias, x + bias), x, params)


def host(place: Callable[..., Any]) -> dict[str, Any]:
    return {name: place(f"blocks.{name}", array) for name, array in WEIGHTS.items()}


def tokens(count: int) -> jax.Array:
    return jnp.linspace(-1.0, 1.0, count * WIDTH).reshape(count, WIDTH)


def assert_close(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), a, b)


class Device:
    """Simulates a backend's report on memory, with `other` bytes in addition to the layers.

    The limit minus the margin is 3200 bytes, or 40 layers.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.limit, self.other, self.peak = 3200 + 3200 // 31, 0, 0
        monkeypatch.setattr(streaming, "_measured", {})
        self.layers = Layers(monkeypatch, self.look)
        monkeypatch.setattr(streaming, "memory_stats", self.stats)

    def in_use(self) -> int:
        return self.other + BYTES * self.layers.alive()

    def look(self) -> None:
        self.peak = max(self.peak, self.in_use())

    def stats(self) -> dict[str, int]:
        return {
            "bytes_limit": self.limit,
            "bytes_in_use": self.in_use(),
            "peak_bytes_in_use": self.peak,
        }


@pytest.mark.parametrize("place", PLACES)
def test_layers_stay_as_far_as_memory_goes(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    layers, params, run = device.layers, host(place), Streamer()
    weights = {n: a if place is keep_layers else tuple(a) for n, a in WEIGHTS.items()}

    def brought(count: int, other: int) -> list[int]:
        """Returns the positions of the layers that a call uploads, in order."""
        assert run is not None
        device.other = other
        layers.forget()
        assert_close(run(network, None, params, x := tokens(count)), network(None, weights, x))
        assert device.peak <= 3200
        if place is keep_layers:
            return [layer[0].index[0] for layer in layers.brought]
        stacks = [stack for stack, _ in zip(params["b"], range(COUNT), strict=True)]
        return [stacks.index(layer[0].stack) for layer in layers.brought]

    def brings(found: list[int], streamed: list[int]) -> bool:
        """Whether the first pass uploads all layers, and later passes only the streamed ones."""
        usual_pass = [*streamed[1:], streamed[0]]  # the last one is for the pass after
        return sorted(found[: COUNT + 1]) == sorted([*range(COUNT), streamed[0]]) and (
            found[COUNT + 1 :] == 2 * usual_pass
        )

    passes = 3 * list(range(COUNT))
    usual = 3200 - 7 * BYTES - BYTES // 2  # beside it 2 layers, and 5.5 more
    assert brought(6, usual) == passes and layers.most == 2
    # five stay, the others are spread evenly
    streamed = [2, 5, 7]
    assert brings(brought(6, usual), streamed) and layers.most <= 5 + 2
    for _ in range(2):
        assert brought(6, usual) == 3 * [5, 7, 2] and layers.most == 5 + 2
    # a smaller argument needs no more, so nothing is dropped, or tried out, for it
    assert brought(3, usual - 10) == 3 * [5, 7, 2] and layers.most == 5 + 2
    assert brought(3, usual - 10) == 3 * [5, 7, 2]
    # a larger one needs an unknown amount: it has two layers, until it has shown what it needs
    more = usual + 3 * BYTES
    assert brought(9, more) == [*passes, 0] and layers.most <= 5 + 2
    assert layers.alive() == 2
    # beside which there was room for 2.5, but all that is known is what the others reached
    assert brought(9, more) == 3 * [*range(1, COUNT), 0] and layers.most == 2
    # what is known of the first one still holds
    assert brings(brought(6, usual), streamed)
    run = None
    assert not layers.alive()
    # what the process knows serves another run: its first call shows the order of layers alone
    run = Streamer()
    assert brought(6, usual) == passes and layers.most == 2
    assert brings(brought(6, usual), streamed)
    run = Streamer()
    busy = usual + 2 * BYTES  # something else has come to be on the device
    brought(6, busy)
    assert brings(brought(6, busy), [1, 3, 4, 6, 7]) and device.peak <= 3200


def test_room_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    run, params = Streamer(), host(keep_separate_layers)
    for _ in range(3):
        run(network, None, params, tokens(2))
    assert len(device.layers.brought) == 3 * COUNT + COUNT
    assert device.layers.alive() == COUNT + 2  # and the last two of the first call


@pytest.mark.parametrize("place", PLACES)
def test_nothing_stays_if_it_must_not_or_memory_is_unknown(
    place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, params = Device(monkeypatch), host(place)
    runners = [Streamer(stays=False), Streamer()]
    while runners:
        run = runners[0]
        for _ in range(2):
            run(network, None, params, tokens(2))
            assert device.layers.most == 2
        del run
        runners.pop(0)
        assert not device.layers.alive()
        monkeypatch.setattr(streaming, "memory_stats", dict)


def test_the_next_layer_is_brought_and_started_before_the_last_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers, events = Layers(monkeypatch, lambda: events.append("bring")), []
    waited = []
    wait = jax.block_until_ready

    def noted(arrays: Any) -> Any:
        events.append("wait")
        waited.append(arrays)
        return wait(arrays)

    monkeypatch.setattr(jax, "block_until_ready", noted)
    run, params = Streamer(stays=False), host(keep_separate_layers)["b"]
    _, given = run(biases, None, params, tokens(1))
    assert events == ["bring", "bring", *["wait", "bring"] * (COUNT - 2)] and layers.most == 2
    for (_, output), expected in zip(waited, given, strict=False):
        assert output is expected  # of the layer before the one that runs

    # the order is known: a copy is started before the layers that it is to run beside
    (program,) = run._programs.values()
    for piece in program.plan.pieces:
        if isinstance(piece, Layer):
            piece.function = functools.partial(
                lambda function, *given: events.append("run") or function(*given), piece.function
            )
    usual = ["wait", "bring", "run"]
    for first in (["wait", "bring", *usual], usual):
        events.clear()
        run(biases, None, params, tokens(1))
        assert events == [*first, *usual * (COUNT - 1)] and layers.most == 2


def test_what_nothing_reads_later_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def count() -> None:
        found.append(sum(a.shape == x.shape for a in jax.live_arrays()))

    x, params = tokens(7), host(keep_separate_layers)
    Layers(monkeypatch, count)
    Streamer()(network, None, params, x)
    # given, given plus one, the last layer's result, and those of the two before it
    assert len(found) == 3 * COUNT and max(found) <= 5


def test_one_function_for_all_layers() -> None:
    run, params = Streamer(), host(keep_separate_layers)
    run(network, None, params, tokens(2))
    run(biases, None, params["b"], tokens(2))
    program, other = run._programs.values()
    assert [layer[0].stack for layer in program.layers] == list(params["b"])
    assert other.layers == tuple(layer[:1] for layer in program.layers)
    functions = [p.function for p in program.plan.pieces if isinstance(p, Layer)]
    assert len(functions) == COUNT and len(set(functions)) == 1
    assert functions[0]._cache_size() == 1  # pyright: ignore


def test_leaves_are_in_page_locked_memory() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    (_, separate), stacked = keep_separate_layers("blocks.w", array), keep_layers("blocks.w", array)
    parts = [separate.part(()), stacked.part((1,))]
    kind = jax.devices()[0].default_memory().kind
    for part, copy in zip(parts, streaming.upload(parts), strict=True):
        assert part.sharding.memory_kind == streaming.PINNED
        assert copy.sharding.memory_kind == kind
        np.testing.assert_array_equal(copy, array[1])
    # of two stacked axes, which nested scans run over, and of none
    assert keep_separate_layers("segments.0.runs.0.w", array).depth == 2
    assert isinstance(keep_separate_layers("embed.kernel", array), jax.Array)


def test_reverse_scans_constants_and_what_is_collected() -> None:
    """A scan over layers inside a compiled function, in reverse order, with outputs per layer."""

    @jax.jit
    def inner(w: jax.Array, x: jax.Array, bias: jax.Array) -> Any:
        def body(x: jax.Array, w: jax.Array) -> Any:
            return jnp.tanh(x @ w) + bias, x.sum()

        return jax.lax.scan(body, x, w, reverse=True)

    @functools.partial(jax.jit, static_argnames=("graphdef", "scale"))
    def whole(graphdef: None, params: Any, x: jax.Array, *, scale: float) -> Any:
        y, sums = inner(params["w"], x * scale, params["b"])
        return {"y": y + 1.0, "sums": sums}

    x, b = tokens(2), jnp.ones(4)
    run = Streamer()
    for _ in range(2):
        got = run(whole, None, {**host(keep_layers), "b": b}, x, scale=2.0)
        assert_close(got, whole(None, {**WEIGHTS, "b": b}, x, scale=2.0))


def _first(params: Any, x: jax.Array) -> Any:
    return x @ jax.tree.leaves(params)[-1]


def _second_of_stack(params: Any, x: jax.Array) -> Any:
    return x @ params["w"][1]


def _product(params: Any, x: jax.Array) -> Any:
    return jnp.einsum("nc,cd->nd", x, params["w"][0])


def _rows(params: Any, x: jax.Array) -> Any:
    return jax.lax.scan(lambda x, row: (x + row, None), x, params["w"][0])


def _given_back(params: Any, x: jax.Array) -> Any:
    return x, params["w"]


@pytest.mark.parametrize(
    ("place", "function"),
    [
        (keep_layers, _second_of_stack),
        (keep_layers, _given_back),
        (keep_separate_layers, _first),
        (keep_separate_layers, _product),
        (keep_separate_layers, _rows),
        (keep_separate_layers, _given_back),
    ],
)
def test_host_memory_is_for_layers(place: Any, function: Callable[..., Any]) -> None:
    @functools.partial(jax.jit, static_argnames="graphdef")
    def outside(graphdef: None, params: Any, x: jax.Array) -> Any:
        return function(params, x)

    with pytest.raises(ValueError, match="outside of a layer"):
        Streamer()(outside, None, {"w": host(place)["w"]}, tokens(1))
