"""The smallest refiner that the tests build."""

from __future__ import annotations

from sanawm_jax.refiner.config import RefinerConfig

CONFIG = RefinerConfig(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    cross_attention_dim=32,
    caption_channels=8,
    num_layers=2,
)
