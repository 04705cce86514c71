"""Configurations of the refiner and its text connectors, with the fields of the published files."""

from __future__ import annotations

import dataclasses
from typing import Any

from sanawm_jax.checkpoints.files import config_fields, reading
from sanawm_jax.runtime.errors import InputError

SPLIT = "split"  # rotated pairs (i, i + D/2) of a head
INTERLEAVED = "interleaved"  # rotated pairs (2i, 2i + 1)
FEED_FORWARDS = (
    "gelu",
    "gelu-approximate",
    "geglu",
    "geglu-approximate",
    "swiglu",
    "linear-silu",
)


def _check_rope(what: str, rope_type: str, head_dim: int) -> None:
    if rope_type not in (SPLIT, INTERLEAVED):
        raise InputError(f"{what}: rope_type={rope_type!r} must be {SPLIT} or {INTERLEAVED}")
    if head_dim % 2:
        raise InputError(f"{what}: attention_head_dim={head_dim} must be even to be rotated")


@dataclasses.dataclass(frozen=True)
class RefinerConfig:
    """Fields and defaults of diffusers' `SanaWMLTX2RefinerTransformer3DModel`.

    The reference class is LTX-2's transformer for audio and video. The refiner runs only its video
    half. The audio fields are read so that published files load. Of these, only
    `audio_cross_attn_mod` affects the video, because LTX-2 modulates the text of both halves or of
    neither. `perturbed_attn`, `cross_attn_timestep_scale_multiplier` and
    `use_keyframes_abs_pos_embedding` are for guidance, audio and keyframes. The refiner has none of
    these, so the fields have no effect, as in the reference.

    Raises:
      InputError: no published code can run the value of a field.
    """

    in_channels: int = 128
    out_channels: int | None = 128
    patch_size: int = 1
    patch_size_t: int = 1
    num_attention_heads: int = 32
    attention_head_dim: int = 128
    cross_attention_dim: int = 4096
    vae_scale_factors: tuple[int, int, int] = (8, 32, 32)
    pos_embed_max_pos: int = 20
    base_height: int = 2048
    base_width: int = 2048
    gated_attn: bool = False
    cross_attn_mod: bool = False
    audio_in_channels: int = 128
    audio_out_channels: int | None = 128
    audio_patch_size: int = 1
    audio_patch_size_t: int = 1
    audio_num_attention_heads: int = 32
    audio_attention_head_dim: int = 64
    audio_cross_attention_dim: int = 2048
    audio_scale_factor: int = 4
    audio_pos_embed_max_pos: int = 20
    audio_sampling_rate: int = 16000
    audio_hop_length: int = 160
    audio_gated_attn: bool = False
    audio_cross_attn_mod: bool = False
    num_layers: int = 48
    activation_fn: str = "gelu-approximate"
    qk_norm: str = "rms_norm_across_heads"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    caption_channels: int = 3840
    attention_bias: bool = True
    attention_out_bias: bool = True
    rope_theta: float = 10000.0
    rope_double_precision: bool = True
    causal_offset: int = 1
    timestep_scale_multiplier: int = 1000
    cross_attn_timestep_scale_multiplier: int = 1000
    rope_type: str = INTERLEAVED
    use_prompt_embeddings: bool = True
    perturbed_attn: bool = False
    ff_bias: bool = True
    audio_ff_bias: bool = True
    use_prompt_adaln_single: bool = True
    use_keyframes_abs_pos_embedding: bool = False

    def __post_init__(self) -> None:
        what = "refiner transformer config"
        _check_rope(what, self.rope_type, self.attention_head_dim)
        if self.patch_size != 1 or self.patch_size_t != 1:
            raise InputError(
                f"{what}: patch_size={self.patch_size} and patch_size_t={self.patch_size_t} must "
                "be 1; no published refiner has patches"
            )
        if (self.out_channels or self.in_channels) != self.in_channels:
            raise InputError(
                f"{what}: out_channels={self.out_channels} must equal "
                f"in_channels={self.in_channels} to be a velocity of the latents"
            )
        needs_width = self.use_prompt_embeddings or self.modulates_text
        if self.cross_attention_dim != self.width and needs_width:
            raise InputError(
                f"{what}: cross_attention_dim={self.cross_attention_dim} must be "
                f"{self.width}, the width of the projected and modulated text"
            )
        if self.qk_norm != "rms_norm_across_heads":
            raise InputError(f"{what}: qk_norm={self.qk_norm!r} must be rms_norm_across_heads")
        if self.activation_fn not in FEED_FORWARDS:
            raise InputError(
                f"{what}: activation_fn={self.activation_fn!r} must be one of "
                f"{', '.join(FEED_FORWARDS)}"
            )

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> RefinerConfig:
        """Reads the dictionary of a published `config.json`; unknown fields are errors."""
        with reading("refiner transformer config"):
            return cls(**config_fields(cls, raw, what="refiner transformer config"))

    @property
    def width(self) -> int:
        """Width C of the video tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def text_width(self) -> int:
        """Width of the text embeddings that the transformer receives."""
        return self.caption_channels if self.use_prompt_embeddings else self.cross_attention_dim

    @property
    def num_modulations(self) -> int:
        """Number of vectors that modulate a block: shift, scale and gate of 2 or 3 branches."""
        return 9 if self.cross_attn_mod else 6

    @property
    def modulates_text(self) -> bool:
        """Whether the timestep modulates the keys and values of the text."""
        return self.cross_attn_mod or self.audio_cross_attn_mod


@dataclasses.dataclass(frozen=True)
class ConnectorsConfig:
    """Fields and defaults of diffusers' `LTX2TextConnectors`; the audio fields have no effect.

    No code of the reference reads `causal_temporal_positioning`.

    Raises:
      InputError: the rotary embedding is unknown, or the widths do not match.
    """

    caption_channels: int = 3840
    text_proj_in_factor: int = 49
    video_connector_num_attention_heads: int = 30
    video_connector_attention_head_dim: int = 128
    video_connector_num_layers: int = 2
    video_connector_num_learnable_registers: int | None = 128
    video_gated_attn: bool = False
    audio_connector_num_attention_heads: int = 30
    audio_connector_attention_head_dim: int = 128
    audio_connector_num_layers: int = 2
    audio_connector_num_learnable_registers: int | None = 128
    audio_gated_attn: bool = False
    connector_rope_base_seq_len: int = 4096
    rope_theta: float = 10000.0
    rope_double_precision: bool = True
    causal_temporal_positioning: bool = False
    rope_type: str = INTERLEAVED
    per_modality_projections: bool = False
    video_hidden_dim: int = 4096
    audio_hidden_dim: int = 2048
    proj_bias: bool = False

    def __post_init__(self) -> None:
        what = "connectors config"
        _check_rope(what, self.rope_type, self.video_connector_attention_head_dim)
        if self.projected_width != self.width:
            name = "video_hidden_dim" if self.per_modality_projections else "caption_channels"
            raise InputError(
                f"{what}: {name}={self.projected_width} must be the {self.width} channels of the "
                "video connector's heads"
            )

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> ConnectorsConfig:
        """Reads the dictionary of a published `config.json`; unknown fields are errors."""
        with reading("connectors config"):
            return cls(**config_fields(cls, raw, what="connectors config"))

    @property
    def width(self) -> int:
        """Width C of the video connector."""
        return self.video_connector_num_attention_heads * self.video_connector_attention_head_dim

    @property
    def projected_width(self) -> int:
        """Width to which the hidden states are projected."""
        return self.video_hidden_dim if self.per_modality_projections else self.caption_channels


# the video half of LTX-2 19B; its file has rope_type split, and the defaults otherwise
LTX_2_19B = RefinerConfig(rope_type=SPLIT)
LTX_2_19B_CONNECTORS = ConnectorsConfig(rope_type=SPLIT)
