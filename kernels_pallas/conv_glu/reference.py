"""The gated convolution as a sum of shifted arrays, for XLA on any device.

Axis letters: H W rows and columns of a frame, C channels, in `reference` those of values
and gates together.
Reference: the middle of diffusers' `GLUMBConvTemp`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def _taps(x: jax.Array, kernel: jax.Array) -> list[tuple[tuple[int, int], jax.Array]]:
    """For each tap of a depthwise kernel: its index, and x shifted to that tap, of x's shape."""
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
def depthwise_conv(
    x: Float[Array, "*rest H W C"], kernel: Float[Array, "_ _ 1 C"], bias: Float[Array, "C"]
) -> Float[Array, "*rest H W C"]:
    """Depthwise 2-D convolution as shifted multiply-adds, with zero padding.

    XLA fuses the shifts into one pass. A grouped convolution of this width is several times
    slower, both on a GPU and on a CPU.

    Args:
      x: frames, channels last.
      kernel: an odd number of rows and of columns.
      bias: added at the end.
    """
    # Sums are in float32, as in an XLA convolution. Inside the fusion this costs no memory traffic.
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
    # The transpose of a shift is a shift, so dx is the same fused pass with the kernel reversed.
    # The derivative of nine slices would write nine padded arrays.
    x, kernel, bias = saved
    dx = depthwise_conv(dy, kernel[::-1, ::-1], jnp.zeros_like(bias))
    wide = dy.astype(jnp.float32)
    space = tuple(range(dy.ndim - 1))
    d_kernel = [jnp.sum(seen * wide, space) for _, seen in _taps(x, kernel)]
    d_kernel = jnp.stack(d_kernel).reshape(kernel.shape)
    return dx, d_kernel.astype(kernel.dtype), jnp.sum(wide, space).astype(bias.dtype)


depthwise_conv.defvjp(_depthwise_forward, _depthwise_backward)


def reference(
    x: Float[Array, "*rest H W C"],
    x_bias: Float[Array, "C"],
    kernel: Float[Array, "_ _ 1 C"],
    bias: Float[Array, "C"],
    *,
    is_split: bool = False,
) -> Float[Array, "*rest H W C//2"]:
    """`conv_glu` in XLA; the shapes are the same.

    Args:
      is_split: write the activated input to memory. Otherwise XLA fuses the activation into the
        convolution, which then computes it again for every tap.
    """
    wide = x.astype(jnp.float32) + x_bias.astype(jnp.float32)
    activated = jax.nn.silu(wide).astype(x.dtype)
    if is_split:
        activated = lax.optimization_barrier(activated)
    value, gate = jnp.split(depthwise_conv(activated, kernel, bias), 2, -1)
    return value * jax.nn.silu(gate)
