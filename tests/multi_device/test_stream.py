"""A stream whose heads a mesh divides (tensor axis) equals one on one device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from sanawm_jax.core.params import apply, build
from sanawm_jax.core.sharding import make_mesh, shardings
from sanawm_jax.dit.model import DiT
from sanawm_jax.dit.state import DiTState, Window
from tests.tiny_dit import CONFIG, random_inputs, random_params

# four heads, so that four devices have one each
GRAPHDEF, ABSTRACT = build(DiT, dataclasses.replace(CONFIG, hidden_size=64, num_attention_heads=4))
WINDOW = Window(3, 2, 2)
PER_FRAME = ("latents", "timesteps", "camera", "plucker")


@functools.partial(jax.jit, donate_argnames=("state",))
def chunk(params: Any, inputs: dict[str, Any], state: DiTState | None) -> Any:
    return apply(GRAPHDEF, params, **inputs, window=WINDOW, state=state, method="stream")


def stream(params: Any) -> list[np.ndarray]:
    inputs, state, out = random_inputs(2, 9), None, []
    for start, end in ((0, 3), (3, 5), (5, 7), (7, 9)):
        cut = {k: a[:, start:end] if k in PER_FRAME else a for k, a in inputs.items()}
        velocity, state = chunk(params, cut, state)
        out.append(np.asarray(velocity))
    return out


@functools.cache
def on_one_device() -> list[np.ndarray]:
    return stream(random_params(0, ABSTRACT))


@pytest.mark.parametrize("devices", [2, 4])
def test_equals_one_device(devices: int) -> None:
    params, expected = random_params(0, ABSTRACT), on_one_device()
    mesh = make_mesh(tensor=devices)
    with jax.set_mesh(mesh):
        found = stream(jax.device_put(params, shardings(params, mesh)))
    for a, b in zip(found, expected, strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
