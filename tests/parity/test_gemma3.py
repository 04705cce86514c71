"""The Gemma-3 text encoder against transformers, with weights that our loader reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma3TextModel,
)

from sanawm_jax.checkpoints import keymap
from sanawm_jax.checkpoints.files import SafetensorsFolder, read_config
from sanawm_jax.core.params import build, count, leaves
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.text.config import GEMMA_3_12B, GemmaConfig
from sanawm_jax.text.gemma import GemmaTower, text_tower
from sanawm_jax.text.keys import is_ignored, key_table, load_text_encoder
from tests.parity.compare import randomise, relative
from tests.parity.refiner_reference import TEXT, VISION, make_text_encoder

VOCAB = 80
BASE: dict[str, Any] = dict(vocab_size=VOCAB, **TEXT)
ROPE: dict[str, Any] = BASE["rope_parameters"]
DEFAULT = dict(rope_type="default", rope_theta=100.0)
CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "no_scaling": dict(rope_parameters={**ROPE, "full_attention": DEFAULT}),
    "other_local_base": dict(rope_parameters={**ROPE, "sliding_attention": DEFAULT}),
    "all_full": dict(layer_types=["full_attention"] * 3),
    "all_sliding": dict(layer_types=["sliding_attention"] * 3),
    "window_of_1": dict(sliding_window=1),
    "scale_and_eps": dict(query_pre_attn_scalar=3, rms_norm_eps=1e-2),
    "softcap_is_not_read": dict(attn_logit_softcapping=0.5),
}


def reference(cls: type = Gemma3TextModel, seed: int = 0, **over: Any) -> Any:
    return randomise(cls(Gemma3TextConfig(**{**BASE, **over})), seed)


def tokens(rng: np.random.Generator, length: int = 13) -> tuple[np.ndarray, np.ndarray]:
    """Ids padded on the left: a full text, a short one and a single token."""
    ids = rng.integers(0, VOCAB, (3, length))
    mask = (np.arange(length) >= np.array([[0], [length // 2], [length - 1]])).astype(np.int64)
    return ids * mask, mask


def reference_states(model: Any, ids: np.ndarray, mask: np.ndarray) -> list[torch.Tensor]:
    inputs = dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    with torch.no_grad():
        return list(model(**inputs, output_hidden_states=True).hidden_states)


def check(folder: Path, model: Any, rng: np.random.Generator) -> None:
    """Every hidden state of every token except padding, whose states are never used."""
    ids, mask = tokens(rng)
    theirs = reference_states(model, ids, mask)
    ours = text_tower(*load_text_encoder(folder), all_states=True)(ids, mask)
    assert len(ours) == len(theirs) == BASE["num_hidden_layers"] + 1
    for i, (a, b) in enumerate(zip(np.asarray(ours), theirs, strict=True)):
        assert relative(a[mask != 0], b.numpy()[mask != 0]) <= 1e-5, f"hidden state {i}"
    assert np.isfinite(np.asarray(ours)).all()


@pytest.mark.parametrize("case", CASES)
def test_every_hidden_state(case: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model = reference(**CASES[case])
    model.save_pretrained(tmp_path)
    check(tmp_path, model, rng)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_with_a_vision_tower(prefix: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """The tensor names of the published layout, and those of transformers' modules."""
    from safetensors.torch import load_file, save_file

    model = make_text_encoder(VOCAB)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert any(k.startswith("language_model.model.") for k in tensors)
    renamed = {k.replace("language_model.model.", prefix): v for k, v in tensors.items()}
    if prefix.startswith("model."):
        renamed = {k if k.startswith("model.") else f"model.{k}": v for k, v in renamed.items()}
    save_file(renamed, file)
    check(tmp_path, model, rng)


def test_causal_language_model(tmp_path: Path, rng: np.random.Generator) -> None:
    model = reference(Gemma3ForCausalLM, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" in set(SafetensorsFolder(tmp_path).keys())
    check(tmp_path, model, rng)


def test_older_config_file(tmp_path: Path, rng: np.random.Generator) -> None:
    """The configuration of the released 12B has few fields, and no `rope_parameters`."""
    model = make_text_encoder(VOCAB, layer_types=None, num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    text = raw["text_config"]
    for name in ("rope_parameters", "layer_types", "use_bidirectional_attention", "rms_norm_eps"):
        del text[name]
    older = dict(rope_scaling=dict(factor=8.0, rope_type="linear"), sliding_window_pattern=2)
    raw["text_config"] = {**text, **older}
    path.write_text(json.dumps(raw))
    loaded = Gemma3ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    text_config: Any = loaded.config.text_config
    assert text_config.layer_types[:2] == ["sliding_attention", "full_attention"]
    check(tmp_path, loaded, rng)


def test_bfloat16_is_no_worse_than_the_reference(tmp_path: Path) -> None:
    error = allowed = 0.0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        reference(seed=seed).bfloat16().save_pretrained(tmp_path)
        ids, mask = rng.integers(0, VOCAB, (4, 16)), np.ones((4, 16), np.int64)
        theirs, exact = (
            reference_states(Gemma3TextModel.from_pretrained(tmp_path, dtype=d).eval(), ids, mask)
            for d in (torch.bfloat16, torch.float32)
        )
        ours = text_tower(*load_text_encoder(tmp_path))(ids, mask)
        error += relative(ours.astype(jnp.float32), exact[-1])
        allowed += relative(theirs[-1].float(), exact[-1])
    assert error <= allowed


PUBLISHED_12B = dict(
    hidden_size=3840,
    intermediate_size=15360,
    model_type="gemma3_text",
    num_attention_heads=16,
    num_hidden_layers=48,
    num_key_value_heads=8,
    rope_scaling=dict(factor=8.0, rope_type="linear"),
    sliding_window=1024,
)


def test_names_and_shapes_of_the_12b(tmp_path: Path) -> None:
    assert GemmaConfig.from_json({"model_type": "gemma3", "text_config": PUBLISHED_12B}) == (
        GEMMA_3_12B
    )
    assert GemmaConfig.from_json(GEMMA_3_12B.to_json()) == GEMMA_3_12B
    config: Any = Gemma3Config(text_config=dict(PUBLISHED_12B), vision_config=VISION)
    config.save_pretrained(tmp_path)
    assert GemmaConfig.from_json(read_config(tmp_path)) == GEMMA_3_12B
    with torch.device("meta"):
        model = Gemma3TextModel(config.text_config)
    theirs = {k: tuple(v.shape) for k, v in model.named_parameters()}
    _, abstract = build(GemmaTower, GEMMA_3_12B)
    shapes = {path: leaf.shape for path, leaf in leaves(abstract)}
    ours = {}
    for entry in key_table(GEMMA_3_12B):
        shape = shapes[entry.path][len(entry.index) :]
        ours[entry.source] = shape[::-1] if entry.layout == keymap.LINEAR else shape
    assert ours == theirs
    assert count(abstract) == sum(p.numel() for p in model.parameters())


def test_what_is_skipped() -> None:
    for key in (
        "vision_tower.a.b",
        "model.multi_modal_projector.x",
        "language_model.lm_head.weight",
    ):
        assert is_ignored(key)
    for key in ("layers.0.vision_tower.x", "language_model.other.weight", "audio_tower.x"):
        assert not is_ignored(key)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(rope_parameters={**ROPE, "full_attention": dict(rope_type="yarn")}), "yarn"),
        (dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(another_field=1), "another_field"),
        (dict(model_type="gemma4"), "gemma4"),
    ],
)
def test_refuses_what_it_cannot_run(change: dict[str, Any], said: str) -> None:
    raw = {**BASE, "model_type": "gemma3_text", **change}
    with pytest.raises(InputError, match=said):
        GemmaConfig.from_json(raw)
