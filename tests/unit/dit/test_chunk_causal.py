"""The chunk-causal model has the parameters of the bidirectional one, and sees no later chunk."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.core.params import apply
from tests.tiny_dit import GRAPHDEF, random_inputs, random_params

STARTS = (0, 4, 5, 7)  # a chunk of one frame among them
FRAMES = 9
PER_FRAME = ("latents", "timesteps", "camera", "plucker", "frame_mask")


def _run(params, inputs, starts):
    return jax.jit(lambda p, i: apply(GRAPHDEF, p, **i, chunk_starts=starts))(params, inputs)


def test_one_chunk_is_the_bidirectional_model():
    params, inputs = random_params(), random_inputs(1, FRAMES)
    whole = _run(params, inputs, None)
    np.testing.assert_array_equal(_run(params, inputs, (0,)), whole)
    assert np.abs(_run(params, inputs, STARTS) - whole).max() > 1e-2


def test_a_chunk_sees_its_past_and_itself_alone():
    params, inputs = random_params(), random_inputs(1, FRAMES)
    seen = {name: inputs.pop(name) for name in ("latents", "camera", "plucker")}

    @jax.jit
    def influence(chunk):
        def output(seen):
            y = apply(GRAPHDEF, params, **inputs, **seen, chunk_starts=STARTS)
            return jnp.sum(jnp.sin(y[0] * jnp.arange(1, 4)[:, None]) * chunk[:, None, None, None])

        return jax.grad(output)(seen)

    for start, end in zip(STARTS, (*STARTS[1:], FRAMES), strict=True):
        frames = jnp.arange(FRAMES)
        gradients = influence((frames >= start) & (frames < end))
        for name, gradient in gradients.items():
            size = np.abs(gradient[0]).reshape(FRAMES, -1).max(1)
            assert np.all(size[end:] == 0), name
            assert np.all(size[:end] > 0), name


@pytest.mark.parametrize("masked", [False, True])
def test_a_prefix_is_the_run_on_its_frames_alone(masked):
    params, inputs = random_params(), random_inputs(2, FRAMES)
    if masked:
        inputs["frame_mask"] = jnp.ones((2, FRAMES)).at[1, 3:].set(0).at[0, 8:].set(0)
    whole = _run(params, inputs, STARTS)
    for end in (4, 7):
        part = {k: a[:, :end] if k in PER_FRAME else a for k, a in inputs.items()}
        starts = tuple(s for s in STARTS if s < end)
        np.testing.assert_allclose(_run(params, part, starts), whole[:, :end], atol=3e-5)
