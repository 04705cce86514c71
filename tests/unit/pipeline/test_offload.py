"""`--offload` changes where weights are and nothing else."""

from __future__ import annotations

import functools
import gc
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sanawm_jax.core import streaming
from sanawm_jax.errors import InputError
from sanawm_jax.pipeline.generate import SanaWM
from sanawm_jax.pipeline.random_weights import write_random
from sanawm_jax.pipeline.stage2 import LTX2Refiner, RefineOptions

BOUND = 1e-6  # relative: layers are compiled apart from each other


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from sanawm_jax.pipeline.random_weights import TINY

    out = tmp_path_factory.mktemp("offload") / "w"
    return write_random(out, part="all", sizes=TINY)


class Layers:
    """Which layers' weights are on the device, by the arrays that were uploaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.arrays: list[tuple[Any, weakref.ref]] = []
        self.most = 0
        upload = streaming.Streamer._bring

        def counted(streamer: Any, slices: Any) -> Any:
            arrays = upload(streamer, slices)
            key = streaming._key(slices)
            self.arrays += [(key, weakref.ref(a)) for a in arrays]
            gc.collect()
            self.most = max(self.most, len(self.alive()))
            return arrays

        monkeypatch.setattr(streaming.Streamer, "_bring", counted)

    def alive(self) -> set[Any]:
        return {key for key, array in self.arrays if array() is not None}

    def seen(self) -> set[Any]:
        return {key for key, _ in self.arrays}


def assert_close(a: Any, b: Any) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert np.isfinite(a).all() and np.abs(b).max() > 0.1
    np.testing.assert_allclose(a, b, rtol=0, atol=BOUND * np.abs(b).max())


def test_stage1(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def make(offload: str) -> Any:
        model = SanaWM.from_pretrained(folders[0], dtype="float32", offload=offload)
        image = Image.new("RGB", (64, 64), (200, 30, 30))
        made = model(
            image, "a room", action="w-16", intrinsics="60,60,32,32", num_frames=17, height=64,
            width=64, steps=3, cfg_scale=3.0, text_length=8, progress=False,
        )  # fmt: skip
        return made, model

    kept, model = make("none")
    assert set(model._parts) == {"text", "encoder", "transformer", "decoder"}
    moved, model = make("model")
    assert set(model._parts) == {"decoder"}  # one at a time
    np.testing.assert_array_equal(moved.latents, kept.latents)
    np.testing.assert_array_equal(moved.frames, kept.frames)
    layers = Layers(monkeypatch)
    streamed, _ = make("block")
    assert_close(streamed.latents, kept.latents)
    # 4 layers of the DiT and 2 of the text tower passed, no more than two at once
    assert len(layers.seen()) == 6 and layers.most == 2
    gc.collect()
    assert not layers.alive()  # gone with the networks


@pytest.mark.parametrize("block_size", [3, 0])
def test_refiner(folders: list[Path], block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 8, 6, 2, 2)).astype(np.float32)

    def refine(offload: str) -> np.ndarray:
        options = RefineOptions(refiner_block_size=block_size)
        refiner = LTX2Refiner.from_pretrained(
            folders[1], dtype="float32", offload=offload, options=options
        )
        return refiner(latents, "a room", progress=False)

    kept = refine("none")
    np.testing.assert_array_equal(refine("model"), kept)
    layers = Layers(monkeypatch)
    assert_close(refine("block"), kept)
    # 2 of Gemma 3; 3 of the transformer, whose text layers pass once and on their own
    assert len(layers.seen()) == 2 + 3 + 3 and layers.most == 2


def test_layers_are_in_page_locked_memory() -> None:
    stack = streaming.HostStack(np.ones((2, 3, 4), np.float32), 1)
    part = stack.part((1,))
    assert part.shape == (3, 4) and part.sharding.memory_kind == streaming.PINNED
    assert streaming.upload(part).sharding.memory_kind == jax.devices()[0].default_memory().kind


def test_reverse_scans_constants_and_what_is_collected() -> None:
    """A scan over layers inside a compiled function, run in reverse, with outputs a layer."""

    @jax.jit
    def inner(w: jax.Array, x: jax.Array, bias: jax.Array) -> Any:
        def body(x: jax.Array, w: jax.Array) -> Any:
            return jnp.tanh(x @ w) + bias, x.sum()

        return jax.lax.scan(body, x, w, reverse=True)

    @functools.partial(jax.jit, static_argnames=("graphdef", "scale"))
    def whole(graphdef: None, params: Any, x: jax.Array, *, scale: float) -> Any:
        y, sums = inner(params["w"], x * scale, params["b"])
        return {"y": y + 1.0, "sums": sums}

    rng = np.random.default_rng(0)
    w = rng.standard_normal((5, 4, 4)).astype(np.float32)
    x, b = rng.standard_normal((2, 4)).astype(np.float32), np.ones(4, np.float32)
    expected = whole(None, {"w": w, "b": b}, jnp.asarray(x), scale=2.0)
    run = streaming.Streamer()
    for _ in range(2):
        params = {"w": streaming.HostStack(w, 1), "b": jnp.asarray(b)}
        got = run(whole, None, params, jnp.asarray(x), scale=2.0)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)

    @functools.partial(jax.jit, static_argnames="graphdef")
    def outside(graphdef: None, params: Any, x: jax.Array) -> jax.Array:
        return x @ params["w"][0]

    with pytest.raises(ValueError, match="outside of a scan"):
        run(outside, None, {"w": streaming.HostStack(w, 1)}, jnp.asarray(x))


def test_what_is_given_away_is_written_in_place() -> None:
    """A window read by every layer, then written: it is held once, and what is kept stays."""

    @functools.partial(jax.jit, static_argnames="graphdef", donate_argnames=("window", "small"))
    def move(graphdef: None, params: Any, window: jax.Array, x: jax.Array, small: jax.Array) -> Any:
        def body(x: jax.Array, layer: Any) -> Any:
            w, seen = layer
            x = jnp.tanh(x @ w) + seen.sum(0)
            return x, x

        x, made = jax.lax.scan(body, x, (params["w"], window))
        return x, window.at[:, 0].set(made), small.sum()

    rng = np.random.default_rng(0)
    w, window = (rng.standard_normal((5, n, 4)).astype(np.float32) for n in (4, 3))
    x, small = rng.standard_normal((2, 4)).astype(np.float32)
    given = [jnp.array(a) for a in (window, x, small)]
    expected = move(None, {"w": w}, *[jnp.array(a) for a in given])
    run = streaming.Streamer()
    got = run(move, None, {"w": streaming.HostStack(w, 1)}, *given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    # a sum cannot take the place of `small`
    assert [a.is_deleted() for a in given] == [True, False, False]


def test_unknown_name(folders: list[Path]) -> None:
    with pytest.raises(InputError, match="--offload=disk is unknown; use one of none, model, b"):
        SanaWM.from_pretrained(folders[0], offload="disk")
