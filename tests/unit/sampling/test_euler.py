"""One Euler step, guidance, and the noise level after a step."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.sampling.schedule import (
    Schedule,
    euler_step,
    frame_timesteps,
    guide,
    next_sigmas,
)

FRAMES, SHAPE = 3, (2, 3, 2, 2, 4)
GIVEN = jnp.array([True, False, False])


def test_exact_velocity_ends_at_the_data(rng: np.random.Generator) -> None:
    """x = (1 - sigma) clean + sigma noise is a straight line, so any steps end at clean."""
    clean, noise = (rng.normal(size=SHAPE).astype(np.float32) for _ in range(2))
    x = jnp.asarray(noise).at[:, 0].set(clean[:, 0])
    sigmas = Schedule(shift=3.0).sigmas(5)
    for sigma, after in itertools.pairwise(sigmas):
        x = euler_step(x, jnp.asarray(noise - clean), sigma, after, GIVEN)
        np.testing.assert_array_equal(x[:, 0], clean[:, 0])  # given, so it never moves
        expected = (1 - after) * clean + after * noise
        np.testing.assert_allclose(x[:, 1:], expected[:, 1:], atol=1e-5)
    np.testing.assert_allclose(x, clean, atol=1e-5)


def test_latents_stay_float32() -> None:
    x = jnp.full(SHAPE, 1.0 + 2**-20)
    moved = euler_step(x, jnp.ones(SHAPE, jnp.bfloat16), jnp.float32(0.5), jnp.float32(0.5), GIVEN)
    assert moved.dtype == jnp.float32
    np.testing.assert_array_equal(moved, x)


def test_given_frames_have_no_noise() -> None:
    timesteps = frame_timesteps(jnp.float32(0.75), GIVEN, 2)
    np.testing.assert_array_equal(timesteps, [[0.0, 750.0, 750.0]] * 2)


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 1.0), (1.0, 3.0), (4.0, 9.0)])
def test_guidance_starts_from_the_unconditional_prediction(scale: float, expected: float) -> None:
    velocity = jnp.stack([jnp.full(SHAPE[1:], 1.0), jnp.full(SHAPE[1:], 3.0)])  # conditional last
    guided = guide(velocity.astype(jnp.bfloat16), jnp.float32(scale))
    assert guided.shape == (1, *SHAPE[1:]) and guided.dtype == jnp.float32
    np.testing.assert_array_equal(guided, np.full(guided.shape, expected))


def test_next_levels_are_the_next_lower_ones() -> None:
    """As in the reference, the next level is the next smaller one, so equal levels are skipped."""
    sigmas = np.array([1.0, 0.999, 0.5, 0.5, 0.1, 0.0], np.float32)
    np.testing.assert_array_equal(
        next_sigmas(sigmas), np.array([0.999, 0.5, 0.1, 0.1, 0.0], np.float32)
    )
