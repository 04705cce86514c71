"""Every form of the DiT against numbers that upstream's own code computed.

tests/data/golden/README.md describes these numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from sanawm_jax.checkpoints import keymap
from sanawm_jax.checkpoints.files import Tensors
from sanawm_jax.checkpoints.upstream import is_ignored, upstream_table
from sanawm_jax.core import frame_attention
from sanawm_jax.core.params import Params, apply, build
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.keys import key_table
from sanawm_jax.dit.model import DiT
from sanawm_jax.dit.numerics import PRESETS, Numerics
from sanawm_jax.dit.state import DiTState, RecurrentCarry, SoftmaxCarry, Window
from sanawm_jax.sampling.rollout import denoise_chunk
from sanawm_jax.sampling.stage1 import Conditions

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
STARTS = (0, 4, 7, 10)
JUNE, JULY = PRESETS["streaming"], PRESETS["trainer"]
ALL = Window(4, 3, 4)
WINDOW = Window(4, 3, 2)


@functools.cache
def arrays(name: str) -> dict[str, Any]:
    """Returns the arrays of a golden file in our layout, in which channels are last."""
    found = {}
    with np.load(GOLDEN / f"{name}.npz") as file:
        for key, value in file.items():
            if value.ndim == 5:
                value = np.moveaxis(value, 1, -1)
            elif key.startswith(("text", "cfg3_text")) or key == "timesteps_per_frame":
                value = value[:, 0]
            found[key] = value
    return found


@functools.cache
def network(numerics: Numerics) -> tuple[Any, Params]:
    raw = json.loads((GOLDEN / "streaming_june/config.json").read_text())
    config = DiTConfig.from_json(raw["sanawm_jax_dit_config"])
    graphdef, abstract = build(DiT, dataclasses.replace(config, numerics=numerics))
    tensors = load_file(GOLDEN / "streaming_june/weights.safetensors")
    params = keymap.load(
        upstream_table(key_table(config)),
        abstract,
        Tensors(tensors),
        what="golden weights",
        ignore=is_ignored,
    )
    return graphdef, params


def difference(found: Any, expected: Any) -> float:
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def inputs_of(given: dict[str, Any], latents: str = "latents_noisy") -> dict[str, Any]:
    return {
        "latents": given[latents],
        "timesteps": given["timesteps_per_frame"],
        "text": given["text"],
        "text_mask": given["mask"],
        "camera": given["camera"],
        "plucker": given["plucker"],
    }


@functools.partial(jax.jit, static_argnames=("graphdef", "starts"))
def whole(graphdef: Any, params: Params, inputs: dict[str, Any], starts: Any = None) -> jax.Array:
    return apply(graphdef, params, **inputs, chunk_starts=starts)


# name of the folder, numerics, chunk starts
WHOLE = {
    "bidirectional_june": (PRESETS["chunk_causal"], None),
    "chunk_causal_june": (PRESETS["chunk_causal"], STARTS),
    "chunk_causal_july": (JULY, STARTS),
}


@pytest.mark.parametrize("folder", WHOLE)
def test_a_whole_clip(folder: str) -> None:
    numerics, starts = WHOLE[folder]
    given, expected = arrays(f"{folder}/inputs"), dict(arrays(f"{folder}/outputs"))
    graphdef, params = network(numerics)
    inputs = inputs_of(given)
    changed: dict[str, dict[str, Any]] = {
        "velocity": {},
        "velocity_no_camera": {"camera": None},
        "velocity_rotation_only": {"camera": given["camera_rotation_only"]},
    }
    if "velocity_scalar_timestep" in expected:
        every = np.broadcast_to(given["timestep_scalar"], inputs["timesteps"].shape)
        changed["velocity_scalar_timestep"] = {"timesteps": every}
    if "velocity_clean_t0" in expected:
        clean = arrays("streaming_june/inputs")["latents_clean"]
        changed["velocity_clean_t0"] = {
            "latents": clean,
            "timesteps": np.zeros_like(inputs["timesteps"]),
        }
    for name, change in changed.items():
        found = whole(graphdef, params, {**inputs, **change}, starts)
        assert difference(found, expected.pop(name)) < 1e-5, name
    expected.pop("velocity_bf16sdpa", None)  # see below
    if "velocity_starts_0_1_5_8" in expected:
        found = whole(graphdef, params, inputs, (0, 1, 5, 8))
        assert difference(found, expected.pop("velocity_starts_0_1_5_8")) < 1e-5
    if "velocity_from_chunk_size" in expected:
        other, params = network(dataclasses.replace(numerics, ffn_sees="clip"))
        found = whole(other, params, inputs, STARTS)
        assert difference(found, expected.pop("velocity_from_chunk_size")) < 1e-5
    assert not expected


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The softmax layers round queries, keys, values and results to bfloat16, as upstream's do."""

    def rounds(function: Any) -> Any:
        def run(*args: Any, **options: Any) -> jax.Array:
            half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), args)
            # products of bfloat16 numbers, summed in float32
            wide = jax.tree.map(lambda a: a.astype(jnp.float32), half)
            return function(*wide, **options).astype(jnp.bfloat16).astype(jnp.float32)

        return run

    for name in ("_attend", "attention_to_both"):  # of the self-attention layers alone
        monkeypatch.setattr(frame_attention, name, rounds(getattr(frame_attention, name)))
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("folder", ["bidirectional_june", "chunk_causal_june"])
def test_a_whole_clip_with_softmax_in_bfloat16(folder: str) -> None:
    numerics, starts = WHOLE[folder]
    found = whole(*network(numerics), inputs_of(arrays(f"{folder}/inputs")), starts)
    assert difference(found, arrays(f"{folder}/outputs")["velocity_bf16sdpa"]) < 5e-4


@pytest.mark.usefixtures("rounded")
def test_a_stream_with_softmax_in_bfloat16() -> None:
    expected = arrays("streaming_june/outputs")["velocity_all_cached_bf16sdpa"]
    assert difference(stream(JUNE, ALL)[0], expected) < 5e-4


def test_the_bidirectional_form_of_july() -> None:
    graphdef, params = network(JULY)
    found = whole(graphdef, params, inputs_of(arrays("bidirectional_june/inputs")))
    assert difference(found, arrays("bidirectional_july/outputs")["velocity"]) < 1e-5


def test_diffusers_cap_is_another_model_where_the_camera_moves() -> None:
    given, expected = arrays("bidirectional_june/inputs"), arrays("bidirectional_june/outputs")
    graphdef, params = network(PRESETS["diffusers"])
    inputs = inputs_of(given)
    assert difference(whole(graphdef, params, inputs), expected["velocity"]) > 0.1
    inputs["camera"] = given["camera_rotation_only"]
    assert difference(whole(graphdef, params, inputs), expected["velocity_rotation_only"]) < 1e-5


@functools.partial(jax.jit, static_argnames=("graphdef", "window"))
def chunk(graphdef: Any, params: Params, inputs: Any, window: Window, state: Any = None) -> Any:
    return apply(graphdef, params, **inputs, window=window, state=state, method="stream")


def stream(numerics: Numerics, window: Window) -> tuple[jax.Array, jax.Array, list[DiTState]]:
    """Velocities of noisy latents and of the clean pass, and the states after each chunk."""
    given = arrays("streaming_june/inputs")
    graphdef, params = network(numerics)
    noisy, clean, states, state = [], [], [], None
    for start, end in zip(STARTS, (*STARTS[1:], 13), strict=True):
        inputs = inputs_of(given)
        for name in ("latents", "timesteps", "camera", "plucker"):
            inputs[name] = inputs[name][:, start:end]
        noisy.append(chunk(graphdef, params, inputs, window, state)[0])
        inputs["latents"] = given["latents_clean"][:, start:end]
        inputs["timesteps"] = np.zeros_like(inputs["timesteps"])
        velocity, state = chunk(graphdef, params, inputs, window, state)
        clean.append(velocity)
        states.append(state)
    return jnp.concatenate(noisy, 1), jnp.concatenate(clean, 1), states


@pytest.mark.parametrize("generation", ["june", "july"])
def test_a_stream_and_its_state(generation: str) -> None:
    numerics = {"june": JUNE, "july": JULY}[generation]
    expected = arrays(f"streaming_{generation}/outputs")
    noisy, clean, states = stream(numerics, ALL)
    assert difference(noisy, expected["velocity_all_cached"]) < 1e-5
    assert difference(clean, expected["velocity_of_clean_pass_all_cached"]) < 1e-5
    if generation == "june":
        found = stream(numerics, Window(4, 3, 2, sink=False))[0]
        assert difference(found, expected["velocity_window2"]) < 1e-5
    noisy, clean, _ = stream(numerics, WINDOW)
    assert difference(noisy, expected["velocity_window2_sink"]) < 1e-5
    if generation == "july":
        assert difference(clean, expected["velocity_of_clean_pass_window2_sink"]) < 1e-5

    # what chunk 1 saved: block 0 is the first Gated DeltaNet block, block 3 the softmax block
    gdn, softmax = states[1].layers[0]
    cache = {
        k.removeprefix("cache_chunk1_"): v for k, v in expected.items() if k.startswith("cache")
    }
    recurrent, caches = (jax.tree.map(lambda a: a[0, 0], layer) for layer in (gdn, softmax))
    assert isinstance(recurrent.attention, RecurrentCarry)
    assert isinstance(caches.attention, SoftmaxCarry)
    of = recurrent.attention

    def equal(found: Any, name: str) -> None:
        assert difference(found, cache.pop(name)) < 1e-5, name

    def tail(a: Any) -> Any:  # B K P C to the tokens' frames
        return jnp.moveaxis(a[0], 0, 1)

    equal(of.main, "block0_slot0")
    equal(jnp.swapaxes(of.normaliser, -1, -2), "block0_slot1")
    equal(jnp.swapaxes(of.camera, -1, -2), "block0_slot2")  # pyright: ignore
    equal(tail(of.inputs["k"]), "block0_slot4")
    if generation == "july":
        equal(tail(of.inputs["k_camera"]), "block0_slot3")
    else:
        assert "k_camera" not in of.inputs
    for carry, block in ((recurrent, 0), (caches, 3)):
        equal(jnp.moveaxis(carry.ffn, -1, 1), f"block{block}_slot9")  # B C F P
    for slot, part in enumerate((caches.attention.main, caches.attention.camera)):
        for i, a in enumerate((part.k, part.v)):  # chunk 1 is frames 4..6 of the cache
            heads = jnp.moveaxis(a[:, 4:7].reshape(1, -1, *a.shape[-2:]), 2, 1)
            equal(heads, f"block3_slot{2 * slot + i}")
    assert set(cache) == {"block0_slot6", "block3_slot6"}  # upstream's flag of the block's kind


SAMPLES = {
    "sample_window2_sink_shift8": (WINDOW, (1000, 960, 889, 727, 0), 1.0),
    "sample_all_cached_shift8": (ALL, (1000, 960, 889, 727, 0), 1.0),
    "sample_window2_sink_trained_list": (WINDOW, (1000, 967, 908, 764, 0), 1.0),
    "sample_window2_sink_cfg3_1000_727": (WINDOW, (1000, 727, 0), 3.0),
}


@pytest.mark.parametrize(
    ("generation", "name"),
    [*(("june", name) for name in SAMPLES), ("july", "sample_window2_sink_shift8")],
)
def test_a_whole_sampler_run(generation: str, name: str) -> None:
    window, steps, scale = SAMPLES[name]
    given, expected = arrays("streaming_june/inputs"), arrays(f"streaming_{generation}/outputs")
    graphdef, params = network({"june": JUNE, "july": JULY}[generation])
    text, mask = given["text"], given["mask"]
    if scale != 1.0:
        text = np.concatenate([expected["cfg3_text_uncond"], text])
        mask = np.concatenate([expected["cfg3_mask_uncond"], mask])
    state, made = None, []
    for start, end in zip(STARTS, (*STARTS[1:], 13), strict=True):
        part = slice(start, end)
        conditions = Conditions(text, mask, given["camera"][:, part], given["plucker"][:, part])
        latents, state = denoise_chunk(
            graphdef,
            params,
            state,
            given["noise"][:, part],
            given["latents_clean"][:, :1] if start == 0 else None,
            conditions,
            np.float32(steps) / 1000,
            jnp.float32(scale),
            window=window,
            dtype=jnp.float32,
        )
        made.append(latents)
    assert difference(jnp.concatenate(made, 1), expected[name]) < 1e-5
