"""One teacher-forced pass computes what a stream computes in one call per frame."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.core.params import apply
from sanawm_jax.dit.state import Window
from sanawm_jax.runtime.errors import InputError
from tests.tiny_dit import GRAPHDEF, random_inputs, random_params
from tests.unit.dit.test_stream import PARAMS, PER_FRAME, chunk, cut, relative

FRAMES = 5
HISTORY = random_inputs(2, FRAMES)
NOISY = {
    **HISTORY,
    "latents": jax.random.normal(jax.random.key(9), HISTORY["latents"].shape),
    "timesteps": HISTORY["timesteps"] * 0 + 700.0,
}


def forced(params: Any, noisy: dict[str, Any], cached: int | None = None) -> jax.Array:
    both = {
        name: jnp.concatenate([HISTORY[name], noisy[name]], 1) if name in PER_FRAME else noisy[name]
        for name in noisy
    }
    starts = tuple(range(2 * FRAMES))
    return apply(
        GRAPHDEF, params, **both, chunk_starts=starts, cached_chunks=cached, teacher_forced=True
    )


@pytest.mark.parametrize("cached", [None, 2])
def test_it_equals_a_stream(cached):
    found = jax.jit(forced, static_argnames="cached")(PARAMS, NOISY, cached)
    window = Window(1, 1, cached or FRAMES)
    state, history, noisy = None, [], []
    for i in range(FRAMES):
        noisy.append(chunk(PARAMS, cut(NOISY, i, i + 1), window, state)[0])
        velocity, state = chunk(PARAMS, cut(HISTORY, i, i + 1), window, state)
        history.append(velocity)
    expected = jnp.concatenate([*history, *noisy], 1)
    assert relative(found, expected) < 1e-5


def test_a_noisy_frame_is_seen_by_no_other_frame():
    def frames(latents: jax.Array) -> jax.Array:
        return forced(random_params(), {**NOISY, "latents": latents})

    moved = NOISY["latents"].at[:, 2].add(1.0)
    change = jnp.abs(frames(moved) - frames(NOISY["latents"])).max((0, 2, 3, 4))
    assert np.flatnonzero(np.asarray(change) > 1e-6).tolist() == [FRAMES + 2]


def test_chunks_of_several_frames_are_refused():
    with pytest.raises(InputError, match="chunks of one frame"):
        apply(GRAPHDEF, PARAMS, **NOISY, chunk_starts=(0, 2), teacher_forced=True)
