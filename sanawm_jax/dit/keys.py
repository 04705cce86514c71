"""Published names of the DiT's tensors (diffusers layout)."""

from __future__ import annotations

import re

import numpy as np
from jaxtyping import Float32

from sanawm_jax.checkpoints.keymap import (
    CONV2D,
    LINEAR_AS_CONV2D,
    Entry,
    Layout,
    default_layout,
    default_name,
    table,
)
from sanawm_jax.core.params import build
from sanawm_jax.core.stack import layer_index, stacked_axes
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.model import DiT

_SHORT_CONV = Layout((1, 0), ones=(1,))  # (k, C) <-> (C, 1, k)
_FRAME_CONV = Layout((2, 1, 0), ones=(3,))  # (k, in, out) <-> (out, in, k, 1)

# our names -> theirs, on whole path components
_BLOCK = {
    "attn.out": "attn.proj",
    "attn.beta": "attn.beta_proj",
    "attn.decay": "attn.gate_proj",
    "attn.decay_rate_log": "attn.A_log",
    "attn.decay_step": "attn.dt_bias",
    "attn.gate": "attn.output_gate",
    "attn.q_camera": "attn.q_proj_cam",
    "attn.k_camera": "attn.k_proj_cam",
    "attn.v_camera": "attn.v_proj_cam",
    "attn.out_camera": "attn.out_proj_cam",
    "attn.q_norm_camera": "attn.q_norm_cam",
    "attn.k_norm_camera": "attn.k_norm_cam",
    "attn.q_conv": "attn.conv_q",
    "attn.k_conv": "attn.conv_k",
    "attn.v_conv": "attn.conv_v",
    "attn.q_conv_camera": "attn.conv_q_cam",
    "attn.k_conv_camera": "attn.conv_k_cam",
    "attn.v_conv_camera": "attn.conv_v_cam",
    "cross_attn.q": "cross_attn.q_linear",
    "cross_attn.kv": "cross_attn.kv_linear",
    "cross_attn.out": "cross_attn.proj",
    "ffn.up": "mlp.inverted_conv.conv",
    "ffn.depthwise": "mlp.depth_conv.conv",
    "ffn.down": "mlp.point_conv.conv",
    "ffn.temporal": "mlp.t_conv",
    "ffn.fc1": "mlp.fc1",
    "ffn.fc2": "mlp.fc2",
    "plucker": "plucker_proj",
    "modulation_table": "scale_shift_table",
}
_ROOT = {
    "patch_embed.conv": "x_embedder.proj",
    "time_in": "t_embedder.linear_1",
    "time_out": "t_embedder.linear_2",
    "modulation": "t_block.1",
    "text_embed": "y_embedder.y_proj",
    "text_norm": "attention_y_norm",
    "plucker_embed.conv": "plucker_embedder.proj",
    "raymap_embed.conv": "raymap_embedder.proj",
    "final_table": "final_layer.scale_shift_table",
    "final": "final_layer.linear",
}
_LAYER = re.compile(r"segments\.(\d+)\.runs\.(\d+)\.layers\.(.*)")


def _renamed(path: str, names: dict[str, str]) -> str:
    for ours in sorted(names, key=len, reverse=True):
        if path == ours or path.startswith(ours + "."):
            return names[ours] + path[len(ours) :]
    return path


def _layout(path: str, ndim: int) -> Layout:
    if path.endswith("_conv.taps") or path.endswith("_conv_camera.taps"):
        return _SHORT_CONV
    if path.endswith(("ffn.up.kernel", "ffn.down.kernel")):
        return LINEAR_AS_CONV2D
    if path.endswith("ffn.temporal.kernel"):
        return _FRAME_CONV
    if path.endswith("ffn.depthwise.kernel"):
        return CONV2D
    return default_layout(path.rpartition(".")[2], ndim)


def key_table(config: DiTConfig) -> list[Entry]:
    """Every leaf of `build(DiT, config)` with the published tensors that fill it."""
    segments = config.segments()

    def name(path: str, index: tuple[int, ...]) -> str:
        match = _LAYER.fullmatch(path)
        if match is None:
            return default_name(_renamed(path, _ROOT))
        segment, run = int(match[1]), int(match[2])
        layer = layer_index(segments, segment, run, *index)
        inner = _renamed(match[3], _BLOCK)
        inner = inner.replace(".taps", ".kernel")
        return f"blocks.{layer}.{default_name(inner)}"

    return table(
        build(DiT, config)[1],
        name,
        stacked=stacked_axes,
        layout=_layout,
    )


def is_ignored(key: str) -> bool:
    """`recall_gate` is a buffer that no published forward pass reads."""
    return key.endswith(".attn.recall_gate")


def extra_tensors(config: DiTConfig) -> dict[str, Float32[np.ndarray, "1"]]:
    """Buffers that the published layout holds besides the parameters."""
    zero = np.zeros((1,), np.float32)
    return {f"blocks.{i}.attn.recall_gate": zero for i in range(config.num_layers)}
