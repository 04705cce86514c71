"""Layers that the refiner and its connectors share.

Axis letters: B batch, T tokens with queries, S keys, C width, N heads, D head size.
Reference: diffusers `LTX2Attention`, `FeedForward`, `RMSNorm`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.ucpe import inverse_rms
from sanawm_jax.core.layers import Linear, RMSNorm

_QK_NORM_EPS = 1e-6  # a constant in the reference, independent of norm_eps
_FEED_FORWARD_RATIO = 4


class Norm(nnx.Module):
    """RMS norm followed by `(1 + scale) x + shift`, all in float32.

    The result has x's dtype. In contrast, the reference rounds after each of the three operations.
    """

    def __init__(self, features: int, *, eps: float, has_scale: bool):
        self.eps = eps
        if has_scale:
            self.scale = nnx.Param(jnp.ones((features,)))

    def __call__(
        self,
        x: Float[Array, "*rest C"],
        scale: Float[Array, "*#rest C"] | float = 0.0,
        shift: Float[Array, "*#rest C"] | float = 0.0,
    ) -> Float[Array, "*rest C"]:
        y = x.astype(jnp.float32) * inverse_rms(x, self.eps)
        if hasattr(self, "scale"):
            y = y * self.scale[...].astype(jnp.float32)
        return (y * (1.0 + scale) + shift).astype(x.dtype)


class AttentionProjections(nnx.Module):
    """All parts of an attention layer except the attention: q, k, v with norms, gate and output.

    Queries and keys are normalised over all heads together.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        context_width: int | None = None,
        is_gated: bool = False,
        use_bias: bool = True,
        use_out_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        inner, context_width = heads * head_dim, context_width or width
        self.heads = heads
        self.q = Linear(width, inner, use_bias=use_bias, rngs=rngs)
        self.k = Linear(context_width, inner, use_bias=use_bias, rngs=rngs)
        self.v = Linear(context_width, inner, use_bias=use_bias, rngs=rngs)
        self.out = Linear(inner, width, use_bias=use_out_bias, rngs=rngs)
        self.q_norm = RMSNorm(inner, eps=_QK_NORM_EPS)
        self.k_norm = RMSNorm(inner, eps=_QK_NORM_EPS)
        if is_gated:
            self.gate = Linear(width, heads, rngs=rngs)

    def query(self, x: Float[Array, "B T C"]) -> Float[Array, "B T N D"]:
        """Projects tokens to their queries."""
        return self._by_head(self.q_norm(self.q(x)))

    def key_value(
        self, context: Float[Array, "B S C"]
    ) -> tuple[Float[Array, "B S N D"], Float[Array, "B S N D"]]:
        """Projects the tokens that are attended to, to keys and values."""
        return self._by_head(self.k_norm(self.k(context))), self._by_head(self.v(context))

    def _by_head(self, x: jax.Array) -> jax.Array:
        return rearrange(x, "B T (N D) -> B T N D", N=self.heads)

    def project_out(
        self, mixed: Float[Array, "B T N D"], x: Float[Array, "B T C"]
    ) -> Float[Array, "B T C"]:
        """Gates each head of the mixed values by the layer's input x, and projects."""
        if hasattr(self, "gate"):
            # the factor 2 makes a gate of zeros an identity
            gate = 2.0 * jax.nn.sigmoid(self.gate(x).astype(jnp.float32))
            mixed = (mixed * gate[..., None]).astype(x.dtype)
        return self.out(rearrange(mixed, "B T N D -> B T (N D)"))


class FeedForward(nnx.Module):
    """Two linear layers around an activation; `kind` is its name in the reference."""

    def __init__(self, width: int, kind: str, *, use_bias: bool = True, rngs: nnx.Rngs):
        inner = _FEED_FORWARD_RATIO * width
        self.kind = kind
        doubled = 2 if kind in ("geglu", "swiglu") else 1
        self.up = Linear(width, doubled * inner, use_bias=use_bias, rngs=rngs)
        self.down = Linear(inner, width, use_bias=use_bias, rngs=rngs)

    def __call__(self, x: Float[Array, "*rest C"]) -> Float[Array, "*rest C"]:
        h = self.up(x)
        if self.kind in ("geglu", "swiglu"):
            h, gate = jnp.split(h, 2, -1)
            h = h * (jax.nn.silu(gate) if self.kind == "swiglu" else _gelu(gate))
        elif self.kind == "gelu-approximate":
            h = jax.nn.gelu(h, approximate=True)
        elif self.kind == "geglu-approximate":  # not gated, although its name suggests it
            h = h * jax.nn.sigmoid(1.702 * h)
        elif self.kind == "linear-silu":
            h = jax.nn.silu(h)
        else:
            h = _gelu(h)
        return self.down(h)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)
