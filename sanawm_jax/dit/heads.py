"""Norm, rotation and ray transform of heads, which each rank of a mesh runs on its own frames.

The functions are those of `kernels_pallas.ucpe`, which gives their shapes. Their RMS norm needs all
heads of a token. Where the axis `tensor` of the mesh divides the heads, the functions with a norm
therefore stay with the compiler and run in XLA.
Axis letters: B batch, F latent frames, P tokens per frame, N heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from kernels_pallas import ucpe
from sanawm_jax.core.sharding import per_rank

HEADS = "B F P N D"
_ANGLES, _MATRICES = "F P A", "B F P i j"


def _run(
    function: Callable[..., Any],
    x: jax.Array,
    arrays: dict[str, jax.Array | None],
    of: ucpe.Features,
    outputs: str | tuple[str, ...],
) -> Any:
    """Runs `function(x, *arrays, features)` per rank; `arrays` are named by their axes."""

    def run(x: jax.Array, scale: jax.Array | None, *arrays: jax.Array | None) -> Any:
        return function(x, *arrays, of._replace(scale=scale))

    inputs = (HEADS, "C", *arrays)
    mapped = per_rank(run, inputs, outputs, whole_width=of.scale is not None)
    return mapped(x, of.scale, *arrays.values())


def plain_and_rotated(
    x: Float[Array, "B F P N D"], angles: Float[Array, "F P D//2"], of: ucpe.Features
) -> tuple[Float[Array, "B F P N D"], Float[Array, "B F P N D"]]:
    """See `kernels_pallas.ucpe.reference.plain_and_rotated`."""
    return _run(ucpe.plain_and_rotated, x, {_ANGLES: angles}, of, (HEADS, HEADS))


def rotate(
    x: Float[Array, "B F P N D"], angles: Float[Array, "F P D//2"], of: ucpe.Features
) -> Float[Array, "B F P N D"]:
    """See `kernels_pallas.ucpe.reference.rotate`."""
    return _run(ucpe.rotate, x, {_ANGLES: angles}, of, HEADS)


def to_ray_space(
    x: Float[Array, "B F P N D"],
    matrices: Float[Array, "B F P 4 4"],
    angles: Float[Array, "F P D//4"] | None,
    of: ucpe.Features | None = None,
    *,
    capped: bool = True,
) -> tuple[Float[Array, "B F P N D"], Float[Array, "B F N"]]:
    """See `kernels_pallas.ucpe.reference.to_ray_space`."""
    move = functools.partial(ucpe.to_ray_space, capped=capped)
    arrays = {_MATRICES: matrices, _ANGLES: angles}
    return _run(move, x, arrays, of or ucpe.Features(), (HEADS, "B F N"))


def from_ray_space(
    x: Float[Array, "B F P N D"],
    matrices: Float[Array, "B F P 4 4"],
    angles: Float[Array, "F P D//4"] | None,
) -> Float[Array, "B F P N D"]:
    """Applies `kernels_pallas.ucpe.reference.apply_ucpe`, and rotates back."""

    def move(x: jax.Array, matrices: jax.Array, angles: jax.Array | None) -> jax.Array:
        return ucpe.apply_ucpe(x, matrices, angles, inverse=True)

    return per_rank(move, (HEADS, _MATRICES, _ANGLES), HEADS)(x, matrices, angles)
