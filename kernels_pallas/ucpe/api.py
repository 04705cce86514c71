"""Features, rotation and ray transforms of heads; `kernels_pallas.choice` chooses the kernel.

Shapes and meanings are those of the functions with the same names in `ucpe.reference`. On a GPU,
the Pallas kernel takes bfloat16, and float32 always goes through XLA. The kernel rounds its results
and no intermediate values. Only the forward pass has a kernel: gradients are those of the XLA
implementation, which XLA computes from the inputs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import choice
from kernels_pallas.ucpe import gpu, reference
from kernels_pallas.ucpe.gpu import Form, Tiles
from kernels_pallas.ucpe.reference import AS_IS, Features


def plain_and_rotated(
    x: Float[Array, "B F P N D"],
    angles: Float[Array, "F P D//2"],
    of: Features = AS_IS,
    *,
    impl: str | None = None,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "B F P N D"], Float[Array, "B F P N D"]]:
    """See `reference.plain_and_rotated`."""
    if not choice.is_pallas("ucpe", impl, x.dtype):
        return reference.plain_and_rotated(x, angles, of)
    form = Form(plain=True, featured=not of.is_identity(), relu=of.relu)
    call = _Call(form, tiles or Tiles(), choice.interpret(), of.eps, of.factor)
    return _run(call, x, None, angles, of.scale)


def rotate(
    x: Float[Array, "B F P N D"],
    angles: Float[Array, "F P D//2"],
    of: Features = AS_IS,
    *,
    impl: str | None = None,
    tiles: Tiles | None = None,
) -> Float[Array, "B F P N D"]:
    """See `reference.rotate`."""
    if not choice.is_pallas("ucpe", impl, x.dtype):
        return reference.rotate(x, angles, of)
    form = Form(featured=not of.is_identity(), relu=of.relu)
    call = _Call(form, tiles or Tiles(), choice.interpret(), of.eps, of.factor)
    return _run(call, x, None, angles, of.scale)


def apply_ucpe(
    x: Float[Array, "B F P N D"],
    matrices: Float[Array, "B F P 4 4"],
    angles: Float[Array, "F P D//4"] | None,
    *,
    inverse: bool = False,
    impl: str | None = None,
    tiles: Tiles | None = None,
) -> Float[Array, "B F P N D"]:
    """See `reference.apply_ucpe`."""
    if not choice.is_pallas("ucpe", impl, x.dtype):
        return reference.apply_ucpe(x, matrices, angles, inverse=inverse)
    form = Form(moves=True, rotated=angles is not None)
    call = _Call(form, tiles or Tiles(), choice.interpret(), inverse=inverse)
    return _run(call, x, matrices, angles, None)


def to_ray_space(
    x: Float[Array, "B F P N D"],
    matrices: Float[Array, "B F P 4 4"],
    angles: Float[Array, "F P D//4"] | None,
    of: Features = AS_IS,
    *,
    capped: bool = True,
    impl: str | None = None,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "B F P N D"], Float[Array, "B F N"]]:
    """See `reference.to_ray_space`; Pallas measures the inflation before it rounds the heads."""
    if not choice.is_pallas("ucpe", impl, x.dtype):
        return reference.to_ray_space(x, matrices, angles, of, capped=capped)
    form = Form(
        moves=True,
        rotated=angles is not None,
        measured=True,
        capped=capped,
        featured=not of.is_identity(),
        relu=of.relu,
    )
    call = _Call(form, tiles or Tiles(), choice.interpret(), of.eps, of.factor)
    return _run(call, x, matrices, angles, of.scale)


class _Call(NamedTuple):
    """The arguments of a call that are not arrays."""

    form: Form
    tiles: Tiles
    interpret: bool
    eps: float = 1e-5
    factor: float = 1.0
    inverse: bool = False

    def reference(
        self,
        x: jax.Array,
        matrices: jax.Array | None,
        angles: jax.Array | None,
        scale: jax.Array | None,
    ) -> Any:
        """Computes the call in XLA."""
        of = Features(scale, self.eps, self.form.relu, self.factor)
        if matrices is None:
            assert angles is not None
            function = reference.plain_and_rotated if self.form.plain else reference.rotate
            return function(x, angles, of)
        if self.form.measured:
            return reference.to_ray_space(x, matrices, angles, of, capped=self.form.capped)
        return reference.apply_ucpe(x, matrices, angles, inverse=self.inverse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(
    call: _Call,
    x: jax.Array,
    matrices: jax.Array | None,
    angles: jax.Array | None,
    scale: jax.Array | None,
) -> Any:
    form, arrays = call.form, {"x": x}
    if form.featured:
        with jax.named_scope("norm"):
            flat = x.reshape(*x.shape[:-2], -1)
            inverse = jnp.ones((*x.shape[:-2], 1))
            weight = jnp.ones(flat.shape[-1:])
            if scale is not None:
                inverse = reference.inverse_rms(flat, call.eps)
                weight = scale.astype(jnp.float32)
            arrays |= {"inverse": inverse, "weight": weight * call.factor}
    with jax.named_scope("ucpe" if form.moves else "rope"):
        if angles is not None:
            sin = jnp.sin(angles)
            arrays |= {"cos": jnp.cos(angles), "sin": -sin if call.inverse else sin}
        if matrices is not None:
            arrays["matrices"] = matrices
        found = gpu.run(form, arrays, call.tiles, interpret=call.interpret)
        if form.measured:
            return found[0], found[1][..., 0].mean(axis=2)
    return (found[1], found[0]) if form.plain else found[0]


def _forward(call: _Call, *args: Any) -> tuple[Any, Any]:
    return _run(call, *args), args


def _backward(call: _Call, saved: Any, gradients: Any) -> Any:
    return jax.vjp(call.reference, *saved)[1](gradients)


_run.defvjp(_forward, _backward)
