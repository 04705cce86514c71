"""A model that is built only for its shapes has the same parameters as a random one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sanawm_jax.core.params import build, init, leaves
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.model import DiT
from sanawm_jax.refiner.config import ConnectorsConfig, RefinerConfig
from sanawm_jax.refiner.connectors import TextConnectors
from sanawm_jax.refiner.model import Refiner
from sanawm_jax.text.config import GemmaConfig
from sanawm_jax.text.gemma import GemmaTower
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.model import VideoDecoder, VideoEncoder, VideoVAE
from tests import tiny_dit, tiny_refiner

CONNECTORS = ConnectorsConfig(
    caption_channels=16,
    text_proj_in_factor=2,
    video_connector_num_attention_heads=2,
    video_connector_attention_head_dim=8,
)


@pytest.mark.parametrize(
    ("module", "config"),
    [
        (DiT, DiTConfig()),
        (DiT, tiny_dit.CONFIG),
        (GemmaTower, GemmaConfig(num_hidden_layers=3)),
        (Refiner, RefinerConfig()),
        (Refiner, tiny_refiner.CONFIG),
        (TextConnectors, CONNECTORS),
        (VideoDecoder, VAEConfig(decoder_inject_noise=(True,) * 4, timestep_conditioning=True)),
        (VideoEncoder, VAEConfig()),
        (VideoVAE, VAEConfig()),
    ],
)
def test_built_without_random_numbers(module: type[nnx.Module], config: Any) -> None:
    graphdef, abstract = build(module, config)
    made = nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))  # pyright: ignore
    expected, state = nnx.split(made)
    assert graphdef == expected
    assert hash(graphdef) == hash(expected)
    flat = dict(leaves(abstract))
    theirs = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    assert flat == {path: leaf.get_value() for path, leaf in theirs.items()}


def test_numbers_are_drawn_after_a_build() -> None:
    build(DiT, tiny_dit.CONFIG)
    key = jax.random.key(0)
    made = dict(leaves(init(DiT, tiny_dit.CONFIG, key)))
    kernel = made["segments.0.runs.0.layers.attn.qkv.kernel"]
    assert kernel.dtype == jnp.float32
    assert float(jnp.std(kernel)) == pytest.approx(kernel.shape[-2] ** -0.5, rel=0.1)
    again = dict(leaves(init(DiT, tiny_dit.CONFIG, key)))
    assert all(np.array_equal(a, again[path]) for path, a in made.items())
