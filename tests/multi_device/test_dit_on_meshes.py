"""Loss and gradients of the DiT on every kind of mesh equal those on one device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import choice
from sanawm_jax.core.params import apply, leaves
from sanawm_jax.core.sharding import batch_sharding, make_mesh, shardings
from tests.tiny_dit import GRAPHDEF, random_inputs, random_params

FSDP = {"fsdp": 8}
CONTEXT = {"context": 8}
BOTH = {"data": 2, "context": 4}
ALL = {"tensor": 2, "context": 2, "fsdp": 2}
BATCH = 8
# frames, chunk starts; 11 is divisible by no mesh, and chunks straddle ranks
CLIPS = {
    "bidirectional": (8, None),
    "bidirectional_padded": (11, None),
    "chunk_causal": (8, (0, 4, 7)),
    "chunk_causal_padded": (11, (0, 4, 5, 9)),
    "chunk_causal_masked": (11, (0, 4, 5, 9)),  # padded, and the caller masks frames too
}


# every mesh runs both models; padding is tried on each mesh that shares frames out
CASES = [
    *((mesh, "bidirectional") for mesh in (FSDP, CONTEXT)),
    *((mesh, "bidirectional_padded") for mesh in (BOTH, ALL)),
    *((mesh, "chunk_causal") for mesh in (FSDP, BOTH)),
    (ALL, "chunk_causal_padded"),
    (CONTEXT, "chunk_causal_masked"),
]


# kernels see a rank without the past of the clip, chunks that straddle ranks, and a divided batch
KERNEL_CASES = [({"data": 2, "context": 2}, "chunk_causal_masked")]


def _loss(params: Any, inputs: dict[str, Any], starts: tuple[int, ...] | None) -> jax.Array:
    velocity = apply(GRAPHDEF, params, **inputs, chunk_starts=starts)
    target = jnp.sin(jnp.arange(velocity[0].size)).reshape(velocity[0].shape)
    return jnp.mean(jnp.square(velocity - target))


@functools.cache
def _on_one_device(name: str) -> tuple[Any, Any, Any, Any]:
    frames, starts = CLIPS[name]
    params, inputs = random_params(), random_inputs(BATCH, frames)
    if name == "chunk_causal_masked":
        inputs["frame_mask"] = jnp.ones((BATCH, frames)).at[0, 6:].set(0).at[1, 10:].set(0)
    step = jax.jit(jax.value_and_grad(_loss), static_argnums=2)
    return (params, inputs, *step(params, inputs, starts))


@pytest.mark.parametrize(("shape", "name"), CASES, ids=str)
def test_equals_one_device(shape: dict[str, int], name: str) -> None:
    _check(shape, name)


def _check(shape: dict[str, int], name: str, tolerance: float = 1e-5) -> None:
    params, inputs, loss, gradients = _on_one_device(name)
    mesh = make_mesh(**shape)
    placed = shardings(params, mesh)
    batch = jax.tree.map(lambda _: batch_sharding(mesh), inputs)
    step = jax.jit(
        jax.value_and_grad(functools.partial(_loss, starts=CLIPS[name][1])),
        in_shardings=(placed, batch),
        out_shardings=(None, placed),
    )
    with jax.set_mesh(mesh):
        ours, our_gradients = step(jax.device_put(params, placed), jax.device_put(inputs, batch))
    assert float(ours) == pytest.approx(float(loss), rel=tolerance)
    for (path, a), (_, b) in zip(leaves(our_gradients), leaves(gradients), strict=True):
        scale = max(float(np.linalg.norm(b)), 1e-6)
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) / scale <= tolerance, path


@pytest.mark.parametrize(("shape", "name"), KERNEL_CASES, ids=str)
def test_pallas_kernels_run_on_every_rank(
    shape: dict[str, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but in the interpreter."""
    _on_one_device(name)  # in XLA
    ran = set()

    def pick(kernel: str, impl: str | None = None) -> str:
        assert not choice.is_partitioned(), f"{kernel} cannot run as a kernel here"
        ran.add(kernel)
        return choice.AUTO[kernel]

    monkeypatch.setattr(choice, "pick", pick)
    _check(shape, name, tolerance=1e-4)
    assert ran == {"conv_glu", "gdn", "ucpe"}  # attention does not ask on a CPU
