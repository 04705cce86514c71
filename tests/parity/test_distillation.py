"""The losses and the rollout of distillation against numbers of the published formulas."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.dit.numerics import PRESETS
from sanawm_jax.sampling.stage1 import Conditions
from sanawm_jax.training.objectives.distillation import (
    ScoreLevel,
    distribution_matching,
    flow_loss,
    mask_of_made,
    noised_clip,
    ode_loss,
)
from sanawm_jax.training.objectives.rollout import (
    Student,
    clean_estimate,
    roll_out,
    timesteps_of_frames,
)
from tests.parity.test_golden import WINDOW, arrays, difference, network

STEPS = (1000.0, 967.0, 908.0, 764.0, 0.0)


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    return arrays("distill/losses")


def test_distribution_matching(given: dict[str, Any]) -> None:
    level = ScoreLevel(*map(float, given["dmd_shift_min_max_guidance"]))
    clip, noise = given["dmd_generated"], given["dmd_noise"]
    timestep = level.timestep(given["dmd_raw_timestep"][:, 0])
    timesteps = timesteps_of_frames(timestep, clip.shape[1], given=True)
    assert difference(timesteps, given["dmd_timestep"]) < 1e-6
    noisy = noised_clip(clip, noise, timesteps)
    assert difference(noisy, given["dmd_noisy"]) < 1e-6
    fake, conditional, unconditional = (
        clean_estimate(noisy, given[f"dmd_{name}"], timesteps)
        for name in ("fake_flow", "real_flow_cond", "real_flow_uncond")
    )
    real = level.guided(conditional, unconditional)
    assert difference(fake, given["dmd_pred_fake"]) < 1e-5
    assert difference(real, given["dmd_pred_real"]) < 1e-5
    found = distribution_matching(clip, fake, real, mask_of_made(timesteps))
    assert difference(found.normaliser, given["dmd_normalizer"]) < 1e-5
    assert difference(found.direction, given["dmd_gradient_abs_mean"]) < 1e-5
    assert difference(found.loss, given["generator_loss"]) < 1e-5
    assert difference(found.cotangent, given["generator_grad"]) < 1e-5
    assert difference(jnp.linalg.norm(found.cotangent), given["generator_grad_norm"]) < 1e-5


def test_critic(given: dict[str, Any]) -> None:
    mask = mask_of_made(given["dmd_timestep"])
    clip, noise = given["dmd_generated"], given["dmd_noise"]
    loss, gradient = jax.value_and_grad(flow_loss)(given["critic_flow"], clip, noise, mask)
    assert difference(loss, given["critic_loss"]) < 1e-5
    assert difference(gradient, given["critic_grad"]) < 1e-5
    assert difference(jnp.linalg.norm(gradient), given["critic_grad_norm"]) < 1e-5


def test_ode_regression(given: dict[str, Any]) -> None:
    clean = np.moveaxis(given["ode_trajectory"][:, -1], 2, -1)
    args = given["ode_noisy"], given["ode_timestep"], clean
    loss, gradient = jax.value_and_grad(ode_loss)(given["ode_flow"], *args)
    assert difference(loss, given["ode_loss"]) < 1e-5
    assert difference(gradient, given["ode_grad"]) < 1e-5
    found = clean_estimate(given["ode_noisy"], given["ode_flow"], given["ode_timestep"])
    assert difference(found, given["ode_prediction"]) < 1e-5


def test_a_whole_rollout() -> None:
    inputs, expected = arrays("streaming_june/inputs"), arrays("streaming_july/outputs")
    graphdef, params = network(PRESETS["trainer"])
    student = Student(graphdef, WINDOW, jnp.float32)
    conditions = Conditions(inputs["text"], inputs["mask"], inputs["camera"], inputs["plucker"])
    again = np.moveaxis(expected["rollout_noises"], 2, -1)  # 6 axes: still channels first
    noises = np.stack([inputs["noise"], *again])
    made = jax.jit(roll_out, static_argnums=(0, 6))(
        student,
        params,
        inputs["latents_clean"][:, :1],
        conditions,
        noises,
        jnp.int32(expected["rollout_exit_step"]),
        STEPS,
    ).made
    assert difference(made, expected["rollout_generated"]) < 1e-5
