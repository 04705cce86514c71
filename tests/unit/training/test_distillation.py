"""Parts of the recipes of distillation that need no network, and the published values."""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import distill
from sanawm_jax.dit.state import Window
from sanawm_jax.training.objectives.distillation import ScoreLevel, pseudo_huber
from sanawm_jax.training.objectives.rollout import timesteps_of_chunks
from sanawm_jax.training.recipes.ode import states_of_chunks
from sanawm_jax.training.recipes.to_truth import ToTruth, share_of_own


def test_timesteps_of_chunks() -> None:
    drawn = jnp.array([[900.0, 500.0, 100.0], [1.0, 2.0, 3.0]])
    found = timesteps_of_chunks(drawn, 6, Window(2, 2, 1))
    np.testing.assert_array_equal(found, [[0, 900, 500, 500, 100, 100], [0, 1, 2, 2, 3, 3]])


def test_levels_of_the_scores_are_shifted_and_bounded() -> None:
    level = ScoreLevel()
    drawn = np.asarray(level.draw(jax.random.key(0), 4000))
    assert drawn.min() == 20 and drawn.max() == 980
    # the median of the uniform timestep is 500, which the shift of 10 moves to 909
    assert np.median(drawn) == pytest.approx(1000 * 10 * 0.5 / 5.5, abs=8)
    assert float(level.guided(jnp.float32(2.0), jnp.float32(1.0))) == 5.0


def test_pseudo_huber() -> None:
    error = jnp.array([-3.0, 0.0, 1e-3])
    np.testing.assert_allclose(pseudo_huber(error, 0), error**2)
    np.testing.assert_allclose(pseudo_huber(error, 0.03)[0], 2.97, atol=1e-3)
    assert pseudo_huber(error, 0.03)[1] == 0


def test_the_share_of_own_histories_grows() -> None:
    config = distill.get_config("self_forcing_to_truth")
    config.steps = 100
    found = [float(share_of_own(config, jnp.int32(step))) for step in (0, 25, 50, 99)]
    np.testing.assert_allclose(found, [0.25, 0.5, 0.75, 0.75])


def test_noise_of_a_history_spares_the_given_frame() -> None:
    config = distill.get_config("self_forcing_to_truth")
    run: Any = types.SimpleNamespace(config=config)
    history = jnp.zeros((64, 3, 4, 4, 2))
    noisy = np.asarray(ToTruth(run, run, run).noised_history(history, jax.random.key(0)))
    assert not noisy[:, 0].any()
    spread = noisy[:, 1:].std((1, 2, 3, 4))
    assert 0 < spread.min() < 0.02 and 0.08 < spread.max() < 0.12


def test_states_of_chunks_and_their_timesteps_belong_together() -> None:
    steps = (1000.0, 500.0, 0.0)
    run: Any = types.SimpleNamespace(starts=(0, 2, 4), steps=steps)
    trajectory = jnp.broadcast_to(jnp.array(steps)[:, None, None, None, None], (64, 3, 6, 2, 2, 1))
    states, timesteps = states_of_chunks(jax.random.key(0), trajectory, run)
    np.testing.assert_array_equal(states[:, :, 0, 0, 0], timesteps)
    assert not timesteps[:, 0].any()
    np.testing.assert_array_equal(timesteps[:, 2::2], timesteps[:, 3::2])
    # the levels of the chunks are independent, and all occur
    assert {tuple(row) for row in np.asarray(timesteps)[:, 1::2]} > {(0, 500, 1000), (1000, 0, 500)}


def test_published_values() -> None:
    ode, t43, t121 = (
        distill.get_config(name) for name in ("ode_t43", "self_forcing_t43", "self_forcing_t121")
    )
    for config in (ode, t43, t121):
        assert tuple(config.denoising_step_list) == (1000, 967, 908, 764, 0)
        assert config.window.size == 3 and config.ema_decay == 0
        assert config.optimizer.schedule == "constant" and config.optimizer.warmup_steps == 0
    rule = ode.optimizer
    assert (rule.learning_rate, rule.betas, rule.weight_decay) == (2e-5, (0.9, 0.999), 0.01)
    assert (rule.clip_norm, ode.steps, ode.batch_size, ode.seed) == (1.0, 3000, 8, 42)
    assert (t43.frames, t43.window.cached, t43.window.sink, t43.steps) == (43, -1, False, 700)
    assert (t121.frames, t121.window.cached, t121.window.sink, t121.steps) == (121, 2, True, 3000)
    for config in (t43, t121):
        student, critic = config.optimizer, config.critic.optimizer
        assert (student.learning_rate, critic.learning_rate) == (1e-5, 2e-6)
        for rule in (student, critic):
            assert (rule.betas, rule.weight_decay, rule.clip_norm) == ((0.0, 0.999), 0.0, 10.0)
        score = config.score
        assert (score.shift, score.lowest, score.highest, score.guidance) == (10, 20, 980, 3)
        assert config.student_every == 5 and config.batch_size == 2 and config.renoise
    with pytest.raises(ValueError, match="no stage 'dmd'"):
        distill.get_config("dmd")
