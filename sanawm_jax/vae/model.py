"""The video autoencoder that stage 1, the refiner and the dataset share.

Axis letters: B batch; f h w frames, rows and columns of the video; F H W latent frames, rows and
columns, c latent channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32

from sanawm_jax.vae import latents as latents_lib
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.decoder import Decoder, DecoderNoise
from sanawm_jax.vae.encoder import Encoder
from sanawm_jax.vae.state import DecoderState


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
        self, video: Float[Array, "B f h w 3"], *, causal: bool | None = None, remat: bool = False
    ) -> tuple[Float[Array, "B F H W c"], Float[Array, "B F H W c"]]:
        """Encodes RGB in [-1, 1] to mean and log-variance; see `Encoder`."""
        return self.encoder(video, causal=causal, remat=remat)

    def decode(
        self,
        latents: Float[Array, "B F H W c"],
        temb: Float[Array, "B"] | None = None,
        *,
        noise: DecoderNoise | None = None,
        causal: bool | None = None,
        remat: bool = False,
    ) -> Float[Array, "B f h w 3"]:
        """Decodes to RGB in about [-1, 1]; see `Decoder`."""
        return self.decoder(latents, temb, noise=noise, causal=causal, remat=remat)

    def decode_stream(
        self, latents: Float[Array, "B F H W c"], state: DecoderState | None = None
    ) -> tuple[Float[Array, "B f h w 3"], DecoderState]:
        """Decodes the diffusion model's latents that follow a state; see `Decoder.stream`."""
        return self.decoder.stream(self.denormalise(latents), state)

    def encode_normalised(self, video: Float[Array, "B f h w 3"]) -> Float32[Array, "B F H W c"]:
        """Encodes video to the diffusion model's latents: normalised posterior mode, float32."""
        mean, _ = self.encode(video)
        return self.normalise(mean).astype(jnp.float32)

    def normalise(self, latents: Float[Array, "B F H W c"]) -> Float[Array, "B F H W c"]:
        """Converts VAE latents to those of the diffusion model."""
        return latents_lib.normalise(latents, *self._statistics())

    def denormalise(self, latents: Float[Array, "B F H W c"]) -> Float[Array, "B F H W c"]:
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
