"""Configuration of the stage-1 DiT, field for field the published `transformer/config.json`."""

from __future__ import annotations

import dataclasses
from typing import Any

from sanawm_jax.checkpoints.files import config_fields, reading
from sanawm_jax.core.stack import Segment, plan
from sanawm_jax.dit.numerics import Numerics
from sanawm_jax.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What makes one layer's parameters differ from another's."""

    softmax: bool  # softmax attention, else gated DeltaNet
    plucker: bool  # adds the projected Plücker embedding after attention


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Fields and defaults of diffusers' `SanaWMTransformer3DModel`; the defaults are the release.

    `init_cam_from_base`, `fp32_attention`, `image_size`, `learn_sigma` and `mixed_precision` are
    read so that published files load, and change nothing, as in the reference.

    `numerics` is no published field: it says which implementation's numbers are computed.

    Raises:
      InputError: a field whose value no published code can run, or sizes that do not divide.
    """

    in_channels: int = 128
    num_layers: int = 20
    hidden_size: int = 2240
    num_attention_heads: int = 20
    patch_size: tuple[int, int, int] = (1, 1, 1)
    softmax_every_n: int = 4
    linear_head_dim: int = 112
    ffn_type: str = "GLUMBConvTemp"
    t_kernel_size: int = 3
    conv_kernel_size: int = 4
    k_conv_only: bool = True
    pos_embed_type: str = "wan_rope"
    qk_norm: bool = True
    cross_norm: bool = True
    y_norm: bool = True
    cam_attn_compress: int = 1
    init_cam_from_base: bool = True
    use_chunk_plucker_post_attn: bool = True
    chunk_plucker_channels: int = 48
    chunk_plucker_post_attn_blocks: int = 20
    fp32_attention: bool = True
    image_size: int = 720
    caption_channels: int = 2304
    mlp_ratio: float = 3.0
    mlp_acts: tuple[str | None, str | None, str | None] = ("silu", "silu", None)
    use_pe: bool = True
    learn_sigma: bool = False
    pred_sigma: bool = False
    mixed_precision: str = "bf16"
    numerics: Numerics = dataclasses.field(default=Numerics(), metadata={"published": False})

    def __post_init__(self) -> None:
        def refuse(message: str) -> None:
            raise InputError(f"transformer config: {message}")

        if self.hidden_size % self.linear_head_dim or self.linear_head_dim % 8:
            refuse(
                f"hidden_size={self.hidden_size} must be a multiple of "
                f"linear_head_dim={self.linear_head_dim}, itself a multiple of 8"
            )
        if self.hidden_size % self.num_attention_heads:
            refuse(
                f"hidden_size={self.hidden_size} must be a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.patch_size[0] != 1:
            refuse(f"patch_size={self.patch_size} must not patch time")
        if self.ffn_type not in ("GLUMBConvTemp", "mlp"):
            refuse(f"ffn_type={self.ffn_type!r} must be GLUMBConvTemp or mlp")
        if self.use_pe and self.pos_embed_type != "wan_rope":
            refuse(f"pos_embed_type={self.pos_embed_type!r} must be wan_rope")
        if self.cam_attn_compress != 1:
            refuse("cam_attn_compress must be 1: the camera branch shares the main gates")
        if self.pred_sigma:
            refuse("pred_sigma=True has no published model; the flow model predicts no variance")

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> DiTConfig:
        """From the dictionary of a published `config.json`; unknown fields are errors."""
        with reading("transformer config"):
            return cls(**config_fields(cls, raw, what="transformer config"))

    @property
    def num_heads(self) -> int:
        """Heads N of self-attention; cross-attention has `num_attention_heads`."""
        return self.hidden_size // self.linear_head_dim

    @property
    def ffn_width(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    def kinds(self) -> list[LayerKind]:
        """Kind of every layer, in order."""
        n, last = self.softmax_every_n, self.chunk_plucker_post_attn_blocks
        return [
            LayerKind(
                softmax=n > 0 and (i + 1) % n == 0,
                plucker=self.use_chunk_plucker_post_attn and (last < 0 or i < last),
            )
            for i in range(self.num_layers)
        ]

    def segments(self) -> tuple[Segment, ...]:
        """The stack as repeated groups: 5 x (3 GDN, 1 softmax) for the release."""
        return plan(self.kinds(), self.softmax_every_n if self.softmax_every_n > 0 else 1)


SANA_WM_2B = DiTConfig()
