"""From Gemma-3 hidden states to the text embeddings that the refiner reads.

All hidden states of a token are normalised, concatenated and projected to one vector. A small
transformer then mixes the tokens. Learned registers replace the padding tokens.

Axis letters: B batch, L text tokens, Z hidden states (layers + 1), C width, N heads, D head size.
Reference: diffusers `LTX2TextConnectors`, `SanaWMLTX2Refiner._encode_prompt`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Num

from sanawm_jax.core.attention import attention
from sanawm_jax.core.layers import Linear
from sanawm_jax.core.params import Params, apply, draw, stack
from sanawm_jax.refiner.config import ConnectorsConfig
from sanawm_jax.refiner.layers import AttentionProjections, FeedForward, Norm
from sanawm_jax.refiner.rope import Rotation, rotate, text_rotations
from sanawm_jax.text.gemma import Tower
from sanawm_jax.text.tokenizer import Tokenizer

_EPS = 1e-6
_SCALE = 8.0  # factor of hidden states after the division by their range


def normalise_states(
    states: Float[Array, "B L C Z"], mask: Num[Array, "B L"]
) -> Float32[Array, "B L C Z"]:
    """Subtracts the mean of every hidden state and divides by its range; padding becomes 0.

    Mean, minimum and maximum are over the tokens and channels of one hidden state, without padding.
    Reference: `per_layer_masked_mean_norm`, `_pack_text_embeds`.

    Args:
      states: hidden states of the text encoder.
      mask: non-zero for a token; every text has at least one token.
    """
    x = states.astype(jnp.float32)
    is_token = (mask != 0)[:, :, None, None]
    count = jnp.sum(mask != 0, 1, dtype=jnp.float32)[:, None, None, None] * x.shape[2]
    mean = jnp.sum(jnp.where(is_token, x, 0.0), (1, 2), keepdims=True) / (count + _EPS)
    low = jnp.min(jnp.where(is_token, x, jnp.inf), (1, 2), keepdims=True)
    high = jnp.max(jnp.where(is_token, x, -jnp.inf), (1, 2), keepdims=True)
    y = (x - mean) / (high - low + _EPS) * _SCALE
    return jnp.where(is_token, y, 0.0)


def pack_states(
    states: Float[Array, "Z B L C"], mask: Num[Array, "B L"]
) -> Float32[Array, "B L C Z"]:
    """Normalises the hidden states of the text encoder and moves their axis to the end.

    The result is float32, because the connectors normalise once more, and two roundings would add
    up.
    """
    return normalise_states(rearrange(states, "Z B L C -> B L C Z"), mask)


class ConnectorBlock(nnx.Module):
    """Self-attention and feed-forward, each with a norm before it and a residual connection."""

    def __init__(self, config: ConnectorsConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.rope_type = config.rope_type
        self.attn_norm = Norm(width, eps=_EPS, has_scale=False)
        self.ffn_norm = Norm(width, eps=_EPS, has_scale=False)
        self.attn = AttentionProjections(
            width,
            config.video_connector_num_attention_heads,
            config.video_connector_attention_head_dim,
            is_gated=config.video_gated_attn,
            rngs=rngs,
        )
        self.ffn = FeedForward(width, "gelu-approximate", rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L C"], rotation: Rotation, key_mask: Bool[Array, "B L"] | None
    ) -> Float[Array, "B L C"]:
        """Mixes the tokens of a text; `key_mask` is false for a hidden token."""
        h = self.attn_norm(x)
        q, (k, v) = self.attn.query(h), self.attn.key_value(h)
        q, k = rotate(q, rotation, self.rope_type), rotate(k, rotation, self.rope_type)
        x = x + self.attn.project_out(attention(q, k, v, key_mask=key_mask), h)
        return x + self.ffn(self.ffn_norm(x))


class TextConnectors(nnx.Module):
    """Maps packed hidden states to the refiner's text; the audio connector is not built."""

    def __init__(self, config: ConnectorsConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.project = Linear(
            config.caption_channels * config.text_proj_in_factor,
            config.projected_width,
            use_bias=config.proj_bias,
            rngs=rngs,
        )
        registers = config.video_connector_num_learnable_registers
        if registers is not None:
            shape = (registers, config.width)
            init = functools.partial(jax.random.uniform, minval=-1.0, maxval=1.0)
            self.registers = nnx.Param(draw(init, rngs, shape))
        self.blocks = stack(
            lambda rngs: ConnectorBlock(config, rngs=rngs),
            rngs,
            (config.video_connector_num_layers,),
        )
        self.norm = Norm(config.width, eps=_EPS, has_scale=False)

    def __call__(
        self, states: Float[Array, "B L _ Z"], mask: Num[Array, "B L"], *, dtype: Any = None
    ) -> tuple[Float[Array, "B L C"], Int[Array, "B L"]]:
        """Computes text embeddings and their mask.

        Args:
          states: from `pack_states`, with `caption_channels` channels.
          mask: non-zero for a token; padding is on the left.
          dtype: compute dtype; by default that of the states.

        Returns:
          The text, and a mask int32 that is 1 everywhere: registers replace the padding, and
          without registers the reference does not hide the padding either.

        Raises:
          ValueError: L is not a multiple of the number of registers.
        """
        config = self.config
        x = self.project(self._features(states, mask).astype(dtype or states.dtype))
        key_mask = mask != 0
        if hasattr(self, "registers"):
            x, key_mask = self._fill_with_registers(x, key_mask), None
        rotation = text_rotations(config, x.shape[1])

        def step(x: jax.Array, block: ConnectorBlock) -> tuple[jax.Array, None]:
            return block(x, rotation, key_mask), None

        x, _ = lax.scan(step, x, self.blocks)
        return self.norm(x), jnp.ones(mask.shape, jnp.int32)

    def _features(self, states: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns (B, L, C Z) float32, normalised a second time, as in the reference."""
        config = self.config
        if not config.per_modality_projections:
            return rearrange(normalise_states(states, mask), "B L C Z -> B L (C Z)")
        x = states.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.mean(x * x, 2, keepdims=True) + _EPS)
        x = x * (config.video_hidden_dim / config.caption_channels) ** 0.5
        x = jnp.where((mask != 0)[:, :, None, None], x, 0.0)
        return rearrange(x, "B L C Z -> B L (C Z)")

    def _fill_with_registers(self, x: jax.Array, is_token: jax.Array) -> jax.Array:
        """Moves the tokens of x (B, L, C) to the front and fills the rest with registers."""
        registers = self.registers[...].astype(x.dtype)
        length = x.shape[1]
        if length % len(registers):
            raise ValueError(f"{length} text tokens are no multiple of {len(registers)} registers")
        order = jnp.argsort(~is_token, axis=1, stable=True)
        front = jnp.take_along_axis(x, order[..., None], 1)
        count = jnp.sum(is_token, 1)[:, None]
        is_front = (jnp.arange(length)[None] < count)[..., None]
        return jnp.where(is_front, front, jnp.tile(registers, (length // len(registers), 1)))


def encode_texts(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    length: int,
    load_tower: Callable[[], Tower],
    load_connectors: Callable[[], tuple[nnx.GraphDef, Params]],
    dtype: Any,
) -> Float[Array, "B L C"]:
    """Prompts as the refiner's transformer reads them: Gemma-3's hidden states, connected.

    Args:
      length: text tokens L; shorter prompts are padded on the left.
      load_tower: gives the text tower with all hidden states; it can be freed when it has run.
      load_connectors: gives the connectors, which are asked for after that.
      dtype: compute dtype of the connectors.

    Returns:
      The text. All tokens count: registers stand where padding was.
    """
    ids, mask = tokenizer([text.strip() for text in texts], length, padding_side="left")
    states = load_tower()(ids, mask).block_until_ready()
    graphdef, params = load_connectors()
    return connect_text(graphdef, params, states, jnp.asarray(mask), dtype)


@jax.jit(static_argnames=("graphdef", "dtype"))
def connect_text(
    graphdef: nnx.GraphDef,
    params: Params,
    states: Float[Array, "Z B L C"],
    mask: Num[Array, "B L"],
    dtype: Any,
) -> Float[Array, "B L C_out"]:
    """Computes the transformer's text from all hidden states of the text tower."""
    return apply(graphdef, params, pack_states(states, mask), mask, dtype=dtype)[0]
