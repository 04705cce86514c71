"""Tiles of a pointwise model join to the whole result; windows stream with few compilations."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.tiling import (
    LONG_VIDEO,
    Tiling,
    blend,
    decode_windows,
    tiled_decode,
    tiled_encode,
)

CFG = VAEConfig(spatial_compression_ratio=32, temporal_compression_ratio=8)


def repeat_latents(latents):
    """A decoder that makes the pixels of a latent from this latent alone."""
    x = np.repeat(np.repeat(np.asarray(latents), 32, axis=2), 32, axis=3)
    return jnp.asarray(np.concatenate([x[:, :1], np.repeat(x[:, 1:], 8, axis=1)], axis=1))


def subsample(video):
    """An encoder whose latents are single pixels."""
    x = jnp.asarray(np.asarray(video)[:, ::8, ::32, ::32])
    return x, -x


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(2, 3), st.integers(1, 3))
def test_tiles_in_space_reassemble(height, width, size, stride):
    stride = min(size, stride)
    tiling = Tiling(
        tile_sample_min_height=32 * size,
        tile_sample_min_width=32 * size,
        tile_sample_stride_height=32 * stride,
        tile_sample_stride_width=32 * stride,
    )
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.standard_normal((1, 1, height, width, 1)), jnp.float32)
    video = repeat_latents(z)
    mean, logvar = tiled_encode(subsample, video, CFG, tiling)
    if aligned(height, size, stride) and aligned(width, size, stride):
        np.testing.assert_allclose(tiled_decode(repeat_latents, z, CFG, tiling), video, atol=1e-5)
        np.testing.assert_allclose(mean, z, atol=1e-5)
        np.testing.assert_allclose(logvar, -z, atol=1e-5)
    assert mean.shape == z.shape


def aligned(length, size, stride):
    """Whether every tile is at least as long as its overlap, as blending needs."""
    return length <= size or all(length - s >= size - stride for s in range(0, length, stride))


@pytest.mark.parametrize("frames", [17, 25, 41, 97])
def test_windows_of_encoding_reassemble(frames):
    tiling = Tiling(use_framewise=True, tile_sample_min_num_frames=16)
    rng = np.random.default_rng(1)
    video = jnp.asarray(rng.standard_normal((1, frames, 32, 32, 1)), jnp.float32)
    mean, _ = tiled_encode(subsample, video, CFG, tiling)
    np.testing.assert_allclose(mean, video[:, ::8, ::32, ::32], atol=1e-5)


def test_long_video_streams_with_few_shapes():
    tiny = VAEConfig(spatial_compression_ratio=32, temporal_compression_ratio=8)
    shapes = []

    def decode(latents):
        shapes.append(latents.shape)
        b, f, h, w, _ = latents.shape
        return jnp.ones((b, 8 * (f - 1) + 1, 32 * h, 32 * w, 1), jnp.bfloat16)

    tiling = Tiling(
        use_framewise=True,
        tile_sample_min_num_frames=96,
        tile_sample_stride_num_frames=64,
        tile_sample_min_height=64,
        tile_sample_stride_height=32,
        tile_sample_min_width=64,
        tile_sample_stride_width=64,
    )
    z = jnp.zeros((1, 121, 2, 3, 4), jnp.float32)
    sizes = [tuple(y.shape) for y in decode_windows(decode, z, tiny, tiling)]
    assert [s[1] for s in sizes] == [65] + 14 * [64]
    assert {s[2:] for s in sizes} == {(64, 96, 1)}
    assert len(set(shapes)) <= 12
    assert min(s[1] for s in shapes) > 1  # the last latent alone would add no frame


def test_first_window_needs_no_later_latents():
    z = jnp.zeros((1, 121, 1, 1, 4), jnp.float32)
    seen = []

    def decode(latents):
        seen.append(latents.shape[1])
        return repeat_latents(latents)

    next(decode_windows(decode, z, CFG, LONG_VIDEO))
    assert seen == [13]


def test_small_input_is_one_call():
    calls = []

    def decode(latents):
        calls.append(latents.shape)
        return repeat_latents(latents)

    z = jnp.zeros((2, 12, 16, 16, 1), jnp.float32)
    tiled_decode(decode, z, CFG, LONG_VIDEO)
    assert calls == [z.shape]


def test_blend_is_a_linear_ramp():
    y = blend(jnp.zeros((6, 2)), jnp.ones((5, 2)), axis=0, overlap=4)
    np.testing.assert_allclose(y[:, 0], [0, 0.25, 0.5, 0.75, 1])
    short = blend(jnp.zeros((2, 2)), jnp.ones((5, 2)), axis=0, overlap=4)
    np.testing.assert_allclose(short[:, 0], [0, 0.5, 1, 1, 1])
    np.testing.assert_allclose(blend(jnp.zeros((6, 2)), jnp.ones((5, 2)), axis=0, overlap=0), 1)
    end = blend(jnp.arange(6.0), jnp.zeros(5), axis=0, overlap=2)
    np.testing.assert_allclose(end, [4, 2.5, 0, 0, 0])  # of the last two before


def test_tiles_below_a_latent_are_refused():
    tiling = Tiling(tile_sample_stride_height=16)
    with pytest.raises(InputError, match=r"height.*at least 32"):
        tiled_decode(repeat_latents, jnp.zeros((1, 1, 1, 1, 1)), CFG, tiling)
