"""Stacked and separate layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.core.lora import LoraConfig, build_adapted
from sanawm_jax.core.params import build, leaves
from sanawm_jax.core.stack import over_layers, part, scan_runs, stacked_axes
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.model import DiT
from sanawm_jax.memory.streaming import separate_layers
from sanawm_jax.refiner.config import ConnectorsConfig, RefinerConfig
from sanawm_jax.refiner.connectors import TextConnectors
from sanawm_jax.refiner.model import Refiner
from sanawm_jax.text.config import GemmaConfig
from sanawm_jax.text.gemma import GemmaTower
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.model import VideoVAE

# of each model: its configuration, and the shape of the stacked axes of its layers; the released
# DiT has 5 x (3 GDN, then 1 softmax)
STACKS: dict[Any, tuple[Any, set[tuple[int, ...]]]] = {
    DiT: (DiTConfig(), {(5, 3), (5, 1)}),
    Refiner: (RefinerConfig(num_layers=48), {(48,)}),
    TextConnectors: (ConnectorsConfig(video_connector_num_layers=2), {(2,)}),
    GemmaTower: (GemmaConfig(num_hidden_layers=26), {(26,)}),
    VideoVAE: (VAEConfig(), set()),
}


@pytest.mark.parametrize("model", STACKS)
def test_stacked_axes_of_every_model(model: Any) -> None:
    """The number of stacked axes does not depend on outer names. Lists of blocks have none."""
    config, stacks = STACKS[model]
    found = set()
    for path, leaf in leaves(build(model, config)[1]):
        axes = stacked_axes(path)
        assert stacked_axes(f"params.{path}") == stacked_axes(f"1.mu.model.{path}") == axes
        found.add(leaf.shape[:axes])
    assert found - {()} == stacks


def test_stacked_axes_of_adapters() -> None:
    adapted = LoraConfig(2, (r"blocks\.attn\.q", "embed"))
    tree = dict(leaves(build_adapted(Refiner, RefinerConfig(), adapted)[1]))
    assert {path: stacked_axes(path) for path in tree} == {
        "blocks.attn.q.lora_a": 1,
        "blocks.attn.q.lora_b": 1,
        "embed.lora_a": 0,
        "embed.lora_b": 0,
    }


def test_modules_of_a_list_are_not_stacked() -> None:
    for path in ("layers.0.kernel", "model.blocks.3.attn.q.kernel", "down_blocks.conv.kernel"):
        assert stacked_axes(path) == 0


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
    """Parameters without layers, and layers with two stacked axes, do not become tuples."""
    for path in ("embed.kernel", "segments.0.runs.0.kernel"):
        assert isinstance(separate_layers(path, np.ones((2, 3))), jax.Array)


@pytest.mark.parametrize(
    ("remat", "keep", "runs"),
    [("none", False, 1), ("full", False, 2), ("parts", False, 3), ("parts", True, 2)],
)
def test_how_often_a_part_runs(remat: str, keep: bool, runs: int) -> None:
    """The last part of a layer runs at most twice: no part of the layer needs its result."""

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
