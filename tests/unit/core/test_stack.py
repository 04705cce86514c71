"""Stacked and separate layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sanawm_jax.core.stack import over_layers
from sanawm_jax.core.streaming import separate_layers


def test_separate_layers_give_what_a_scan_gives() -> None:
    rng = np.random.default_rng(0)
    stack = rng.standard_normal((5, 4, 4)).astype(np.float32)
    biases = rng.standard_normal((5, 4)).astype(np.float32)
    separate = [separate_layers(f"blocks.{name}", a) for name, a in (("w", stack), ("b", biases))]
    assert all(isinstance(leaf, tuple) and len(leaf) == 5 for leaf in separate)
    traced = 0

    def layer(x: jax.Array, parts: list[Any]) -> tuple[jax.Array, dict[str, Any]]:
        nonlocal traced
        traced += 1
        weight, bias, nothing = parts
        assert nothing is None
        x = jnp.tanh(x @ weight + bias)
        return x, {"sum": x.sum(), "none": None}

    x = jnp.ones((2, 4))
    run = jax.jit(lambda x, leaves: over_layers(layer, x, [*leaves, None]))
    expected, sums = run(x, [jnp.asarray(stack), jnp.asarray(biases)])
    traced = 0
    got, separate_sums = run(x, separate)
    assert traced == 1  # not once a layer
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert isinstance(separate_sums["sum"], tuple)
    np.testing.assert_allclose(jnp.stack(separate_sums["sum"]), sums["sum"], atol=1e-6)


def test_what_is_no_layer_stays_whole() -> None:
    """Nor are layers with two stacked axes, which nested scans run over, taken apart."""
    for path in ("embed.kernel", "segments.0.runs.0.kernel"):
        assert isinstance(separate_layers(path, np.ones((2, 3))), jax.Array)
