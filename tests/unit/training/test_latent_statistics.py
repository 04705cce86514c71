"""The statistics that training measures give latents the mean 0 and the deviation 1."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.core.params import init
from sanawm_jax.data.latent_cache import clip_encoder
from sanawm_jax.training.recipes.clips import pack_clips
from sanawm_jax.training.recipes.vae import with_statistics
from sanawm_jax.vae.config import SMALL_WORLD_VAE
from sanawm_jax.vae.model import VideoVAE

CHANNELS = 4


@pytest.mark.parametrize("scaling_factor", [1.0, 0.5])
def test_normalised_latents_have_mean_0_and_deviation_1(
    scaling_factor: float, rng: np.random.Generator
) -> None:
    config = dataclasses.replace(
        SMALL_WORLD_VAE,
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        decoder_layers_per_block=(1, 1, 1, 1),
        scaling_factor=scaling_factor,
    )
    params = init(VideoVAE, config, jax.random.key(0))
    # a deviation of about a third, far from its square
    conv_out = params["encoder"]["conv_out"]["conv"]
    conv_out["kernel"] = 0.3 * conv_out["kernel"]
    conv_out["bias"] = conv_out["bias"] + jnp.linspace(-1, 1, conv_out["bias"].size)
    # clips of different brightness: a mean of the clips' deviations is less than that of all
    videos = rng.integers(0, 120, (16, 9, 32, 32, 3)) + rng.integers(0, 130, (16, 1, 1, 1, 3))
    packed = pack_clips([{"video": video.astype(np.uint8)} for video in videos])
    measured = with_statistics(config, params, packed, 16)
    assert np.all(np.abs(np.asarray(measured["latents_std"]) - 1) > 0.2)
    latents = np.asarray(clip_encoder(config)(measured, jnp.asarray(videos, jnp.uint8)))
    assert latents.shape[-1] == CHANNELS
    np.testing.assert_allclose(latents.mean((0, 1, 2, 3)), 0.0, atol=1e-3)
    np.testing.assert_allclose(latents.std((0, 1, 2, 3)), scaling_factor, rtol=1e-3)
    # fewer clips than there are: whole batches of eight
    half = with_statistics(config, params, packed, 15)
    first = with_statistics(config, params, packed[:8], 8)
    np.testing.assert_allclose(half["latents_std"], first["latents_std"], rtol=1e-6)
