"""Configurations of the video autoencoder, for the reference and for our code."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from diffusers import AutoencoderKLLTX2Video
from flax import nnx

from sanawm_jax.checkpoints import files, keymap
from sanawm_jax.core import params as params_lib
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.keys import key_table
from sanawm_jax.vae.model import VideoVAE
from tests.parity.compare import randomise

_DOWN = "LTX2VideoDownBlock3D"

# the published pattern of blocks at a small width; every other case changes what it can
PUBLISHED = VAEConfig(
    latent_channels=8,
    block_out_channels=(16, 16, 32, 32),
    layers_per_block=(1, 0, 1, 0, 1),
    decoder_block_out_channels=(8, 16, 32),
    decoder_layers_per_block=(1, 0, 1, 1),
    decoder_causal=False,
    spatial_compression_ratio=32,
    temporal_compression_ratio=8,
)
TWO_BLOCKS = VAEConfig(
    latent_channels=6,
    block_out_channels=(8, 16),
    down_block_types=(_DOWN,) * 2,
    layers_per_block=(1, 1, 1),
    spatio_temporal_scaling=True,
    downsample_type=("spatiotemporal", "spatial"),
    decoder_block_out_channels=(8, 8),
    decoder_layers_per_block=(1, 1, 1),
    decoder_spatio_temporal_scaling=True,
    decoder_inject_noise=False,
    upsample_type=("spatial", "spatiotemporal"),
    upsample_residual=True,
    upsample_factor=(1, 1),
    patch_size=2,
    spatial_compression_ratio=8,
    temporal_compression_ratio=2,
)
CONDITIONED = dataclasses.replace(
    TWO_BLOCKS,
    layers_per_block=(0, 0, 1),
    decoder_inject_noise=(True, False, True),
    upsample_residual=(False, True),
    decoder_block_out_channels=(8, 16),
    upsample_factor=(1, 2),
    timestep_conditioning=True,
    encoder_causal=False,
    decoder_spatial_padding_mode="zeros",
    encoder_spatial_padding_mode="reflect",
)
STRIDED = dataclasses.replace(
    TWO_BLOCKS,
    block_out_channels=(6, 6),
    downsample_type=("conv", "temporal"),
    spatio_temporal_scaling=(True, False),
    decoder_block_out_channels=(4, 8),  # changes width without an upsampler's help
    upsample_type=("spatiotemporal", "temporal"),
    decoder_spatio_temporal_scaling=(False, True),
    encoder_spatial_padding_mode="replicate",
    decoder_spatial_padding_mode="circular",
    resnet_norm_eps=1e-2,
    spatial_compression_ratio=None,
    temporal_compression_ratio=None,
    scaling_factor=0.7,
)
CASES = {
    "published": (PUBLISHED, (9, 64, 96)),
    "two_blocks": (TWO_BLOCKS, (5, 24, 16)),
    "conditioned": (CONDITIONED, (3, 16, 24)),
    "strided": (STRIDED, (4, 14, 10)),
}


@dataclasses.dataclass
class Pair:
    cfg: VAEConfig
    reference: AutoencoderKLLTX2Video
    graphdef: nnx.GraphDef
    params: params_lib.Params

    def encode(self, video: np.ndarray, **how: Any) -> tuple[jax.Array, jax.Array]:
        call = functools.partial(params_lib.apply, self.graphdef, method="encode", **how)
        return jax.jit(call)(self.params, video)

    def decode(self, latents: np.ndarray, *args: Any, **how: Any) -> jax.Array:
        call = functools.partial(params_lib.apply, self.graphdef, method="decode", **how)
        return jax.jit(call)(self.params, latents, *args)


def make_pair(cfg: VAEConfig, folder: Path) -> Pair:
    """Saves a reference model with random weights to `folder`, and loads ours from it."""
    reference = randomise(AutoencoderKLLTX2Video(**dataclasses.asdict(cfg)), seed=3)
    if cfg.timestep_conditioning:
        reference.decoder.timestep_scale_multiplier.data.fill_(900.0)
    generator = torch.Generator().manual_seed(5)
    reference.latents_mean.copy_(torch.randn(cfg.latent_channels, generator=generator))
    reference.latents_std.copy_(torch.rand(cfg.latent_channels, generator=generator) + 0.5)
    reference.save_pretrained(folder)
    read = VAEConfig.from_json(files.read_config(folder))
    assert read == cfg
    graphdef, abstract = params_lib.build(VideoVAE, read)
    source = files.SafetensorsFolder(folder)
    params = keymap.load(key_table(read), abstract, source, what=str(folder))
    return Pair(read, reference, graphdef, params)


def to_torch(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(x)).movedim(-1, 1)


def from_torch(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1)


def draw_video(rng: np.random.Generator, shape: tuple[int, ...], batch: int = 2) -> np.ndarray:
    return rng.uniform(-1, 1, (batch, *shape, 3)).astype(np.float32)
