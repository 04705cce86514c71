"""The text encoder's masks, positions and invariances, without a reference."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sanawm_jax.checkpoints import keymap
from sanawm_jax.checkpoints.files import Tensors
from sanawm_jax.core.params import apply, build, cast, init, leaves
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.text.config import GemmaConfig
from sanawm_jax.text.gemma import (
    GemmaTower,
    attention_masks,
    grouped_attention,
    rope_tables,
    rotate,
    text_tower,
)
from sanawm_jax.text.keys import find_prefix, key_table, load_text_encoder

CONFIG = GemmaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    query_pre_attn_scalar=6,
    sliding_window=3,
)


@pytest.fixture(scope="module")
def params() -> dict:
    """Random parameters of the tiny tower."""
    return init(GemmaTower, CONFIG, jax.random.key(0))


compiled = jax.jit(
    functools.partial(apply, build(GemmaTower, CONFIG)[0]), static_argnames="all_states"
)


def run(params: dict, ids: np.ndarray, mask: np.ndarray, all_states: bool = False) -> np.ndarray:
    """The tower's states as numpy."""
    mask = np.asarray(mask, np.int32)
    return np.asarray(compiled(params, ids, mask, all_states=all_states))


def test_masks_by_hand() -> None:
    full, sliding = attention_masks(jnp.array([[1, 1, 1, 0]]), 2)
    np.testing.assert_array_equal(
        full[0].astype(int), [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    )
    np.testing.assert_array_equal(
        sliding[0].astype(int), [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]]
    )


def test_rotation_keeps_length_and_sees_only_distance(rng: np.random.Generator) -> None:
    cos, sin = rope_tables(9, 6, 100.0)
    q, k = (jnp.asarray(np.tile(rng.standard_normal((1, 1, 1, 6)), (1, 9, 1, 1))) for _ in "qk")
    rotated_q, rotated_k = rotate(q, cos, sin)[0, :, 0], rotate(k, cos, sin)[0, :, 0]
    np.testing.assert_allclose(
        np.linalg.norm(rotated_q, axis=-1), np.linalg.norm(q[0, :, 0], axis=-1), rtol=1e-5
    )
    products = np.asarray(rotated_q @ rotated_k.T)
    np.testing.assert_allclose(products[1:, 1:], products[:-1, :-1], atol=1e-5)
    assert abs(products[4, 0] - products[0, 0]) > 1e-2


def test_softcap_bounds_the_logits() -> None:
    """One of two keys has a much larger logit; without the cap it would get all the weight."""
    q = jnp.full((1, 1, 1, 1, 2), 100.0)
    k = jnp.array([[[[100.0, 0.0]], [[0.0, 0.0]]]])
    v = jnp.array([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    seen = jnp.ones((1, 1, 2), bool)
    capped = grouped_attention(q, k, v, seen, scale=1.0, softcap=1.0)[0, 0, 0, 0]
    np.testing.assert_allclose(capped, jax.nn.softmax(jnp.array([1.0, 0.0])), rtol=1e-6)
    free = grouped_attention(q, k, v, seen, scale=1.0, softcap=None)[0, 0, 0, 0]
    np.testing.assert_allclose(free, [1.0, 0.0])


def test_later_tokens_and_padding_change_nothing_before_them(
    params: dict, rng: np.random.Generator
) -> None:
    ids = rng.integers(0, 32, (1, 8))
    whole = run(params, ids, np.ones_like(ids))
    changed = ids.copy()
    changed[0, 5] = (ids[0, 5] + 1) % 32
    other = run(params, changed, np.ones_like(ids))
    np.testing.assert_allclose(other[0, :5], whole[0, :5], atol=1e-5)
    assert np.abs(other[0, 5:] - whole[0, 5:]).max() > 1e-2
    padded = run(params, np.pad(ids, ((0, 0), (0, 4))), np.arange(12)[None] < 8)
    np.testing.assert_allclose(padded[0, :8], whole[0], atol=1e-5)


def test_batch_rows_are_independent(params: dict, rng: np.random.Generator) -> None:
    ids = rng.integers(0, 32, (2, 6))
    mask = np.arange(6) < np.array([[6], [4]])
    both = run(params, ids, mask)
    np.testing.assert_allclose(both[1:], run(params, ids[1:], mask[1:]), atol=1e-5)


def test_all_states_end_in_the_last_one(params: dict, rng: np.random.Generator) -> None:
    ids = rng.integers(0, 32, (2, 6))
    mask = np.ones_like(ids)
    states = run(params, ids, mask, all_states=True)
    assert states.shape == (CONFIG.num_hidden_layers + 1, 2, 6, CONFIG.hidden_size)
    np.testing.assert_array_equal(states[-1], run(params, ids, mask))
    np.testing.assert_allclose(states[0], np.asarray(params["embed_table"])[ids] * 4.0, rtol=1e-6)


def test_compute_dtype(params: dict, rng: np.random.Generator) -> None:
    ids = rng.integers(0, 32, (1, 6))
    mask = np.ones_like(ids)
    exact = text_tower(CONFIG, params)(ids, mask)
    half = text_tower(CONFIG, params, dtype=jnp.bfloat16)(ids, mask)
    stored_half = text_tower(CONFIG, cast(params, jnp.bfloat16))(ids, mask)
    assert exact.dtype == jnp.float32
    assert half.dtype == stored_half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.1)
    assert np.abs(half.astype(jnp.float32) - exact).max() > 1e-4


def test_ids_past_the_embedding_are_refused(params: dict) -> None:
    tower = text_tower(CONFIG, params)
    tower(np.array([[31]]), np.array([[1]]))
    with pytest.raises(InputError, match="token id 32"):
        tower(np.array([[32]]), np.array([[1]]))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_round_trip_through_published_names(prefix: str, params: dict) -> None:
    entries = key_table(CONFIG, prefix)
    tensors = keymap.export(entries, params)
    assert find_prefix(tensors) == prefix
    assert tensors[f"{prefix}layers.2.self_attn.k_proj.weight"].shape == (12, 16)
    back = keymap.load(entries, build(GemmaTower, CONFIG)[1], Tensors(tensors), what="test")
    for (path, ours), (_, loaded) in zip(leaves(params), leaves(back), strict=True):
        np.testing.assert_array_equal(ours, loaded, err_msg=path)


def test_broken_folders_name_the_tensors(params: dict, tmp_path: Path) -> None:
    tensors = keymap.export(key_table(CONFIG, "model."), params)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_json()))
    head = {"lm_head.weight": np.zeros((32, 16), np.float32)}
    save_file(tensors | head, tmp_path / "model.safetensors")
    assert load_text_encoder(tmp_path)[0] == CONFIG
    extra = {"model.layers.3.mlp.up_proj.weight": np.zeros((24, 16), np.float32)}
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors | extra, tmp_path / "model.safetensors")
    with pytest.raises(
        InputError, match=r"missing 1: model\.layers\.1.*unexpected 1: model\.layers\.3"
    ):
        load_text_encoder(tmp_path)
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight": gone.T}, tmp_path / "m.safetensors")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="mis-shaped 1"):
        load_text_encoder(tmp_path)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(head_dim=7), "head_dim=7"),
        (dict(num_key_value_heads=3), "num_key_value_heads=3"),
        (dict(sliding_window=None), "sliding_window"),
        (dict(sliding_window=0), "sliding_window"),
        (dict(layer_types=("full_attention",)), "layer_types"),
        (dict(layer_types=("chunked",) * 26), "chunked"),
    ],
)
def test_config_refuses_sizes_that_do_not_fit(change: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        GemmaConfig(**change)


def test_config_json_round_trip() -> None:
    assert GemmaConfig.from_json(CONFIG.to_json()) == CONFIG
    assert CONFIG.layer_types == ("sliding_attention", "full_attention", "sliding_attention")
    assert GemmaConfig.from_json({"layer_types": None}) == GemmaConfig()
    with pytest.raises(InputError, match="bogus"):
        GemmaConfig.from_json({"bogus": 1})
