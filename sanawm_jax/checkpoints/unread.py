"""Shapes of the audio half of LTX-2, which its published files hold and the refiner never reads.

Only `random_weights` uses them, to write files as large as the released ones. Names and shapes are
those of diffusers' `LTX2VideoTransformer3DModel` and `LTX2TextConnectors`.
"""

from __future__ import annotations

from sanawm_jax.refiner.config import ConnectorsConfig, RefinerConfig

Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _time(name: str, width: int, count: int) -> Shapes:
    inner = f"{name}.emb.timestep_embedder"
    return {
        **_linear(f"{inner}.linear_1", 256, width),
        **_linear(f"{inner}.linear_2", width, width),
        **_linear(f"{name}.linear", width, count * width),
    }


def _attention(name: str, queries: int, keys: int, inner: int) -> Shapes:
    return {
        f"{name}.norm_q.weight": (inner,),
        f"{name}.norm_k.weight": (inner,),
        **_linear(f"{name}.to_q", queries, inner),
        **_linear(f"{name}.to_k", keys, inner),
        **_linear(f"{name}.to_v", keys, inner),
        **_linear(f"{name}.to_out.0", inner, queries),
    }


def _feed_forward(name: str, width: int) -> Shapes:
    return {
        **_linear(f"{name}.net.0.proj", width, 4 * width),
        **_linear(f"{name}.net.2", 4 * width, width),
    }


def audio_shapes(config: RefinerConfig) -> Shapes:
    """The audio half of the released transformer: no gates, one time network, GELU."""
    video, audio = config.width, config.audio_num_attention_heads * config.audio_attention_head_dim
    captions, channels = config.caption_channels, config.audio_in_channels
    out: Shapes = {
        "audio_scale_shift_table": (2, audio),
        **_linear("audio_proj_in", channels, audio),
        **_linear("audio_caption_projection.linear_1", captions, audio),
        **_linear("audio_caption_projection.linear_2", audio, audio),
        **_time("audio_time_embed", audio, 6),
        **_time("av_cross_attn_video_scale_shift", video, 4),
        **_time("av_cross_attn_audio_scale_shift", audio, 4),
        **_time("av_cross_attn_video_a2v_gate", video, 1),
        **_time("av_cross_attn_audio_v2a_gate", audio, 1),
        **_linear("audio_proj_out", audio, config.audio_out_channels or channels),
    }
    for i in range(config.num_layers):
        block: Shapes = {
            "audio_scale_shift_table": (6, audio),
            "video_a2v_cross_attn_scale_shift_table": (5, video),
            "audio_a2v_cross_attn_scale_shift_table": (5, audio),
            **_attention("audio_attn1", audio, audio, audio),
            **_attention("audio_attn2", audio, config.audio_cross_attention_dim, audio),
            **_attention("audio_to_video_attn", video, audio, audio),
            **_attention("video_to_audio_attn", audio, video, audio),
            **_feed_forward("audio_ff", audio),
        }
        out |= {f"transformer_blocks.{i}.{name}": shape for name, shape in block.items()}
    return out


def audio_connector_shapes(config: ConnectorsConfig) -> Shapes:
    """The audio connector of the released file; it shares the projection of the hidden states."""
    heads, size = (
        config.audio_connector_num_attention_heads,
        config.audio_connector_attention_head_dim,
    )
    width = heads * size
    out: Shapes = {}
    if registers := config.audio_connector_num_learnable_registers:
        out["learnable_registers"] = (registers, width)
    for i in range(config.audio_connector_num_layers):
        out |= _attention(f"transformer_blocks.{i}.attn1", width, width, width)
        out |= _feed_forward(f"transformer_blocks.{i}.ff", width)
    return {f"audio_connector.{name}": shape for name, shape in out.items()}
