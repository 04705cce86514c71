"""Layers that all networks share: thin modules that call pure functions.

Weights are cast to the dtype of the activations where they are used, so float32 masters and
bfloat16 compute need no second copy of the model. Axis letters: B batch, C channels, C_out
channels of a result of another width, R rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels_pallas.ucpe import rms_norm
from sanawm_jax.core.params import Initializer, draw

kernel_init: Initializer = nnx.initializers.lecun_normal()
zeros_init: Initializer = nnx.initializers.zeros


def modulation_table(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    """Returns learned shifts and scales (rows, width), to which a timestep embedding is added."""

    def init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
        return jax.random.normal(key, shape, dtype) / width**0.5

    return nnx.Param(draw(init, rngs, (rows, width)))


@jax.custom_vjp
def affine(
    x: Float[Array, "*rest C"], kernel: Float[Array, "C C_out"], bias: Float[Array, "C_out"]
) -> Float[Array, "*rest C_out"]:
    """`x @ kernel + bias` with one rounding, after the bias, as a fused GEMM epilogue does it."""
    if jax.default_backend() == "gpu":
        # cuBLASLt adds the bias before it rounds. With a float32 result it would write twice as
        # many bytes, and another kernel would have to read them, add the bias and round.
        return x @ kernel + bias
    y = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
    return (y + bias.astype(jnp.float32)).astype(x.dtype)


def _affine_forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return affine(x, kernel, bias), (x, kernel)


def _affine_backward(
    saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    # The automatic derivative would compute both products in float32, which is slow. dy has the
    # compute dtype, and the products keep it.
    x, kernel = saved
    rows = dy.reshape(-1, dy.shape[-1])
    d_kernel = jnp.matmul(x.reshape(-1, x.shape[-1]).T, rows)
    d_bias = jnp.sum(rows, 0, dtype=jnp.float32).astype(dy.dtype)
    return dy @ kernel.T, d_kernel, d_bias


affine.defvjp(_affine_forward, _affine_backward)


def _is_wider(x: jax.Array, kernel: jax.Array) -> bool:
    return x.dtype == jnp.float32 and kernel.dtype == jnp.bfloat16


def wide_product(
    x: Float[Array, "*rest C"], kernel: Float[Array, "C C_out"]
) -> Float[Array, "*rest C_out"]:
    """Multiplies float32 x with a bfloat16 kernel, as exactly as in float32.

    The kernel is read in bfloat16. In a large model, a float32 copy of a kernel that computes the
    modulation would take half a gigabyte, for the product with one row. Therefore x is written as
    the sum of three bfloat16 numbers, whose products with the kernel are exact.
    """
    parts, rest = [], x
    for _ in range(3):
        # A compiler may remove a cast to bfloat16 and back, but not this operation.
        part = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return jnp.sum(jnp.matmul(jnp.stack(parts), kernel, preferred_element_type=jnp.float32), 0)


class Linear(nnx.Module):
    """`x @ kernel + bias` on the last axis; kernel (C, C_out).

    `core.lora.build_adapted` adds `lora_a` (C, R), `lora_b` (R, C_out) and `lora_scale`.
    """

    # only layers with adapters have these attributes
    lora_a: nnx.LoRAParam
    lora_b: nnx.LoRAParam
    lora_scale: float

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        kernel_init: Initializer = kernel_init,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(draw(kernel_init, rngs, (in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros((out_features,))) if use_bias else None

    def __call__(self, x: Float[Array, "*rest C"]) -> Float[Array, "*rest C_out"]:
        if self.bias is None:
            return self.product(x)
        kernel, bias = self.kernel[...], self.bias[...].astype(x.dtype)
        if _is_wider(x, kernel):
            return self.product(x) + bias
        return self._adapted(x, affine(x, kernel.astype(x.dtype), bias))

    def product(self, x: Float[Array, "*rest C"]) -> Float[Array, "*rest C_out"]:
        """Without the bias, for a reader that adds it on the way."""
        kernel = self.kernel[...]
        if _is_wider(x, kernel):
            return self._adapted(x, wide_product(x, kernel))
        return self._adapted(x, x @ kernel.astype(x.dtype))

    def _adapted(self, x: jax.Array, y: jax.Array) -> jax.Array:
        if not hasattr(self, "lora_a"):
            return y
        a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
        return y + self.lora_scale * ((x @ a) @ b)  # two small products instead of a @ b


class Conv(nnx.Module):
    """Convolution over `len(kernel_size)` spatial axes of an input whose channels are last.

    Kernel (*kernel_size, C / groups, C_out), as `lax.conv_general_dilated` takes it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        groups: int = 1,
        use_bias: bool = True,
        kernel_init: Initializer = kernel_init,
        rngs: nnx.Rngs,
    ):
        shape = (*kernel_size, in_features // groups, out_features)
        self.kernel = nnx.Param(draw(kernel_init, rngs, shape))
        self.bias = nnx.Param(jnp.zeros((out_features,))) if use_bias else None

    def __call__(
        self,
        x: Float[Array, "B *space C"],
        *,
        strides: Sequence[int] | None = None,
        padding: str | Sequence[tuple[int, int]] | None = None,
        groups: int = 1,
    ) -> Float[Array, "B *space_out C_out"]:
        kernel = self.kernel[...].astype(x.dtype)
        rank = kernel.ndim - 2
        if padding is None:
            # PyTorch pads symmetrically; "SAME" differs for kernels of even size.
            padding = [(k // 2, k // 2) for k in kernel.shape[:rank]]
        letters = "DHW"[3 - rank :]
        # Round once, after the bias, as a fused convolution does. A CPU has no fused convolution
        # and would round twice, so there the result of the convolution is float32.
        is_wide = jax.default_backend() == "cpu" and x.dtype != jnp.float32
        y = lax.conv_general_dilated(
            x,
            kernel,
            strides or (1,) * rank,
            padding,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
            feature_group_count=groups,
            preferred_element_type=jnp.float32 if is_wide else None,
        )
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype).astype(y.dtype)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a learned scale. The statistics are computed in float32."""

    def __init__(self, features: int, *, eps: float, rngs: nnx.Rngs | None = None):
        del rngs
        self.scale = nnx.Param(jnp.ones((features,)))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rest C"]) -> Float[Array, "*rest C"]:
        return rms_norm(x, self.scale[...], self.eps)


@jax.named_scope("adaln")
def modulated_norm(
    x: Float[Array, "*rest C"], scale: Float[Array, "*#rest C"], shift: Float[Array, "*#rest C"]
) -> Float[Array, "*rest C"]:
    """Layer norm, then `(1 + scale) x + shift` (adaLN), all in float32; x's dtype comes back."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, -1, keepdims=True)
    variance = jnp.mean(centred * centred, -1, keepdims=True)
    return (centred * lax.rsqrt(variance + 1e-6) * (1.0 + scale) + shift).astype(x.dtype)


def activation(name: str | None) -> Callable[[jax.Array], jax.Array]:
    """Returns an activation function by the reference's name; None is the identity.

    Raises:
      ValueError: the name is unknown.
    """
    table: dict[str | None, Callable[[jax.Array], jax.Array]] = {
        None: lambda x: x,
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
        "mish": jax.nn.mish,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "relu": jax.nn.relu,
    }
    if name not in table:
        raise ValueError(f"unknown activation {name!r}; use one of {sorted(map(str, table))}")
    return table[name]
