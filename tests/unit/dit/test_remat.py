"""Rematerialisation changes the memory of the backward pass, but no gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.core.params import Params, apply, leaves
from sanawm_jax.core.stack import REMAT
from tests.tiny_dit import GRAPHDEF, random_inputs, random_params

INPUTS = random_inputs(1, 4)
INPUTS["frame_mask"] = jnp.array([[1.0, 1.0, 1.0, 0.0]])


@functools.cache
def gradients(remat: str) -> tuple[jax.Array, Params]:
    def loss(params: Params) -> jax.Array:
        return jnp.mean(jnp.square(apply(GRAPHDEF, params, **INPUTS, remat=remat)))

    return jax.jit(jax.value_and_grad(loss))(random_params())


@pytest.mark.parametrize("remat", sorted(REMAT.keys() - {"none"}))
def test_gradients_are_those_without(remat: str) -> None:
    (wanted, plain), (found, again) = gradients("none"), gradients(remat)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    for (path, a), (_, b) in zip(leaves(plain), leaves(again), strict=True):
        error = np.linalg.norm(a - b)
        assert error <= 1e-6 * max(float(np.linalg.norm(a)), 1.0), (path, error)
