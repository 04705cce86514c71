"""The network and its gradient with Pallas kernels, interpreted, equal those with XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import choice
from sanawm_jax.core.params import apply
from tests.tiny_dit import GRAPHDEF, random_inputs, random_params


@pytest.mark.parametrize("kernel", ["ucpe"])
def test_a_kernel_changes_nothing(kernel, monkeypatch):
    inputs = random_inputs(1, 3)
    inputs["frame_mask"] = jnp.array([[1.0, 1.0, 0.0]])
    pick = choice.pick

    def run(impl):
        def loss(params):
            y = apply(GRAPHDEF, params, **inputs)
            return jnp.sum(jnp.sin(y)), y

        monkeypatch.setattr(
            choice, "pick", lambda name, given=None: impl if name == kernel else pick(name, given)
        )
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(random_params())

    wanted, found = run("xla"), run("pallas")
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        assert np.isfinite(a).all() and np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a) + 1e-6
