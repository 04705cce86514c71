"""Linear layers in FP8 (e4m3). Weights are stored in FP8, and activations are rounded to it.

    y = s_x s_w (x8 W8^T) + b,  x8 = e4m3(x / s_x),  W8 = e4m3(W^T / s_w)

Each of the two scales is one number per tensor. XLA's FP8 product on Hopper takes nothing else. A
scale per token or per output channel is not more accurate on trained weights (small world, 20
steps: error 0.088 instead of 0.089), because e4m3 has enough range and too few bits. The scales are
powers of two, so scaling does not round, and a scale is also exact in bfloat16.

XLA makes one call of the lines in `float8_matmul`, of a library or, where it measures that to be
faster (an H100 under jax 0.11), of Triton: a product of two e4m3 matrices, each with its contracted
axis last, then a scalar factor, then a vector. Kernels are therefore (out, in), and everything is
two-dimensional. Rows that are no multiple of 16, such as 300 text tokens, are
padded by XLA. Axis letters: C input channels, C_out output channels.

The library qwix is not used. It wraps calls of the model and has its own arrays as parameters. Our
parameters are a plain dict of stacked arrays, which are loaded, streamed and counted by path.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32

from sanawm_jax.core.layers import Linear
from sanawm_jax.core.params import Params, build_with, leaves
from sanawm_jax.runtime.errors import InputError

FLOAT8 = jnp.float8_e4m3fn
LARGEST = 448.0  # the largest finite e4m3 number; larger ones become NaN
MULTIPLE = 16  # the library needs kernels whose two sizes are multiples of this number


def scale_for(largest: Float[Array, "*rest"]) -> Float32[Array, "*rest"]:
    """Scales (float32) that bring magnitudes `largest` below 448: powers of two, 1 for zero.

    They are powers of two, and 1 for zero. NaN and infinity also get 1. They become NaN in e4m3, so
    a wrong activation stays visible.
    """
    bits = lax.bitcast_convert_type(largest.astype(jnp.float32) / LARGEST, jnp.uint32)
    # Round up to a power of two. The compiler may repeat this per element, so it is short.
    rounded = lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
    return jnp.where((rounded > 0) & (rounded < jnp.inf), rounded, 1.0)


def to_float8(x: Float[Array, "*rest"], scale: Float[Array, "*#rest"]) -> Float[Array, "*rest"]:
    """`x / scale` in e4m3; the scale is a power of two that broadcasts against x."""
    return (x * (1.0 / scale).astype(x.dtype)).astype(FLOAT8)


@jax.jit
def quantise(kernel: Float[Array, "*rest C C_out"]) -> dict[str, Float[Array, "..."]]:
    """Rounds a kernel to e4m3.

    Returns:
      `values` (*rest, C_out, C) in e4m3, and `scale` (*rest) in float32.
    """
    scale = scale_for(jnp.max(jnp.abs(kernel), (-2, -1)))
    values = to_float8(kernel, scale[..., None, None])
    return {"values": jnp.swapaxes(values, -1, -2), "scale": scale}


@jax.named_scope("fp8")
def float8_matmul(
    x: Float[Array, "*rest C"],
    values: Float[Array, "C_out C"],
    scale: Float[Array, ""],
    bias: Float[Array, "C_out"] | None = None,
) -> Float[Array, "*rest C_out"]:
    """Multiplies x with a kernel of `quantise` and adds a bias; the result has x's dtype.

    A backend without FP8 products computes with the same rounded numbers in a wider dtype.

    Returns:
      (..., out) in x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    x_scale = scale_for(jnp.max(jnp.abs(rows)))
    y = lax.dot_general(
        to_float8(rows, x_scale),
        values,
        (((1,), (1,)), ((), ())),
        preferred_element_type=x.dtype,
    )
    y = y * (x_scale * scale).astype(x.dtype)
    if bias is not None:
        y = y + bias.astype(x.dtype)
    return y.reshape(*x.shape[:-1], -1)


class Float8Kernel(nnx.Module):
    """The two arrays that `quantise` makes of a kernel, under the kernel's path."""

    def __init__(self, kernel: Float[Array, "*rest C C_out"]):
        quantised = quantise(kernel)
        self.values = nnx.Param(quantised["values"])
        self.scale = nnx.Param(quantised["scale"])


class Float8Linear(nnx.Module):
    """The FP8 version of a `Linear`, which it replaces in a model."""

    def __init__(self, linear: Linear):
        self.kernel = Float8Kernel(linear.kernel[...])
        self.bias = linear.bias

    def __call__(self, x: Float[Array, "*rest C"]) -> Float[Array, "*rest C_out"]:
        return self._product(x, None if self.bias is None else self.bias[...])

    def product(self, x: Float[Array, "*rest C"]) -> Float[Array, "*rest C_out"]:
        """See `Linear.product`."""
        return self._product(x, None)

    def _product(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        return float8_matmul(x, self.kernel.values[...], self.kernel.scale[...], bias)


@functools.lru_cache(maxsize=16)
def build_float8(
    module: type[nnx.Module], config: Any, targets: str
) -> tuple[nnx.GraphDef, Params]:
    """Works as `params.build`, but the targeted layers have e4m3 kernels.

    Args:
      module, config: see `params.build`.
      targets: regular expression for the whole dotted path of a linear layer. A layer whose sizes
        are not multiples of 16 does not change.

    Raises:
      InputError: no layer can be changed.
    """

    def change(model: nnx.Module) -> None:
        modules = dict(nnx.iter_modules(model))
        found = {
            path: layer
            for path, layer in modules.items()
            if isinstance(layer, Linear)
            and re.fullmatch(targets, ".".join(map(str, path)))
            and not any(size % MULTIPLE for size in layer.kernel[...].shape[-2:])
        }
        if not found:
            raise InputError(
                f"no layer of this model can run in FP8: their sizes are no multiples of {MULTIPLE}"
            )
        for path, layer in found.items():
            setattr(modules[path[:-1]], str(path[-1]), Float8Linear(layer))

    return build_with(module, config, change)


def quantising(abstract: Params, place: Callable[[str, Any], Any] | None) -> Callable[..., Any]:
    """Returns a `place` for `keymap.load` that quantises each kernel immediately after reading.

    Args:
      abstract: the abstract parameters of `build_float8`, which say which kernels are in FP8.
      place: (dotted path, array) -> the array in its place; None puts it on the device.

    Returns:
      A function (dotted path, array) -> the placed array, or, for an FP8 kernel, its two arrays by
      name.
    """
    suffix = ".values"
    paths = {p.removesuffix(suffix) for p, _ in leaves(abstract) if p.endswith(f".kernel{suffix}")}

    def placed(path: str, array: Any) -> Any:
        if path not in paths:
            return place(path, array) if place else jax.device_put(array)
        quantised = quantise(jax.device_put(array))
        if place is None:
            return quantised
        return {name: place(f"{path}.{name}", np.asarray(a)) for name, a in quantised.items()}

    return placed
