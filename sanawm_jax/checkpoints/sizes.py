"""Configurations of all networks: the released ones, and tiny ones for tests."""

from __future__ import annotations

import dataclasses

from sanawm_jax.dit.config import SANA_WM_2B, DiTConfig
from sanawm_jax.refiner.config import (
    LTX_2_19B,
    LTX_2_19B_CONNECTORS,
    SPLIT,
    ConnectorsConfig,
    RefinerConfig,
)
from sanawm_jax.text.config import GEMMA3, GEMMA_2_2B, GEMMA_3_12B, GemmaConfig
from sanawm_jax.vae.config import VAEConfig


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Configurations of all networks."""

    dit: DiTConfig
    vae: VAEConfig
    text: GemmaConfig
    refiner: RefinerConfig
    connectors: ConnectorsConfig
    refiner_text: GemmaConfig
    text_length: int = 1024  # of the refiner's prompt


RELEASED = Sizes(
    dit=SANA_WM_2B,
    vae=VAEConfig(decoder_causal=False, spatial_compression_ratio=32, temporal_compression_ratio=8),
    text=GEMMA_2_2B,
    refiner=LTX_2_19B,
    connectors=LTX_2_19B_CONNECTORS,
    refiner_text=GEMMA_3_12B,
)
_TINY_TEXT = GemmaConfig(
    vocab_size=1024,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    query_pre_attn_scalar=16,
    sliding_window=16,
)
TINY = Sizes(
    dit=DiTConfig(
        num_layers=4,
        hidden_size=48,
        num_attention_heads=2,
        linear_head_dim=24,
        in_channels=8,
        caption_channels=32,
        chunk_plucker_post_attn_blocks=4,
    ),
    vae=VAEConfig(
        decoder_causal=False,
        latent_channels=8,
        block_out_channels=(8, 16, 16, 16),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    ),
    text=_TINY_TEXT,
    refiner=RefinerConfig(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        num_layers=3,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        rope_type=SPLIT,
    ),
    connectors=ConnectorsConfig(
        caption_channels=32,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16,
        video_connector_num_learnable_registers=4,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=16,
        audio_connector_num_learnable_registers=4,
        connector_rope_base_seq_len=64,
        rope_type=SPLIT,
    ),
    refiner_text=dataclasses.replace(
        _TINY_TEXT, model_type=GEMMA3, attn_logit_softcapping=None, rope_factor=8.0
    ),
    text_length=16,
)
