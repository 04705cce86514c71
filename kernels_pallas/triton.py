"""GPU instructions that Triton kernels request by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu


def fma(a: jax.Array, b: jax.Array, c: jax.Array, *, plain: bool = False) -> jax.Array:
    """Computes a * b + c of float32 vectors of one shape, with one rounding.

    Pallas's Triton compiler does not fuse a product with a sum. A kernel that is limited by
    instructions, and not by memory, would otherwise need twice as many of them.

    Args:
      plain: use a product and a sum instead. The interpreter does not have the instruction.
    """
    if plain:
        return a * b + c
    shape = jnp.broadcast_shapes(a.shape, b.shape, c.shape)
    (result,) = plgpu.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[jnp.broadcast_to(x, shape) for x in (a, b, c)],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return result
