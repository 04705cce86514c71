"""Stacked and separate layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.core.stack import over_layers, part, scan_runs
from sanawm_jax.memory.streaming import separate_layers


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


@pytest.mark.parametrize(
    ("remat", "keep", "runs"),
    [("none", False, 1), ("full", False, 2), ("parts", False, 3), ("parts", True, 2)],
)
def test_how_often_a_part_runs(remat: str, keep: bool, runs: int) -> None:
    """The last part of a layer twice at most: nothing is computed from it in the layer."""

    def step(weight: jax.Array, x: jax.Array, carry: None) -> tuple[jax.Array, None]:
        x = part(lambda x: jnp.exp(x * weight), remat, keep=keep)(x)
        return part(lambda x: jnp.tanh(x * weight), remat)(x), carry

    def loss(weights: jax.Array) -> jax.Array:
        return scan_runs([weights], jnp.ones(3), step, remat=remat)[0].sum()

    weights = jnp.linspace(0.1, 0.5, 6).reshape(2, 3)
    text = str(jax.make_jaxpr(jax.grad(loss))(weights))
    assert (text.count("= exp "), text.count("= tanh ")) == (runs, min(runs, 2))


def test_refuses_an_unknown_remat() -> None:
    with pytest.raises(ValueError, match="parts"):
        scan_runs(
            [jnp.ones((1, 1))], jnp.ones(3), lambda weight, x, _: (weight * x, None), remat="some"
        )
