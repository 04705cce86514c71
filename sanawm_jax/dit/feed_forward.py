"""Feed-forward of a DiT block: a gated depthwise convolution over space, then one over frames.

Axis letters: B batch, F latent frames, P = H W tokens a frame, C width.
Reference: diffusers `GLUMBConvTemp`, `SanaWMMlp`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from sanawm_jax.core.frames import FrameLayout, neighbours
from sanawm_jax.core.layers import Conv, Linear, activation, zeros_init
from sanawm_jax.dit.config import DiTConfig


def _taps(x: jax.Array, kernel: jax.Array) -> list[tuple[tuple[int, int], jax.Array]]:
    """What each tap of a depthwise kernel sees: pairs of its index and x shifted, as x in size."""
    rows, columns = x.shape[-3:-1]
    kh, kw = kernel.shape[:2]
    pad = [(0, 0)] * (x.ndim - 3) + [(kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)]
    padded = jnp.pad(x, pad)
    return [
        ((i, j), padded[..., i : i + rows, j : j + columns, :])
        for i in range(kh)
        for j in range(kw)
    ]


@jax.custom_vjp
def depthwise_conv(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Depthwise 2-D convolution as shifted multiply-adds, zero padding.

    XLA fuses the shifts into one pass; a grouped convolution of this width is several times
    slower both on a GPU and on a CPU.

    Args:
      x: (..., H, W, C).
      kernel: (kh, kw, 1, C), odd sizes.
      bias: (C,).
    """
    # sums in float32 as a convolution's are; inside the fusion that costs no memory traffic
    weights = kernel.astype(x.dtype).astype(jnp.float32)
    y = bias.astype(jnp.float32)
    for (i, j), seen in _taps(x, kernel):
        y = y + seen * weights[i, j, 0]
    return y.astype(x.dtype)


def _depthwise_forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return depthwise_conv(x, kernel, bias), (x, kernel, bias)


def _depthwise_backward(
    saved: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    # The transpose of a shift is a shift: dx is the same fused pass with the kernel turned round,
    # where the derivative of nine slices would write nine padded arrays.
    x, kernel, bias = saved
    dx = depthwise_conv(dy, kernel[::-1, ::-1], jnp.zeros_like(bias))
    wide = dy.astype(jnp.float32)
    space = tuple(range(dy.ndim - 1))
    d_kernel = [jnp.sum(seen * wide, space) for _, seen in _taps(x, kernel)]
    d_kernel = jnp.stack(d_kernel).reshape(kernel.shape)
    return dx, d_kernel.astype(kernel.dtype), jnp.sum(wide, space).astype(bias.dtype)


depthwise_conv.defvjp(_depthwise_forward, _depthwise_backward)


class GatedConvFeedForward(nnx.Module):
    """1x1 up, SiLU, depthwise 3x3, gate, 1x1 down, plus a residual convolution over frames."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.ffn_width
        self.acts = config.mlp_acts
        self.up = Linear(width, 2 * inner, rngs=rngs)
        self.depthwise = Conv(2 * inner, 2 * inner, (3, 3), groups=2 * inner, rngs=rngs)
        self.down = Linear(inner, width, use_bias=False, rngs=rngs)
        # zero, so that the residual starts as the identity
        self.temporal = Conv(
            width,
            width,
            (config.t_kernel_size,),
            use_bias=False,
            kernel_init=zeros_init,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, grid: tuple[int, int], layout: FrameLayout) -> jax.Array:
        """x (B, F, P, C) on a token grid (H, W) -> the same shape."""
        up_act, gate_act, down_act = (activation(name) for name in self.acts)
        y = rearrange(up_act(self.up(x)), "B F (H W) C -> B F H W C", H=grid[0])
        bias = self.depthwise.bias
        assert bias is not None
        y = depthwise_conv(y, self.depthwise.kernel[...], bias[...])
        value, gate = jnp.split(y, 2, -1)
        y = rearrange(value * gate_act(gate), "B F H W C -> B F (H W) C")
        y = down_act(self.down(y))
        return y + _over_frames(y, self.temporal.kernel[...], layout)


def _over_frames(x: jax.Array, kernel: jax.Array, layout: FrameLayout) -> jax.Array:
    """Convolution over axis 1, one matrix product a tap: x (B, F, P, C), kernel (K, C, C)."""
    kernel = kernel.astype(x.dtype)
    parts = [
        jnp.matmul(seen, tap, preferred_element_type=jnp.float32)
        for seen, tap in zip(neighbours(x, len(kernel) // 2, layout), kernel, strict=True)
    ]
    return sum(parts[1:], parts[0]).astype(x.dtype)


class Mlp(nnx.Module):
    """Two linear layers with a tanh GELU; the text embedder and the `mlp` feed-forward."""

    def __init__(self, in_features: int, hidden: int, out_features: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(in_features, hidden, rngs=rngs)
        self.fc2 = Linear(hidden, out_features, rngs=rngs)

    def __call__(
        self, x: jax.Array, grid: tuple[int, int] | None = None, layout: FrameLayout | None = None
    ) -> jax.Array:
        del grid, layout
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))
