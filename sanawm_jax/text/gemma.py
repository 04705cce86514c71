"""The Gemma-2 and Gemma-3 text encoders, from token ids to hidden states.

Axis letters: B batch, L text tokens, S keys (= L), C width, K key-value heads, G queries per
key-value head, D head size.
Reference: Gemma 2 (arXiv 2408.00118), Gemma 3 (arXiv 2503.19786), transformers `Gemma2Model` and
`Gemma3TextModel`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax

from kernels_pallas.ucpe import inverse_rms, rotate_pairs
from sanawm_jax.core.layers import Linear
from sanawm_jax.core.params import Params, apply, build, draw, stack
from sanawm_jax.memory.streaming import Runner, call
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.text.config import SLIDING, GemmaConfig

Tower = Callable[[np.ndarray, np.ndarray], jax.Array]  # (ids (B, L), mask (B, L)) -> (B, L, C)


def rope_tables(
    length: int, head_dim: int, theta: float, factor: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines (L, D/2) of the rotary embedding for positions 0..L-1, float32.

    Args:
      theta: base of the frequencies.
      factor: linear scaling divides the frequencies by this.
    """
    frequency = (theta ** -(np.arange(0, head_dim, 2) / head_dim) / factor).astype(np.float32)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + D/2) of x (B, L, ..., D) by `rope_tables`, in float32.

    In contrast, the reference rounds cosines, sines and products to x's dtype.
    """
    shape = (1, cos.shape[0], *(1,) * (x.ndim - 3), cos.shape[1])
    return rotate_pairs(x, cos.reshape(shape), sin.reshape(shape), interleaved=False)


def attention_masks(mask: jax.Array, window: int | None) -> tuple[jax.Array, jax.Array]:
    """Returns which keys a query sees in a full and in a sliding layer.

    Attention is causal, and padding is never seen.

    Args:
      mask: (B, L), nonzero for tokens.
      window: number of keys that a query of a sliding layer sees, with its own; None means all.

    Returns:
      Two (B, L, S) bool arrays.
    """
    position = jnp.arange(mask.shape[1])
    back = position[:, None] - position[None, :]
    full = (back >= 0)[None] & (mask != 0)[:, None, :]
    return full, full if window is None else full & (back < window)[None]


def grouped_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Attention with shared key-value heads and tanh-capped logits.

    Args:
      q: (B, L, K, G, D).
      k: (B, S, K, D).
      v: (B, S, K, D).
      mask: (B, L, S) bool.
      scale: factor of the logits.
      softcap: bound of the logits before masking; None means no bound.

    Returns:
      (B, L, K, G, D) in q's dtype.
    """
    # logits, cap and softmax are float32
    logits = jnp.einsum("BLKGD,BSKD->BKGLS", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    # A finite number, so that a padding query that sees nothing averages all keys, as in the
    # reference.
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, -1).astype(q.dtype)
    return jnp.einsum("BKGLS,BSKD->BLKGD", weights, v)


class GemmaNorm(nnx.Module):
    """RMS norm with the factor 1 + scale, computed in float32."""

    def __init__(self, features: int, *, eps: float):
        self.scale = nnx.Param(jnp.zeros((features,)))
        self.eps = eps

    def __call__(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """Normalises x (..., C); the result has `dtype`, by default that of x."""
        y = x.astype(jnp.float32) * inverse_rms(x, self.eps)
        return (y * (1.0 + self.scale[...].astype(jnp.float32))).astype(dtype or x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with grouped queries, rotary embedding and capped logits."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, head = config.hidden_size, config.head_dim
        linear = functools.partial(Linear, use_bias=False, rngs=rngs)
        self.q = linear(width, config.num_attention_heads * head)
        self.k = linear(width, config.num_key_value_heads * head)
        self.v = linear(width, config.num_key_value_heads * head)
        self.out = linear(config.num_attention_heads * head, width)
        if config.use_qk_norm:
            self.q_norm = GemmaNorm(head, eps=config.rms_norm_eps)
            self.k_norm = GemmaNorm(head, eps=config.rms_norm_eps)

    def __call__(
        self, x: jax.Array, mask: jax.Array, rope: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        config = self.config
        heads = config.num_key_value_heads
        q = rearrange(self.q(x), "B L (K G D) -> B L K G D", K=heads, D=config.head_dim)
        k = rearrange(self.k(x), "B S (K D) -> B S K D", K=heads)
        v = rearrange(self.v(x), "B S (K D) -> B S K D", K=heads)
        if config.use_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = grouped_attention(
            rotate(q, *rope),
            rotate(k, *rope),
            v,
            mask,
            scale=config.query_pre_attn_scalar**-0.5,
            softcap=config.attn_logit_softcapping,
        )
        return self.out(rearrange(mixed, "B L K G D -> B L (K G D)"))


class Mlp(nnx.Module):
    """Gated MLP with the tanh approximation of GELU."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.gate = Linear(width, inner, use_bias=False, rngs=rngs)
        self.up = Linear(width, inner, use_bias=False, rngs=rngs)
        self.down = Linear(inner, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class Layer(nnx.Module):
    """Attention and MLP, each between two norms and with a residual connection.

    The residual is float32, while the reference rounds it to the compute dtype twice per layer.
    """

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        norm = functools.partial(GemmaNorm, config.hidden_size, eps=config.rms_norm_eps)
        self.attn = Attention(config, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)
        self.pre_attn_norm, self.post_attn_norm = norm(), norm()
        self.pre_mlp_norm, self.post_mlp_norm = norm(), norm()

    def __call__(
        self, x: jax.Array, mask: jax.Array, rope: tuple[jax.Array, jax.Array], dtype: Any
    ) -> jax.Array:
        """Maps x (B, L, C) float32 to the same shape; attention and MLP run in `dtype`."""
        y = self.attn(self.pre_attn_norm(x, dtype), mask, rope)
        x = x + self.post_attn_norm(y, jnp.float32)
        y = self.mlp(self.pre_mlp_norm(x, dtype))
        return x + self.post_mlp_norm(y, jnp.float32)


class GemmaTower(nnx.Module):
    """Embedding, layers that are stacked on a leading axis and run by one scan, and final norm."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        table_init = nnx.initializers.normal(config.hidden_size**-0.5)
        self.embed_table = nnx.Param(draw(table_init, rngs, shape))
        self.layers = stack(
            lambda rngs: Layer(config, rngs=rngs), rngs, (config.num_hidden_layers,)
        )
        self.norm = GemmaNorm(config.hidden_size, eps=config.rms_norm_eps)

    def embed(self, ids: jax.Array, dtype: Any = None) -> jax.Array:
        """Embeddings (B, L, C) of ids times sqrt(C), in `dtype` or in the dtype of the table."""
        x = self.embed_table[...][ids]
        x = x if dtype is None else x.astype(dtype)
        # the factor is rounded to the model's dtype, as in the training of the weights
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)

    def __call__(
        self,
        ids: jax.Array,
        mask: jax.Array,
        *,
        dtype: Any = None,
        all_states: bool = False,
    ) -> jax.Array:
        """Computes hidden states of token ids, which may be padded on either side.

        Args:
          ids: (B, L) integers; positions count from the left and include padding.
          mask: (B, L), nonzero for tokens.
          dtype: compute dtype; by default that of the embedding table.
          all_states: return every hidden state, not only the last one.

        Returns:
          (B, L, C) after the final norm, which is `hidden_states[-1]` of the reference. With
          `all_states`, (layers + 1, B, L, C): the embeddings, the output of each layer except the
          last, and the state after the final norm.
        """
        config = self.config
        full, sliding = attention_masks(mask, config.sliding_window)
        length, head = ids.shape[1], config.head_dim
        rope = rope_tables(length, head, config.rope_theta, config.rope_factor)
        local = rope
        if config.rope_local_theta is not None:
            local = rope_tables(length, head, config.rope_local_theta)

        embedded = self.embed(ids, dtype)
        dtype = embedded.dtype

        def step(x: jax.Array, scanned: tuple[Any, Any]) -> tuple[jax.Array, jax.Array | None]:
            layer, is_sliding = scanned
            choose = functools.partial(jnp.where, is_sliding)
            turns = choose(local[0], rope[0]), choose(local[1], rope[1])
            y = layer(x, choose(sliding, full), turns, dtype)
            return y, x.astype(dtype) if all_states else None

        is_sliding = jnp.array([kind == SLIDING for kind in config.layer_types])
        x, entering = lax.scan(step, embedded.astype(jnp.float32), (self.layers, is_sliding))
        x = self.norm(x, dtype)
        return x if entering is None else jnp.concatenate([entering, x[None]])


@jax.jit(static_argnames=("graphdef", "dtype", "all_states"))
def _run(
    graphdef: nnx.GraphDef,
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
    dtype: Any,
    all_states: bool,
) -> jax.Array:
    return apply(graphdef, params, ids, mask, dtype=dtype, all_states=all_states)


def text_tower(
    config: GemmaConfig,
    params: Params,
    *,
    dtype: Any = None,
    all_states: bool = False,
    run: Runner = call,
) -> Tower:
    """Returns the compiled function (ids (B, L), mask (B, L)) -> last hidden state (B, L, C).

    The function raises InputError for ids that the embedding does not have. The tokenizer and the
    text encoder are then from different models.

    Args:
      params: parameters of `GemmaTower`, as `keys.load_text_encoder` returns them.
      dtype: compute dtype; by default that of the parameters.
      all_states: return every hidden state, (layers + 1, B, L, C).
      run: how the compiled function is called, see `memory.streaming`.
    """
    graphdef, _ = build(GemmaTower, config)

    def tower(ids: np.ndarray, mask: np.ndarray) -> jax.Array:
        # on an accelerator, a lookup past the end of the table gives no error
        if (largest := int(np.max(ids))) >= config.vocab_size:
            raise InputError(
                f"token id {largest} is past the text encoder's {config.vocab_size} embeddings; "
                "tokenizer/ and text_encoder/ must come from one model"
            )
        # This only copies, while jnp.asarray would compile a program for every shape.
        arrays = jax.device_put((ids, mask))
        return run(_run, graphdef, params, *arrays, dtype=dtype, all_states=all_states)

    return tower
