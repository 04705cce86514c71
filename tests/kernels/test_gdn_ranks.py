"""The frame recurrence, divided over ranks, against one scan over all frames."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import gdn

RANKS, LOCAL = 4, 3


def _maps(key):
    k, v, beta, decay = jax.random.split(key, 4)
    frames = RANKS * LOCAL
    keys = jax.nn.relu(jax.random.normal(k, (2, frames, 5, 2, 4))) * 5**-0.5 * 4**-0.5
    return gdn.frame_transitions(
        keys,
        jax.random.normal(v, (2, frames, 5, 2, 3)),
        jax.nn.sigmoid(jax.random.normal(beta, (2, frames, 5, 2))),
        jax.nn.sigmoid(jax.random.normal(decay, (2, frames, 2)) + 2),
    )


def _on_ranks(a, axis):
    return jnp.moveaxis(a.reshape(*a.shape[:axis], RANKS, LOCAL, *a.shape[axis + 1 :]), axis, 0)


def _check(run, initial, maps, tolerance=1e-5):
    """Compares `run(maps, initial, frames, axis_name)` on ranks with one run over all frames."""
    weights = jax.random.normal(jax.random.key(2), maps.u.shape)
    frames = jnp.arange(RANKS * LOCAL)

    @jax.jit
    def whole(maps, initial):
        states, final = run(maps, initial, frames, None)
        return jnp.sum(states * weights) + jnp.sum(final), (states, final)

    @jax.jit
    def shared(maps, initial):
        # vmap with a name runs the collectives of a mesh axis on one device
        states, final = jax.vmap(
            lambda m, f: run(m, initial, f, "ranks"), axis_name="ranks", out_axes=(0, 0)
        )(jax.tree.map(lambda a: _on_ranks(a, 1), maps), _on_ranks(frames, 0))
        states = jnp.moveaxis(states, 0, 1).reshape(maps.u.shape)
        return jnp.sum(states * weights) + jnp.sum(final[0]), (states, final[0])

    gradients = [
        jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(maps, initial) for f in (whole, shared)
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, rtol=10 * tolerance, atol=tolerance),
        *gradients,
    )


def _initial():
    return jax.random.normal(jax.random.key(1), (2, 2, 3, 4))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("resets", [(), (2, 3, 7)])
def test_equals_one_scan(reverse, exclusive, resets):
    def run(maps, initial, frames, axis_name):
        reset = jnp.isin(frames, jnp.array(resets, int))
        return gdn.scan_states(
            maps, initial, reset=reset, reverse=reverse, exclusive=exclusive, axis_name=axis_name
        )

    _check(run, _initial(), _maps(jax.random.key(0)))


@pytest.mark.parametrize("impl", ["xla", "pallas"])
def test_both_directions_at_once(impl):
    def run(maps, initial, frames, axis_name):
        return gdn.bidirectional_states(
            maps,
            initial,
            chunk_ends=jnp.isin(frames, jnp.array([1, 4, 5, 11])),
            axis_name=axis_name,
            impl="xla" if axis_name is None else impl,
            tiles=gdn.Tiles(scan_exact=True),
        )

    _check(run, _initial(), _maps(jax.random.key(0)))
