"""Configuration of the video autoencoder, and the stages that follow from it.

Source of the fields and of their defaults: diffusers' `AutoencoderKLLTX2Video`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sanawm_jax.checkpoints.files import config_fields, reading
from sanawm_jax.runtime.errors import InputError

Strides = tuple[int, int, int]  # frames, rows, columns

STRIDES: dict[str, Strides] = {
    "spatial": (1, 2, 2),
    "temporal": (2, 1, 1),
    "spatiotemporal": (2, 2, 2),
}
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_DOWN_BLOCK = "LTX2VideoDownBlock3D"


@dataclasses.dataclass(frozen=True)
class DownStage:
    """One encoder block: residual blocks of `in_channels`, then a downsampler to `out_channels`."""

    in_channels: int
    out_channels: int
    num_layers: int
    strides: Strides | None  # None: the block keeps the resolution
    strided_conv: bool = False  # a strided convolution instead of space-to-depth


@dataclasses.dataclass(frozen=True)
class UpStage:
    """One decoder block: a change of width if needed, an upsampler, then residual blocks."""

    in_channels: int
    out_channels: int
    num_layers: int
    strides: Strides | None
    inject_noise: bool
    residual: bool
    factor: int  # the upsampler divides its channels by this


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Fields of the published `vae/config.json`.

    The tuples of the decoder begin at the output side, as in the published file. Only
    `upsample_type` is in the order of execution.

    Raises:
      InputError: the combination of fields cannot run; the reference cannot run it either.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 128
    block_out_channels: tuple[int, ...] = (256, 512, 1024, 2048)
    down_block_types: tuple[str, ...] = (_DOWN_BLOCK,) * 4
    decoder_block_out_channels: tuple[int, ...] = (256, 512, 1024)
    layers_per_block: tuple[int, ...] = (4, 6, 6, 2, 2)
    decoder_layers_per_block: tuple[int, ...] = (5, 5, 5, 5)
    spatio_temporal_scaling: bool | tuple[bool, ...] = (True,) * 4
    decoder_spatio_temporal_scaling: bool | tuple[bool, ...] = (True,) * 3
    decoder_inject_noise: bool | tuple[bool, ...] = (False,) * 4
    downsample_type: tuple[str, ...] = ("spatial", "temporal", "spatiotemporal", "spatiotemporal")
    upsample_type: tuple[str, ...] = ("spatiotemporal",) * 3
    upsample_residual: bool | tuple[bool, ...] = (True,) * 3
    upsample_factor: tuple[int, ...] = (2, 2, 2)
    timestep_conditioning: bool = False
    patch_size: int = 4
    patch_size_t: int = 1
    resnet_norm_eps: float = 1e-6
    scaling_factor: float = 1.0
    encoder_causal: bool = True
    decoder_causal: bool = True
    encoder_spatial_padding_mode: str = "zeros"
    decoder_spatial_padding_mode: str = "reflect"
    spatial_compression_ratio: int | None = None
    temporal_compression_ratio: int | None = None

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> VAEConfig:
        """Reads a parsed `config.json` without its keys that begin with an underscore.

        Upstream's causal class calls a field by another name, and has one that only training reads.

        Raises:
          InputError: a field is unknown, or the combination of fields cannot run.
        """
        raw = {k: v for k, v in raw.items() if k != "gradient_checkpointing"}
        if "decoder_upsample_type" in raw:
            raw["upsample_type"] = raw.pop("decoder_upsample_type")
        raw = {k: v for k, v in raw.items() if k != "upsample_type" or v is not None}
        with reading("the VAE's config.json"):
            return cls(**config_fields(cls, raw, what="the VAE's config.json"))

    def __post_init__(self):
        for mode in (self.encoder_spatial_padding_mode, self.decoder_spatial_padding_mode):
            _require(
                mode in PADDING_MODES,
                f"unknown spatial padding mode {mode!r}; use one of {', '.join(PADDING_MODES)}",
            )
        _require(
            self.out_channels * self.patch_size**2 % self.patch_size_t == 0,
            f"out_channels does not split into patch_size_t={self.patch_size_t} frames",
        )
        self._check_tuples()
        self._check_down()
        self._check_up()

    @property
    def spatial_ratio(self) -> int:
        """Pixels per latent along rows and columns, as the reference computes it.

        If the configuration does not give it, every scaling block counts as a spatial one. For this
        reason, published configurations give it.
        """
        if self.spatial_compression_ratio is not None:
            return self.spatial_compression_ratio
        return self.patch_size * 2 ** sum(self._encoder_scaling)

    @property
    def temporal_ratio(self) -> int:
        """Pixel frames per latent frame after the first one; see `spatial_ratio`."""
        if self.temporal_compression_ratio is not None:
            return self.temporal_compression_ratio
        return self.patch_size_t * 2 ** sum(self._encoder_scaling)

    @property
    def _encoder_scaling(self) -> tuple[bool, ...]:
        return _spread(self.spatio_temporal_scaling, len(self.layers_per_block) - 1)

    @property
    def mid_inject_noise(self) -> bool:
        """Whether the middle block of the decoder takes noise."""
        return _spread(self.decoder_inject_noise, len(self.decoder_layers_per_block))[-1]

    @property
    def down_stages(self) -> tuple[DownStage, ...]:
        """The encoder's blocks; the first has the width of the latents, as in the reference."""
        stages = []
        width = self.latent_channels
        for i, out in enumerate(self.block_out_channels):
            kind = self.downsample_type[i] if self._encoder_scaling[i] else None
            strided = kind == "conv"
            strides = (2, 2, 2) if strided else STRIDES[kind] if kind else None
            stages.append(DownStage(width, out, self.layers_per_block[i], strides, strided))
            width = out
        return tuple(stages)

    @property
    def up_stages(self) -> tuple[UpStage, ...]:
        """The blocks of the decoder in the order of execution."""
        blocks = len(self.decoder_layers_per_block)
        widths = self.decoder_block_out_channels[::-1]
        layers = self.decoder_layers_per_block[::-1]
        scaling = _spread(self.decoder_spatio_temporal_scaling, blocks - 1)[::-1]
        noise = _spread(self.decoder_inject_noise, blocks)[::-1]
        residual = _spread(self.upsample_residual, blocks - 1)[::-1]
        factors = self.upsample_factor[::-1]
        stages = []
        width = widths[0]
        for i, wide in enumerate(widths):
            stages.append(
                UpStage(
                    in_channels=width // factors[i],
                    out_channels=wide // factors[i],
                    num_layers=layers[i + 1],
                    strides=STRIDES[self.upsample_type[i]] if scaling[i] else None,
                    inject_noise=noise[i + 1],
                    residual=residual[i],
                    factor=factors[i],
                )
            )
            width = wide // factors[i]
        return tuple(stages)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns the latent frames, rows and columns of a video.

        Raises:
          InputError: the size of the video does not divide into latents.
        """
        size = (frames, height, width)
        problem = f"a video of {frames} frames of {height}x{width} does not divide into latents"
        p = self.patch_size
        _require(
            height % p == width % p == 0 < min(size), f"{problem}; rows and columns must be {p}k"
        )
        size = (frames, height // p, width // p)
        for stage in self.down_stages:
            if stage.strided_conv:
                size = ((size[0] - 1) // 2 + 1, (size[1] - 1) // 2 + 1, (size[2] - 1) // 2 + 1)
            elif stage.strides is not None:
                t, h, w = stage.strides
                _require(
                    (size[0] - 1) % t == size[1] % h == size[2] % w == 0,
                    f"{problem}; use {self.temporal_ratio}k+1 frames and multiples of "
                    f"{self.spatial_ratio} pixels",
                )
                size = ((size[0] - 1) // t + 1, size[1] // h, size[2] // w)
        return size

    def video_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns the pixel frames, rows and columns to which latents of this size decode."""
        for stage in self.up_stages:
            if stage.strides is not None:
                t, h, w = stage.strides
                frames, height, width = (frames - 1) * t + 1, height * h, width * w
        return frames * self.patch_size_t, height * self.patch_size, width * self.patch_size

    def _check_tuples(self) -> None:
        down, up = len(self.block_out_channels), len(self.decoder_block_out_channels)
        wanted = {
            "down_block_types": down,
            "downsample_type": down,
            "layers_per_block": down + 1,
            "spatio_temporal_scaling": down,
            "upsample_type": up,
            "upsample_factor": up,
            "decoder_layers_per_block": up + 1,
            "decoder_spatio_temporal_scaling": up,
            "decoder_inject_noise": up + 1,
            "upsample_residual": up,
        }
        for name, length in wanted.items():
            value = getattr(self, name)
            _require(
                isinstance(value, bool) or len(value) == length,
                f"{name} has {value} where {length} entries are wanted",
            )
        unknown = set(self.down_block_types) - {_DOWN_BLOCK}
        _require(not unknown, f"unknown down_block_types {', '.join(sorted(unknown))}")
        unknown = set(self.downsample_type) - STRIDES.keys() - {"conv"}
        _require(not unknown, f"unknown downsample_type {', '.join(sorted(unknown))}")
        unknown = set(self.upsample_type) - STRIDES.keys()
        _require(not unknown, f"unknown upsample_type {', '.join(sorted(unknown))}")

    def _check_down(self) -> None:
        for i, s in enumerate(self.down_stages):
            where = f"encoder block {i} ({s.in_channels} to {s.out_channels} channels)"
            if s.strides is None or s.strided_conv:
                _require(s.in_channels == s.out_channels, f"{where} cannot change its width")
            else:
                fold = s.strides[0] * s.strides[1] * s.strides[2]
                fits = s.out_channels % fold == 0 and s.in_channels * fold % s.out_channels == 0
                _require(fits, f"{where} does not divide over strides {s.strides}")

    def _check_up(self) -> None:
        arriving = self.decoder_block_out_channels[-1]
        for i, s in enumerate(self.up_stages):
            where = f"decoder block {i} ({s.in_channels} to {s.out_channels} channels)"
            if s.in_channels != s.out_channels:
                # in the reference, a change of width takes neither a timestep embedding nor noise
                extra = self.timestep_conditioning or s.inject_noise
                _require(not extra, f"{where} cannot change its width and be conditioned")
                _require(arriving == s.in_channels, f"{where} is given {arriving} channels")
                arriving = s.out_channels
            into = s.out_channels * (s.factor if s.strides else 1)
            _require(arriving == into, f"{where} is given {arriving} channels instead of {into}")
            if s.strides is not None:
                fold = s.strides[0] * s.strides[1] * s.strides[2]
                fits = into % fold == fold % s.factor == 0 if s.residual else True
                _require(fits, f"{where} has no residual path over strides {s.strides}")
                _require(
                    into * fold % s.factor == into * fold // s.factor % fold == 0,
                    f"{where} does not divide over strides {s.strides}",
                )
            arriving = s.out_channels


def _spread(value: bool | tuple[bool, ...], length: int) -> tuple[bool, ...]:
    return (value,) * length if isinstance(value, bool) else value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(f"VAE: {message}")


# 128x128 video of 8k+1 frames <-> (k+1, 16, 16, 48) latents. The patches have the size of a latent,
# so no stage halves rows and columns. Such a stage would have to encode a single first frame with
# the few channels of its convolution.
SMALL_WORLD_VAE = VAEConfig(
    latent_channels=48,
    block_out_channels=(96, 96, 96),
    down_block_types=(_DOWN_BLOCK,) * 3,
    layers_per_block=(2, 1, 1, 1),
    spatio_temporal_scaling=(True,) * 3,
    downsample_type=("temporal",) * 3,
    decoder_block_out_channels=(96, 96, 96),
    decoder_layers_per_block=(2, 1, 1, 1),
    decoder_spatio_temporal_scaling=(True,) * 3,
    decoder_inject_noise=(False,) * 4,
    upsample_type=("temporal",) * 3,
    upsample_residual=(True,) * 3,
    upsample_factor=(1, 1, 1),
    patch_size=8,
    spatial_compression_ratio=8,
    temporal_compression_ratio=8,
)
