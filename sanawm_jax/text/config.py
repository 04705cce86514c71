"""Configuration of the Gemma-2 text tower, read from a published `config.json`."""

from __future__ import annotations

import dataclasses
from typing import Any

from sanawm_jax.errors import InputError
from sanawm_jax.weights.files import config_fields

SLIDING = "sliding_attention"
FULL = "full_attention"

# what a published file says besides; none of it changes a hidden state
_BOOKKEEPING = """architectures model_type dtype torch_dtype transformers_version use_cache
cache_implementation bos_token_id eos_token_id pad_token_id initializer_range
max_position_embeddings attention_dropout final_logit_softcapping tie_word_embeddings hidden_act
hidden_activation attention_bias use_bidirectional_attention rope_parameters rope_scaling
name_or_path sliding_window_size output_attentions output_hidden_states return_dict
is_encoder_decoder chunk_size_feed_forward id2label label2id problem_type"""
_ACTIVATION = "gelu_pytorch_tanh"


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Fields of transformers' `Gemma2Config` that change a hidden state; the defaults are the 2B.

    `layer_types` names each layer's attention, sliding or full; empty alternates the two, sliding
    first. A sliding layer sees a token and the `sliding_window - 1` before it.

    Raises:
      InputError: sizes that do not divide, or layer types that this tower does not have.
    """

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    query_pre_attn_scalar: float = 256
    attn_logit_softcapping: float | None = 50.0
    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.layer_types:
            kinds = tuple((SLIDING, FULL)[i % 2] for i in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", kinds)

        def refuse(message: str) -> None:
            raise InputError(f"text encoder config: {message}")

        if len(self.layer_types) != self.num_hidden_layers:
            refuse(
                f"layer_types has {len(self.layer_types)} entries for "
                f"num_hidden_layers={self.num_hidden_layers}"
            )
        if unknown := sorted(set(self.layer_types) - {SLIDING, FULL}):
            refuse(f"layer_types has {unknown[0]!r}; use {SLIDING} or {FULL}")
        if SLIDING in self.layer_types and (self.sliding_window or 0) < 1:
            refuse(f"sliding_window={self.sliding_window} must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            refuse(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            refuse(f"head_dim={self.head_dim} must be even for rotary embedding")

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> GemmaConfig:
        """From the dictionary of a published `config.json` of `Gemma2Model` or `Gemma2ForCausalLM`.

        Raises:
          InputError: another model, an unknown field, or a feature that this tower does not have.
        """
        what = "text encoder config"
        if raw.get("model_type", "gemma2") != "gemma2":
            raise InputError(f"{what}: model_type={raw['model_type']!r} must be gemma2")
        for field, allowed in (
            ("attention_bias", (None, False)),
            ("use_bidirectional_attention", (None, False)),
            ("hidden_activation", (_ACTIVATION,)),
            ("rope_scaling", (None,)),
        ):
            if field in raw and raw[field] not in allowed:
                raise InputError(f"{what}: {field}={raw[field]!r} is not supported")
        rope = dict(raw.get("rope_parameters") or {})  # newer files; older have rope_theta alone
        theta = rope.pop("rope_theta", None)
        if rope.pop("rope_type", "default") != "default" or rope:
            raise InputError(f"{what}: rope_parameters={raw['rope_parameters']} is not supported")
        bookkeeping = set(_BOOKKEEPING.split())
        named = {k: v for k, v in raw.items() if k not in bookkeeping}
        if theta is not None:
            named["rope_theta"] = theta
        if named.get("layer_types", ()) is None:
            del named["layer_types"]
        return cls(**config_fields(cls, named, what=what))

    def to_json(self) -> dict[str, Any]:
        """The fields as a `config.json` holds them; `from_json` reads them back."""
        return {**dataclasses.asdict(self), "layer_types": list(self.layer_types)}


GEMMA_2_2B = GemmaConfig()
