"""Every product on the path of the states is float32 at the highest precision.

A CPU always multiplies in float32. A comparison of results on a CPU therefore cannot detect a
product at the default precision, which is TF32 on a GPU and bfloat16 on a TPU. For this reason the
tests inspect the programs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

from kernels_pallas import gdn
from kernels_pallas.gdn import reference
from sanawm_jax.core.params import apply
from sanawm_jax.dit import ucpe
from tests.tiny_dit import GRAPHDEF, random_inputs, random_params

HIGHEST = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
BATCH, FRAMES, TOKENS, HEADS, SIZE = 1, 4, 6, 2, 8
TOKEN = (BATCH, FRAMES, TOKENS, HEADS, SIZE)
MATRIX = (BATCH, FRAMES, HEADS, SIZE, SIZE)


def products(jaxpr: Any, scope: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the scope and equation of every product outside of Pallas kernels."""
    for equation in jaxpr.eqns:
        name = f"{scope}/{equation.source_info.name_stack}"
        if equation.primitive.name == "dot_general":
            yield name, equation
        elif equation.primitive.name != "pallas_call":
            for inner in jax.tree.leaves(
                equation.params, is_leaf=lambda a: isinstance(a, core.ClosedJaxpr | core.Jaxpr)
            ):
                if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
                    yield from products(getattr(inner, "jaxpr", inner), name)


def check(function: Any, *args: Any, only: str = "") -> int:
    """Asserts it of a function and of its gradient.

    Args:
      function: of arrays, to arrays.
      args: its arguments; the gradient is with respect to all of them.
      only: name of the scopes that are looked at; by default all of the program.

    Returns:
      The number of products of the function and its gradient.
    """

    def both(args: Any) -> Any:
        results, vjp = jax.vjp(function, *args)
        return results, vjp(jax.tree.map(jnp.ones_like, results))

    # the tests as a whole run at the highest precision by default, which would hide what is missing
    with jax.default_matmul_precision("default"):
        program = jax.make_jaxpr(both)(args).jaxpr
    found = [equation for name, equation in products(program) if only in name]
    for equation in found:
        assert equation.params["precision"] == HIGHEST, equation
        types = {v.aval.dtype for v in (*equation.invars, *equation.outvars)}
        assert types == {jnp.dtype(jnp.float32)}, equation
        assert equation.params["preferred_element_type"] in (None, jnp.dtype(jnp.float32))
    return len(found)


def array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def states_of_tokens(k: jax.Array, v: jax.Array, beta: jax.Array, decay: jax.Array, of: Any) -> Any:
    """Computes the states of both branches with the functions of a module, chunk by chunk."""
    ends = jnp.arange(FRAMES) == 1
    states = of.bidirectional_states(of.frame_transitions(k, v, beta, decay), chunk_ends=ends)
    normaliser = of.bidirectional_states(of.normaliser_transitions(k, beta, decay))
    return *states, *normaliser


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_states(dtype: Any) -> None:
    run = functools.partial(states_of_tokens, of=reference)
    tokens = array(TOKEN, dtype)
    # 2 + 1 maps and 2 x 2 scans, and two products in the gradient of each
    assert check(run, tokens, tokens, array(TOKEN[:4]), array(MATRIX[:3])) >= 3 * 7


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_read_out(dtype: Any) -> None:
    q = array(TOKEN, dtype)
    read = functools.partial(reference.normalised_read_out, eps=1e-8)
    assert check(read, array(MATRIX), array((*MATRIX[:3], 1, SIZE)), q, q) == 6
    assert check(reference.read_out, array(MATRIX), q) == 3


def test_composition_of_ranks() -> None:
    composites = (array((2, BATCH, HEADS, SIZE, SIZE)), array((2, BATCH, HEADS, 3, SIZE)))

    def compose(w: jax.Array, u: jax.Array, start: jax.Array) -> Any:
        return reference.compose_states(reference.Transition(w, u), start)

    assert check(compose, *composites, array((BATCH, HEADS, 3, SIZE))) >= 2 * 3

    mesh = jax.make_mesh((1,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, "context")

    def over_ranks(w: jax.Array, u: jax.Array) -> jax.Array:
        scan = functools.partial(
            reference.bidirectional_states, axis_name="context", chunk_ends=jnp.arange(FRAMES) == 1
        )
        run = jax.shard_map(
            lambda w, u: scan(reference.Transition(w, u))[0],
            mesh=mesh,
            in_specs=(spec, spec),
            out_specs=spec,
        )
        return run(w, u)

    # the scan, the composition and the correction in each of two directions
    assert check(over_ranks, array(MATRIX), array(MATRIX)) >= 2 * 3 * 2


@pytest.mark.parametrize("impl", ["xla", "pallas"])
def test_api(impl: str) -> None:
    """The products that `api` computes outside of its kernels, and all of them without kernels."""

    class Of:
        frame_transitions = staticmethod(functools.partial(gdn.frame_transitions, impl=impl))
        normaliser_transitions = staticmethod(
            functools.partial(gdn.normaliser_transitions, impl=impl)
        )
        bidirectional_states = staticmethod(functools.partial(gdn.bidirectional_states, impl=impl))

    tokens = array(TOKEN, jnp.bfloat16 if impl == "xla" else jnp.float32)
    run = functools.partial(states_of_tokens, of=Of)
    count = check(run, tokens, tokens, array(TOKEN[:4]), array(MATRIX[:3]))
    # Pallas: the gradient of the maps W of the numerator and the normaliser in two directions
    assert count >= 3 * 7 if impl == "xla" else count == 4


def test_model_in_bfloat16() -> None:
    """All products of the DiT in the scope `gdn`, and only these, for every compute dtype."""
    inputs = random_inputs(1, 4)
    inputs["latents"] = inputs["latents"].astype(jnp.bfloat16)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), random_params())
    assert check(lambda p: apply(GRAPHDEF, p, **inputs), params, only="gdn") >= 30


def test_geometry_of_rays() -> None:
    camera = random_inputs(1, 4)["camera"]
    assert check(lambda c: ucpe.ray_matrices(c, (2, 3)), camera) >= 2
    assert check(lambda c: ucpe.up_latitude_map(c, (2, 3)), camera) >= 2
    assert check(ucpe.inverse_rigid, ucpe.ray_matrices(camera, (2, 3))) >= 1


@pytest.mark.parametrize("broken", ["precision", "dtype"])
def test_a_product_at_another_precision_is_noticed(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"preferred_element_type": jnp.float32, "precision": lax.Precision.HIGHEST}
    if broken == "precision":
        del options["precision"]
    else:
        options["preferred_element_type"] = jnp.bfloat16
    monkeypatch.setattr(reference, "einsum", functools.partial(jnp.einsum, **options))
    with pytest.raises(AssertionError):
        check(reference.read_out, array(MATRIX), array(TOKEN))
