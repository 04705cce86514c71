"""The video autoencoder that stage 1, the refiner and the dataset share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sanawm_jax.vae import latents as latents_lib
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.decoder import Decoder, DecoderNoise
from sanawm_jax.vae.encoder import Encoder


class VideoVAE(nnx.Module):
    """Encoder, decoder and the statistics of the latents.

    `latents_mean` and `latents_std` are constants that are stored with the weights. They have no
    gradient, and an optimizer with weight decay should exclude them.

    Source: `AutoencoderKLLTX2Video`.
    """

    encoder: Encoder
    decoder: Decoder

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self._build_halves(rngs)
        self.latents_mean = nnx.Param(jnp.zeros((cfg.latent_channels,)))
        self.latents_std = nnx.Param(jnp.ones((cfg.latent_channels,)))

    def _build_halves(self, rngs: nnx.Rngs) -> None:
        self.encoder = Encoder(self.cfg, rngs=rngs)
        self.decoder = Decoder(self.cfg, rngs=rngs)

    def encode(
        self, video: jax.Array, *, causal: bool | None = None, remat: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes (B, F, H, W, 3) in [-1, 1] to mean and logvar (B, f, h, w, C); see `Encoder`."""
        return self.encoder(video, causal=causal, remat=remat)

    def decode(
        self,
        latents: jax.Array,
        temb: jax.Array | None = None,
        *,
        noise: DecoderNoise | None = None,
        causal: bool | None = None,
        remat: bool = False,
    ) -> jax.Array:
        """Decodes (B, f, h, w, C) to (B, F, H, W, 3); see `Decoder`."""
        return self.decoder(latents, temb, noise=noise, causal=causal, remat=remat)

    def encode_normalised(self, video: jax.Array) -> jax.Array:
        """Encodes video to the diffusion model's latents: normalised posterior mode, float32."""
        mean, _ = self.encode(video)
        return self.normalise(mean).astype(jnp.float32)

    def normalise(self, latents: jax.Array) -> jax.Array:
        """Converts VAE latents to those of the diffusion model."""
        return latents_lib.normalise(latents, *self._statistics())

    def denormalise(self, latents: jax.Array) -> jax.Array:
        """Converts the latents of the diffusion model to those of the VAE."""
        return latents_lib.denormalise(latents, *self._statistics())

    def _statistics(self) -> tuple[jax.Array, jax.Array, float]:
        mean = lax.stop_gradient(self.latents_mean[...])
        std = lax.stop_gradient(self.latents_std[...])
        return mean, std, self.cfg.scaling_factor


class VideoEncoder(VideoVAE):
    """The encoding half, with the parameter names of the whole VAE; it cannot decode."""

    def _build_halves(self, rngs: nnx.Rngs) -> None:
        self.encoder = Encoder(self.cfg, rngs=rngs)


class VideoDecoder(VideoVAE):
    """The decoding half, with the parameter names of the whole VAE; it cannot encode."""

    def _build_halves(self, rngs: nnx.Rngs) -> None:
        self.decoder = Decoder(self.cfg, rngs=rngs)
