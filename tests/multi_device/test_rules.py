"""The sharding table against every parameter that is trained."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from sanawm_jax.core.params import build, count, leaves
from sanawm_jax.core.sharding import make_mesh, parameter_spec, shardings
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.model import DiT
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.engine.learner import MODEL, UpdateRule
from sanawm_jax.training.engine.optimizer import make_optimizer
from sanawm_jax.training.engine.state import TrainState
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.model import VideoVAE


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"context": 8}], ids=str)
def test_next_to_nothing_of_the_release_is_replicated(shape: dict[str, int]) -> None:
    _, params = build(DiT, DiTConfig())
    mesh = make_mesh(**shape)
    placed = jax.tree.leaves(shardings(params, mesh))
    held = sum(
        math.prod(sharding.shard_shape(leaf.shape))
        for (_, leaf), sharding in zip(leaves(params), placed, strict=True)
    )
    assert held <= 1.02 * count(params) / (mesh.shape["fsdp"] * mesh.shape["tensor"])


@pytest.mark.parametrize(
    "config",
    [
        DiTConfig(k_conv_only=False),
        DiTConfig(ffn_type="mlp", use_chunk_plucker_post_attn=False, softmax_every_n=0),
    ],
    ids=["conv_on_all", "mlp"],
)
def test_every_kind_of_dit_and_the_training_state_match(config: DiTConfig) -> None:
    _, params = build(DiT, config)
    mesh = make_mesh(fsdp=2, tensor=2, context=2)
    rule = UpdateRule(make_optimizer(), lambda step, fraction: step, decay=0.9)
    learner = jax.eval_shape(rule.begin, params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), {MODEL: learner})  # pyright: ignore
    placed = shardings(state, mesh).model
    assert placed.params == placed.average
    moments = [s for s in jax.tree.leaves(placed.moments) if s.spec != P()]
    weights = [s for s in jax.tree.leaves(placed.params) if s.spec != P()]
    assert len(moments) == 2 * len(weights)


def test_autoencoder_matches() -> None:
    shardings(build(VideoVAE, VAEConfig())[1], make_mesh(fsdp=8))


def test_errors_are_one_line() -> None:
    with pytest.raises(InputError, match=r"no sharding rule matches 'head\.kernel'"):
        parameter_spec("head.kernel", (4, 4))
    with pytest.raises(
        InputError, match=r"final\.kernel \(30, 4\): mesh\.fsdp=8 does not divide 30"
    ):
        shardings({"final": {"kernel": jax.ShapeDtypeStruct((30, 4), float)}}, make_mesh(fsdp=8))
    with pytest.raises(InputError, match="needs 16 devices and there are 8"):
        make_mesh(fsdp=8, tensor=2)
