"""Causality, conditioning and initialisation of a tiny autoencoder."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.core import params as params_lib
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.decoder import draw_noise
from sanawm_jax.vae.model import VideoVAE

TINY = VAEConfig(
    latent_channels=4,
    block_out_channels=(8,),
    down_block_types=("LTX2VideoDownBlock3D",),
    layers_per_block=(1, 0),
    spatio_temporal_scaling=True,
    downsample_type=("spatiotemporal",),
    decoder_block_out_channels=(8,),
    decoder_layers_per_block=(1, 1),
    decoder_spatio_temporal_scaling=True,
    decoder_inject_noise=False,
    upsample_type=("spatiotemporal",),
    upsample_residual=True,
    upsample_factor=(1,),
)
KEY = jax.random.key(0, impl="rbg")  # compiles far faster than the default on a CPU
CONDITIONED = dataclasses.replace(TINY, decoder_inject_noise=True, timestep_conditioning=True)


def vae(cfg, method, **how):
    graphdef, _ = params_lib.build(VideoVAE, cfg)
    params = params_lib.init(VideoVAE, cfg, KEY)
    return params, jax.jit(functools.partial(params_lib.apply, graphdef, method=method, **how))


@pytest.mark.parametrize("causal", [True, False])
def test_encoder_sees_the_future_only_if_not_causal(causal, rng):
    params, encode = vae(dataclasses.replace(TINY, encoder_causal=causal), "encode")
    video = rng.standard_normal((1, 9, 16, 16, 3)).astype(np.float32)
    changed = video.copy()
    changed[:, 5:] += 1  # latent frame 2 covers pixel frames 3 and 4
    before, after = encode(params, video)[0], encode(params, changed)[0]
    same = np.array_equal(before[:, :3], after[:, :3])
    assert same is causal
    assert not np.allclose(before[:, 3:], after[:, 3:])


def test_causal_prefix_decodes_alone(rng):
    params, decode = vae(TINY, "decode")
    latents = rng.standard_normal((1, 4, 3, 3, 4)).astype(np.float32)
    whole, prefix = decode(params, latents), decode(params, latents[:, :2])
    np.testing.assert_allclose(whole[:, :3], prefix, atol=1e-5)


def test_initial_scale_is_healthy(rng):
    params, encode = vae(TINY, "encode")
    video = rng.uniform(-1, 1, (1, 5, 32, 32, 3)).astype(np.float32)
    mean, logvar = encode(params, video)
    assert 0.05 < float(mean.std()) < 5
    assert mean.shape == logvar.shape
    _, decode = vae(TINY, "decode")
    assert 0.05 < float(decode(params, mean).std()) < 5


def test_timesteps_and_noise_matter_and_are_required(rng):
    params, decode = vae(CONDITIONED, "decode")
    latents = rng.standard_normal((2, 2, 3, 4, 4)).astype(np.float32)
    noise = draw_noise(KEY, CONDITIONED, 3, 4)
    assert [leaf.shape for leaf in jax.tree.leaves(noise)] == [(3, 4)] * 2 + [(6, 8)] * 2
    # noise enters through scales that start at zero
    for block in (params["decoder"]["mid_block"], params["decoder"]["up_blocks"]["0"]):
        for name in ("per_channel_scale1", "per_channel_scale2"):
            block["resnets"]["0"][name] = jnp.ones_like(block["resnets"]["0"][name])
    y = decode(params, latents, jnp.array([0.1, 0.1]), noise=noise)
    later = decode(params, latents, jnp.array([0.1, 0.3]), noise=noise)
    np.testing.assert_allclose(y[0], later[0], atol=1e-5)
    assert not np.allclose(y[1], later[1], atol=1e-3)
    other = draw_noise(jax.random.key(2, impl="rbg"), CONDITIONED, 3, 4)
    assert not np.allclose(y, decode(params, latents, jnp.array([0.1, 0.1]), noise=other))
    with pytest.raises(InputError, match="timestep"):
        decode(params, latents, noise=noise)
    with pytest.raises(InputError, match="draw_noise"):
        decode(params, latents, jnp.array([0.1, 0.1]))


def test_statistics_take_no_gradient(rng):
    graphdef, _ = params_lib.build(VideoVAE, TINY)
    params = params_lib.init(VideoVAE, TINY, KEY)
    z = jnp.asarray(rng.standard_normal((1, 1, 2, 2, 4)), jnp.float32)

    def total(params):
        return params_lib.apply(graphdef, params, z, method="normalise").sum()

    grads = jax.grad(total)(params)
    assert not grads["latents_mean"].any() and not grads["latents_std"].any()
