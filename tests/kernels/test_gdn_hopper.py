"""The Mosaic GPU kernels of tokens in their interpreter, with its race detector, and lowered."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import choice, gdn
from kernels_pallas.gdn import api, gpu_hopper, gpu_maps_hopper, gpu_read_hopper, reference
from tests.kernels.lowering import lowered

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="an older Mosaic GPU")
SHAPE = (1, 2, 72, 2, 112)  # a whole tile of 64 tokens and an eighth of one
ROUNDING = 2**-9  # of bfloat16


def _normal(index, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(index), shape).astype(dtype)


@pytest.fixture
def interpret(monkeypatch):
    """Parameters of the interpreter, which knows neither sums that go on nor their effect."""
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    from jax._src import effects
    from jax._src.pallas.mosaic_gpu import core

    effects.lowerable_effects.add_type(core._WGMMAPipelineEffect)

    def add_products(starts, terms):
        sums = list(starts)
        for i, a, b in terms():
            sums[i] += gpu_hopper.products(sums[i].shape, (a, b))
        return tuple(sums)

    monkeypatch.setattr(gpu_hopper, "add_products", add_products)
    # later versions end at the first race, and warpgroups write the rows that both have alike
    return params.InterpretGPUParams(detect_races=jax.__version_info__ < (0, 12))


@pytest.fixture
def tokens():
    batch, frames, count, heads, size = SHAPE
    found = {name: _normal(i, SHAPE, jnp.bfloat16) for i, name in enumerate("qvdp")}
    found["k"] = (_normal(4, SHAPE) * (size * count) ** -0.5).astype(jnp.bfloat16)
    found["p"] = jax.nn.relu(found["p"])
    found["beta"] = jax.nn.sigmoid(_normal(5, SHAPE[:4]))
    found["decay"] = jax.nn.sigmoid(_normal(6, (batch, frames, heads)) + 2)
    found["s"] = _normal(7, (batch, frames, heads, size, size))
    found["z"] = jax.nn.relu(_normal(8, (batch, frames, heads, 1, size))) + 0.1
    return found


def _assert_close(found, wanted):
    found, wanted = ([a for a in tree if a is not None] for tree in (found, wanted))
    for a, b in zip(found, wanted, strict=True):
        bound = ROUNDING if a.dtype == jnp.bfloat16 else 2e-5
        a, b = np.asarray(a, np.float32), np.asarray(b)
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) < bound * np.linalg.norm(b)


def _wide(*arrays):
    return [a.astype(jnp.float32) for a in arrays]


def _races(capfd):
    """Accesses that raced, but for rows that both warpgroups have and write alike."""
    found = []
    for report in capfd.readouterr().out.split("RACE DETECTED")[1:]:
        lines = [line.strip() for line in report.splitlines() if "HostAllocationKey" in line][:2]
        places = {line.rpartition(", ")[2] for line in lines}
        if len(places) > 1 or not all(line.startswith("write") for line in lines):
            found.append(lines)
    return found


@pytest.mark.parametrize("has_values", [True, False])
def test_maps(has_values, tokens, interpret, capfd):
    k, v, beta, decay = (tokens[n] for n in ("k", "v", "beta", "decay"))
    names = [k, v] if has_values else [k]
    function = reference.frame_transitions if has_values else reference.normaliser_transitions
    wanted, vjp = jax.vjp(lambda *a: tuple(function(*a)), *_wide(*names), beta, decay)
    dw, du = tokens["s"], tokens["s" if has_values else "z"]
    if has_values:
        _assert_close(gpu_maps_hopper.maps(k, v, beta, decay, interpret=interpret), wanted)
    found = gpu_maps_hopper.maps_gradient(
        k, v if has_values else None, beta, decay, dw, du, interpret=interpret
    )
    _assert_close(found, vjp((dw, du)))
    assert not _races(capfd)


@pytest.mark.parametrize("is_normalised", [True, False])
def test_read_out(is_normalised, tokens, interpret, capfd):
    q, dy, states = tokens["q"], tokens["d"], tokens["s"]
    z, plain, eps = (tokens["z"], tokens["p"], 1e-2) if is_normalised else (None, None, None)

    def read(states, q, z=None, plain=None):
        if z is None:
            return reference.read_out(states, q)
        return reference.normalised_read_out(states, z, q, plain, eps)

    given = [states, *_wide(q)] + ([z, *_wide(plain)] if is_normalised else [])
    wanted, vjp = jax.vjp(read, *given)
    found = gpu_read_hopper.read(states, q, z, plain, eps, interpret=interpret)
    _assert_close([found], [wanted])
    found = gpu_read_hopper.read_gradient(states, q, z, plain, dy, eps, interpret=interpret)
    _assert_close(found, vjp(*_wide(dy)))
    assert not _races(capfd)


@pytest.mark.parametrize("size", [64, 112])
def test_lowers(monkeypatch, size):
    """At the released number of tokens every kernel is Mosaic's, and the Triton ones on request."""
    monkeypatch.setattr(choice, "capability", lambda: choice.HOPPER)
    batch, frames, count, heads = 1, 2, 880, 2

    def like(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((batch, frames, *shape), dtype)

    token = like(count, heads, size, dtype=jnp.bfloat16)
    matrix, row = like(heads, size, size), like(heads, 1, size)
    beta, decay = like(count, heads), like(heads)
    k_beta = (token, beta, decay)

    def maps(tiles, k, v, beta, decay, w, u):
        saved = (k, v, beta, decay)
        found = api._maps(tiles, False, *saved)
        return found, [a for a in api._maps_backward(tiles, False, saved, (w, u)) if a is not None]

    def rows(tiles, k, beta, decay, w, u):
        return maps(tiles, k, None, beta, decay, w, u)[1]

    def read(tiles, states, q, z, dy):
        static, saved = (tiles, False, 1e-8), (states, q, z, q)
        return api._read(static, *saved), api._read_backward(static, saved, dy)

    for function, args in (
        (maps, (token, *k_beta, matrix, matrix)),
        (rows, (*k_beta, matrix, row)),
        (read, (matrix, token, row, token)),
    ):
        text = lowered(functools.partial(function, gdn.Tiles()), *args)
        assert "mosaic_gpu" in text and "xla.gpu.triton" not in text
        text = lowered(functools.partial(function, gdn.Tiles(mosaic=())), *args)
        assert "mosaic_gpu" not in text and "xla.gpu.triton" in text


@pytest.mark.parametrize(
    ("tokens", "size", "is_fit"),
    [(880, 112, True), (72, 64, True), (390, 112, False), (880, 72, False), (880, 128, False)],
)
def test_takes(tokens, size, is_fit):
    assert gpu_hopper.takes(tokens, size) == is_fit
