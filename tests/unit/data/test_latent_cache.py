"""The latent cache: contents, resuming, and the encoding of a first frame alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.camera.rays import camera_conditions
from sanawm_jax.core.params import init
from sanawm_jax.data import latent_cache
from sanawm_jax.data.latent_cache import build_cache, clip_encoder
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.recipes.clips import crop_clips, pack_clips
from sanawm_jax.vae.config import SMALL_WORLD_VAE
from sanawm_jax.vae.model import VideoVAE

CONFIG = dataclasses.replace(
    SMALL_WORLD_VAE,
    latent_channels=8,
    block_out_channels=(16, 16, 16),
    decoder_block_out_channels=(16, 16, 16),
    decoder_layers_per_block=(1, 1, 1, 1),
)


class _Clips(list):
    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def params():
    return init(VideoVAE, CONFIG, jax.random.key(0))


@pytest.fixture
def clips(rng):
    def clip(i):
        c2w = np.tile(np.eye(4, dtype=np.float32), (9, 1, 1))
        c2w[:, 2, 3] = 0.1 * i * np.arange(9)
        return {
            "video": rng.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8),
            "c2w": c2w,
            "intrinsics": np.array([20, 20, 16, 16], np.float32),
            "caption": "a red box" if i % 2 else "a blue ball",
        }

    return _Clips(clip(i) for i in range(5))


def _encode_texts(texts):
    length = jnp.array([len(t.split()) + 1 for t in texts])
    mask = jnp.arange(20) < length[:, None]
    return mask[..., None] * length[:, None, None] * jnp.ones((1, 1, 4)), mask


def _build(folder, clips, params, fingerprint="x"):
    return build_cache(
        folder, clips, CONFIG, params, _encode_texts, fingerprint=fingerprint, batch_size=2
    )


def test_contents(tmp_path, clips, params):
    cache = _build(tmp_path, clips, params)
    assert cache["latents"].shape == (5, 2, 4, 4, 8)
    for i, clip in enumerate(clips):
        encoded = clip_encoder(CONFIG)(params, clip["video"][None])[0]
        np.testing.assert_allclose(cache["latents"][i], encoded, atol=5e-3)
        camera, rays = camera_conditions(
            clip["c2w"], np.tile(clip["intrinsics"], (9, 1)), 32, 32, 8, 8
        )
        np.testing.assert_array_equal(cache["camera"][i], camera)
        np.testing.assert_allclose(cache["plucker"][i], rays, atol=1e-3)
    # sorted captions, then the null caption; 4 used positions round up to 8
    np.testing.assert_array_equal(cache["caption"], [0, 1, 0, 1, 0])
    np.testing.assert_array_equal(cache["text_mask"].sum(1), [4, 4, 1])
    assert cache["text"].shape == (3, 8, 4)


def test_resumes_after_an_interruption(tmp_path, clips, params, monkeypatch):
    whole = _build(tmp_path / "whole", clips, params)
    monkeypatch.setattr(latent_cache, "SAVE_EVERY", 1)
    write, calls = latent_cache._write_progress, []

    def interrupt(folder, progress):
        write(folder, progress)
        calls.append(progress["done"])
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(latent_cache, "_write_progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _build(tmp_path / "parts", clips, params)
    parts = _build(tmp_path / "parts", clips, params)
    assert calls[:2] == [2, 4]
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[name], array)

    clips.reads = 0
    _build(tmp_path / "parts", clips, params)
    assert clips.reads == 0
    _build(tmp_path / "parts", clips, params, fingerprint="other weights")
    assert clips.reads > 0


def test_lone_first_frame_equals_the_clips(clips, params):
    encode = clip_encoder(CONFIG)
    video = clips[0]["video"][None]
    np.testing.assert_allclose(
        encode(params, video[:, :1])[:, 0], encode(params, video)[:, 0], atol=1e-5
    )


def test_refuses_an_encoder_that_looks_ahead(tmp_path, clips, params):
    config = dataclasses.replace(CONFIG, encoder_causal=False)
    with pytest.raises(InputError, match="use a causal encoder"):
        build_cache(tmp_path, clips, config, params, _encode_texts, fingerprint="x", batch_size=2)


def test_packed_clips_crop_to_their_pixels(clips):
    packed = jnp.asarray(pack_clips(clips))
    assert packed.dtype == jnp.uint32
    crop = crop_clips(packed, jnp.array([3, 1]), jnp.array([2, 4]), 5)
    np.testing.assert_array_equal(crop[0], clips[3]["video"][2:7])
    np.testing.assert_array_equal(crop[1], clips[1]["video"][4:9])
