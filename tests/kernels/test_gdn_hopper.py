"""The Mosaic GPU kernels of the recurrence, in the interpreter with race detector, and lowered.

Before JAX 0.11 these kernels cannot be built, and the Triton kernels run instead.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import tiles
from kernels_pallas import gdn
from kernels_pallas.gdn import (
    gpu_hopper,
    gpu_maps_hopper,
    gpu_read_hopper,
    gpu_scan_hopper,
    gpu_states_hopper,
    reference,
)
from kernels_pallas.gdn.gpu import Run
from tests.kernels import hopper_programs, interpreter
from tests.kernels.lowering import lowered

IS_BUILT = jax.__version_info__ >= (0, 11)  # else it is an older Mosaic GPU
SHAPE = (1, 2, 328, 2, 112)  # five tiles of 64 tokens, more than are held at once, and an eighth
ROUNDING = 2**-9  # of bfloat16


def _normal(index, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(index), shape).astype(dtype)


@pytest.fixture
def semaphores(monkeypatch):
    if jax.__version_info__ < interpreter.FIRST_VERSION:
        pytest.skip("an older interpreter")
    return interpreter.teach(monkeypatch)


@pytest.fixture
def interpret(semaphores):
    """Parameters of the interpreter, extended by all operations of the kernels."""
    from jax._src.pallas.mosaic_gpu.interpret import params

    return params.InterpretGPUParams(detect_races=True, on_race="warn")


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


def _races(caplog):
    """Returns the races, except those where both warpgroups write the same values."""
    found = []
    for report in caplog.messages:
        if "RACE DETECTED" not in report:
            continue
        lines = [line.strip() for line in report.splitlines() if "Key(" in line]
        places = {line.rpartition(", ")[2] for line in lines}
        if len(places) > 1 or not all(line.startswith("write") for line in lines):
            found.append(lines or report)
    return found


@pytest.mark.parametrize("has_values", [True, False])
def test_maps(has_values, tokens, interpret, caplog):
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
    assert not _races(caplog)


@pytest.mark.parametrize("is_normalised", [True, False])
def test_read_out(is_normalised, tokens, interpret, caplog):
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
    assert not _races(caplog)


@pytest.mark.parametrize(
    "runs", [[Run(False, False)], [Run(False, False), Run(True, True)]], ids=["one", "both"]
)
@pytest.mark.parametrize("adjoint", [False, True])
def test_recurrence(runs, adjoint, interpret, caplog):
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
    assert not _races(caplog)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_states_of_tokens(reverse, exclusive, interpret, semaphores, caplog):
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
    # each block but those of the first frame waited for the block before it
    waited = {(turn, chain, group) for turn in (1, 2) for chain in range(4) for group in range(2)}
    assert semaphores.waits == waited
    # the race detector does not know that semaphores guard the states in the device's memory
    assert not [race for race in _races(caplog) if "memory_space_id=0" not in race[0]]


def test_recurrence_takes_what_fits():
    assert gpu_scan_hopper.takes(112, 112, 256) == IS_BUILT
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
@pytest.mark.parametrize("name", hopper_programs.PROGRAMS)
def test_lowers(monkeypatch, name, size):
    """At the released number of tokens every kernel is Mosaic's, and the Triton ones on request."""
    hopper_programs.pretend(monkeypatch)
    function, args = hopper_programs.program(name, size)
    text = lowered(functools.partial(function, gdn.Tiles()), *args)
    assert ("mosaic_gpu" in text) == IS_BUILT == ("xla.gpu.triton" not in text)
    text = lowered(functools.partial(function, gdn.Tiles(mosaic=())), *args)
    assert "xla.gpu.triton" in text
    # of the states, the recurrence is Mosaic's all the same
    assert (IS_BUILT and name == "states") == ("mosaic_gpu" in text)


@pytest.mark.parametrize(
    ("tokens", "size", "is_fit"),
    [(880, 112, True), (72, 64, True), (390, 112, False), (880, 72, False), (880, 128, False)],
)
def test_takes(tokens, size, is_fit):
    assert gpu_hopper.takes(tokens, size) == (is_fit and IS_BUILT)
