"""Building blocks of the video autoencoder.

Axis letters: B batch; f h w frames, rows and columns at the resolution of a block, from pixels down
to latents; C channels; p q r strides over f, h, w. Where a block changes the resolution or the
width, its result has the axes f_out h_out w_out C_out. Activations are channels-last.
Source: the LTX2Video blocks of diffusers' `autoencoder_kl_ltx2.py`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels_pallas.ucpe import inverse_rms
from sanawm_jax.core.layers import Conv, Linear, modulation_table
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.vae.config import DownStage, Strides, UpStage
from sanawm_jax.vae.state import KERNEL_PAST, Stream

Noise = tuple[Float[Array, "_ _"], Float[Array, "_ _"]]  # two fields (h, w), one per convolution


def pixel_norm(x: Float[Array, "*rest C"], eps: float = 1e-8) -> Float[Array, "*rest C"]:
    """Divides every location by the RMS of its channels; statistics in float32."""
    scale = inverse_rms(x, eps)
    # With channels as the last axis in memory, XLA would write the normalised array and then pad
    # it. It is one pass less to read x again when the padded array is written.
    scale = lax.optimization_barrier(scale)
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


def space_to_depth(
    x: Float[Array, "B f h w C"], strides: Strides
) -> Float[Array, "B f_out h_out w_out C_out"]:
    """Moves blocks of p*q*r locations into channels, in which the offsets p q r vary fastest."""
    p, q, r = strides
    return rearrange(x, "B (f p) (h q) (w r) C -> B f h w (C p q r)", p=p, q=q, r=r)


def depth_to_space(
    x: Float[Array, "B f h w C"], strides: Strides
) -> Float[Array, "B f_out h_out w_out C_out"]:
    """Inverse of `space_to_depth`."""
    p, q, r = strides
    return rearrange(x, "B f h w (C p q r) -> B (f p) (h q) (w r) C", p=p, q=q, r=r)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _pad(x: jax.Array, time: tuple[int, int], mode: str | None) -> jax.Array:
    """Pads x (B, f, h, w, C) with edge frames in time and with a border of one in space.

    The padding is one gather of locations. XLA fuses it with the operation that computes x, so one
    kernel writes the padded array once, including its borders.

    Args:
      time: numbers of frames before and after.
      mode: reflect, replicate or circular; None does not pad in space.
    """
    source = jnp.zeros((), jnp.int32)  # after the loop: (f_out, h_out, w_out) indices of locations
    for axis, (before, after), how in _widths(time, mode):
        size = x.shape[axis]
        # an iota, because a constant with all locations would be megabytes in the program
        places = _sources(lax.iota(jnp.int32, before + size + after) - before, size, how)
        source = source[..., None] * size + places
    locations = jnp.asarray(x).reshape(x.shape[0], -1, x.shape[-1])
    y = locations.at[:, source.reshape(-1)].get(
        mode="promise_in_bounds", wrap_negative_indices=False
    )
    return y.reshape(x.shape[0], *source.shape, x.shape[-1])


def _widths(
    time: tuple[int, int], mode: str | None
) -> list[tuple[int, tuple[int, int], str | None]]:
    """Returns for each axis: its number, its widths before and after, and its padding mode."""
    space = (1, 1) if mode else (0, 0)
    return [(1, time, "replicate"), (2, space, mode), (3, space, mode)]


def _sources(i: Any, size: int, mode: str | None) -> Any:
    """Returns which of the `size` entries of an axis is at position i, inside or outside of it."""
    if mode == "circular":
        return i % size
    if mode == "reflect":
        i = size - 1 - abs(size - 1 - abs(i))
    # An axis of size one cannot be reflected. It is repeated here, while torch raises an error.
    return i.clip(0, size - 1)


def _pad_forward(x: jax.Array, time: tuple[int, int], mode: str | None) -> tuple[jax.Array, None]:
    return _pad(x, time, mode), None


def _pad_backward(
    time: tuple[int, int], mode: str | None, _: None, d: jax.Array
) -> tuple[jax.Array]:
    """Adds the gradient of each border to the entry that the border repeats.

    The gradient of the gather itself would scatter all locations.
    """
    for axis, (before, after), how in _widths(time, mode):
        size = d.shape[axis] - before - after
        whole, d = d, lax.slice_in_dim(d, before, before + size, axis=axis)
        places = np.arange(-before, size + after)
        for i, source in zip(places, _sources(places, size, how), strict=True):
            if not 0 <= i < size:
                at = (slice(None),) * axis + (int(source),)
                d = d.at[at].add(lax.index_in_dim(whole, int(i + before), axis, keepdims=False))
    return (d,)


_pad.defvjp(_pad_forward, _pad_backward)


class CausalConv(nnx.Module):
    """3x3x3 convolution. Time is padded with edge frames, and space by `padding_mode`.

    The argument `causal` of a call decides whether time is padded only on the left. In a causal
    stream the frames before the call take the place of that padding.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        padding_mode: str,
        strides: Strides = (1, 1, 1),
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(in_features, out_features, (3, 3, 3), rngs=rngs)
        self.padding_mode = padding_mode
        self.strides = strides

    def __call__(
        self, x: Float[Array, "B f h w C"], *, causal: bool, stream: Stream | None = None
    ) -> Float[Array, "B f_out h_out w_out C_out"]:
        time = (KERNEL_PAST, 0) if causal else (1, 1)
        if stream is not None:
            x, time = stream.with_past(x), (0, 0)
        is_padded = self.padding_mode != "zeros"
        x = _pad(x, time, self.padding_mode if is_padded else None)
        space = (0, 0) if is_padded else (1, 1)
        return self.conv(x, strides=self.strides, padding=((0, 0), space, space))


class ChannelLayerNorm(nnx.Module):
    """Layer norm over channels with scale and bias; statistics in float32."""

    def __init__(self, features: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((features,)))
        self.bias = nnx.Param(jnp.zeros((features,)))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rest C"]) -> Float[Array, "*rest C"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, -1, keepdims=True)
        y = centred * lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class TimeEmbedder(nnx.Module):
    """Sinusoidal embedding of a timestep and a two-layer MLP."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(256, features, rngs=rngs)
        self.linear_2 = Linear(features, features, rngs=rngs)

    def __call__(self, timestep: Float[Array, "B"], dtype: DTypeLike) -> Float[Array, "B C"]:
        # The phases are float32: in bfloat16, neighbouring timesteps of 0..1000 would be equal.
        frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(128, dtype=jnp.float32) / 128)
        phase = timestep.astype(jnp.float32).reshape(-1, 1) * frequencies
        waves = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1).astype(dtype)
        return self.linear_2(jax.nn.silu(self.linear_1(waves)))


class ResnetBlock(nnx.Module):
    """Residual block with norms before its convolutions.

    It is optionally modulated by a timestep, and it optionally adds noise.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float,
        padding_mode: str,
        inject_noise: bool = False,
        timestep_conditioning: bool = False,
        rngs: nnx.Rngs,
    ):
        self.conv1 = CausalConv(in_features, out_features, padding_mode=padding_mode, rngs=rngs)
        self.conv2 = CausalConv(out_features, out_features, padding_mode=padding_mode, rngs=rngs)
        widens = in_features != out_features
        self.norm3 = ChannelLayerNorm(in_features, eps=eps) if widens else None
        self.conv_shortcut = (
            Conv(in_features, out_features, (1, 1, 1), rngs=rngs) if widens else None
        )
        # noise has no effect at the start
        scale = (1, 1, in_features)
        self.per_channel_scale1 = nnx.Param(jnp.zeros(scale)) if inject_noise else None
        self.per_channel_scale2 = nnx.Param(jnp.zeros(scale)) if inject_noise else None
        self.scale_shift_table = (
            modulation_table(4, in_features, rngs) if timestep_conditioning else None
        )

    def __call__(
        self,
        x: Float[Array, "B f h w C"],
        temb: Float[Array, "B 4*C"] | None = None,
        noise: Noise | None = None,
        *,
        causal: bool,
        stream: Stream | None = None,
    ) -> Float[Array, "B f h w C_out"]:
        """Maps x to C_out channels; temb is 4 vectors of C channels, one after another."""
        modulation = None
        if self.scale_shift_table is not None:
            table = self.scale_shift_table[...].astype(x.dtype)
            # shift and scale of the first norm, then those of the second norm
            modulation = rearrange(temb, "B (k C) -> k B 1 1 1 C", k=4)
            modulation = modulation + table[:, None, None, None, None]

        y = pixel_norm(x)
        if modulation is not None:
            y = y * (1 + modulation[1]) + modulation[0]
        y = self.conv1(jax.nn.silu(y), causal=causal, stream=stream)
        if self.per_channel_scale1 is not None:
            y = y + self._noise(noise, 0, y) * self.per_channel_scale1[...].astype(y.dtype)
        y = pixel_norm(y)
        if modulation is not None:
            y = y * (1 + modulation[3]) + modulation[2]
        y = self.conv2(jax.nn.silu(y), causal=causal, stream=stream)
        if self.per_channel_scale2 is not None:
            y = y + self._noise(noise, 1, y) * self.per_channel_scale2[...].astype(y.dtype)

        if self.norm3 is not None:
            x = self.norm3(x)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + y

    @staticmethod
    def _noise(noise: Noise | None, index: int, like: jax.Array) -> jax.Array:
        if noise is None:
            raise InputError("this VAE injects noise in its decoder; pass noise=draw_noise(...)")
        return noise[index].astype(like.dtype)[:, :, None]  # h w 1, shared by frames and batch


class Downsampler(nnx.Module):
    """Space-to-depth after a convolution, plus the mean over groups of the folded input."""

    def __init__(self, stage: DownStage, *, padding_mode: str, rngs: nnx.Rngs):
        assert stage.strides is not None
        self.strides = stage.strides
        fold = math.prod(stage.strides)
        self.group_size = stage.in_channels * fold // stage.out_channels
        self.conv = CausalConv(
            stage.in_channels, stage.out_channels // fold, padding_mode=padding_mode, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "B f h w C"], *, causal: bool
    ) -> Float[Array, "B f_out h_out w_out C_out"]:
        if self.strides[0] > 1:
            # The first frame is repeated for the frames before the clip, so that 8k+1 divides.
            x = jnp.concatenate([x[:, : self.strides[0] - 1], x], axis=1)
        folded = space_to_depth(x, self.strides)
        skip = reduce(folded, "B f h w (C g) -> B f h w C", "mean", g=self.group_size)
        return space_to_depth(self.conv(x, causal=causal), self.strides) + skip


class Upsampler(nnx.Module):
    """Depth-to-space after a convolution, plus optionally the repeated and unfolded input."""

    def __init__(self, stage: UpStage, *, padding_mode: str, rngs: nnx.Rngs):
        assert stage.strides is not None
        self.strides = stage.strides
        fold = math.prod(stage.strides)
        features = stage.out_channels * stage.factor
        self.repeats = fold // stage.factor if stage.residual else 0
        self.conv = CausalConv(
            features, features * fold // stage.factor, padding_mode=padding_mode, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "B f h w C"], *, causal: bool, stream: Stream | None = None
    ) -> Float[Array, "B f_out h_out w_out C_out"]:
        # frames that would be before the clip are removed
        excess = self.strides[0] - 1 if stream is None or stream.is_start else 0
        y = depth_to_space(self.conv(x, causal=causal, stream=stream), self.strides)[:, excess:]
        if not self.repeats:
            return y
        unfolded = depth_to_space(x, self.strides)[:, excess:]
        return y + jnp.tile(unfolded, (1, 1, 1, 1, self.repeats))


class DownBlock(nnx.Module):
    """Residual blocks, then a downsampler."""

    def __init__(self, stage: DownStage, *, eps: float, padding_mode: str, rngs: nnx.Rngs):
        width = stage.in_channels
        self.resnets = nnx.List(
            ResnetBlock(width, width, eps=eps, padding_mode=padding_mode, rngs=rngs)
            for _ in range(stage.num_layers)
        )
        self.downsample = self._downsampler(stage, padding_mode, rngs)

    def __call__(
        self, x: Float[Array, "B f h w C"], *, causal: bool
    ) -> Float[Array, "B f_out h_out w_out C_out"]:
        for resnet in self.resnets:
            x = resnet(x, causal=causal)
        return x if self.downsample is None else self.downsample(x, causal=causal)

    @staticmethod
    def _downsampler(
        stage: DownStage, padding_mode: str, rngs: nnx.Rngs
    ) -> CausalConv | Downsampler | None:
        if stage.strides is None:
            return None
        if not stage.strided_conv:
            return Downsampler(stage, padding_mode=padding_mode, rngs=rngs)
        width = stage.in_channels
        return CausalConv(width, width, padding_mode=padding_mode, strides=stage.strides, rngs=rngs)


class MidBlock(nnx.Module):
    """Residual blocks of one width, with their own embedding of the timestep."""

    def __init__(
        self,
        features: int,
        num_layers: int,
        *,
        eps: float,
        padding_mode: str,
        inject_noise: bool = False,
        timestep_conditioning: bool = False,
        rngs: nnx.Rngs,
    ):
        embedder = TimeEmbedder(4 * features, rngs=rngs) if timestep_conditioning else None
        self.time_embedder = embedder
        self.resnets = nnx.List(
            ResnetBlock(
                features,
                features,
                eps=eps,
                padding_mode=padding_mode,
                inject_noise=inject_noise,
                timestep_conditioning=timestep_conditioning,
                rngs=rngs,
            )
            for _ in range(num_layers)
        )

    def __call__(
        self,
        x: Float[Array, "B f h w C"],
        timestep: Float[Array, "B"] | None = None,
        noise: tuple[Noise, ...] | None = None,
        *,
        causal: bool,
        stream: Stream | None = None,
    ) -> Float[Array, "B f h w C"]:
        temb = None
        if self.time_embedder is not None:
            assert timestep is not None
            temb = self.time_embedder(timestep, x.dtype)
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb, noise[i] if noise else None, causal=causal, stream=stream)
        return x


class UpBlock(MidBlock):
    """A change of width if needed, an upsampler, then residual blocks."""

    def __init__(
        self,
        stage: UpStage,
        *,
        eps: float,
        padding_mode: str,
        timestep_conditioning: bool,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            stage.out_channels,
            stage.num_layers,
            eps=eps,
            padding_mode=padding_mode,
            inject_noise=stage.inject_noise,
            timestep_conditioning=timestep_conditioning,
            rngs=rngs,
        )
        widths = (stage.in_channels, stage.out_channels)
        self.conv_in = (
            ResnetBlock(*widths, eps=eps, padding_mode=padding_mode, rngs=rngs)
            if widths[0] != widths[1]
            else None
        )
        self.upsample = (
            Upsampler(stage, padding_mode=padding_mode, rngs=rngs) if stage.strides else None
        )

    def __call__(
        self,
        x: Float[Array, "B f h w C"],
        timestep: Float[Array, "B"] | None = None,
        noise: tuple[Noise, ...] | None = None,
        *,
        causal: bool,
        stream: Stream | None = None,
    ) -> Float[Array, "B f_out h_out w_out C_out"]:
        if self.conv_in is not None:
            x = self.conv_in(x, causal=causal, stream=stream)
        if self.upsample is not None:
            x = self.upsample(x, causal=causal, stream=stream)
        return super().__call__(x, timestep, noise, causal=causal, stream=stream)
