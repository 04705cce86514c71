"""Separate layers give the result of stacked layers, without copies of weights or KV cache."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sanawm_jax.checkpoints.folder import Place
from sanawm_jax.core.params import Params, build, from_leaves, init, leaves
from sanawm_jax.memory.programs import equations, trace
from sanawm_jax.memory.streaming import (
    Runner,
    Streamer,
    call,
    keep_separate_layers,
    separate_layers,
)
from sanawm_jax.refiner import sampler
from sanawm_jax.refiner.config import RefinerConfig
from sanawm_jax.refiner.kv_window import KVWindow
from sanawm_jax.refiner.model import Refiner
from sanawm_jax.refiner.rope import VideoRope, video_rope
from sanawm_jax.refiner.sampler import (
    SIGMAS,
    RefinerText,
    capture_sink,
    read_text,
    refine,
    refine_block,
)
from tests.tiny_refiner import CONFIG

PLAIN = dataclasses.replace(CONFIG, num_layers=3)
CASES = {
    "interleaved": dict(rope_type="interleaved"),
    "split": dict(rope_type="split"),
    "modulated_text": dict(rope_type="split", cross_attn_mod=True, gated_attn=True),
    "static_modulation": dict(cross_attn_mod=True, use_prompt_adaln_single=False),
}
FRAMES, ROWS, COLUMNS = 15, 2, 3  # 1 sink, 4 blocks of 3, a last one of 2
WINDOW = 7  # 6 frames of history: trims from the third block on


def model(case: str) -> tuple[RefinerConfig, nnx.GraphDef, Params]:
    config = dataclasses.replace(PLAIN, **CASES[case])
    params = init(Refiner, config, jax.random.key(0))
    # tables and biases are small or zero at first
    flat = {
        path: leaf + 0.2 * jax.random.normal(jax.random.key(i), leaf.shape)
        for i, (path, leaf) in enumerate(leaves(params))
    }
    return config, build(Refiner, config)[0], from_leaves(flat)


def separate(params: Params, place: Place = separate_layers) -> Params:
    return from_leaves({p: place(p, np.asarray(a)) for p, a in leaves(params)})


def prompt() -> RefinerText:
    return RefinerText(jax.random.normal(jax.random.key(1), (1, 5, 8)))


def block_of(
    case: str, place: Place = separate_layers, run: Runner = call
) -> tuple[Any, Params, KVWindow, tuple[Any, ...]]:
    """Returns a KV cache that holds the sink, and the other arguments of `refine_block`."""
    config, graphdef, params = model(case)
    rope = video_rope(config, FRAMES, ROWS, COLUMNS, 16.0)
    params, text = read_text(
        graphdef, separate(params, place), prompt(), dtype=jnp.float32, run=run
    )
    sink = jnp.ones((1, 1, ROWS, COLUMNS, 4))
    sizes = dict(history_slots=6, dtype=jnp.float32)
    window = run(capture_sink, graphdef, params, sink, text, rope, **sizes)
    clean, noise = jax.random.normal(jax.random.key(2), (2, 1, 3, ROWS, COLUMNS, 4))
    return graphdef, params, window, (clean, noise, text, rope, jnp.asarray(SIGMAS))


@pytest.mark.parametrize("block_frames", [3, 0])
@pytest.mark.parametrize("case", CASES)
def test_equals_stacked_layers(case: str, block_frames: int) -> None:
    config, graphdef, params = model(case)
    clip = jax.random.normal(jax.random.key(3), (1, FRAMES, ROWS, COLUMNS, 4))
    rope = video_rope(config, FRAMES, ROWS, COLUMNS, 16.0)

    def refined(params: Params) -> np.ndarray:
        out = refine(
            graphdef, params, clip, prompt(), rope, block_frames=block_frames,
            window_frames=WINDOW, dtype=jnp.float32, progress=False,
        )  # fmt: skip
        return np.asarray(out)

    stacked = refined(params)
    assert np.abs(stacked - clip)[:, 1:].max() > 0.3
    bound = 1e-6 * np.abs(stacked).max()
    np.testing.assert_allclose(refined(separate(params)), stacked, rtol=0, atol=bound)


@pytest.mark.parametrize("case", CASES)
def test_text_is_read_once_if_nothing_modulates_it(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding the text once changes only roundings, and the layers that encode it are released."""
    config, graphdef, params = model(case)
    rope = video_rope(config, FRAMES, ROWS, COLUMNS, 16.0)
    clip = jax.random.normal(jax.random.key(3), (1, 7, ROWS, COLUMNS, 4))
    kept, text = read_text(graphdef, params, prompt(), dtype=jnp.float32)
    missing = {path for path, leaf in leaves(kept) if leaf is None}
    if config.modulates_text:
        assert text.keys is None and not missing
        return
    assert text.keys is not None
    assert text.keys.k.shape == (config.num_layers, 1, 5, 2, 16)
    assert {path.rpartition(".")[0] for path in missing} == {
        *(f"blocks.cross_attn.{name}" for name in ("k", "v", "k_norm")),
        *(f"caption.linear_{i}" for i in (1, 2)),
    }

    def refined(params: Params, text: RefinerText) -> np.ndarray:
        return np.asarray(
            refine(graphdef, params, clip, text, rope, dtype=jnp.float32, progress=False)
        )

    once = refined(kept, text)
    monkeypatch.setattr(sampler, "read_text", lambda graphdef, params, text, **_: (params, text))
    np.testing.assert_allclose(refined(params, prompt()), once, rtol=0, atol=2e-6)


def test_one_loop_and_no_copies() -> None:
    """The loop over steps is the only one, so nothing copies weights or caches out of a stack."""
    graphdef, params, window, args = block_of("split")
    program = trace(refine_block, graphdef, params, window, *args, dtype=jnp.float32)
    assert [e.primitive.name for e in equations(program)].count("scan") == 1
    lowered = refine_block.lower(graphdef, params, window, *args, dtype=jnp.float32)
    # the last pass, after the loop, writes a window that it reads; this order alone needs no copy
    # of it, and a CPU's compiler drops what says so
    assert "optimization_barrier" in lowered.as_text()
    steps = lowered.compile().as_text().partition("ENTRY")[0]
    buffer = window.keys.k[0]
    sizes = "|".join(
        ",".join(map(str, shape)) for shape in (buffer.shape, (1, 7 * 6, *buffer.shape[3:]))
    )
    assert not re.findall(rf"= f32\[(?:{sizes})\]\S* copy\(.*", steps)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("frames", [3, 2])
def test_the_window_is_donated(frames: int, is_streamed: bool) -> None:
    place, run = (keep_separate_layers, Streamer()) if is_streamed else (separate_layers, call)
    graphdef, params, window, (clean, noise, *rest) = block_of("split", place, run)
    before = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(window.keys)]
    block = clean[:, :frames], noise[:, :frames]
    _, after = run(refine_block, graphdef, params, window, *block, *rest, dtype=jnp.float32)
    assert all(a.is_deleted() for a in jax.tree.leaves(window.keys))
    assert [a.unsafe_buffer_pointer() for a in jax.tree.leaves(after.keys)] == before
    arrays = [a for a in jax.tree.leaves((params, rest, after)) if isinstance(a, jax.Array)]
    assert not any(a.is_deleted() for a in arrays)


@pytest.mark.parametrize("frames", [3, 2])
def test_unfilled_slots_have_no_influence(frames: int) -> None:
    def refined(junk: float) -> tuple[np.ndarray, KVWindow]:
        graphdef, params, window, (clean, noise, *rest) = block_of("split")

        def spoil(a: jax.Array, value: float) -> jax.Array:
            return a.at[:, 1:].set(value)

        keys = dataclasses.replace(
            window.keys,
            # Only keys can be NaN: a masked value has the weight 0, and 0 times NaN is NaN.
            k=jax.tree.map(lambda a: spoil(a, np.nan if junk else 0.0), window.keys.k),
            v=jax.tree.map(lambda a: spoil(a, junk), window.keys.v),
        )
        window = dataclasses.replace(window, keys=keys)
        cut = (clean[:, :frames], noise[:, :frames], *rest)
        out, window = refine_block(graphdef, params, window, *cut, dtype=jnp.float32)
        return np.asarray(out), window

    plain, _ = refined(0.0)
    spoilt, window = refined(1e4)
    np.testing.assert_array_equal(spoilt, plain)
    slots = jnp.arange(window.history_slots) + 1
    for k in window.keys.k:
        assert np.isfinite(k[:, slots[:frames]]).all() and np.isnan(k[:, slots[frames:]]).all()


def test_the_last_pass_moves_nothing() -> None:
    """At noise level 0 the frames stay exactly as they are, for any velocity."""
    graphdef, params, window, (clean, noise, text, rope, _) = block_of("split")
    out, _ = refine_block(
        graphdef, params, window, clean, noise, text, VideoRope(*rope), jnp.asarray([0.5]),
        dtype=jnp.float32,
    )  # fmt: skip
    start = jax.jit(sampler.add_noise)(clean, noise, jnp.float32(0.5))
    np.testing.assert_array_equal(out, start)
