"""Configuration of the Gemma text encoders, read from a published `config.json`."""

from __future__ import annotations

import dataclasses
from typing import Any

from sanawm_jax.checkpoints.files import check_layers, config_fields, reading
from sanawm_jax.runtime.errors import InputError

SLIDING = "sliding_attention"
FULL = "full_attention"

# other fields of published files; none of them changes a hidden state
_BOOKKEEPING = """architectures model_type dtype torch_dtype transformers_version use_cache
cache_implementation bos_token_id eos_token_id pad_token_id initializer_range
max_position_embeddings attention_dropout final_logit_softcapping tie_word_embeddings hidden_act
hidden_activation attention_bias use_bidirectional_attention rope_parameters rope_scaling
name_or_path sliding_window_size output_attentions output_hidden_states return_dict
is_encoder_decoder chunk_size_feed_forward id2label label2id problem_type"""
_ACTIVATION = "gelu_pytorch_tanh"
GEMMA2 = "gemma2"
GEMMA3 = "gemma3_text"
# a field that a Gemma-3 file does not have takes the value of transformers' `Gemma3TextConfig`
_GEMMA3_DEFAULTS: dict[str, Any] = dict(vocab_size=262208, attn_logit_softcapping=None)
_GEMMA3_THETA = {FULL: 1_000_000.0, SLIDING: 10_000.0}
_GEMMA3_PERIOD = 6  # five sliding layers, then one full layer


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Fields of transformers' `Gemma2Config` and `Gemma3TextConfig` that change a hidden state.

    The defaults are those of Gemma-2 2B. Gemma 3 (`model_type="gemma3_text"`) also normalises
    queries and keys, uses another rotary base `rope_local_theta` in its sliding layers, and divides
    the frequencies of its full layers by `rope_factor`.

    `layer_types` gives the attention of each layer, sliding or full. If it is empty, the two
    alternate, and the first layer is sliding. In a sliding layer, a token sees itself and the
    `sliding_window - 1` tokens before it.

    Raises:
      InputError: sizes do not divide, or a layer type is unknown.
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
    model_type: str = GEMMA2
    rope_local_theta: float | None = None  # the base of sliding layers; None: rope_theta
    rope_factor: float = 1.0

    @property
    def use_qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head, as in Gemma 3."""
        return self.model_type == GEMMA3

    def __post_init__(self) -> None:
        if not self.layer_types:
            kinds = tuple((SLIDING, FULL)[i % 2] for i in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", kinds)

        def refuse(message: str) -> None:
            raise InputError(f"text encoder config: {message}")

        if self.model_type not in (GEMMA2, GEMMA3):
            refuse(f"model_type={self.model_type!r} must be {GEMMA2} or {GEMMA3}")
        if self.rope_factor <= 0:
            refuse(f"rope scaling factor={self.rope_factor} must be positive")
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
        """Reads the dictionary of a published `config.json`.

        It accepts the files of `Gemma2Model`, `Gemma2ForCausalLM`, `Gemma3TextModel`,
        `Gemma3ForCausalLM` and `Gemma3ForConditionalGeneration`; of the last one it reads the
        `text_config`.

        Raises:
          InputError: the file is of another model, has an unknown field, or needs a feature that is
            not implemented.
        """
        with reading("text encoder config"):
            return cls._from_json(raw, "text encoder config")

    @classmethod
    def _from_json(cls, raw: dict[str, Any], what: str) -> GemmaConfig:
        if raw.get("model_type") == "gemma3":  # it has a text part and a vision part
            raw = {"model_type": GEMMA3, **(raw.get("text_config") or {})}
        check_layers(raw, what)
        kind = raw.get("model_type", GEMMA2)
        if kind not in (GEMMA2, GEMMA3):
            raise InputError(f"{what}: model_type={kind!r} must be {GEMMA2}, gemma3 or {GEMMA3}")
        for field, allowed in (
            ("attention_bias", (None, False)),
            ("use_bidirectional_attention", (None, False)),
            ("hidden_activation", (_ACTIVATION,)),
        ):
            if field in raw and raw[field] not in allowed:
                raise InputError(f"{what}: {field}={raw[field]!r} is not supported")
        bookkeeping = set(_BOOKKEEPING.split())
        named = {k: v for k, v in raw.items() if k not in bookkeeping and k[0] != "_"}
        if named.get("layer_types", ()) is None:
            del named["layer_types"]
        named.update(_gemma2_rope(raw, what) if kind == GEMMA2 else _gemma3_fields(raw, what))
        if kind == GEMMA3:
            for absorbed in ("rope_local_base_freq", "sliding_window_pattern"):
                named.pop(absorbed, None)
        return cls(**config_fields(cls, {**named, "model_type": kind}, what=what))

    def to_json(self) -> dict[str, Any]:
        """Returns the fields in the form of a `config.json`, which `from_json` reads."""
        out = {**dataclasses.asdict(self), "layer_types": list(self.layer_types)}
        factor, local = out.pop("rope_factor"), out.pop("rope_local_theta")
        if self.model_type == GEMMA2:
            del out["model_type"]
            return out
        out["rope_local_base_freq"] = self.rope_theta if local is None else local
        scaling = None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
        return {**out, "rope_scaling": scaling}


def _gemma2_rope(raw: dict[str, Any], what: str) -> dict[str, Any]:
    """The rotary base of a Gemma-2 file; newer files hold it in `rope_parameters`."""
    if raw.get("rope_scaling") is not None:
        raise InputError(f"{what}: rope_scaling={raw['rope_scaling']!r} is not supported")
    rope = dict(raw.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", None)
    if rope.pop("rope_type", "default") != "default" or rope:
        raise InputError(f"{what}: rope_parameters={raw['rope_parameters']} is not supported")
    return {} if theta is None else {"rope_theta": theta}


def _gemma3_fields(raw: dict[str, Any], what: str) -> dict[str, Any]:
    """The fields that a Gemma-3 file stores differently: layer types and rotary embeddings.

    Newer files hold `rope_parameters` with one dictionary per layer type. Older files hold
    `rope_theta` and `rope_scaling` for the full layers and `rope_local_base_freq` for the sliding
    layers.
    """
    fields = {k: raw.get(k, v) for k, v in _GEMMA3_DEFAULTS.items()}
    fields["attn_logit_softcapping"] = None  # no layer of the reference reads it
    if not raw.get("layer_types"):
        period = raw.get("sliding_window_pattern") or _GEMMA3_PERIOD
        count = raw.get("num_hidden_layers", GemmaConfig.num_hidden_layers)
        fields["layer_types"] = [SLIDING if (i + 1) % period else FULL for i in range(count)]
    new = raw.get("rope_parameters") or {}
    full, sliding = (dict(new.get(kind) or {}) for kind in (FULL, SLIDING))
    if not new:
        full.update(raw.get("rope_scaling") or {})
    full.setdefault("rope_theta", raw.get("rope_theta", _GEMMA3_THETA[FULL]))
    sliding.setdefault("rope_theta", raw.get("rope_local_base_freq", _GEMMA3_THETA[SLIDING]))
    fields["rope_theta"] = full.pop("rope_theta")
    fields["rope_local_theta"] = sliding.pop("rope_theta")
    kind = full.pop("rope_type", full.pop("type", "default"))
    if kind == "linear":
        fields["rope_factor"] = full.pop("factor", 1.0)
    sliding_kind = sliding.pop("rope_type", "default")
    if kind not in ("default", "linear") or sliding_kind != "default" or full or sliding:
        given = raw.get("rope_parameters") or raw.get("rope_scaling")
        raise InputError(f"{what}: rotary embedding {given} is not supported")
    return fields


GEMMA_2_2B = GemmaConfig()
GEMMA_3_12B = GemmaConfig(
    vocab_size=262208,
    hidden_size=3840,
    intermediate_size=15360,
    num_hidden_layers=48,
    num_attention_heads=16,
    num_key_value_heads=8,
    attn_logit_softcapping=None,
    sliding_window=1024,
    layer_types=(*(SLIDING,) * 5, FULL) * 8,
    model_type=GEMMA3,
    rope_theta=1_000_000.0,
    rope_local_theta=10_000.0,
    rope_factor=8.0,
)
