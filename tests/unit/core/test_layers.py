"""Matrix products of operands with different dtypes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sanawm_jax.core.layers import Linear, wide_product


def test_a_float32_row_reads_a_bfloat16_kernel_exactly():
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2, 3, 256))
    kernel = jax.random.normal(keys[1], (256, 64), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    found = jax.jit(wide_product)(x, kernel)
    assert found.dtype == jnp.float32
    # one bfloat16 number in place of three would be off by 2e-3
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6 * np.abs(exact).max())


def test_linear_takes_it_for_weights_that_are_narrower_alone():
    linear = Linear(16, 8, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 16))
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), linear)
    text = str(jax.make_jaxpr(lambda layer, x: layer(x))(rounded, x))
    assert "reduce_precision" in text and "f32[16,8]" not in text
    assert "reduce_precision" not in str(jax.make_jaxpr(lambda layer, x: layer(x))(linear, x))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), rounded)
    np.testing.assert_allclose(rounded(x), wide(x), rtol=1e-6, atol=1e-6)
