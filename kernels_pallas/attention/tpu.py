"""Splash attention, JAX's flash attention kernel for TPUs, for any sequence length and head size.

The kernel takes arrays (N, T, D) per clip. It needs sequence lengths that are multiples of its
block and head sizes that are multiples of 128, and it has no scale. Tokens and channels are
therefore padded. Padding tokens get another segment id than the real ones, which hides them.
Axis letters: B batch, T tokens with queries, S keys, N heads, D head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_LANES = 128


def splash_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    scale: float,
    *,
    key_count: Int[Array, "B"] | None = None,
    block: int = 512,
    interpret: bool = False,
) -> Float[Array, "B T N D"]:
    """Computes softmax(scale q k^T) v. The result can be differentiated.

    Args:
      q, k, v: as many heads of keys as of queries.
      scale: factor of the logits.
      key_count: keys at this index and later are hidden.
      block: tokens per tile, a multiple of 128.
      interpret: run in the interpreter, on a machine that has no TPU.

    Returns:
      The mixed values in q's dtype.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    batch, queries, heads, size = q.shape
    keys = k.shape[1]

    def fit(a: jax.Array) -> jax.Array:
        """Pads and transposes (B, T, N, D) to (B, N, T', D')."""
        more = ((0, 0), (0, -a.shape[1] % block), (0, 0), (0, -size % _LANES))
        return jnp.pad(a, more).transpose(0, 2, 1, 3)

    q, k, v = fit((q.astype(jnp.float32) * scale).astype(q.dtype)), fit(k), fit(v)
    shape = (q.shape[2], k.shape[2])
    counts = jnp.full((batch,), keys, jnp.int32) if key_count is None else key_count
    hidden = (jnp.arange(shape[1]) >= counts[:, None]).astype(jnp.int32)
    segments = splash.SegmentIds(jnp.zeros((batch, shape[0]), jnp.int32), hidden)
    attend: Any = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask(shape)] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            use_fused_bwd_kernel=True,
        ),
        interpret=interpret,
    )
    y = jax.vmap(attend)(q, k, v, segments)
    return y.transpose(0, 2, 1, 3)[:, :queries, :, :size]
