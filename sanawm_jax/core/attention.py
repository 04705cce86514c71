"""Softmax attention for every tower.

Axis letters: B batch, T queries, S keys, N heads, D head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.attention import fits_cudnn, flash_attention, flash_attention_to_both


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
    # flash kernels never write the logits to memory, but they take no float32 and no mask
    if jax.default_backend() in ("gpu", "tpu") and q.dtype == jnp.bfloat16:
        if key_mask is not None:
            k, v, key_count = seen_first(k, v, key_mask)
        return flash_attention(q, k, v, scale or q.shape[-1] ** -0.5, key_count=key_count)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, key_value_seq_lengths=key_count
    )


@jax.named_scope("attention")
def attention_to_both(
    q: jax.Array,
    first: tuple[jax.Array, jax.Array],
    second: tuple[jax.Array, jax.Array],
    *,
    key_count: jax.Array,
    scale: float | None = None,
) -> jax.Array:
    """`attention` to two sets of keys as if they were one; cuDNN's are never put together.

    Args:
      q: (B, T, N, D).
      first, second: keys and values, (B, S, N, D) each.
      key_count: (B,) int32, hides every key of the second set from that one on; at least 1.
      scale: of the logits; D^-1/2 by default.

    Returns:
      (B, T, N, D) in q's dtype; not differentiable on a GPU.
    """
    if jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16 and fits_cudnn(q):
        factor = scale or q.shape[-1] ** -0.5
        return flash_attention_to_both(q, first, second, factor, key_count=key_count)
    k, v = (jnp.concatenate(pair, 1) for pair in zip(first, second, strict=True))
    return attention(q, k, v, key_count=first[0].shape[1] + key_count, scale=scale)


def seen_first(
    k: jax.Array, v: jax.Array, key_mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values with the hidden ones last, and how many are seen: what a mask comes to.

    The order of keys changes no result.

    Args:
      k, v: (B, S, N, D).
      key_mask: (B, S) bool, with one seen key at least in every row.

    Returns:
      k and v, and (B,) int32.
    """
    order = jnp.argsort(~key_mask, axis=1, stable=True)[..., None, None]
    k, v = (jnp.take_along_axis(a, order, axis=1) for a in (k, v))
    return k, v, jnp.sum(key_mask, 1, dtype=jnp.int32)
