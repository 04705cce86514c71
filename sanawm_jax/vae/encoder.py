"""The encoder, from video to the parameters of the latents' Gaussian distribution.

Axis letters: B batch; f h w frames, rows and columns of the video; F H W latent frames, rows and
columns, c latent channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.vae.blocks import CausalConv, DownBlock, MidBlock, pixel_norm
from sanawm_jax.vae.config import VAEConfig


class Encoder(nnx.Module):
    """Patches, downsampling blocks, a middle block; the output is a mean and one log-variance.

    Source: `LTX2VideoEncoder3d`.
    """

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        shared = {"padding_mode": cfg.encoder_spatial_padding_mode, "rngs": rngs}
        eps = cfg.resnet_norm_eps
        width = cfg.block_out_channels[-1]
        patch = cfg.in_channels * cfg.patch_size**2
        self.conv_in = CausalConv(patch, cfg.latent_channels, **shared)
        self.down_blocks = nnx.List(DownBlock(s, eps=eps, **shared) for s in cfg.down_stages)
        self.mid_block = MidBlock(width, cfg.layers_per_block[-1], eps=eps, **shared)
        self.conv_out = CausalConv(width, cfg.latent_channels + 1, **shared)

    def __call__(
        self, video: Float[Array, "B f h w 3"], *, causal: bool | None = None, remat: bool = False
    ) -> tuple[Float[Array, "B F H W c"], Float[Array, "B F H W c"]]:
        """Encodes a video.

        Args:
          video: RGB in [-1, 1].
          causal: True forces causal time padding. Otherwise the configuration decides: as in the
            reference, False does not make a causal encoder non-causal.
          remat: recompute each block in the backward pass instead of keeping its activations.

        Returns:
          Mean and log-variance; all channels of the log-variance are equal.

        Raises:
          InputError: the size of the video does not divide into latents.
        """
        cfg = self.cfg
        if cfg.patch_size_t != 1:
            raise InputError("VAE: encoding has no weights for patch_size_t other than 1")
        cfg.latent_shape(*video.shape[1:4])
        causal = bool(causal or cfg.encoder_causal)
        p = cfg.patch_size
        # within a patch, columns come before rows
        x = rearrange(video, "B f (h q) (w r) C -> B f h w (C r q)", q=p, r=p)
        x = self.conv_in(x, causal=causal)
        for block in (*self.down_blocks, self.mid_block):

            def run(x: jax.Array, block=block) -> jax.Array:
                return block(x, causal=causal)

            x = jax.checkpoint(run)(x) if remat else run(x)
        x = self.conv_out(jax.nn.silu(pixel_norm(x)), causal=causal)
        mean, logvar = x[..., :-1], x[..., -1:]
        return mean, jnp.broadcast_to(logvar, mean.shape)
