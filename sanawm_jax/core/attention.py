"""Softmax attention for every tower.

Axis letters: B batch, T queries, S keys, N heads, D head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.attention import flash_attention


@jax.named_scope("attention")
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    key_count: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """softmax(scale q k^T) v, logits and softmax in float32.

    Args:
      q: (B, T, N, D).
      k: (B, S, N, D).
      v: (B, S, N, D).
      key_mask: (B, S) bool, false hides a key from every query.
      key_count: (B,) int32, hides every key from that one on; unlike a mask, an accelerator's
        fused kernels take it at full speed.
      scale: of the logits; D^-1/2 by default.

    Returns:
      (B, T, N, D) in q's dtype.
    """
    # cuDNN never writes the logits to memory; with a mask it would, and it takes no float32
    if jax.default_backend() == "gpu" and key_mask is None and q.dtype == jnp.bfloat16:
        return flash_attention(q, k, v, scale or q.shape[-1] ** -0.5, key_count=key_count)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, key_value_seq_lengths=key_count
    )
