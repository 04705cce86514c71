"""Packing of hidden states and text connectors against diffusers, through the real loader."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.sana_wm.refiner import _pack_text_embeds

from sanawm_jax.checkpoints import keymap
from sanawm_jax.checkpoints.files import SafetensorsFolder, read_config
from sanawm_jax.checkpoints.refiner_folder import RefinerFolder
from sanawm_jax.core.params import apply, build, count, leaves
from sanawm_jax.refiner.config import LTX_2_19B_CONNECTORS, ConnectorsConfig
from sanawm_jax.refiner.connectors import TextConnectors, pack_states
from sanawm_jax.refiner.keys import connectors_table, is_audio_connector
from sanawm_jax.sampling.refine import LTX2Refiner
from tests.parity.compare import relative
from tests.parity.refiner_reference import (
    CAPTIONS,
    load_refiner,
    make_connectors,
    make_refiner,
)

LENGTH, CHANNELS, STATES = 16, 24, 4
MASK = (np.arange(LENGTH) >= np.array([[9], [0], [15]])).astype(np.int64)  # padding on the left
LTX_2_3 = dict(
    per_modality_projections=True,
    video_hidden_dim=32,
    audio_hidden_dim=24,
    video_connector_attention_head_dim=16,
    proj_bias=True,
    video_gated_attn=True,
    audio_gated_attn=True,
    rope_type="split",
)
CASES: dict[str, dict[str, Any]] = {
    "interleaved": {},
    "split": dict(rope_type="split"),
    "two_projections": LTX_2_3,
    "no_registers": dict(video_connector_num_learnable_registers=None),
    "as_many_registers_as_tokens": dict(video_connector_num_learnable_registers=LENGTH),
    "gated": dict(video_gated_attn=True, proj_bias=True),
    "float32_rope": dict(rope_double_precision=False, rope_theta=50.0),
    "unused": dict(causal_temporal_positioning=True, audio_connector_num_layers=1),
}


def hidden_states(rng: np.random.Generator) -> np.ndarray:
    """Returns states (Y, B, L, C) with different scales and means, as in a text encoder."""
    size = np.array([1.0, 5.0, 0.2, 30.0]).reshape(STATES, 1, 1, 1)
    states = rng.standard_normal((STATES, len(MASK), LENGTH, CHANNELS)) + 0.3
    return (size * states).astype(np.float32)


def reference_pack(states: np.ndarray) -> torch.Tensor:
    stacked = torch.tensor(np.moveaxis(states, 0, -1))
    return _pack_text_embeds(stacked, torch.tensor(MASK).sum(-1), device="cpu")


def test_pack(rng: np.random.Generator) -> None:
    states = hidden_states(rng)
    theirs = reference_pack(states)
    ours = jax.jit(pack_states)(states, MASK)
    assert relative(ours.reshape(theirs.shape), theirs) <= 1e-5
    assert not np.asarray(ours)[MASK == 0].any()


@pytest.mark.parametrize("case", CASES)
def test_connectors(case: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model = make_connectors(**CASES[case])
    model.save_pretrained(tmp_path)
    config = ConnectorsConfig.from_json(read_config(tmp_path))
    graphdef, abstract = build(TextConnectors, config)
    params = keymap.load(
        connectors_table(config),
        abstract,
        SafetensorsFolder(tmp_path),
        what="x",
        ignore=is_audio_connector,
    )
    states = hidden_states(rng)
    with torch.no_grad():
        text, _, mask = model(reference_pack(states), torch.tensor(MASK))
    packed = pack_states(jnp.asarray(states), jnp.asarray(MASK))
    ours, ours_mask = jax.jit(functools.partial(apply, graphdef))(params, packed, MASK)
    assert relative(ours, text) <= 1e-5
    np.testing.assert_array_equal(ours_mask, mask)


def test_names_and_shapes_of_the_released_connectors() -> None:
    with torch.device("meta"):
        model = LTX2TextConnectors(rope_type="split")
    theirs = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    _, abstract = build(TextConnectors, LTX_2_19B_CONNECTORS)
    shapes = {path: leaf.shape for path, leaf in leaves(abstract)}
    ours = {}
    for entry in connectors_table(LTX_2_19B_CONNECTORS):
        shape = shapes[entry.path][len(entry.index) :]
        ours[entry.source] = shape[::-1] if entry.layout == keymap.LINEAR else shape
    kept = {k: v for k, v in theirs.items() if not is_audio_connector(k)}
    assert ours == kept
    assert count(abstract) == sum(int(np.prod(s)) for s in kept.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_refiner(tmp_path_factory.mktemp("refiner"))


PROMPTS = [*CAPTIONS, "", "  red \n", "a room, " * 20, "日本 émigré 🙂"]


def test_prompt_to_text(folder: Path) -> None:
    """The whole text path of a folder: left-padded tokens, encoder, packing and connectors."""
    reference, refiner = load_refiner(folder), LTX2Refiner.from_pretrained(folder, dtype="float32")
    for prompt in PROMPTS:
        with torch.no_grad():
            theirs, mask = reference._encode_prompt(
                prompt, device=torch.device("cpu"), dtype=torch.float32
            )
        assert mask.all()  # so that the transformer needs no mask
        assert relative(refiner.encode_prompt(prompt).embeddings, theirs) <= 1e-5


def test_token_ids(folder: Path) -> None:
    tokenizer = RefinerFolder(folder).load_tokenizer()
    theirs = load_refiner(folder).tokenizer(
        PROMPTS,
        padding="max_length",
        padding_side="left",
        max_length=LENGTH,
        truncation=True,
        add_special_tokens=True,
        return_tensors="np",
    )
    ids, mask = tokenizer(PROMPTS, LENGTH, padding_side="left")
    np.testing.assert_array_equal(ids, theirs.input_ids)
    np.testing.assert_array_equal(mask, theirs.attention_mask)
