"""A loss that every device computes on its own rows has the gradients of the whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sanawm_jax.core.sharding import batch_sharding, make_mesh, shard
from sanawm_jax.small_world.timed_run import on_ranks
from sanawm_jax.training.engine.step import Share


def loss(params, examples):
    made = shard(jnp.tanh(examples["x"] @ params["a"]), "B C") @ params["b"]
    error = jnp.square(made).mean(1)
    weights = examples["weights"]
    return jnp.mean(error * weights), {"part": Share(jnp.mean(error * weights), jnp.mean(weights))}


def test_gradients_and_metrics_are_those_of_the_batch():
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(3, 4))), "b": jnp.asarray(rng.normal(size=(4, 2)))}
    x = jnp.asarray(rng.normal(size=(8, 3)))
    examples = {"x": x, "weights": jnp.arange(8.0)}  # rows of the devices weigh differently
    gradient = jax.value_and_grad(loss, has_aux=True)
    (value, metrics), expected = jax.jit(gradient)(params, examples)
    mesh = make_mesh(data=2, fsdp=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(examples, batch_sharding(mesh))
        shared = jax.value_and_grad(on_ranks(loss), has_aux=True)
        (found, found_metrics), gradients = jax.jit(shared)(params, placed)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    np.testing.assert_allclose(found_metrics["part"].mean(), metrics["part"].mean(), rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
