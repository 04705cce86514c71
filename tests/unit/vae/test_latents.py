"""Normalisation and the posterior."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from sanawm_jax.vae import latents as latents_lib


def test_denormalise_inverts_normalise(rng):
    x = jnp.asarray(rng.standard_normal((2, 3, 4, 4, 5)), jnp.float32)
    mean = jnp.asarray(rng.standard_normal(5), jnp.float32)
    std = jnp.asarray(rng.uniform(0.5, 2, 5), jnp.float32)
    z = latents_lib.normalise(x, mean, std, 0.7)
    np.testing.assert_allclose(z[..., 2], (x[..., 2] - mean[2]) * 0.7 / std[2], rtol=1e-5)
    np.testing.assert_allclose(latents_lib.denormalise(z, mean, std, 0.7), x, atol=1e-5)
    half = latents_lib.normalise(jnp.asarray(x, jnp.bfloat16), mean, std)
    assert half.dtype == jnp.bfloat16


def test_normalised_data_is_standard(rng):
    x = jnp.asarray(rng.standard_normal((4, 8, 8, 8, 3)) * [1, 5, 0.2] + [3, 0, -1])
    z = latents_lib.normalise(x, x.mean((0, 1, 2, 3)), x.std((0, 1, 2, 3)))
    np.testing.assert_allclose(z.mean((0, 1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(z.std((0, 1, 2, 3)), 1, atol=1e-5)


def test_sampling_has_the_stated_moments(rng):
    shape = (1, 50, 40, 40, 2)
    noise = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    logvar = jnp.full(shape, np.log(0.25))
    z = latents_lib.sample_posterior(jnp.full(shape, 1.5), logvar, noise)
    assert abs(float(z.mean()) - 1.5) < 0.01
    assert abs(float(z.std()) - 0.5) < 0.01


def test_extreme_logvar_stays_finite():
    mean, noise = jnp.zeros((1, 1, 1, 1, 2)), jnp.ones((1, 1, 1, 1, 2))
    logvar = jnp.array([1e4, -1e4]).reshape(mean.shape)
    z = latents_lib.sample_posterior(mean, logvar, noise)
    np.testing.assert_allclose(z.ravel(), np.exp([10.0, -15.0]), rtol=1e-5)
    assert np.isfinite(latents_lib.kl_divergence(mean, logvar)).all()


def test_kl_is_zero_only_at_the_prior(rng):
    zeros = jnp.zeros((1, 2, 3, 3, 4))
    assert float(jnp.abs(latents_lib.kl_divergence(zeros, zeros)).max()) == 0
    other = jnp.asarray(rng.standard_normal(zeros.shape) + 0.1)
    assert float(latents_lib.kl_divergence(other, zeros).min()) > 0
