"""The gated convolution: the XLA form against plain loops, and the Pallas kernels against XLA."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.conv_glu import Tiles, conv_glu, gpu
from tests.kernels.lowering import triton_kernels

# rows that bands divide and do not, blocks of channels that are full and not, one row or column
CASES = [
    ((2, 5, 4), 24, Tiles(rows=2, channels=16, gate_rows=3, dx_rows=4)),
    ((1, 4, 1), 8, Tiles(rows=4, channels=8, gate_rows=1, dx_rows=2)),
    ((1, 1, 3), 5, Tiles(rows=3, channels=16, gate_rows=2, dx_rows=1)),
]
GPU_CASES = [((3, 22, 40), 192, Tiles()), ((2, 22, 40), 200, Tiles(rows=3, gate_rows=2, dx_rows=2))]


def _inputs(shape, channels, dtype, scale=2.0):
    keys = jax.random.split(jax.random.key(0), 5)
    return (
        jax.random.normal(keys[0], (*shape, 2 * channels), dtype) * scale,
        jax.random.normal(keys[4], (2 * channels,)),
        jax.random.normal(keys[1], (3, 3, 1, 2 * channels)),
        jax.random.normal(keys[2], (2 * channels,)),
    ), jax.random.normal(keys[3], (*shape, channels), dtype)


@functools.partial(jax.jit, static_argnames=("impl", "tiles"))
def _run(inputs, dy, impl, tiles):
    y, vjp = jax.vjp(lambda *a: conv_glu(*a, impl=impl, tiles=tiles), *inputs)
    return y, *vjp(dy)


def _results(inputs, dy, impl, tiles=None):
    return [np.asarray(a, np.float32) for a in _run(tuple(inputs), dy, impl, tiles)]


def _error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def test_reference_equals_loops():
    (x, x_bias, kernel, bias), _ = _inputs((2, 3, 4), 3, jnp.float32)
    activated = np.asarray(jax.nn.silu(x + x_bias))
    padded = np.pad(activated, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros_like(activated) + np.asarray(bias)
    for row in range(3):
        for column in range(4):
            seen = padded[:, row : row + 3, column : column + 3]
            y[:, row, column] += (seen * np.asarray(kernel)[:, :, 0]).sum((1, 2))
    wanted = y[..., :3] * np.asarray(jax.nn.silu(y[..., 3:]))
    for impl in ("xla", "xla_split"):
        found = conv_glu(x, x_bias, kernel, bias, impl=impl)
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("shape", "channels", "tiles"), CASES)
def test_pallas_equals_xla(shape, channels, tiles):
    inputs, dy = _inputs(shape, channels, jnp.float32)
    wanted = _results(inputs, dy, "xla")
    for found, want in zip(_results(inputs, dy, "pallas", tiles), wanted, strict=True):
        assert _error(found, want) < 1e-6


def test_bfloat16_is_no_worse_than_xla():
    shape, channels, tiles = CASES[0]
    inputs, dy = _inputs(shape, channels, jnp.bfloat16)
    truth = _results([a.astype(jnp.float32) for a in inputs], dy.astype(jnp.float32), "xla")
    xla = _results(inputs, dy, "xla")
    pallas = _results(inputs, dy, "pallas", tiles)
    for found, other, want in zip(pallas, xla, truth, strict=True):
        assert _error(found, want) < 1.05 * _error(other, want) < 0.02


def test_large_inputs_stay_finite():
    shape, channels, tiles = CASES[0]
    inputs, dy = _inputs(shape, channels, jnp.float32, scale=200.0)
    wanted = _results(inputs, dy, "xla")
    for found, want in zip(_results(inputs, dy, "pallas", tiles), wanted, strict=True):
        assert np.isfinite(found).all() and _error(found, want) < 1e-6


def test_lowers_for_cuda():
    tiles = Tiles(rows=2, gate_rows=2, dx_rows=2)
    x = jax.ShapeDtypeStruct((3, 22, 40, 2, 6720), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((3, 3, 2, 6720), jnp.float32)
    b = jax.ShapeDtypeStruct((2, 2, 6720), jnp.float32)
    dy = jax.ShapeDtypeStruct((3, 22, 40, 6720), jnp.bfloat16)

    def both(x, w, b, dy):
        y = gpu.forward(x, w, b, tiles, interpret=False)
        return y, gpu.backward(x, w, b, dy, tiles, interpret=False)

    names = triton_kernels(both, x, w, b, dy)
    assert names == ["conv_glu_forward", "conv_glu_gate", "conv_glu_dx"]


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "channels", "tiles"), GPU_CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_a_gpu(shape, channels, tiles, dtype):
    inputs, dy = _inputs(shape, channels, dtype)
    wide = [a.astype(jnp.float32) for a in inputs]
    truth = _results(wide, dy.astype(jnp.float32), "xla")
    xla = _results(inputs, dy, "xla")
    pallas = _results(inputs, dy, "pallas", tiles)
    for found, other, want in zip(pallas, xla, truth, strict=True):
        assert _error(found, want) < max(1.05 * _error(other, want), 5e-6)
