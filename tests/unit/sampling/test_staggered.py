"""The sampler whose chunks start one after the other, against samplers that are known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.core.params import apply
from sanawm_jax.dit.state import Window
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.rollout import denoise_chunk
from sanawm_jax.sampling.schedule import Schedule
from sanawm_jax.sampling.stage1 import Conditions, denoise_batch
from sanawm_jax.sampling.staggered import denoise_staggered, plan, staggered_step
from tests.tiny_dit import GRAPHDEF, random_inputs, random_params

FRAMES, STARTS = 11, (0, 3, 5, 7, 9)
SIGMAS = Schedule(shift=3.0).sigmas(4)
PARAMS = random_params()


def conditions_of(inputs: dict[str, Any]) -> Conditions:
    return Conditions(*(inputs[name] for name in ("text", "text_mask", "camera", "plucker")))


@pytest.fixture
def inputs() -> dict[str, Any]:
    return random_inputs(batch=1, frames=FRAMES)


def run(inputs: dict[str, Any], interval: float | None, **options: Any) -> np.ndarray:
    noise = inputs["latents"]
    how: dict[str, Any] = dict(guidance=1.0, dtype=jnp.float32, progress=False, interval=interval)
    found = denoise_staggered(
        *(GRAPHDEF, PARAMS, noise, noise[:, :1] * 0.5, conditions_of(inputs), SIGMAS, STARTS),
        **{**how, **options},
    )
    return np.asarray(found)


def relative(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_one_after_the_other_is_a_stream(inputs: dict[str, Any]) -> None:
    """A chunk that starts when the one before has ended sees the clean past, as a stream does."""
    window, state, at, parts = Window(3, 2, 5), None, 0, []
    conditions = conditions_of(inputs)
    for end in (*STARTS[1:], FRAMES):
        text, mask, *cameras = conditions
        latents, state = denoise_chunk(
            GRAPHDEF,
            PARAMS,
            state,
            inputs["latents"][:, at:end],
            inputs["latents"][:, :1] * 0.5 if at == 0 else None,
            Conditions(text, mask, *(a[:, at:end] for a in cameras)),
            jnp.asarray(SIGMAS),
            jnp.float32(1.0),
            window=window,
            dtype=jnp.float32,
        )
        parts.append(latents)
        at = end
    assert relative(run(inputs, 1.0), np.concatenate(parts, 1)) < 1e-5


def test_all_at_once_is_the_plain_sampler(inputs: dict[str, Any]) -> None:
    noise = inputs["latents"]
    expected = denoise_batch(
        *(GRAPHDEF, PARAMS, noise, noise[:, :1] * 0.5, conditions_of(inputs)),
        *map(jnp.asarray, (SIGMAS[:-1], SIGMAS[1:])),
        *(jnp.float32(1.0), jnp.float32, STARTS),
    )
    assert relative(run(inputs, 1e-6), expected) < 1e-5
    assert relative(run(inputs, None), expected) > 1e-3


def test_guidance(inputs: dict[str, Any]) -> None:
    doubled = {**inputs, **{k: jnp.concatenate([inputs[k]] * 2) for k in ("text", "text_mask")}}
    assert relative(run(doubled, None, guidance=3.0), run(inputs, None)) < 1e-5
    doubled["text"] = doubled["text"].at[0].multiply(0.5)
    assert relative(run(doubled, None, guidance=3.0), run(inputs, None)) > 1e-4


def test_the_plan() -> None:
    steps = plan(121, (0, *range(4, 121, 3)), Schedule(shift=8.0).sigmas(60))
    assert len(steps) == 58 + 60  # the last of 40 chunks starts at int(1.5 * 39)
    assert [step.frames for step in steps[:5]] == [4, 7, 7, 10, 13]
    last = steps[-1]
    assert last.frames == 121 and not last.sigmas[:118].any() and (last.nexts == 0).all()
    for chunk in (slice(0, 4), slice(118, 121)):
        moves = sum(step.nexts[chunk] - step.sigmas[chunk] for step in steps)
        np.testing.assert_allclose(moves, -1.0, rtol=1e-6)
    with pytest.raises(InputError, match="positive"):
        plan(4, (0, 2), SIGMAS, 0.0)


def test_hidden_frames_change_nothing(inputs: dict[str, Any]) -> None:
    """A program of more frames than have started gives what one of exactly those frames gives."""
    sigmas = np.where(np.arange(FRAMES) < 5, 0.7, 0).astype(np.float32)
    results = [
        staggered_step(
            GRAPHDEF,
            PARAMS,
            jnp.array(inputs["latents"]),
            conditions_of(inputs),
            sigmas,
            sigmas * 0.5,
            np.int32(5),
            np.float32(1.0),
            starts=STARTS,
            frames=frames,
            dtype=jnp.float32,
        )
        for frames in (5, 9, FRAMES)
    ]
    for found in results[1:]:
        assert relative(found, results[0]) < 1e-6
    velocity = jax.jit(lambda p, **i: apply(GRAPHDEF, p, **i, chunk_starts=(0, 3)))(
        PARAMS,
        **{k: a[:, :5] if k in ("latents", "camera", "plucker") else a for k, a in inputs.items()}
        | {"timesteps": jnp.asarray(np.where(np.arange(5) > 0, 700.0, 0))[None]},
    )
    move = jnp.where(jnp.arange(5) > 0, -0.35, 0.0)[:, None, None, None] * velocity
    assert relative(results[0][:, :5], inputs["latents"][:, :5] + move) < 1e-5
