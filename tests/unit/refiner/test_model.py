"""Properties of the refiner's forward pass that hold for any weights."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.core.params import Params, apply, build, init
from sanawm_jax.refiner.kv_window import open_window
from sanawm_jax.refiner.model import Refiner
from sanawm_jax.refiner.rope import VideoRope, frame_window, video_rope
from sanawm_jax.refiner.sampler import block_noise
from tests.tiny_refiner import CONFIG

FRAMES, ROWS, COLUMNS = 4, 2, 2
ROPE = video_rope(CONFIG, 8, ROWS, COLUMNS, 16.0)


@pytest.fixture(scope="module")
def params() -> Params:
    return init(Refiner, CONFIG, jax.random.key(0))


def inputs(rng: np.random.Generator) -> tuple[Any, ...]:
    latents = rng.standard_normal((1, FRAMES, ROWS, COLUMNS, 4), np.float32)
    times = np.array([0.0, 700.0, 700.0, 700.0], np.float32).reshape(1, FRAMES, 1)
    text = rng.standard_normal((1, 5, 8), np.float32)
    return (
        jnp.asarray(latents),
        jnp.asarray(times),
        jnp.asarray(text),
        frame_window(ROPE, 0, FRAMES),
    )


def forward(params: Params, *args: Any, **static: Any) -> Any:
    graphdef, _ = build(Refiner, CONFIG)
    return jax.jit(functools.partial(apply, graphdef, **static))(params, *args)


def test_the_sink_sees_itself_and_the_rest_sees_the_sink(
    params: Params, rng: np.random.Generator
) -> None:
    latents, times, text, rope = inputs(rng)
    before, _ = forward(params, latents, times, text, rope, sink_frames=1)
    after, _ = forward(params, latents.at[:, 2:].add(1.0), times, text, rope, sink_frames=1)
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert np.abs(before[:, 1] - after[:, 1]).max() > 1e-4
    after, _ = forward(params, latents.at[:, 0].add(1.0), times, text, rope, sink_frames=1)
    assert np.abs(before[:, 1] - after[:, 1]).max() > 1e-4


def test_a_captured_sink_equals_a_sink_in_the_sequence(
    params: Params, rng: np.random.Generator
) -> None:
    latents, times, text, rope = inputs(rng)
    whole, _ = forward(params, latents, times, text, rope, sink_frames=1)
    sink_rope, rest_rope = frame_window(ROPE, 0, 1), frame_window(ROPE, 1, FRAMES - 1)
    _, sink = forward(params, latents[:, :1], times[:, :1], text, sink_rope, capture=True)
    graphdef, _ = build(Refiner, CONFIG)
    turn = functools.partial(apply, graphdef, params, rope=sink_rope, method="turn")
    window = open_window(sink, turn, history_slots=4)
    rest, _ = jax.jit(functools.partial(apply, graphdef))(
        params, latents[:, 1:], times[:, 1:], text, rest_rope, window=window
    )
    np.testing.assert_allclose(rest, whole[:, 1:], atol=2e-5)


def test_one_timestep_stands_for_all_tokens(params: Params, rng: np.random.Generator) -> None:
    latents, _, text, rope = inputs(rng)
    one, _ = forward(params, latents, jnp.full((1, 1, 1), 300.0), text, rope)
    all_, _ = forward(params, latents, jnp.full((1, FRAMES, ROWS * COLUMNS), 300.0), text, rope)
    np.testing.assert_allclose(one, all_, atol=2e-6)


def test_gradients_do_not_depend_on_remat(params: Params, rng: np.random.Generator) -> None:
    latents, times, text, rope = inputs(rng)
    graphdef, _ = build(Refiner, CONFIG)

    def loss(params: Params, remat: str) -> jax.Array:
        velocity, _ = apply(
            graphdef, params, latents, times, text, rope, sink_frames=1, remat=remat
        )
        return jnp.mean(velocity**2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain, saved = gradient(params, "none"), gradient(params, "full")
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(plain))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(plain["blocks"]["attn"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), plain, saved)


def test_refuses_what_makes_no_sense(params: Params, rng: np.random.Generator) -> None:
    latents, times, text, rope = inputs(rng)
    with pytest.raises(ValueError, match="remat"):
        forward(params, latents, times, text, rope, remat="some")
    _, sink = forward(params, latents, times, text, rope, capture=True)
    window = open_window(sink, lambda k: k, history_slots=1)
    with pytest.raises(ValueError, match="a window holds the sink"):
        forward(params, latents, times, text, rope, window=window, sink_frames=1)


def test_rope_window() -> None:
    window = frame_window(ROPE, 3, 2)
    np.testing.assert_array_equal(window.frames, ROPE.frames[3:5])
    assert window.rows is ROPE.rows
    traced = jax.jit(lambda first: frame_window(VideoRope(*map(jnp.asarray, ROPE)), first, 2))
    np.testing.assert_array_equal(traced(3).frames, ROPE.frames[3:5])


def test_noise_does_not_depend_on_the_cut() -> None:
    key, shape = jax.random.key(3), (1, ROWS, COLUMNS, 4)
    whole = block_noise(key, 1, 6, shape)
    cut = jnp.concatenate([block_noise(key, 1, 4, shape), block_noise(key, 5, 2, shape)], 1)
    np.testing.assert_array_equal(whole, cut)
    assert whole.shape == (1, 6, ROWS, COLUMNS, 4)
    assert abs(float(jnp.std(whole)) - 1.0) < 0.2
