"""Softmax attention for every tower.

Axis letters: B batch, T tokens with queries, S keys, N heads, N_kv heads of keys and values (fewer
where several heads share one), D head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.attention import fits_cudnn, flash_attention, flash_attention_to_both


@jax.named_scope("attention")
def attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B S N_kv D"],
    v: Float[Array, "B S N_kv D"],
    *,
    key_mask: Bool[Array, "B S"] | None = None,
    key_count: Int[Array, "B"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T N D"]:
    """Computes softmax(scale q k^T) v, with logits and softmax in float32.

    Args:
      q, k, v: queries, keys and values.
      key_mask: false hides a key from every query.
      key_count: hides every key from that one on. The fused kernels of an accelerator take a count
        at full speed, and a mask they do not take.
      scale: factor of the logits; D^-1/2 by default.

    Returns:
      The mixed values in q's dtype.
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
    q: Float[Array, "B T N D"],
    first: tuple[Float[Array, "B S_first N D"], Float[Array, "B S_first N D"]],
    second: tuple[Float[Array, "B S_second N D"], Float[Array, "B S_second N D"]],
    *,
    key_count: Int[Array, "B"],
    scale: float | None = None,
) -> Float[Array, "B T N D"]:
    """Computes `attention` to two sets of keys as if they were one set.

    With cuDNN the two sets are concatenated in memory only where the result is differentiated.

    Args:
      q: queries.
      first, second: keys and values; the two sets can have different lengths.
      key_count: hides every key of the second set from that one on; at least 1.
      scale: factor of the logits; D^-1/2 by default.

    Returns:
      The mixed values in q's dtype.
    """
    if jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16 and fits_cudnn(q):
        factor = scale or q.shape[-1] ** -0.5
        return flash_attention_to_both(q, first, second, factor, key_count=key_count)
    k, v = (jnp.concatenate(pair, 1) for pair in zip(first, second, strict=True))
    return attention(q, k, v, key_count=first[0].shape[1] + key_count, scale=scale)


def seen_first(
    k: Float[Array, "B S N_kv D"], v: Float[Array, "B S N_kv D"], key_mask: Bool[Array, "B S"]
) -> tuple[Float[Array, "B S N_kv D"], Float[Array, "B S N_kv D"], Int[Array, "B"]]:
    """Moves hidden keys and values to the end, so that a count can replace the mask.

    The order of keys changes no result.

    Args:
      k, v: keys and values.
      key_mask: false for a hidden key; every row has at least one key that is seen.

    Returns:
      Keys, values, and the number of keys that are seen.
    """
    order = jnp.argsort(~key_mask, axis=1, stable=True)[..., None, None]
    k, v = (jnp.take_along_axis(a, order, axis=1) for a in (k, v))
    return k, v, jnp.sum(key_mask, 1, dtype=jnp.int32)
