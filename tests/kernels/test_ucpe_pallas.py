"""Ray transforms of heads: the XLA form against plain loops, the Pallas kernel against XLA."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import ucpe
from kernels_pallas.ucpe import gpu
from tests.kernels.lowering import triton_kernels

# tokens that tiles divide and do not, groups of channels that are a power of two and not
CASES = [
    ((2, 3, 5, 2, 16), ucpe.Tiles(tokens=4, joined=False)),
    ((1, 2, 8, 1, 24), ucpe.Tiles(tokens=8)),
    ((1, 1, 1, 3, 112), ucpe.Tiles(tokens=2)),
]
GPU_CASES = [
    ((2, 3, 880, 20, 112), ucpe.Tiles()),
    ((1, 2, 100, 3, 112), ucpe.Tiles(joined=False)),
    ((1, 2, 100, 3, 64), ucpe.Tiles(tokens=32, warps=8)),
]
FORMS = ("bounded", "plain", "inverse", "unrotated")


def _inputs(shape, dtype, scale=1.0):
    """Tokens, matrices that inflate some heads and shrink others, angles."""
    batch, frames, tokens, _, size = shape
    keys = jax.random.split(jax.random.key(0), 3)
    x = (jax.random.normal(keys[0], shape) * scale).astype(dtype)
    matrices = jax.random.normal(keys[1], (batch, frames, tokens, 4, 4))
    return x, matrices, jax.random.normal(keys[2], (frames, tokens, size // 4)) * 3


def _form(name, x, matrices, angles, options):
    if name == "bounded":
        return ucpe.to_ray_space(x, matrices, angles, **options)
    angles = None if name == "unrotated" else angles
    return (ucpe.apply_ucpe(x, matrices, angles, inverse=name == "inverse", **options),)


@functools.partial(jax.jit, static_argnames=("form", "impl", "tiles"))
def _run(inputs, form, impl, tiles):
    options = {"impl": impl, "tiles": tiles}
    results, vjp = jax.vjp(lambda *a: _form(form, *a, options), *inputs)
    keys = jax.random.split(jax.random.key(1), 2)
    return results, vjp(
        tuple(
            jax.random.normal(key, a.shape, jnp.bfloat16).astype(a.dtype)
            for key, a in zip(keys, results, strict=False)
        )
    )


def _results(inputs, form, impl, tiles=None):
    found = jax.tree.leaves(_run(tuple(inputs), form, impl, tiles))
    return [np.asarray(a, np.float32) for a in found]


def _error(found, wanted):
    return np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30)


def test_reference_equals_loops():
    x, matrices, angles = _inputs((1, 2, 3, 2, 16), jnp.float32)
    wanted = np.zeros(x.shape)
    for f, p, n in np.ndindex(2, 3, 2):
        head, out = np.asarray(x[0, f, p, n]), wanted[0, f, p, n]
        for g in range(2):
            out[4 * g : 4 * g + 4] = np.asarray(matrices[0, f, p]) @ head[4 * g : 4 * g + 4]
        turned = (head[8::2] + 1j * head[9::2]) * np.exp(1j * np.asarray(angles[f, p]))
        out[8::2], out[9::2] = turned.real, turned.imag
    np.testing.assert_allclose(ucpe.apply_ucpe(x, matrices, angles), wanted, atol=1e-5)
    before, after = np.linalg.norm(x, axis=-1), np.linalg.norm(wanted, axis=-1)
    y, inflation = ucpe.to_ray_space(x, matrices, angles)
    kept = np.minimum(before / after, 1.0)
    np.testing.assert_allclose(y, wanted * kept[..., None], atol=1e-5)
    np.testing.assert_allclose(inflation, np.mean((kept * after / before) ** 2, axis=2), rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "tiles"), CASES)
def test_pallas_equals_xla(shape, tiles, form):
    inputs = _inputs(shape, jnp.float32)
    wanted = _results(inputs, form, "xla")
    for found, want in zip(_results(inputs, form, "pallas", tiles), wanted, strict=True):
        assert _error(found, want) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_no_worse_than_xla(form):
    shape, tiles = CASES[0]
    inputs = _inputs(shape, jnp.bfloat16)
    truth = _results([a.astype(jnp.float32) for a in inputs], form, "xla")
    xla, pallas = _results(inputs, form, "xla"), _results(inputs, form, "pallas", tiles)
    for found, other, want in zip(pallas, xla, truth, strict=True):
        assert _error(found, want) < max(1.1 * _error(other, want), 1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_small_and_large_heads(scale):
    shape, tiles = CASES[0]
    inputs = _inputs(shape, jnp.float32, scale)
    wanted = ucpe.to_ray_space(*inputs, impl="xla")
    found = ucpe.to_ray_space(*inputs, impl="pallas", tiles=tiles)
    for a, b in zip(found, wanted, strict=True):
        assert np.isfinite(a).all() and _error(a, b) < 1e-6


@pytest.mark.parametrize("tiles", [ucpe.Tiles(), ucpe.Tiles(tokens=32, joined=False)])
def test_lowers_for_cuda(tiles):
    x = jax.ShapeDtypeStruct((1, 121, 880, 20, 112), jnp.bfloat16)
    matrices = jax.ShapeDtypeStruct((1, 121, 880, 4, 4), jnp.float32)
    angles = jax.ShapeDtypeStruct((121, 880, 28), jnp.float32)

    def both(x, matrices, angles):
        return [
            gpu.transform(x, matrices, rotation, tiles, bounded=bounded, interpret=False)
            for bounded, rotation in ((True, (angles, angles)), (False, None))
        ]

    assert triton_kernels(both, x, matrices, angles) == ["ucpe_bounded", "ucpe"]


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "tiles"), GPU_CASES)
def test_on_a_gpu(shape, tiles, form):
    inputs = _inputs(shape, jnp.bfloat16)
    truth = _results([a.astype(jnp.float32) for a in inputs], form, "xla")
    xla, pallas = _results(inputs, form, "xla"), _results(inputs, form, "pallas", tiles)
    for found, other, want in zip(pallas, xla, truth, strict=True):
        assert np.isfinite(found).all()
        assert _error(found, want) < max(1.1 * _error(other, want), 1e-5)
