"""Features, rotation and ray transform of heads: XLA against plain loops, Pallas against XLA."""

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
    ((2, 3, 5, 2, 16), ucpe.Tiles(tokens=4)),
    ((1, 2, 8, 1, 24), ucpe.Tiles(tokens=8)),
    ((1, 1, 1, 3, 112), ucpe.Tiles(tokens=2)),
]
GPU_CASES = [
    ((2, 3, 880, 20, 112), ucpe.Tiles()),
    ((1, 2, 100, 3, 112), ucpe.Tiles()),
    ((1, 2, 100, 3, 64), ucpe.Tiles(tokens=32, warps=8)),
]
FORMS = (
    "to ray space",
    "to ray space, keys",
    "to ray space, uncapped",
    "from ray space",
    "unrotated",
    "rotated",
    "rotated, queries",
    "plain and rotated, keys",
    "plain and rotated, no norm",
)


def _inputs(shape, dtype, scale=1.0):
    """Returns tokens, matrices that enlarge or shrink the heads, angles, and the norm's scale."""
    batch, frames, tokens, heads, size = shape
    keys = jax.random.split(jax.random.key(0), 4)
    x = (jax.random.normal(keys[0], shape) * scale).astype(dtype)
    matrices = jax.random.normal(keys[1], (batch, frames, tokens, 4, 4))
    angles = jax.random.normal(keys[2], (frames, tokens, size // 2)) * 3
    return x, matrices, angles, 1.0 + 0.3 * jax.random.normal(keys[3], (heads * size,))


def _form(name, x, matrices, angles, scale, options):
    of = ucpe.Features()
    if name.endswith(("keys", "no norm")):
        of = ucpe.Features(None if name.endswith("no norm") else scale, 1e-5, True, 0.05)
    elif name.endswith("queries"):
        of = ucpe.Features(scale, 1e-5)
    if "rotated" in name and name != "unrotated":
        function = ucpe.plain_and_rotated if name.startswith("plain") else ucpe.rotate
        return function(x, angles, of, **options)
    half = angles[..., : angles.shape[-1] // 2]
    if name.startswith("to"):
        return ucpe.to_ray_space(
            x, matrices, half, of, capped=not name.endswith("uncapped"), **options
        )
    is_turned = name != "unrotated"
    return ucpe.apply_ucpe(x, matrices, half if is_turned else None, inverse=is_turned, **options)


@functools.partial(jax.jit, static_argnames=("form", "impl", "tiles"))
def _run(inputs, form, impl, tiles):
    options = {"impl": impl, "tiles": tiles}
    results, vjp = jax.vjp(lambda *a: _form(form, *a, options), *inputs)
    leaves, tree = jax.tree.flatten(results)
    keys = jax.random.split(jax.random.key(1), 2)
    weights = [
        jax.random.normal(key, a.shape, jnp.bfloat16).astype(a.dtype)
        for key, a in zip(keys, leaves, strict=False)
    ]
    return results, vjp(tree.unflatten(weights))


def _results(inputs, form, impl, tiles=None):
    found = jax.tree.leaves(_run(tuple(inputs), form, impl, tiles))
    return [np.asarray(a, np.float32) for a in found]


def _error(found, wanted):
    return np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30)


def test_reference_equals_loops():
    x, matrices, angles, _ = _inputs((1, 2, 3, 2, 16), jnp.float32)
    angles = angles[..., :4]
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


def test_features_and_rotation_equal_loops():
    x, _, angles, scale = _inputs((1, 2, 3, 2, 8), jnp.float32)
    of = ucpe.Features(scale, eps=0.1, relu=True, factor=0.5)
    plain, rotated = ucpe.plain_and_rotated(x, angles, of)
    for f, p in np.ndindex(2, 3):
        token = np.asarray(x[0, f, p]).ravel()
        wanted = token / np.sqrt(np.mean(token**2) + 0.1) * np.asarray(scale)
        wanted = 0.5 * np.maximum(wanted, 0.0).reshape(2, 8)
        np.testing.assert_allclose(plain[0, f, p], wanted, atol=1e-6)
        turned = (wanted[:, 0::2] + 1j * wanted[:, 1::2]) * np.exp(1j * np.asarray(angles[f, p]))
        np.testing.assert_allclose(rotated[0, f, p, :, 0::2], turned.real, atol=1e-6)
        np.testing.assert_allclose(rotated[0, f, p, :, 1::2], turned.imag, atol=1e-6)
    np.testing.assert_array_equal(ucpe.rotate(x, angles, of), rotated)
    np.testing.assert_array_equal(ucpe.features(x, of), plain)


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
    wanted = _form("to ray space", *inputs, {"impl": "xla"})
    found = _form("to ray space", *inputs, {"impl": "pallas", "tiles": tiles})
    for a, b in zip(found, wanted, strict=True):
        assert np.isfinite(a).all() and _error(a, b) < 1e-6
    for impl in ("xla", "pallas"):
        assert all(np.isfinite(a).all() for a in _results(inputs, "to ray space", impl, tiles))


@pytest.mark.parametrize("tiles", [ucpe.Tiles(), ucpe.Tiles(tokens=32)])
def test_lowers_for_cuda(tiles):
    shape = (1, 121, 880, 20, 112)
    inputs = jax.eval_shape(lambda: _inputs(shape, jnp.bfloat16))
    calls = {
        "ucpe_measured_featured": gpu.Form(True, measured=True, featured=True, relu=True),
        "ucpe_measured": gpu.Form(True, measured=True),
        "ucpe": gpu.Form(True, rotated=False),
        "rope_plain_featured": gpu.Form(plain=True, featured=True, relu=True),
        "rope": gpu.Form(),
    }

    def all_of_them(x, matrices, angles, scale):
        arrays = {"x": x, "matrices": matrices, "weight": scale, "inverse": x[..., 0, 0]}
        found = []
        for form in calls.values():
            table = angles[..., :28] if form.moves else angles
            arrays |= {"cos": table, "sin": table}
            found.append(gpu.run(form, arrays, tiles, interpret=False))
        return found

    assert triton_kernels(all_of_them, *inputs) == list(calls)


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
