"""Norm, rotary embedding and UCPE ray transform of the heads of tokens, for XLA on any device.

Axis letters: B batch, F latent frames, P tokens per frame, N heads, D head size, C channels
of all heads together.
Reference: diffusers `_apply_rotary_emb`, `_apply_ucpe_transform`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Features(NamedTuple):
    """What happens to projected tokens before they are rotated or transformed, in this order.

    Attributes:
      scale: weights of an RMS norm over all heads together, C = N*D; None for no norm.
      eps: epsilon of the norm.
      relu: whether negative numbers become 0.
      factor: a positive number by which the result is multiplied.
    """

    scale: Float[Array, "C"] | None = None
    eps: float = 1e-5
    relu: bool = False
    factor: float = 1.0

    def is_identity(self) -> bool:
        return self.scale is None and not self.relu and self.factor == 1.0


AS_IS = Features()


def inverse_rms(x: Float[Array, "*rest C"], eps: float) -> Float[Array, "*rest 1"]:
    """Computes 1 / RMS over the last axis, which stays with size 1, in float32."""
    x32 = x.astype(jnp.float32)
    return lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)


@jax.named_scope("norm")
def rms_norm(
    x: Float[Array, "*rest C"], scale: Float[Array, "C"], eps: float
) -> Float[Array, "*rest C"]:
    """RMS norm over the last axis times `scale`, computed in float32 and returned in x's dtype."""
    y = x.astype(jnp.float32) * inverse_rms(x, eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def features(x: Float[Array, "B F P N D"], of: Features) -> Float[Array, "B F P N D"]:
    """Applies `Features` to the heads of tokens."""
    if of.scale is not None:
        x = rms_norm(x.reshape(*x.shape[:-2], -1), of.scale, of.eps).reshape(x.shape)
    if of.relu:
        x = jax.nn.relu(x)
    return x if of.factor == 1.0 else x * of.factor


def plain_and_rotated(
    x: Float[Array, "B F P N D"], angles: Float[Array, "F P D//2"], of: Features = AS_IS
) -> tuple[Float[Array, "B F P N D"], Float[Array, "B F P N D"]]:
    """Returns the features of x, and the same features rotated by `angles` (radians)."""
    plain = features(x, of)
    return plain, apply_rope(plain, angles[:, :, None])


def rotate(
    x: Float[Array, "B F P N D"], angles: Float[Array, "F P D//2"], of: Features = AS_IS
) -> Float[Array, "B F P N D"]:
    """Returns the second result of `plain_and_rotated`."""
    return plain_and_rotated(x, angles, of)[1]


@jax.named_scope("rope")
def apply_rope(
    x: Float[Array, "*rest D"], angles: Float[Array, "*#rest D//2"], *, inverse: bool = False
) -> Float[Array, "*rest D"]:
    """Rotates neighbouring channels (2i, 2i+1) of x by angles[..., i], in float32.

    Args:
      x: heads.
      angles: radians; the leading axes broadcast to those of x.
      inverse: rotate back.
    """
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return rotate_pairs(x, cos, -sin if inverse else sin)


def rotate_pairs(
    x: Float[Array, "*rest D"],
    cos: Float[Array, "*#rest D//2"],
    sin: Float[Array, "*#rest D//2"],
    *,
    interleaved: bool = True,
) -> Float[Array, "*rest D"]:
    """Rotates pairs of channels, in float32; the result has x's dtype.

    Args:
      x: heads.
      cos, sin: of the angle of each pair.
      interleaved: whether pair i is the channels (2i, 2i+1), otherwise it is (i, i + D/2).
    """
    x32 = x.astype(jnp.float32)
    if interleaved:
        first, second = x32[..., 0::2], x32[..., 1::2]
    else:
        first, second = jnp.split(x32, 2, -1)
    rotated = [first * cos - second * sin, first * sin + second * cos]
    if interleaved:
        return jnp.stack(rotated, -1).reshape(x.shape).astype(x.dtype)
    return jnp.concatenate(rotated, -1).astype(x.dtype)


@jax.named_scope("ucpe")
def apply_ucpe(
    x: Float[Array, "B F P N D"],
    matrices: Float[Array, "B F P 4 4"],
    angles: Float[Array, "F P D//4"] | None,
    *,
    inverse: bool = False,
) -> Float[Array, "B F P N D"]:
    """Transforms the first half of every head and rotates the second half.

    Args:
      x: heads of tokens.
      matrices: float32, applied to the channels in groups of 4.
      angles: radians, or None for no rotation.
      inverse: rotate back.
    """
    first, second = jnp.split(x, 2, -1)
    groups = first.reshape(*first.shape[:-1], -1, 4).astype(jnp.float32)
    # Multiply-adds fuse with the neighbouring operations. A batch of 4x4 products would not.
    columns = matrices[:, :, :, None, None]  # B F P 1 1 i j
    moved = columns[..., 0] * groups[..., 0, None]
    for j in range(1, 4):
        moved = moved + columns[..., j] * groups[..., j, None]
    first = moved.reshape(first.shape).astype(x.dtype)
    if angles is not None:
        second = apply_rope(second, angles[:, :, None], inverse=inverse)
    return jnp.concatenate([first, second], -1)


def _bounded_rms(reference: jax.Array, x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Scales x down, never up, to the RMS of `reference` over a head; both are (..., D)."""

    def rms(a: jax.Array) -> jax.Array:
        a = a.astype(jnp.float32)
        return jnp.sqrt(jnp.mean(a * a, -1, keepdims=True) + eps)

    scale = jnp.minimum(rms(reference) / jnp.maximum(rms(x), eps), 1.0)
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


@jax.named_scope("ucpe")
def to_ray_space(
    x: Float[Array, "B F P N D"],
    matrices: Float[Array, "B F P 4 4"],
    angles: Float[Array, "F P D//4"] | None,
    of: Features = AS_IS,
    *,
    capped: bool = True,
) -> tuple[Float[Array, "B F P N D"], Float[Array, "B F N"]]:
    """Applies `apply_ucpe` and scales each head back to its former size if it became larger.

    The translation of a camera can make a head larger.

    Args:
      x, matrices, angles: as in `apply_ucpe`.
      of: features that are applied to x first.

    Returns:
      Heads of x's shape, and their mean squared inflation in float32: the square of the size
      after divided by the size before, averaged over the tokens of a frame.
    """

    def size(a: jax.Array) -> jax.Array:
        # The bound is inside the root. Outside it, the gradient for a head of zeros would be 0/0.
        return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(a.astype(jnp.float32)), -1), 1e-12))

    x = features(x, of)
    y = apply_ucpe(x, matrices, angles)
    if capped:
        y = _bounded_rms(x, y)
    return y, jnp.square(size(y) / size(x)).mean(axis=2)
