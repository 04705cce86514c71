"""Trains the video autoencoder on clips whose pixels all lie on the device.

Axis letters: n clips, B batch, F frames, H W pixel rows and columns, C latent channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from sanawm_jax.checkpoints.export import export_vae
from sanawm_jax.core.params import Params, apply, build, init
from sanawm_jax.data.latent_cache import clip_encoder, to_signed
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.engine.precision import compute_dtype
from sanawm_jax.training.engine.recipe import Recipe, one_learner
from sanawm_jax.training.engine.step import Metrics
from sanawm_jax.training.objectives.vae_loss import VAELossWeights, vae_loss
from sanawm_jax.training.recipes.clips import crop_clips, open_source, pack_clips
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.latents import sample_posterior
from sanawm_jax.vae.model import VideoVAE


def vae_recipe(config: ml_collections.ConfigDict, workdir: Path) -> Recipe:
    """Trains on random sequences of consecutive frames; measures the latents before export."""
    model = VAEConfig(**config.vae.to_dict())
    clips = open_source(config)
    packed = pack_clips(clips)
    frames, total = config.clip_frames, packed.shape[1]
    if frames > total:
        raise InputError(f"clip_frames={frames} is more than the {total} frames of a clip")
    logging.info("%d clips, %.2f GiB on the device", len(packed), packed.nbytes / 2**30)
    graphdef, abstract = build(VideoVAE, model)
    dtype = compute_dtype(config.dtype)
    weights = VAELossWeights(**config.loss.to_dict())

    def prepare(
        resident: jax.Array, batch: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        crop_key, noise_key = jax.random.split(key)
        starts = jax.random.randint(crop_key, batch.shape, 0, total - frames + 1)
        video = to_signed(crop_clips(resident, batch, starts, frames))
        latent = jax.eval_shape(encode, abstract, video)[0].shape
        return video, jax.random.normal(noise_key, latent)

    def encode(params: Params, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, logvar = apply(graphdef, params, video.astype(dtype), method="encode")
        return mean.astype(jnp.float32), logvar.astype(jnp.float32)

    def loss(params: Params, examples: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Metrics]:
        video, noise = examples
        mean, logvar = encode(params, video)
        latents = sample_posterior(mean, logvar, noise)
        decoded = apply(graphdef, params, latents.astype(dtype), method="decode")
        return vae_loss(decoded, video, mean, logvar, weights)

    def export(params: Params) -> None:
        params = with_statistics(model, params, packed, config.statistics_clips)
        export_vae(model, params, workdir / "export" / "vae", config.export_dtype)

    def make(shardings: Any) -> Params:
        return init(VideoVAE, model, jax.random.key(config.seed), shardings=shardings)

    return one_learner(
        config,
        abstract=abstract,
        init=make,
        prepare=prepare,
        loss=loss,
        export=export,
        resident=packed,
        size=len(packed),
    )


def with_statistics(config: VAEConfig, params: Params, packed: np.ndarray, clips: int) -> Params:
    """`params` with latents_mean and latents_std, (C,), measured on up to `clips` whole clips."""
    # the encoder normalises with the statistics that it is given; these are the identity
    channels = config.latent_channels
    bare = {
        **params,
        "latents_mean": jnp.zeros((channels,)),
        "latents_std": jnp.full((channels,), config.scaling_factor),
    }
    encode = clip_encoder(config)
    size = min(8, len(packed))
    count, first, second = 0, 0.0, 0.0
    for start in range(0, min(clips, len(packed)) - size + 1, size):
        indices = jnp.arange(size)
        part = jnp.asarray(packed[start : start + size])
        video = crop_clips(part, indices, jnp.zeros_like(indices), packed.shape[1])
        latents = np.asarray(encode(bare, video), np.float64)
        count += latents[..., 0].size
        first += latents.sum((0, 1, 2, 3))
        second += np.square(latents).sum((0, 1, 2, 3))
    mean = first / count
    std = np.sqrt(np.maximum(second / count - mean**2, 1e-8))
    return {
        **params,
        "latents_mean": jnp.asarray(mean, jnp.float32),
        "latents_std": jnp.asarray(std, jnp.float32),
    }
