"""The flow objective against its formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.objectives.flow import (
    drop_captions,
    forced_example,
    frame_weights,
    level_weights,
    noise_levels,
    noised_example,
    velocity_loss,
)


def test_noise_levels():
    sigma, timestep = noise_levels(1.0)
    np.testing.assert_allclose(sigma, np.arange(1000) / 1000, rtol=1e-6)
    np.testing.assert_array_equal(timestep, np.arange(1000))  # no whole number is floored down
    sigma, timestep = noise_levels(3.0)
    assert sigma[0] == timestep[0] == 0
    assert sigma[500] == pytest.approx(0.75) and timestep[500] == 750
    assert np.all(timestep == np.floor(timestep)) and np.all(np.diff(sigma) > 0)


@pytest.mark.parametrize("image_prob", [0.0, 1.0])
def test_example(image_prob):
    clean = jax.random.normal(jax.random.key(1), (6, 3, 2, 2, 4))
    e = noised_example(jax.random.key(2), clean, flow_shift=3.0, image_prob=image_prob)
    noise = e.target + clean
    # one level a sample, so any frame but the first tells it
    sigma = np.asarray((e.noisy - clean)[:, 1:] / e.target[:, 1:])
    level = np.median(sigma.reshape(6, -1), axis=1)
    np.testing.assert_allclose(sigma, level[:, None, None, None, None] * np.ones_like(sigma), 1e-3)
    assert len(np.unique(level.round(4))) > 3
    assert np.all(np.abs(e.timesteps[:, 1:] - 1000 * level[:, None]) < 1.01)
    np.testing.assert_allclose(
        e.noisy[:, 2],
        (1 - level[:, None, None, None]) * clean[:, 2] + level[:, None, None, None] * noise[:, 2],
        atol=1e-4,
    )
    if image_prob:
        np.testing.assert_array_equal(e.noisy[:, 0], clean[:, 0])
        assert not np.any(e.timesteps[:, 0]) and not np.any(e.mask[:, 0])
    else:
        np.testing.assert_array_equal(e.timesteps[:, 0], e.timesteps[:, 1])
        assert np.all(e.mask[:, 0] == 1)
    assert np.all(e.mask[:, 1:] == 1)


def test_image_condition_is_drawn_for_each_sample():
    e = noised_example(
        jax.random.key(0), jnp.zeros((2000, 2, 1, 1, 1)), flow_shift=3.0, image_prob=0.9
    )
    assert float(jnp.mean(e.mask[:, 0])) == pytest.approx(0.1, abs=0.03)


def test_chunks_have_steps_of_their_own():
    clean = jax.random.normal(jax.random.key(1), (64, 7, 1, 1, 8))
    e = noised_example(
        jax.random.key(0),
        clean,
        flow_shift=9.95,
        image_prob=0.5,
        chunk_starts=(0, 4),
        chunk_mixture={"incremental": 1.0},
    )
    sigma = np.asarray((e.noisy - clean) / e.target).mean((2, 3, 4))
    # The timestep for the network is rounded down to a whole number, and the noise level is not.
    np.testing.assert_array_equal(e.timesteps, np.floor(e.timesteps))
    assert np.all((1000 * sigma - e.timesteps > -0.01) & (1000 * sigma - e.timesteps < 1.01))
    given = np.asarray(e.mask[:, 0]) == 0
    assert 15 < given.sum() < 49 and not np.any(e.timesteps[given, 0])
    # the image is one frame: the others of its chunk keep their step
    assert np.all(e.timesteps[:, 1] == e.timesteps[:, 3]) and np.any(e.timesteps[given, 1] > 0)
    assert np.all(e.timesteps[:, 4] >= e.timesteps[:, 3]) and np.all(e.mask[:, 1:] == 1)
    assert np.any(e.timesteps[:, 4] > e.timesteps[:, 3])


def test_captions_are_dropped_whole():
    text, mask = jnp.ones((1000, 4, 3)), jnp.ones((1000, 4), bool)
    null, null_mask = jnp.full((4, 3), -1.0), jnp.array([True, False, False, False])
    out, out_mask = drop_captions(jax.random.key(0), text, mask, null, null_mask, 0.1)
    dropped = np.asarray(out[:, 0, 0] == -1)
    assert dropped.mean() == pytest.approx(0.1, abs=0.03)
    np.testing.assert_array_equal(out[dropped], np.broadcast_to(null, (dropped.sum(), 4, 3)))
    np.testing.assert_array_equal(np.asarray(out_mask).sum(1), np.where(dropped, 1, 4))


def test_masked_loss_is_a_mean_over_what_is_left():
    target = jnp.zeros((2, 3, 2, 2, 5))
    prediction = target.at[:, 0].set(100.0).at[0, 1].set(2.0)
    mask = jnp.array([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    weights = frame_weights(mask)
    assert float(velocity_loss(prediction, target, weights)) == pytest.approx(4.0 / 4)
    # rows that mask different numbers of frames still add up
    weights = frame_weights(jnp.array([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]))
    assert float(velocity_loss(prediction, target, weights)) == pytest.approx(4.0 / 3)
    rows = [velocity_loss(*(a[i : i + 1] for a in (prediction, target, weights))) for i in (0, 1)]
    assert float(sum(rows) / 2) == pytest.approx(4.0 / 3)


def test_teacher_forcing_noises_a_history_a_little_and_its_copy_as_training_does():
    latents = jax.random.normal(jax.random.key(0), (400, 3, 2, 2, 4))
    example = forced_example(jax.random.key(1), latents, flow_shift=3.0, history_noise=0.3)
    history, noisy = np.split(np.asarray(example.timesteps), 2, 1)
    assert (history[:, 0] == 0).all() and (noisy[:, 0] == 0).all()  # the given frame
    assert (history[:, 1] == history[:, 2]).all() and history.max() < 300
    assert 0.15 < (history[:, 1] == 0).mean() < 0.35
    assert 500 < noisy[:, 1:].mean() < 850 and (noisy[:, 1] != noisy[:, 2]).mean() > 0.9
    np.testing.assert_array_equal(example.noisy[:, [0, 3]], latents[:, [0, 0]])
    # a history without noise teaches nothing, all other frames count
    mask = np.asarray(example.mask)
    clean_history = (example.noisy == jnp.tile(latents, (1, 2, 1, 1, 1)))[:, 1].all((1, 2, 3))
    np.testing.assert_array_equal(mask[:, 1] == 0, clean_history)
    assert mask[:, 4:].all() and not mask[:, [0, 3]].any()
    clean = np.asarray(latents)[:, [0, 1, 2] * 2]
    level = (np.asarray(example.timesteps) / 1000)[..., None, None, None]
    np.testing.assert_allclose(example.noisy - level * example.target, clean, atol=8e-3)


def test_weights_of_the_levels():
    levels = jnp.array([0.0, 500.0, 1000.0])
    np.testing.assert_array_equal(level_weights(levels, "velocity"), 1.0)
    np.testing.assert_allclose(
        level_weights(levels, "ramp"), [0.0, 8 * 0.25 * 0.55, 0.8], rtol=1e-6
    )
    with pytest.raises(InputError, match="ramp"):
        level_weights(levels, "none")
