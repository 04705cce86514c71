"""The Mosaic GPU kernels of tokens in their interpreter, with its race detector, and lowered."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from benchmarks import tiles
from kernels_pallas import choice, gdn
from kernels_pallas.gdn import (
    api,
    gpu_hopper,
    gpu_maps_hopper,
    gpu_read_hopper,
    gpu_scan_hopper,
    gpu_states_hopper,
    reference,
)
from kernels_pallas.gdn.gpu import Run
from tests.kernels.lowering import lowered

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="an older Mosaic GPU")
SHAPE = (1, 2, 328, 2, 112)  # five tiles of 64 tokens, more than are held at once, and an eighth
ROUNDING = 2**-9  # of bfloat16


def _normal(index, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(index), shape).astype(dtype)


@pytest.fixture
def interpret(monkeypatch):
    """Parameters of the interpreter.

    It knows neither sums that go on, nor their effect, nor a factor in registers, nor semaphores,
    and JAX 0.11's wants every barrier to be waited for up to the end.
    """
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    from jax._src import effects
    from jax._src.pallas.mosaic_gpu import core
    from jax.experimental.pallas import mosaic_gpu as plgpu

    effects.lowerable_effects.add_type(core._WGMMAPipelineEffect)

    def add_products(starts, terms):
        sums = list(starts)
        for i, a, b in terms():
            sums[i] += gpu_hopper.products(sums[i].shape, (a, b))
        return tuple(sums)

    in_shared_memory = gpu_hopper.products

    def products(shape, *pairs):
        if not isinstance(pairs[0][0], jax.Array):
            return in_shared_memory(shape, *pairs)
        return sum(jnp.dot(a, b[...], preferred_element_type=jnp.float32) for a, b in pairs)

    def multiply(start, parts, maps, adjoint, meanwhile):
        size = maps.shape[1]
        w = sum(_wide(*(maps[pl.ds(j * size, size)] for j in range(2))))
        state = sum(_wide(*parts))
        meanwhile()
        return start + reference.einsum("vd,ed->ve" if adjoint else "vd,de->ve", state, w)

    class Semaphore:  # blocks run one after the other
        def __getitem__(self, index):
            return self

        at = property(lambda self: self)

    def deallocate(barrier):
        with barrier.cv:
            barrier.ref_count -= 1

    if jax.__version_info__ < (0, 12):
        from jax._src.pallas.mosaic_gpu.interpret import shared_memory

        monkeypatch.setattr(shared_memory.Barrier, "deallocate", deallocate)
    monkeypatch.setattr(gpu_hopper, "add_products", add_products)
    monkeypatch.setattr(gpu_hopper, "products", products)
    monkeypatch.setattr(gpu_scan_hopper, "_multiply", multiply)
    monkeypatch.setattr(pl, "get_global", lambda semaphore: Semaphore())
    for name in ("semaphore_signal", "semaphore_wait"):
        monkeypatch.setattr(plgpu, name, lambda *_, **__: None)
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


@pytest.mark.parametrize(
    "runs", [[Run(False, False)], [Run(False, False), Run(True, True)]], ids=["one", "both"]
)
@pytest.mark.parametrize("adjoint", [False, True])
def test_recurrence(runs, adjoint, interpret, capfd):
    batch, frames, heads, size = 1, 5, 2, 80
    shape = (batch, frames, heads, size, size)
    w = jnp.eye(size) * 0.9 + _normal(0, shape) * 0.02
    u, start = _normal(1, shape), _normal(2, (len(runs), batch, heads, size, size))
    drop = jnp.zeros((len(runs), frames)).at[-1, 2].set(1.0)

    def scan(u, start):
        found = [
            reference.scan_states(
                reference.Transition(w, u), start[i], reverse=run.reverse,
                exclusive=run.exclusive, reset=drop[i] > 0,
            )
            for i, run in enumerate(runs)
        ]  # fmt: skip
        return tuple(jnp.stack(a) for a in zip(*found, strict=True))

    if adjoint:
        ds, d_final = _normal(3, (len(runs), *shape)), _normal(4, start.shape)
        wanted = jax.vjp(scan, u, start)[1]((ds, d_final))
        found = gpu_scan_hopper.scan(
            w, ds, d_final, drop, tuple(runs), adjoint=True, interpret=interpret
        )
        found = jnp.sum(found[0], 0), found[1]
    else:
        wanted = scan(u, start)
        found = gpu_scan_hopper.scan(
            w, u[None], start, drop, tuple(runs), adjoint=False, interpret=interpret
        )
    _assert_close(found, wanted)
    assert not _races(capfd)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_states_of_tokens(reverse, exclusive, interpret, capfd):
    batch, frames, count, heads, size = shape = (2, 3, 72, 2, 80)
    k = (_normal(0, shape) * (size * count) ** -0.5).astype(jnp.bfloat16)
    v, beta = _normal(1, shape, jnp.bfloat16), jax.nn.sigmoid(_normal(2, shape[:4]))
    decay = jax.nn.sigmoid(_normal(3, (batch, frames, heads)) + 2)
    start, drop = _normal(4, (batch, heads, size, size)), jnp.array([0.0, 1.0, 0.0])
    maps = reference.frame_transitions(*_wide(k, v), beta, decay)
    wanted = reference.scan_states(
        maps, start, reverse=reverse, exclusive=exclusive, reset=drop > 0
    )
    found = gpu_states_hopper.states(
        k, v, beta, decay, start, drop, Run(reverse, exclusive),
        keeps_maps=True, interpret=interpret,
    )  # fmt: skip
    _assert_close(found, (*wanted, *maps))
    # the states themselves are guarded by what it does not know
    assert not [race for race in _races(capfd) if "memory_space_id=0" not in race[0]]


def test_recurrence_takes_what_fits():
    assert gpu_scan_hopper.takes(112, 112, 256)
    assert not gpu_scan_hopper.takes(112, 112, 257)  # flags of all frames come in one copy
    assert not gpu_scan_hopper.takes(128, 128, 5)


def test_tiles_alone(interpret):
    _, frames, _, heads, size = SHAPE
    matrix = _normal(0, (frames, heads, size, size))
    shape, tokens = SHAPE[1:], [_normal(i, SHAPE[1:], jnp.bfloat16) for i in range(2)]
    move = functools.partial(tiles.move, shape=shape, interpret=interpret)
    (y,) = move("read-out", tokens[:1], [matrix])
    np.testing.assert_array_equal(y, tokens[0])
    found = move("frame maps", tokens, [])
    assert [a.shape for a in found] == [matrix.shape] * 2
    (states,) = move("recurrence, one direction", [], [matrix] * 2)
    np.testing.assert_array_equal(states, matrix)


@pytest.mark.parametrize("size", [64, 112])
def test_lowers(monkeypatch, size):
    """At the released number of tokens every kernel is Mosaic's, and the Triton ones on request."""
    monkeypatch.setattr(choice, "capability", lambda: choice.HOPPER)
    monkeypatch.setattr(choice, "interpret", lambda: False)
    monkeypatch.setattr(gpu_states_hopper, "CHAINS", 1)
    batch, frames, count, heads = 1, 2, 880, 2

    def like(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((batch, frames, *shape), dtype)

    token = like(count, heads, size, dtype=jnp.bfloat16)
    matrix, row = like(heads, size, size), like(heads, 1, size)
    initial = jax.ShapeDtypeStruct((batch, heads, size, size), jnp.float32)
    beta, decay = like(count, heads), like(heads)
    k_beta = (token, beta, decay)

    def maps(tiles, k, v, beta, decay, w, u):
        saved = (k, v, beta, decay)
        found = api._maps(tiles, False, *saved)
        return found, [a for a in api._maps_backward(tiles, False, saved, (w, u)) if a is not None]

    def states(tiles, k, v, beta, decay, initial):
        def run(*saved):
            bidirectional = gdn.bidirectional_token_states(*saved, tiles=tiles, impl="pallas")
            return gdn.token_states(*saved, initial, tiles=tiles, impl="pallas"), bidirectional

        found, vjp = jax.vjp(run, k, v, beta, decay)
        return found, vjp(found)

    def rows(tiles, k, beta, decay, w, u):
        return maps(tiles, k, None, beta, decay, w, u)[1]

    def read(tiles, states, q, z, dy):
        static, saved = (tiles, False, 1e-8), (states, q, z, q)
        return api._read(static, *saved), api._read_backward(static, saved, dy)

    for function, args in (
        (maps, (token, *k_beta, matrix, matrix)),
        (states, (token, *k_beta, initial)),
        (rows, (*k_beta, matrix, row)),
        (read, (matrix, token, row, token)),
    ):
        text = lowered(functools.partial(function, gdn.Tiles()), *args)
        assert "mosaic_gpu" in text and "xla.gpu.triton" not in text
        text = lowered(functools.partial(function, gdn.Tiles(mosaic=())), *args)
        assert "xla.gpu.triton" in text
        assert function is states or "mosaic_gpu" not in text  # its recurrence is Mosaic's


@pytest.mark.parametrize(
    ("tokens", "size", "is_fit"),
    [(880, 112, True), (72, 64, True), (390, 112, False), (880, 72, False), (880, 128, False)],
)
def test_takes(tokens, size, is_fit):
    assert gpu_hopper.takes(tokens, size) == is_fit
