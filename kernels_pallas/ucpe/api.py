"""Ray transforms of heads, their implementation chosen by `kernels_pallas.choice`.

Shapes and meanings are those of the functions of the same names in `ucpe.reference`. On a GPU the
Pallas kernel takes bfloat16; float32 goes through XLA whatever is chosen. Only the forward pass is
fast: gradients of the Pallas form are those of the XLA form, computed by XLA from the inputs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import choice
from kernels_pallas.ucpe import gpu, reference
from kernels_pallas.ucpe.gpu import Tiles


def _is_pallas(impl: str | None, dtype: Any) -> bool:
    is_too_wide = dtype == jnp.float32 and not choice.interpret()
    return not is_too_wide and choice.pick("ucpe", impl) == "pallas"


def apply_ucpe(
    x: jax.Array,
    matrices: jax.Array,
    angles: jax.Array | None,
    *,
    inverse: bool = False,
    impl: str | None = None,
    tiles: Tiles | None = None,
) -> jax.Array:
    """See `reference.apply_ucpe`."""
    if not _is_pallas(impl, x.dtype):
        return reference.apply_ucpe(x, matrices, angles, inverse=inverse)
    static = (tiles or Tiles(), choice.interpret(), inverse, False)
    return _transform(static, x, matrices, angles)


def to_ray_space(
    x: jax.Array,
    matrices: jax.Array,
    angles: jax.Array | None,
    *,
    impl: str | None = None,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `reference.to_ray_space`; from Pallas the inflation is that of heads not yet rounded."""
    if not _is_pallas(impl, x.dtype):
        return reference.to_ray_space(x, matrices, angles)
    return _transform((tiles or Tiles(), choice.interpret(), False, True), x, matrices, angles)


_Static = tuple[Tiles, bool, bool, bool]  # tiles, interpreted, inverse, bounded


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _transform(static: _Static, x: jax.Array, matrices: jax.Array, angles: jax.Array | None) -> Any:
    tiles, interpret, inverse, bounded = static
    with jax.named_scope("ucpe"):
        rotation = None
        if angles is not None:
            sin = jnp.sin(angles)
            rotation = (jnp.cos(angles), -sin if inverse else sin)
        found = gpu.transform(x, matrices, rotation, tiles, bounded=bounded, interpret=interpret)
        return (found[0], found[1].mean(axis=2)) if bounded else found[0]


def _forward(static: _Static, *args: Any) -> tuple[Any, Any]:
    return _transform(static, *args), args


def _backward(static: _Static, saved: Any, gradients: Any) -> Any:
    inverse, bounded = static[2:]
    function = functools.partial(reference.apply_ucpe, inverse=inverse)
    return jax.vjp(reference.to_ray_space if bounded else function, *saved)[1](gradients)


_transform.defvjp(_forward, _backward)
