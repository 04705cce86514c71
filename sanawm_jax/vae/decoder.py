"""The decoder, from latents to video.

Axis letters: B batch; F H W latent frames, rows and columns, c latent channels; f h w frames, rows
and columns of the video or, as in `blocks`, of an activation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from sanawm_jax.core.layers import modulation_table
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.vae.blocks import (
    CausalConv,
    MidBlock,
    Noise,
    TimeEmbedder,
    UpBlock,
    pixel_norm,
)
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.state import DecoderState, Stream

# one entry per block, the middle block first; None for a block without noise
DecoderNoise = tuple[tuple[Noise, ...] | None, ...]


def draw_noise(
    key: Key[Array, ""], cfg: VAEConfig, height: int, width: int, dtype: DTypeLike = jnp.float32
) -> DecoderNoise:
    """Draws standard normal fields for a decoder that injects noise, in the order of their use.

    Args:
      height, width: size of the latents.
    """
    blocks = []
    strides = (1, 1)
    stages = [(cfg.mid_inject_noise, cfg.decoder_layers_per_block[-1], None)]
    stages += [(s.inject_noise, s.num_layers, s.strides) for s in cfg.up_stages]
    for inject, num_layers, up in stages:
        strides = (strides[0] * up[1], strides[1] * up[2]) if up else strides
        if not inject:
            blocks.append(None)
            continue
        key, use = jax.random.split(key)
        size = (num_layers, 2, height * strides[0], width * strides[1])
        fields = jax.random.normal(use, size, dtype)
        blocks.append(tuple((pair[0], pair[1]) for pair in fields))
    return tuple(blocks)


class Decoder(nnx.Module):
    """A middle block, blocks with depth-to-space upsampling, and the conversion to pixels.

    Source: `LTX2VideoDecoder3d`.
    """

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        shared = {"padding_mode": cfg.decoder_spatial_padding_mode, "rngs": rngs}
        block = {**shared, "eps": cfg.resnet_norm_eps}
        block["timestep_conditioning"] = cfg.timestep_conditioning
        width = cfg.decoder_block_out_channels[-1]
        self.conv_in = CausalConv(cfg.latent_channels, width, **shared)
        self.mid_block = MidBlock(
            width,
            cfg.decoder_layers_per_block[-1],
            inject_noise=cfg.mid_inject_noise,
            **block,
        )
        self.up_blocks = nnx.List(UpBlock(stage, **block) for stage in cfg.up_stages)
        width = cfg.up_stages[-1].out_channels
        self.conv_out = CausalConv(width, cfg.out_channels * cfg.patch_size**2, **shared)
        timed = cfg.timestep_conditioning
        self.timestep_scale_multiplier = nnx.Param(jnp.array(1000.0)) if timed else None
        self.time_embedder = TimeEmbedder(2 * width, rngs=rngs) if timed else None
        self.scale_shift_table = modulation_table(2, width, rngs) if timed else None

    def __call__(
        self,
        latents: Float[Array, "B F H W c"],
        temb: Float[Array, "B"] | None = None,
        *,
        noise: DecoderNoise | None = None,
        causal: bool | None = None,
        remat: bool = False,
        stream: Stream | None = None,
    ) -> Float[Array, "B f h w 3"]:
        """Decodes latents.

        Args:
          latents: denormalised.
          temb: timesteps in [0, 1], if the configuration has timestep conditioning.
          noise: from `draw_noise`, if the configuration injects noise.
          causal: True forces causal time padding. Otherwise the configuration decides: as in the
            reference, False does not make a causal decoder non-causal.
          remat: recompute each block in the backward pass instead of keeping its activations.
          stream: of a causal decoder, what it knows of the frames before these; see `stream`.

        Returns:
          RGB in about [-1, 1], not clipped.

        Raises:
          InputError: the decoder needs timesteps or noise that the call does not give.
        """
        cfg = self.cfg
        causal = bool(causal or cfg.decoder_causal)
        if self.timestep_scale_multiplier is not None:
            if temb is None or temb.size != latents.shape[0]:
                raise InputError("this VAE decodes with one timestep a sample; pass temb of (B,)")
            temb = temb * self.timestep_scale_multiplier[...]
        x = self.conv_in(latents, causal=causal, stream=stream)
        for i, block in enumerate((self.mid_block, *self.up_blocks)):

            def run(x, temb, noise, block=block):
                return block(x, temb, noise, causal=causal, stream=stream)

            run = jax.checkpoint(run) if remat else run
            x = run(x, temb, noise[i] if noise is not None else None)
        x = pixel_norm(x)
        if self.time_embedder is not None and self.scale_shift_table is not None:
            assert temb is not None
            shift_scale = rearrange(
                self.time_embedder(temb, x.dtype), "B (k C) -> k B 1 1 1 C", k=2
            )
            table = self.scale_shift_table[...].astype(x.dtype)
            shift, scale = shift_scale + table[:, None, None, None, None]
            x = x * (1 + scale) + shift
        x = self.conv_out(jax.nn.silu(x), causal=causal, stream=stream)
        p, t = cfg.patch_size, cfg.patch_size_t
        # within a patch, columns come before rows
        return rearrange(x, "B f h w (C p r q) -> B (f p) (h q) (w r) C", p=t, q=p, r=p)

    def stream(
        self,
        latents: Float[Array, "B F H W c"],
        state: DecoderState | None = None,
        temb: Float[Array, "B"] | None = None,
        *,
        noise: DecoderNoise | None = None,
    ) -> tuple[Float[Array, "B f h w 3"], DecoderState]:
        """Decodes the latents that follow a state, of which there may be one.

        Any cut of a clip into calls gives the frames of the whole clip.

        Args:
          latents: denormalised.
          state: after the latents before; None at the start, where the first latent frame becomes
            one frame of video.
          temb, noise: see `__call__`.

        Returns:
          RGB in about [-1, 1], not clipped, and the state for the next call.

        Raises:
          InputError: the decoder is not causal.
        """
        if not self.cfg.decoder_causal:
            raise InputError("this VAE's decoder is not causal, so it cannot decode a stream")
        stream = Stream(state)
        video = self(latents, temb, noise=noise, stream=stream)
        return video, stream.state
