"""The stages and sizes of a configuration, and the combinations that are errors."""

from __future__ import annotations

import dataclasses

import pytest

from sanawm_jax.core import params as params_lib
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.vae.config import SMALL_WORLD_VAE, VAEConfig
from sanawm_jax.vae.model import VideoVAE

LTX2 = VAEConfig(spatial_compression_ratio=32, temporal_compression_ratio=8)


def test_published_sizes():
    assert LTX2.latent_shape(961, 704, 1280) == (121, 22, 40)
    assert LTX2.video_shape(121, 22, 40) == (961, 704, 1280)
    assert LTX2.latent_shape(1, 704, 1280) == (1, 22, 40)
    assert [s.out_channels for s in LTX2.up_stages] == [512, 256, 128]


def test_small_world():
    cfg = SMALL_WORLD_VAE
    assert cfg.latent_shape(49, 128, 128) == (7, 16, 16)
    assert cfg.video_shape(7, 16, 16) == (49, 128, 128)
    _, abstract = params_lib.build(VideoVAE, cfg)
    assert 5e6 < params_lib.count(abstract) < 8e6


# two stages that halve rows and columns, one that halves frames alone
BASE = dataclasses.replace(
    SMALL_WORLD_VAE,
    block_out_channels=(96, 128, 128),
    downsample_type=("spatiotemporal", "spatiotemporal", "temporal"),
    decoder_block_out_channels=(64, 64, 128),
    upsample_type=("temporal", "spatiotemporal", "spatiotemporal"),
    upsample_factor=(1, 1, 2),
    patch_size=4,
    spatial_compression_ratio=16,
)


def test_strided_convolution_rounds_up():
    cfg = dataclasses.replace(
        BASE,
        downsample_type=("conv", "spatiotemporal", "temporal"),
        block_out_channels=(48, 64, 64),
    )
    # 4x5x10 patches, then 2x3x5, which the next block cannot halve
    with pytest.raises(InputError, match="does not divide"):
        cfg.latent_shape(4, 20, 40)
    # 6x7x9 patches, then 3x4x5 -> needs even columns; 3x4x6 halves
    assert cfg.latent_shape(10, 28, 44) == (2, 2, 3)


@pytest.mark.parametrize("size", [(48, 128, 128), (49, 120, 128), (49, 128, 126), (0, 128, 128)])
def test_indivisible_video(size):
    with pytest.raises(InputError, match="does not divide"):
        BASE.latent_shape(*size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_spatial_padding_mode": "same"}, "padding mode 'same'"),
        ({"downsample_type": ("time", "temporal", "temporal")}, "downsample_type time"),
        ({"upsample_type": ("conv", "temporal", "temporal")}, "upsample_type conv"),
        ({"down_block_types": ("Other",) * 3}, "down_block_types Other"),
        ({"layers_per_block": (1, 1, 1)}, "layers_per_block"),
        ({"block_out_channels": (96, 128, 129)}, "encoder block 2"),
        ({"spatio_temporal_scaling": (False, True, True)}, "cannot change its width"),
        ({"upsample_factor": (2, 2, 2)}, "decoder block 2"),
        ({"decoder_block_out_channels": (32, 64, 128), "timestep_conditioning": True}, "condition"),
    ],
)
def test_refused(change, message):
    with pytest.raises(InputError, match=message) as error:
        dataclasses.replace(BASE, **change)
    assert "\n" not in str(error.value)


def test_json_round_trip_and_unknown_field():
    raw = {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in dataclasses.asdict(SMALL_WORLD_VAE).items()
    }
    assert VAEConfig.from_json(raw) == SMALL_WORLD_VAE
    assert hash(VAEConfig.from_json(raw)) == hash(SMALL_WORLD_VAE)
    with pytest.raises(InputError, match="surprise"):
        VAEConfig.from_json({**raw, "surprise": 1})
