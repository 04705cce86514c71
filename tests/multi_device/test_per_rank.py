"""`per_rank`: what each rank of a mesh sees, and gradients through it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from kernels_pallas import choice
from kernels_pallas.attention import api
from sanawm_jax.core.frame_attention import frame_attention
from sanawm_jax.core.frames import layout_of, neighbours
from sanawm_jax.core.sharding import make_mesh, per_rank


def test_without_a_mesh_it_is_the_function() -> None:
    def function(x: jax.Array) -> jax.Array:
        return x

    assert per_rank(function, ("B",), "B") is function
    with jax.set_mesh(make_mesh()):
        assert per_rank(function, ("B",), "B") is function


@pytest.mark.parametrize(
    ("mesh", "batch", "rank"),
    [
        ({"fsdp": 2, "context": 2}, 4, (2, 3, 5)),
        ({"fsdp": 2, "context": 2}, 3, (3, 3, 5)),  # two ranks do not divide a batch of three
        ({"tensor": 2, "data": 4}, 4, None),  # a rank does not have all channels
    ],
    ids=str,
)
def test_what_a_rank_sees(
    mesh: dict[str, int], batch: int, rank: tuple[int, int, int] | None
) -> None:
    seen: list[Any] = []

    def scaled(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen.append(None if choice.is_partitioned() else x.shape)
        again = per_rank(lambda x: x * weights, ("B F C",), "B F C")  # of a rank already
        return again(x), x.sum(-1)

    def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
        run = per_rank(scaled, ("B F C", "C"), ("B F C", "B F"), whole_width=True)
        y, sums = run(x, weights)
        return jnp.sum(jnp.sin(y) * sums[..., None])

    x = jax.random.normal(jax.random.key(0), (batch, 6, 5))
    weights = jnp.arange(1.0, 6.0)
    wanted = jax.value_and_grad(loss, (0, 1))(weights, x)
    seen.clear()
    with jax.set_mesh(make_mesh(**mesh)):
        found = jax.jit(jax.value_and_grad(loss, (0, 1)))(weights, x)
    assert set(seen) == {rank}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


@pytest.mark.parametrize("reach", [1, 3])  # a rank has two frames
@pytest.mark.parametrize("isolated", [False, True])
def test_neighbours_of_ranks_are_those_of_the_whole_clip(
    reach: int, isolated: bool, rng: np.random.Generator
) -> None:
    x = jnp.asarray(rng.normal(size=(2, 8, 1, 3)), jnp.float32)

    def seen(x: jax.Array) -> list[jax.Array]:
        return neighbours(x, reach, layout_of(8, (0, 3, 6)), isolated=isolated)

    wanted = seen(x)
    with jax.set_mesh(make_mesh(context=4)):
        found = jax.jit(per_rank(seen, ("B F P C",), "B F P C"))(x)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def _kernel(q_ref: Any, k_ref: Any, v_ref: Any, y_ref: Any) -> None:
    q, k, v = (ref[...].astype(jnp.float32) for ref in (q_ref, k_ref, v_ref))
    y_ref[...] = jax.nn.dot_product_attention(q, k, v, scale=1.0).astype(y_ref.dtype)


def test_flash_attention_3_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward rule is cuDNN's, whose result has other varying axes than a Pallas call's."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, config: Any) -> jax.Array:
        del config
        like = jax.ShapeDtypeStruct(q.shape, q.dtype)
        return pl.pallas_call(_kernel, out_shape=like, interpret=True)(q, k, v)

    library = api._library
    monkeypatch.setattr(attention_mgpu, "attention", kernel)
    monkeypatch.setattr(api, "_library", lambda _, *args, **kw: library("xla", *args, **kw))
    monkeypatch.setattr(
        "sanawm_jax.core.frame_attention.attention",
        lambda q, k, v, *, key_mask, scale: api._mosaic(scale, q, k, v),
    )
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [jax.random.normal(key, (2, 4, 3, 2, 8)) for key in keys]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        y = frame_attention(q, k, v, layout_of(4, None), scale=0.3)
        return jnp.sum(jnp.sin(y))

    wanted = jax.value_and_grad(loss, (0, 1, 2))(*inputs)
    with jax.set_mesh(make_mesh(data=2, context=2)):
        found = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*inputs)
        primal = jax.jit(loss)(*inputs)
    # the kernel computes in float16, and the library in float32
    np.testing.assert_allclose(primal, found[0], rtol=1e-2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)
