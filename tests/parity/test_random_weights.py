"""Random weights have the names and shapes of the reference's own full-size classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    LTX2VideoTransformer3DModel,
    SanaWMTransformer3DModel,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from sanawm_jax.checkpoints import random_weights as ours
from sanawm_jax.checkpoints.writer import num_bytes


def _gemma3() -> torch.nn.Module:
    text = ours.RELEASED.refiner_text
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
        )
    )


@pytest.mark.parametrize(
    ("make", "specs", "gigabytes"),
    [
        (SanaWMTransformer3DModel, lambda: ours.dit_specs(ours.RELEASED.dit), 10.6),
        (AutoencoderKLLTX2Video, lambda: ours.vae_specs(ours.RELEASED.vae), 2.4),
        (
            lambda: LTX2VideoTransformer3DModel(rope_type="split"),
            lambda: ours.refiner_specs(ours.RELEASED.refiner),
            37.8,
        ),
        (
            lambda: LTX2TextConnectors(rope_type="split"),
            lambda: ours.connectors_specs(ours.RELEASED.connectors),
            2.9,
        ),
        (
            lambda: Gemma2ForCausalLM(Gemma2Config()).model,
            lambda: ours.text_specs(ours.RELEASED.text),
            5.2,
        ),
        (
            lambda: _gemma3().model,
            lambda: ours.text_specs(ours.RELEASED.refiner_text),
            23.5,
        ),
    ],
    ids=["dit", "vae", "refiner", "connectors", "gemma2", "gemma3"],
)
def test_names_and_shapes(
    make: Callable[[], Any], specs: Callable[[], Mapping[str, Any]], gigabytes: float
) -> None:
    with torch.device("meta"):
        reference = {k: tuple(v.shape) for k, v in make().state_dict().items()}
    written = specs()
    prefix = next((p for p in ("language_model.model.", "model.") if all(
        name.startswith(p) for name in written)), "")  # fmt: skip
    assert {name.removeprefix(prefix): shape for name, (shape, _) in written.items()} == reference
    assert sum(map(num_bytes, written.values())) / 1e9 == pytest.approx(gigabytes, abs=0.1)


def test_values_depend_on_name_and_seed_alone() -> None:
    spec = ((64, 300), ours.BF16)
    a = ours.random_tensor("blocks.0.attn.qkv.weight", spec, 0)
    np.testing.assert_array_equal(a, ours.random_tensor("blocks.0.attn.qkv.weight", spec, 0))
    others = (
        ours.random_tensor("blocks.1.attn.qkv.weight", spec, 0),
        ours.random_tensor("blocks.0.attn.qkv.weight", spec, 1),
    )
    assert all((a != other).mean() > 0.9 for other in others)
    assert float(a.astype(np.float32).std()) == pytest.approx(300**-0.5, rel=0.05)
