"""Rollouts of a student, and their gradients chunk by chunk."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sanawm_jax.core.params import Params, build, leaves
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.model import DiT
from sanawm_jax.dit.state import Window
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.schedule import add_noise, check_steps
from sanawm_jax.sampling.stage1 import Conditions
from sanawm_jax.training.objectives.rollout import (
    Student,
    by_chunk,
    check_frames,
    follow,
    roll_out,
    timesteps_of_frames,
    whole_clip,
)
from sanawm_jax.training.recipes.distill import random_network

MODEL = DiTConfig(
    in_channels=3,
    num_layers=2,
    hidden_size=16,
    num_attention_heads=1,
    linear_head_dim=16,
    caption_channels=8,
    softmax_every_n=2,
    ffn_type="mlp",
    mlp_ratio=1.0,
)
WINDOW = Window(2, 1, 1)
STEPS = (1000.0, 800.0, 500.0, 0.0)


@functools.cache
def case(frames: int) -> dict[str, Any]:
    """Returns random weights and inputs of two clips."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    given = {
        "params": random_network(MODEL, 0),
        "image": normal(2, 1, 2, 2, 3),
        # without cameras, which double the time to compile; golden numbers cover them
        "conditions": Conditions(normal(2, 4, 8), np.ones((2, 4), bool), None, None),
        "noises": normal(3, 2, frames, 2, 2, 3),
        "cotangent": normal(2, frames, 2, 2, 3),
    }
    return jax.tree.map(jnp.asarray, given)


def student(window: Window = WINDOW) -> Student:
    return Student(build(DiT, MODEL)[0], window, jnp.float32)


def plain_rollout(of: Student, params: Params, given: dict[str, Any], exit_level: int) -> jax.Array:
    """A loop over chunks and levels that is written as the method says, to be differentiated."""
    made, state, start = [], None, 0
    frames = given["noises"].shape[2]
    here = given["conditions"]
    while start < frames:
        end = start + (of.window.first if start == 0 else of.window.size)
        noise = given["noises"][:, :, start:end]
        x, clean = noise[0], None
        for level in range(exit_level + 1):
            if start == 0:
                x = jnp.concatenate([given["image"], x[:, 1:]], 1)
            timesteps = timesteps_of_frames(
                jnp.full((2,), STEPS[level]), end - start, given=start == 0
            )
            clean = of.estimate(params, state, x, timesteps, here)
            if level < exit_level:
                x = add_noise(lax.stop_gradient(clean), noise[level + 1], STEPS[level + 1] / 1000)
        made.append(clean)
        state = of.remember(lax.stop_gradient(params), state, lax.stop_gradient(made[-1]), here)
        start = end
    return jnp.concatenate(made, 1)


def test_two_passes_equal_backpropagation() -> None:
    of, given, exit_level = student(), case(4), 1

    @jax.jit
    def two_passes(params: Params) -> tuple[jax.Array, Params]:
        args = given["conditions"], given["noises"], jnp.int32(exit_level), STEPS
        rollout = roll_out(of, params, given["image"], *args)
        conditions, _, level, steps = args
        gradients = follow(of, params, rollout, conditions, level, steps, given["cotangent"])
        return rollout.made, gradients

    @jax.jit
    def backpropagated(params: Params) -> tuple[jax.Array, Params]:
        def loss(params: Params) -> tuple[jax.Array, jax.Array]:
            made = plain_rollout(of, params, given, exit_level)
            return jnp.sum(made * given["cotangent"]), made

        gradients, made = jax.grad(loss, has_aux=True)(params)
        return made, gradients

    made, found = two_passes(given["params"])
    expected_made, expected = backpropagated(given["params"])
    np.testing.assert_allclose(made, expected_made, rtol=1e-5, atol=1e-5)
    for (path, a), (_, b) in zip(leaves(found), leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * max(float(np.linalg.norm(b)), 1e-2), path
    assert all(np.any(np.asarray(a) != 0) for path, a in leaves(found) if "final.kernel" in path)


def planned_bytes(frames: int) -> int:
    """Returns the temporary memory of both passes, by the compiler's plan."""
    of = dataclasses.replace(student(Window(4, 3, 2)), remat="full")
    clip = jax.ShapeDtypeStruct((2, frames, 2, 2, 3), jnp.float32)
    noises = jax.ShapeDtypeStruct((3, *clip.shape), jnp.float32)
    conditions = case(4)["conditions"]

    def both(params: Params, noises: Any, cotangent: Any, level: Any) -> Params:
        rollout = roll_out(of, params, case(4)["image"], conditions, noises, level, STEPS)
        return follow(of, params, rollout, conditions, level, STEPS, cotangent)

    level = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = jax.jit(both).lower(case(4)["params"], noises, clip, level)
    plan = lowered.compile().memory_analysis()
    return plan.temp_size_in_bytes - 4 * (noises.size + 5 * clip.size)


@pytest.mark.slow
def test_the_memory_is_that_of_one_chunk() -> None:
    found = [planned_bytes(frames) for frames in (7, 13, 43)]
    # what is left grows with the clip's own arrays alone, which are small beside one chunk's graph
    assert found[2] < 1.2 * found[0], found


def test_chunks_of_a_clip() -> None:
    clip = {"a": np.arange(2 * 8 * 3).reshape(2, 8, 3)}
    first, later = by_chunk(clip, Window(4, 2, 1))
    assert first["a"].shape == (2, 4, 3) and later["a"].shape == (2, 2, 2, 3)
    np.testing.assert_array_equal(later["a"][1], clip["a"][:, 6:])
    np.testing.assert_array_equal(whole_clip(first, later)["a"], clip["a"])


@pytest.mark.parametrize("steps", [(1000, 500), (1000,), (500, 900, 0), (1200, 0)])
def test_bad_steps(steps: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="must fall from at most 1000 to 0"):
        check_steps(steps)


def test_clips_that_are_no_whole_number_of_chunks() -> None:
    check_frames(10, Window(4, 3, 1))
    with pytest.raises(InputError, match=r"use --config.frames=10"):
        check_frames(12, Window(4, 3, 1))
