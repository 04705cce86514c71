"""The published tensor names of the text encoder, and its loader."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sanawm_jax.checkpoints import keymap
from sanawm_jax.checkpoints.files import SafetensorsFolder, read_config
from sanawm_jax.core.params import Params, build
from sanawm_jax.core.stack import stacked_axes
from sanawm_jax.text.config import GemmaConfig
from sanawm_jax.text.gemma import GemmaTower

# The prefixes of: the text model alone, its causal language model, and Gemma 3 with its vision part
# (first the published names, then those of transformers 5).
_PREFIXES = ("", "model.", "language_model.model.", "model.language_model.")
_EMBEDDING = "embed_tokens.weight"
_LAYER = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.out": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "pre_attn_norm": "input_layernorm",
    "post_attn_norm": "post_attention_layernorm",
    "pre_mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def find_prefix(keys: Iterable[str]) -> str:
    """Returns the prefix of every name; empty if the tensors are not those of a text encoder."""
    keys = set(keys)
    return next((p for p in _PREFIXES if p + _EMBEDDING in keys), "")


def key_table(config: GemmaConfig, prefix: str = "") -> list[keymap.Entry]:
    """Maps every leaf of `build(GemmaTower, config)` to the published tensors that fill it."""

    def name(path: str, index: tuple[int, ...]) -> str:
        if path == "embed_table":
            return prefix + _EMBEDDING
        if not index:
            return prefix + keymap.default_name(path)
        module, _, leaf = path.removeprefix("layers.").rpartition(".")
        return prefix + keymap.default_name(f"layers.{index[0]}.{_LAYER[module]}.{leaf}")

    abstract = build(GemmaTower, config)[1]
    return keymap.table(abstract, name, stacked=stacked_axes)


_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")


def is_ignored(key: str) -> bool:
    """Whether a tensor belongs to the language head or to Gemma 3's vision part.

    No hidden state of a text depends on these.
    """
    return key in _HEADS or _VISION.fullmatch(key) is not None


def check_text_encoder(folder: str | Path) -> GemmaConfig:
    """Checks names and shapes of all tensors; it reads only the file headers.

    Raises:
      InputError: see `load_text_encoder`.
    """
    config = GemmaConfig.from_json(read_config(folder))
    source = SafetensorsFolder(folder)
    keymap.check(
        key_table(config, find_prefix(source.keys())),
        build(GemmaTower, config)[1],
        source,
        what=f"{folder} ({config.model_type})",
        ignore=is_ignored,
    )
    return config


def load_text_encoder(
    folder: str | Path, *, dtype: Any = None, sharding: Any = None, place: Any = None
) -> tuple[GemmaConfig, Params]:
    """Reads a `text_encoder/` folder: config.json and safetensors, single or sharded.

    Args:
      dtype: dtype of the parameters; None keeps that of the file.
      sharding: a sharding, or a tree of shardings, for `jax.device_put`.
      place: see `keymap.load`.

    Raises:
      InputError: a file is absent or broken, or the tensors do not fit the configuration.
    """
    config = GemmaConfig.from_json(read_config(folder))
    source = SafetensorsFolder(folder)
    params = keymap.load(
        key_table(config, find_prefix(source.keys())),
        build(GemmaTower, config)[1],
        source,
        what=f"{folder} ({config.model_type})",
        dtype=dtype,
        sharding=sharding,
        place=place,
        ignore=is_ignored,
    )
    return config, params
