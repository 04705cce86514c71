"""A tiny stage-1 folder with random weights, saved by the reference's own classes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    SanaWMPipeline,
    SanaWMTransformer3DModel,
)

from tests.parity.compare import randomise


def make_folder(folder: Path) -> None:
    """Writes `folder/model` and the text encoder that it contains."""
    from transformers import Gemma2Model, GemmaTokenizer

    from sanawm_jax.small_world.text_encoder import make_small_text_encoder

    config = make_small_text_encoder(["a red room", "a green street"], folder / "text", hidden=64)
    vae = AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 16, 16, 16),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    vae = randomise(vae, 1)
    vae.latents_mean.copy_(torch.linspace(-0.3, 0.4, 8))
    vae.latents_std.copy_(torch.linspace(0.6, 1.5, 8))
    SanaWMPipeline(
        tokenizer=GemmaTokenizer.from_pretrained(folder / "text" / "tokenizer"),
        text_encoder=Gemma2Model.from_pretrained(
            folder / "text" / "text_encoder", dtype=torch.float32
        ),
        vae=vae,
        transformer=randomise(
            SanaWMTransformer3DModel(
                num_layers=4,
                hidden_size=48,
                num_attention_heads=2,
                linear_head_dim=24,
                in_channels=8,
                caption_channels=config.hidden_size,
            ),
            2,
            scale=0.5,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=9.8),
    ).save_pretrained(folder / "model")
