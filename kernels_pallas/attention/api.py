"""Flash attention for any length and head size, with kernels that ship with JAX or cuDNN.

On a TPU this is splash attention, see `attention.tpu`. On a GPU, `cudnn` is
`jax.nn.dot_product_attention`, and `mosaic` is the FlashAttention-3 kernel that JAX ships in
`jax.experimental.pallas.ops.gpu`. That kernel runs only on Hopper and in float16. It needs sequence
lengths that are multiples of its tile and head sizes of 64, 128, ..., and it has no scale and no
mask. The DiT meets none of these conditions (heads of size 112, 106,480 tokens). Tokens and
channels are therefore padded, and one of the padding channels hides the padding tokens.
Axis letters: B batch, T tokens with queries, S keys, N heads, N_kv heads of keys
and values (fewer where several heads share one), D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas import choice
from kernels_pallas.attention.tpu import splash_attention

# (q, k, v), each (B, T, N, D) -> (B, T, N, D), softmax(q k^T) v
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
_QUERIES, _KEYS, _CHANNELS = 128, 128, 64  # the kernel needs multiples of these
_SHORTEST = 8192  # tokens; for shorter sequences the padding costs more than the kernel saves
_SHORTEST_ON_TPU = 1024
_HIDDEN = -1e4  # the exponential of this logit is 0 in float32


def flash_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B S N_kv D"],
    v: Float[Array, "B S N_kv D"],
    scale: float,
    *,
    key_count: Int[Array, "B"] | None = None,
    impl: str | None = None,
) -> Float[Array, "B T N D"]:
    """Computes softmax(scale q k^T) v on a GPU or TPU and never writes all logits to memory.

    Args:
      q, k, v: bfloat16.
      scale: factor of the logits.
      key_count: keys at this index and later are hidden.
      impl: cudnn, mosaic or None; see `kernels_pallas.choice`.

    Returns:
      The mixed values in q's dtype.
    """
    if jax.default_backend() == "tpu":
        return _on_tpu(q, k, v, scale, key_count)
    if not fits_cudnn(q):
        return _library("xla", q, k, v, scale, key_count)
    is_long = min(q.shape[1], k.shape[1]) >= _SHORTEST and q.shape[2] == k.shape[2]
    if key_count is None and is_long and choice.pick("attention", impl) == "mosaic":
        return _mosaic(scale, q, k, v)
    return _library("cudnn", q, k, v, scale, key_count)


def fits_cudnn(q: Float[Array, "B T N D"]) -> bool:
    """Whether cuDNN supports the head size of q on this device."""
    return choice.capability() >= choice.AMPERE and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def flash_attention_to_both(
    q: Float[Array, "B T N D"],
    first: tuple[Float[Array, "B S_first N D"], Float[Array, "B S_first N D"]],
    second: tuple[Float[Array, "B S_second N D"], Float[Array, "B S_second N D"]],
    scale: float,
    *,
    key_count: Int[Array, "B"],
) -> Float[Array, "B T N D"]:
    """Computes attention to two sets of keys as if they were one set.

    The two sets are concatenated only where the result is differentiated: cuDNN's sums of
    exponentials have no gradient.

    Args:
      q: on a GPU, bfloat16 and of a head size for which `fits_cudnn` is true.
      first, second: keys and values; the two sets can have different lengths.
      key_count: at least 1; keys of the second set at this index and later are hidden.
    """
    return _to_both(scale, q, first, second, key_count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _to_both(
    scale: float,
    q: jax.Array,
    first: tuple[jax.Array, jax.Array],
    second: tuple[jax.Array, jax.Array],
    key_count: jax.Array,
) -> jax.Array:
    return merged(_with_sums(q, *first, scale), _with_sums(q, *second, scale, key_count))


def _to_both_forward(
    scale: float, q: jax.Array, first: Any, second: Any, key_count: jax.Array
) -> tuple[jax.Array, Any]:
    def whole(q: jax.Array, first: Any, second: Any) -> jax.Array:
        k, v = (jnp.concatenate(pair, 1) for pair in zip(first, second, strict=True))
        name: Any = "cudnn" if fits_cudnn(q) else "xla"
        return _library(name, q, k, v, scale, first[0].shape[1] + key_count)

    return jax.vjp(whole, q, first, second)


def _to_both_backward(scale: float, vjp: Any, dy: jax.Array) -> Any:
    del scale
    return (*vjp(dy), None)


_to_both.defvjp(_to_both_forward, _to_both_backward)


def merged(
    first: tuple[Float[Array, "B T N D"], Float[Array, "B N T"]],
    second: tuple[Float[Array, "B T N D"], Float[Array, "B N T"]],
) -> Float[Array, "B T N D"]:
    """Merges the attention to two sets of keys into the attention to both.

    Args:
      first, second: for each set, the mixed values, and the logarithm of the sum of the logits'
        exponentials in float32.
    """
    # the weight of the first set
    share = jnp.swapaxes(jax.nn.sigmoid(first[1] - second[1]), 1, 2)[..., None]
    return (share * first[0] + (1 - share) * second[0]).astype(first[0].dtype)


def _with_sums(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, key_count: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    if jax.default_backend() != "gpu":
        y, sums = _library("xla", q, k, v, scale, key_count, return_residual=True)
        return y, jnp.swapaxes(sums, 1, 2)
    # The public function rounds the sums to q's dtype. The weight of a set would then be wrong by
    # several percent.
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
    **options: Any,
) -> Any:
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        key_value_seq_lengths=key_count,
        implementation=implementation,
        **options,
    )


def _on_tpu(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, key_count: jax.Array | None
) -> jax.Array:
    # The logits of short sequences fit in memory. The partitioner cannot look into a kernel.
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
    # The backward pass is cuDNN's, so a call that is differentiated also runs forward in cuDNN.
    return jax.vjp(functools.partial(_library, "cudnn", scale=scale), *inputs)


def _mosaic_backward(scale: float, vjp: Any, dy: jax.Array) -> Any:
    del scale
    return vjp(dy)


_mosaic.defvjp(_mosaic_forward, _mosaic_backward)


def padded_attention(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    scale: float,
    attend: Attend,
    dtype: Any = jnp.float16,
) -> Float[Array, "B T N D"]:
    """Computes attention with a kernel that needs whole tiles and has neither a scale nor a mask.

    Args:
      q, k, v, scale: as in `flash_attention`.
      attend: the kernel.
      dtype: dtype in which the kernel runs.
    """
    queries, keys, size = q.shape[1], k.shape[1], q.shape[-1]
    wide = -(size + 1) % _CHANNELS + size + 1  # at least one extra channel
    more_keys = -keys % _KEYS
    limit = float(jnp.finfo(dtype).max)

    def fit(a: jax.Array, rows: int, extra: np.ndarray) -> jax.Array:
        """Pads (B, T, N, D) with `rows` tokens, and writes `extra` into the new channels."""
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
