"""Flash attention of any length and head size through kernels of libraries.

On a TPU it is splash attention, see `attention.tpu`. On a GPU `cudnn` is
`jax.nn.dot_product_attention`, and `mosaic` is the FlashAttention-3 kernel that JAX ships in
`jax.experimental.pallas.ops.gpu`: it runs on Hopper alone, in float16, on sequences that are whole
numbers of tiles and heads of 64, 128, ... channels, without a scale or a mask. What the DiT has is
none of that (heads of 112, 106,480 tokens), so tokens and channels are padded; a channel of the
padding hides the tokens of the padding.
Axis letters: B batch, T queries, S keys, N heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import choice
from kernels_pallas.attention.tpu import splash_attention

# (q, k, v), each (B, T, N, D) -> (B, T, N, D), softmax(q k^T) v
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
_QUERIES, _KEYS, _CHANNELS = 128, 128, 64  # what the kernel takes whole numbers of
_SHORTEST = 8192  # tokens from which padding is worth it
_SHORTEST_ON_TPU = 1024
_HIDDEN = -1e4  # a logit whose exponential is 0 in float32


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    *,
    key_count: jax.Array | None = None,
    impl: str | None = None,
) -> jax.Array:
    """softmax(scale q k^T) v on a GPU or TPU, without the logits of long sequences in memory.

    Args:
      q: (B, T, N, D) bfloat16.
      k, v: (B, S, N, D) bfloat16.
      scale: of the logits.
      key_count: (B,) int32, hides every key from that one on.
      impl: cudnn, mosaic or None, see `kernels_pallas.choice`.

    Returns:
      (B, T, N, D) in q's dtype.
    """
    if jax.default_backend() == "tpu":
        return _on_tpu(q, k, v, scale, key_count)
    if not fits_cudnn(q):
        return _library("xla", q, k, v, scale, key_count)
    is_long = min(q.shape[1], k.shape[1]) >= _SHORTEST and q.shape[2] == k.shape[2]
    if key_count is None and is_long and choice.pick("attention", impl) == "mosaic":
        return _mosaic(scale, q, k, v)
    return _library("cudnn", q, k, v, scale, key_count)


def fits_cudnn(q: jax.Array) -> bool:
    """Whether this device's cuDNN takes heads like those of q (B, T, N, D)."""
    return choice.capability() >= choice.AMPERE and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def flash_attention_to_both(
    q: jax.Array,
    first: tuple[jax.Array, jax.Array],
    second: tuple[jax.Array, jax.Array],
    scale: float,
    *,
    key_count: jax.Array,
) -> jax.Array:
    """`flash_attention` to two sets of keys as if they were one, on a GPU; not differentiable.

    Args:
      q: (B, T, N, D) bfloat16 that `fits_cudnn`.
      first, second: keys and values, (B, S, N, D) each.
      key_count: (B,) int32, hides every key of the second set from that one on; at least 1.
    """
    return merged(_with_sums(q, *first, scale), _with_sums(q, *second, scale, key_count))


def merged(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Attention to two sets of keys, of the attention to each.

    Args:
      first, second: the result (B, T, N, D), and the logarithm of the sum of the logits'
        exponentials (B, N, T) in float32.
    """
    share = jnp.swapaxes(jax.nn.sigmoid(first[1] - second[1]), 1, 2)[..., None]  # of the first
    return (share * first[0] + (1 - share) * second[0]).astype(first[0].dtype)


def _with_sums(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, key_count: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    # the public function rounds the sums to q's dtype, which is an error of percents in a share
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    options: dict[str, Any] = {}
    if key_count is not None:
        options["q_seqlen"] = jnp.full(q.shape[:1], q.shape[1], jnp.int32)
        options |= {"kv_seqlen": key_count, "mask_type": MaskType.PADDING}
    found: Any = dot_product_attention(q, k, v, scale=scale, return_residual=True, **options)
    return found


def _library(
    implementation: Literal["xla", "cudnn"],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    key_count: jax.Array | None = None,
) -> jax.Array:
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, key_value_seq_lengths=key_count, implementation=implementation
    )


def _on_tpu(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, key_count: jax.Array | None
) -> jax.Array:
    # short ones fit the memory; the partitioner cannot look into a kernel
    if k.shape[1] < _SHORTEST_ON_TPU or q.shape[2] != k.shape[2] or choice.is_partitioned():
        return _library("xla", q, k, v, scale, key_count)
    return splash_attention(q, k, v, scale, key_count=key_count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mosaic(scale: float, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(block_q=64, block_kv=_KEYS, max_concurrent_steps=2)
    attend: Any = functools.partial(attention_mgpu.attention, config=config)
    return padded_attention(q, k, v, scale, attend)


def _mosaic_forward(scale: float, *inputs: jax.Array) -> tuple[jax.Array, Any]:
    # what is differentiated runs forward in the library whose backward pass it takes
    return jax.vjp(functools.partial(_library, "cudnn", scale=scale), *inputs)


def _mosaic_backward(scale: float, vjp: Any, dy: jax.Array) -> Any:
    del scale
    return vjp(dy)


_mosaic.defvjp(_mosaic_forward, _mosaic_backward)


def padded_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, attend: Attend, dtype: Any = jnp.float16
) -> jax.Array:
    """Attention through a kernel that takes only whole tiles and neither scale nor mask.

    Args:
      q, k, v, scale: as of `flash_attention`.
      attend: the kernel.
      dtype: that it runs in.
    """
    queries, keys, size = q.shape[1], k.shape[1], q.shape[-1]
    wide = -(size + 1) % _CHANNELS + size + 1  # one channel to spare at least
    more_keys = -keys % _KEYS
    limit = float(jnp.finfo(dtype).max)

    def fit(a: jax.Array, rows: int, extra: np.ndarray) -> jax.Array:
        """(B, T, N, D) with more tokens, and `extra` (T or 1, channels) in the new channels."""
        a = jnp.clip(a.astype(jnp.float32), -limit, limit).astype(dtype)
        a = jnp.pad(a, ((0, 0), (0, rows), (0, 0), (0, 0)))
        shape = (*a.shape[:3], wide - size)
        tail = jnp.broadcast_to(jnp.asarray(extra, dtype)[None, :, None], shape)
        return jnp.concatenate([a, tail], -1)

    none = np.zeros((1, wide - size))
    ones, hidden = none.copy(), np.zeros((keys + more_keys, wide - size))
    ones[0, 0], hidden[keys:, 0] = 1.0, _HIDDEN
    y = attend(
        fit(q.astype(jnp.float32) * scale, -queries % _QUERIES, ones),
        fit(k, more_keys, hidden),
        fit(v, more_keys, none),
    )
    return y[:, :queries, :, :size].astype(q.dtype)
