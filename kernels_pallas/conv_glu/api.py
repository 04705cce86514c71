"""Bias, SiLU, depthwise 3x3 convolution and SiLU gate: the middle of the DiT's feed-forward.

Axis letters: H W rows and columns of a frame, C channels of values and gates together.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import choice
from kernels_pallas.conv_glu import gpu
from kernels_pallas.conv_glu.reference import reference


def conv_glu(
    x: Float[Array, "*rest H W C"],
    x_bias: Float[Array, "C"],
    kernel: Float[Array, "_ _ 1 C"],
    bias: Float[Array, "C"],
    *,
    impl: str | None = None,
    tiles: gpu.Tiles | None = None,
) -> Float[Array, "*rest H W C//2"]:
    """Computes `value * silu(gate)` of the two halves of `conv(silu(x + x_bias)) + bias`.

    The convolution pads with zeros.

    Args:
      x: the matrix product before its bias is added, values and then gates;
        float32 or bfloat16. Sums are computed in float32.
      x_bias: bias of that product.
      kernel, bias: those of the convolution.
      impl: xla, xla_split, pallas or None; see `kernels_pallas.choice`.
      tiles: tile sizes of the Pallas kernels.

    Returns:
      An array in x's dtype, with half of its channels.

    Raises:
      ValueError: the implementation is unknown, or pallas was asked for a kernel that is not 3x3.
    """
    impl = choice.pick("conv_glu", impl)
    if impl != "pallas":
        return reference(x, x_bias, kernel, bias, is_split=impl == "xla_split")
    if kernel.shape[:3] != (3, 3, 1):
        raise ValueError(f"kernel {kernel.shape}: the Pallas kernel is 3x3 and depthwise")
    *lead, height, width, channels = x.shape
    halves = x.reshape(-1, height, width, 2, channels // 2)
    # the weights are rounded to the compute dtype, as in an XLA convolution
    taps = kernel.astype(x.dtype).astype(jnp.float32).reshape(3, 3, 2, channels // 2)
    biases = jnp.stack([x_bias, bias]).astype(jnp.float32).reshape(2, 2, channels // 2)
    y: Any = _pallas(tiles or gpu.Tiles(), choice.interpret(), halves, taps, biases)
    return y.reshape(*lead, height, width, channels // 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pallas(
    tiles: gpu.Tiles, interpret: bool, x: jax.Array, w: jax.Array, b: jax.Array
) -> jax.Array:
    return gpu.forward(x, w, b, tiles, interpret=interpret)


def _forward(
    tiles: gpu.Tiles, interpret: bool, x: jax.Array, w: jax.Array, b: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _pallas(tiles, interpret, x, w, b), (x, w, b)


def _backward(
    tiles: gpu.Tiles,
    interpret: bool,
    saved: tuple[jax.Array, jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return gpu.backward(*saved, dy, tiles, interpret=interpret)


_pallas.defvjp(_forward, _backward)
