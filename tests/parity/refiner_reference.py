"""Tiny refiners of the reference with random weights, saved like published folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaWMLTX2Refiner
from diffusers.models.transformers.transformer_sana_wm_refiner import (
    SanaWMLTX2RefinerTransformer3DModel,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

from sanawm_jax.small_world.text_encoder import make_small_text_encoder
from tests.parity.compare import randomise

CHANNELS = 6
# width 32 is no multiple of 6, so some pairs of a head are padding and never rotate; the position
# range is small, so that tiny grids reach all of it
TRANSFORMER: dict[str, Any] = dict(
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    num_attention_heads=4,
    attention_head_dim=8,
    cross_attention_dim=32,
    caption_channels=24,
    num_layers=3,
    base_height=128,
    base_width=160,
    pos_embed_max_pos=12,
    audio_in_channels=4,
    audio_out_channels=4,
    audio_num_attention_heads=2,
    audio_attention_head_dim=8,
    audio_cross_attention_dim=16,
)
CONNECTORS: dict[str, Any] = dict(
    caption_channels=24,
    text_proj_in_factor=4,
    video_connector_num_attention_heads=2,
    video_connector_attention_head_dim=12,
    video_connector_num_learnable_registers=4,
    audio_connector_num_attention_heads=2,
    audio_connector_attention_head_dim=12,
    audio_connector_num_learnable_registers=4,
    connector_rope_base_seq_len=64,
)
TEXT: dict[str, Any] = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    query_pre_attn_scalar=8,
    sliding_window=5,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters=dict(
        full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
        sliding_attention=dict(rope_type="default", rope_theta=1e4),
    ),
)
VISION: dict[str, Any] = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
CAPTIONS = ["a red room with a tall window", "a green street, and 24 brown trees at dusk"]


def make_transformer(seed: int = 1, **over: Any) -> SanaWMLTX2RefinerTransformer3DModel:
    """Returns a random transformer, in which tables and norms have the scale of trained ones."""
    model = SanaWMLTX2RefinerTransformer3DModel(**{**TRANSFORMER, **over})
    return randomise(model, seed)  # type: ignore[return-value]


def make_connectors(seed: int = 2, **over: Any) -> LTX2TextConnectors:
    return randomise(LTX2TextConnectors(**{**CONNECTORS, **over}), seed)  # type: ignore[return-value]


def make_text_encoder(vocab: int, seed: int = 3, **over: Any) -> Gemma3ForConditionalGeneration:
    config = Gemma3Config(
        text_config=Gemma3TextConfig(vocab_size=vocab, **{**TEXT, **over}).to_dict(),
        vision_config=VISION,
        mm_tokens_per_image=1,
        image_token_index=vocab,
    )
    return randomise(Gemma3ForConditionalGeneration(config), seed)  # type: ignore[return-value]


def make_refiner(folder: Path, *, length: int = 16, **over: Any) -> Path:
    """Saves a whole random refiner and returns its folder."""
    from transformers import GemmaTokenizer

    config = make_small_text_encoder(CAPTIONS, folder / "text", hidden=64)
    SanaWMLTX2Refiner(
        transformer=make_transformer(**over),
        connectors=make_connectors(rope_type=over.get("rope_type", "interleaved")),
        tokenizer=GemmaTokenizer.from_pretrained(folder / "text" / "tokenizer"),
        text_encoder=make_text_encoder(config.vocab_size),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_max_sequence_length=length,
    ).save_pretrained(folder / "refiner")
    return folder / "refiner"


def load_refiner(folder: Path, dtype: torch.dtype = torch.float32) -> SanaWMLTX2Refiner:
    pipeline = SanaWMLTX2Refiner.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
