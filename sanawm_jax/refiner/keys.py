"""The published tensor names of the refiner and its connectors (diffusers layout)."""

from __future__ import annotations

import re

from sanawm_jax.checkpoints.keymap import Entry, default_name, table
from sanawm_jax.core.params import build
from sanawm_jax.core.stack import stacked_axes
from sanawm_jax.refiner.config import ConnectorsConfig, RefinerConfig
from sanawm_jax.refiner.connectors import TextConnectors
from sanawm_jax.refiner.model import Refiner

# from our names to the published names, for whole components of a path
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_ATTENTION |= {"q_norm": "norm_q", "k_norm": "norm_k", "gate": "to_gate_logits"}
_FEED_FORWARD = {"up": "net.0.proj", "down": "net.2"}
_ADALN = {
    "time_in": "emb.timestep_embedder.linear_1",
    "time_out": "emb.timestep_embedder.linear_2",
    "modulation": "linear",
}


def _inside(ours: str, theirs: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in names.items()}


_BLOCK = {
    **_inside("attn", "attn1", _ATTENTION),
    **_inside("cross_attn", "attn2", _ATTENTION),
    **_inside("ffn", "ff", _FEED_FORWARD),
    "attn_norm": "norm1",
    "cross_norm": "norm2",
    "ffn_norm": "norm3",
    "modulation_table": "scale_shift_table",
    "text_modulation_table": "prompt_scale_shift_table",
}
_REFINER = {
    **_inside("time", "time_embed", _ADALN),
    **_inside("text_time", "prompt_adaln", _ADALN),
    "embed": "proj_in",
    "caption": "caption_projection",
    "final_table": "scale_shift_table",
    "final": "proj_out",
}
_CONNECTOR_BLOCK = {
    **_inside("attn", "attn1", _ATTENTION),
    **_inside("ffn", "ff", _FEED_FORWARD),
}
_CONNECTORS = {"registers": "video_connector.learnable_registers"}


def _renamed(path: str, names: dict[str, str]) -> str:
    for ours in sorted(names, key=len, reverse=True):
        if path == ours or path.startswith(ours + "."):
            return names[ours] + path[len(ours) :]
    return path


def refiner_table(config: RefinerConfig) -> list[Entry]:
    """Maps every leaf of `build(Refiner, config)` to the published tensors that fill it."""

    def name(path: str, index: tuple[int, ...]) -> str:
        if not index:
            return default_name(_renamed(path, _REFINER))
        inner = _renamed(path.removeprefix("blocks."), _BLOCK)
        return f"transformer_blocks.{index[0]}.{default_name(inner)}"

    abstract = build(Refiner, config)[1]
    return table(abstract, name, stacked=stacked_axes)


def connectors_table(config: ConnectorsConfig) -> list[Entry]:
    """Maps every leaf of `build(TextConnectors, config)` to the published tensors that fill it."""
    projection = "video_text_proj_in" if config.per_modality_projections else "text_proj_in"
    names = {**_CONNECTORS, "project": projection}

    def name(path: str, index: tuple[int, ...]) -> str:
        if not index:
            return default_name(_renamed(path, names))
        inner = _renamed(path.removeprefix("blocks."), _CONNECTOR_BLOCK)
        return f"video_connector.transformer_blocks.{index[0]}.{default_name(inner)}"

    abstract = build(TextConnectors, config)[1]
    return table(abstract, name, stacked=stacked_axes)


# The other half of LTX-2: the audio stream, its connections to the video (av_, a2v, v2a), and an
# embedding for keyframes. The refiner runs none of it.
_AUDIO = re.compile(
    r"(transformer_blocks\.\d+\.)?"
    r"(audio_|av_cross_attn_|video_to_audio_|video_a2v_cross_attn_|keyframes_abs_pos_embedding).*"
)
_AUDIO_CONNECTOR = re.compile(r"audio_(connector|text_proj_in)\..*")


def is_audio(key: str) -> bool:
    """Whether a tensor of the refiner's file is skipped on purpose because only audio needs it."""
    return _AUDIO.fullmatch(key) is not None


def is_audio_connector(key: str) -> bool:
    """Whether a tensor of the connectors' file is skipped on purpose."""
    return _AUDIO_CONNECTOR.fullmatch(key) is not None


# names of LTX-2's original checkpoints, which adapters may have, and diffusers' names for them
ORIGINAL_NAMES = {"patchify_proj": "proj_in", "adaln_single": "time_embed"}
_CONNECTOR = re.compile(r"((text_)?connectors\.|(video|audio)_(embeddings_)?connector[._]|text_).*")
_ORIGINAL_AUDIO = re.compile(r"av_ca_.*")


def is_no_video_layer(layer: str) -> bool:
    """Whether an adapter's layer is skipped: the audio half and the text connectors of LTX-2."""
    patterns = (_AUDIO, _AUDIO_CONNECTOR, _CONNECTOR, _ORIGINAL_AUDIO)
    return any(pattern.fullmatch(layer) for pattern in patterns)
