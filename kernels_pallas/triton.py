"""Instructions that Triton kernels ask for by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu


def fma(a: jax.Array, b: jax.Array, c: jax.Array, *, plain: bool = False) -> jax.Array:
    """a * b + c of float32 vectors of one shape, rounded once.

    Pallas's compiler for Triton fuses no product with a sum: kernels bound by instructions, not by
    memory, would take twice as many.

    Args:
      plain: as a product and a sum; an interpreter has no such instruction.
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
