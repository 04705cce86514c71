"""The Pallas kernels of the frame recurrence against XLA, on difficult inputs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kernels_pallas import choice, gdn
from kernels_pallas.gdn import api, gpu_scan, gpu_scan_hopper, gpu_states_hopper
from tests.kernels.lowering import lowered, triton_kernels

TILES = gdn.Tiles.of(gdn.Tile(tokens=16, warps=4), scan_rows=16, scan_exact=True)
NAMES = ("q", "k", "v", "q_rot", "k_rot", "beta", "decay", "initial")


def _inputs(shape, dtype=jnp.float32, *, gate=None, strength=None, scale=1.0, hidden=()):
    """Returns tokens, gates and an initial state.

    Args:
      shape: (B, F, P, N, D).
      gate, strength: constant decay and beta; random by default.
      scale: of the keys, 1 is the model's.
      hidden: frames that are padding: beta 0, decay 1.
    """
    batch, frames, tokens, heads, size = shape
    keys = jax.random.split(jax.random.key(sum(shape)), 8)
    bound = size**-0.5 * tokens**-0.5
    found = {
        name: jax.random.normal(key, shape) for name, key in zip(NAMES[:5], keys[:5], strict=True)
    }
    found = {n: jax.nn.relu(a) if n in ("q", "k") else a for n, a in found.items()}
    for name in ("k", "k_rot"):
        found[name] = found[name] * bound * scale
    beta = jax.nn.sigmoid(jax.random.normal(keys[5], shape[:4]))
    decay = jax.nn.sigmoid(jax.random.normal(keys[6], (batch, frames, heads)) + 2)
    beta = beta if strength is None else jnp.full_like(beta, strength)
    decay = decay if gate is None else jnp.full_like(decay, gate)
    padding = jnp.isin(jnp.arange(frames), jnp.array(hidden, int))
    found["beta"] = jnp.where(padding[:, None, None], 0.0, beta)
    found["decay"] = jnp.where(padding[:, None], 1.0, decay)
    found["initial"] = jax.random.normal(keys[7], (batch, heads, size, size)) * 0.1
    return {n: a.astype(dtype) if n in NAMES[:5] else a for n, a in found.items()}


def _both_branches(inputs, impl, tiles, *, ends=None):
    """The main branch, normalised, and the camera branch; and the carried-out state."""
    options = {"impl": impl, "tiles": tiles}
    q, k, v, q_rot, k_rot, beta, decay, initial = (inputs[name] for name in NAMES)
    reset = None if ends is None else jnp.isin(jnp.arange(k.shape[1]), jnp.array(ends))
    states, final = gdn.bidirectional_token_states(
        k_rot, v, beta, decay, initial, chunk_ends=reset, **options
    )
    maps = gdn.normaliser_transitions(k, beta, decay, **options)
    normaliser, _ = gdn.bidirectional_states(maps, chunk_ends=reset, **options)
    y = gdn.normalised_read_out(states, normaliser, q_rot, q, 1e-2, **options)
    camera = gdn.read_out(states, q_rot, **options)
    # rounded as the model does it, the gradient with it
    y, camera = (a.astype(v.dtype).astype(jnp.float32) for a in (y, camera))
    return y, camera, final


@functools.partial(jax.jit, static_argnames=("impl", "tiles", "ends"))
def _run(inputs, weights, impl, tiles=TILES, ends=None):
    run = functools.partial(_both_branches, impl=impl, tiles=tiles, ends=ends)
    results, vjp = jax.vjp(run, inputs)
    return results, vjp(weights)[0]


def _results(inputs, impl, tiles=TILES, ends=None):
    batch, _, _, heads, size = inputs["q"].shape
    shapes = (inputs["q"].shape, inputs["q"].shape, (batch, heads, size, size))
    keys = jax.random.split(jax.random.key(9), 3)
    # exact in bfloat16: who rounds the gradient of y, and who leaves that out, gets the same
    weights = tuple(
        jax.random.normal(k, s, jnp.bfloat16).astype(jnp.float32)
        for k, s in zip(keys, shapes, strict=True)
    )
    found = jax.tree.leaves_with_path(_run(inputs, weights, impl, tiles, ends))
    return {jax.tree_util.keystr(path): np.asarray(a, np.float32) for path, a in found}


def _error(found, wanted):
    return np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-6)


# results in the tokens' dtype; XLA may leave the rounding out where it is undone at once
ROUNDED = ("[0][0]", "[0][1]", *(f"[1]['{name}']" for name in NAMES[:5]))
SHAPE = (2, 3, 18, 2, 8)
HARD = {
    "random": {},
    "chunks": {"ends": (1,)},
    "one frame of one token, head of 20": {"shape": (1, 1, 1, 1, 20)},
    "forgets": {"gate": 1e-6},
    "keeps": {"gate": 1.0},
    "writes nothing": {"strength": 0.0},
    "writes all": {"strength": 1.0},
    "large keys": {"scale": 3.0},
    "padding": {"hidden": (1, 2)},
}


@pytest.mark.parametrize("case", HARD)
def test_equals_xla(case):
    options = dict(HARD[case])
    ends = options.pop("ends", None)
    inputs = _inputs(options.pop("shape", SHAPE), **options)
    wanted = _results(inputs, "xla", ends=ends)
    found = _results(inputs, "pallas", ends=ends)
    assert found.keys() == wanted.keys() and len(found) == 3 + len(NAMES)
    for name, want in wanted.items():
        assert np.isfinite(found[name]).all() and _error(found[name], want) < 2e-6, name


def test_bfloat16_is_no_worse_than_xla():
    # enough tokens to average the rounding of a map
    inputs = _inputs((1, 3, 440, 1, 32), jnp.bfloat16)
    wide = {name: a.astype(jnp.float32) for name, a in inputs.items()}
    truth = _results(wide, "xla")
    xla, pallas = _results(inputs, "xla"), _results(inputs, "pallas")
    for name, want in truth.items():
        assert _error(pallas[name], want) < max(1.02 * _error(xla[name], want), 2e-5), name


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_and_its_gradient(reverse, exclusive):
    inputs = _inputs((1, 4, 8, 2, 4))
    maps = gdn.frame_transitions(*(inputs[n] for n in ("k_rot", "v", "beta", "decay")))
    reset = jnp.array([False, False, True, False])

    def run(maps, initial, impl):
        return gdn.scan_states(
            maps, initial, reverse=reverse, exclusive=exclusive, reset=reset, impl=impl, tiles=TILES
        )

    def both(impl):
        weights = jax.random.normal(jax.random.key(3), maps.u.shape)

        def total(maps, initial):
            states, final = run(maps, initial, impl)
            return jnp.sum(states * weights) + jnp.sum(jnp.sin(final)), (states, final)

        gradient = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
        return gradient(maps, inputs["initial"])

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6),
        both("xla"),
        both("pallas"),
    )


def _scan_inputs(shape, runs, adjoint):
    """Returns asymmetric transitions, which show a transposition, and a reset in the last run."""
    batch, frames, heads, values, size = shape
    keys = jax.random.split(jax.random.key(sum(shape)), 3)
    noise = jax.random.normal(keys[0], (batch, frames, heads, size, size))
    u = jax.random.normal(keys[1], (len(runs) if adjoint else 1, *shape))
    initial = jax.random.normal(keys[2], (len(runs), batch, heads, values, size))
    reset = jnp.zeros((len(runs), frames)).at[-1, frames // 2].set(1.0)
    return 0.9 * jnp.eye(size) + 0.3 / size**0.5 * noise, u, initial, reset


RUNS = {
    "forward": (gpu_scan.Run(False, False),),
    "before": (gpu_scan.Run(False, True),),
    "reverse": (gpu_scan.Run(True, False),),
    "both": (gpu_scan.Run(False, False), gpu_scan.Run(True, True)),
}


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("runs", RUNS)
def test_scan_of_a_row_is_that_of_a_matrix(runs, adjoint):
    w, u, initial, reset = _scan_inputs((2, 4, 2, 1, 20), RUNS[runs], adjoint)
    run = functools.partial(
        gpu_scan.scan, runs=RUNS[runs], tiles=TILES, adjoint=adjoint, interpret=True
    )
    found = run(w, u, initial, reset)
    wanted = run(w, *(jnp.repeat(a, 2, axis=-2) for a in (u, initial)), reset)
    for a, b in zip(wanted, found, strict=True):
        assert _error(b, a[..., :1, :]) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("sizes", [(64, 64), (112, 112), (96, 64)], ids=str)
def test_scan_on_hopper(sizes, runs, adjoint):
    if choice.capability() != choice.HOPPER or not gpu_scan_hopper.takes(*sizes, 5):
        pytest.skip("the kernel is for Hopper alone")
    inputs = _scan_inputs((2, 5, 3, *sizes), RUNS[runs], adjoint)
    wanted, found = (
        jax.jit(
            lambda *a, tiles=tiles: gpu_scan.scan(
                *a, RUNS[runs], tiles, adjoint=adjoint, interpret=False
            )
        )(*inputs)
        for tiles in (gdn.Tiles(scan_exact=True, scan_rows=16), gdn.Tiles())
    )
    for a, b in zip(wanted, found, strict=True):
        assert _error(np.asarray(b), np.asarray(a)) < 2e-5


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(200, 112), (72, 64), (1000, 80)], ids=str)
@pytest.mark.parametrize("runs", RUNS)
def test_states_of_tokens_on_hopper(monkeypatch, sizes, runs):
    """The combined kernel equals transitions and then recurrence, over many frames."""
    if choice.capability() != choice.HOPPER or jax.__version_info__ < (0, 11):
        pytest.skip("the kernel is for Hopper alone")
    monkeypatch.setattr(gpu_states_hopper, "CHAINS", 1)
    tokens, size = sizes
    inputs = _inputs((2, 67, tokens, 3, size), jnp.bfloat16, hidden=(5,))
    given = tuple(inputs[n] for n in ("k_rot", "v", "beta", "decay", "initial"))
    reset = jnp.zeros((67,), bool).at[jnp.array([3, 40])].set(True)
    first, *others = RUNS[runs]
    way = {"chunk_ends": reset} if others else {**first._asdict(), "reset": reset}
    function = gdn.bidirectional_token_states if others else gdn.token_states
    run = functools.partial(function, impl="pallas", **way)

    @functools.partial(jax.jit, static_argnames="mosaic")
    def both(given, mosaic):
        found, vjp = jax.vjp(functools.partial(run, tiles=gdn.Tiles(mosaic=mosaic)), *given)
        primal = run(*given, tiles=gdn.Tiles(mosaic=mosaic))
        return primal, found, vjp(jax.tree.map(jnp.cos, found))

    every = gdn.Tiles().mosaic
    wanted = both(given, tuple(name for name in every if name != "states"))
    found = both(given, every)
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        bound = 2e-3 if a.dtype == jnp.bfloat16 else 3e-5
        assert _error(np.asarray(b, np.float32), np.asarray(a, np.float32)) < bound
    for _ in range(20):  # who did not wait would read another state
        again = both(given, every)
        jax.tree.map(np.testing.assert_array_equal, again, found)


def test_finite_differences():
    inputs = _inputs((1, 2, 3, 1, 4))
    run = jax.jit(functools.partial(_both_branches, impl="pallas", tiles=TILES))
    check_grads(run, (inputs,), order=1, modes=["rev"], rtol=2e-2, atol=2e-2, eps=1e-2)


def test_lowers_for_cuda():
    batch, frames, tokens, heads, size = 1, 121, 880, 20, 112

    def like(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((batch, frames, *shape), dtype)

    token = like(tokens, heads, size, dtype=jnp.bfloat16)
    matrix, row = like(heads, size, size), like(heads, 1, size)
    beta, decay = like(tokens, heads), like(heads)
    tiles = gdn.Tiles()

    def maps(k, v, beta, decay, w, u):
        saved = (k, v, beta, decay)
        return api._maps(tiles, False, *saved), api._maps_backward(tiles, False, saved, (w, u))

    def read(states, q, z, dy):
        static, saved = (tiles, False, 1e-8), (states, q, z, q)
        return api._read(static, *saved), api._read_backward(static, saved, dy)

    def scan(w, u):
        runs = (gpu_scan.Run(False, False), gpu_scan.Run(True, True))
        initial, drop = jnp.zeros((2, *u[:, 0].shape)), jnp.zeros((2, u.shape[1]))
        return [
            gpu_scan.scan(w, u[None], initial, drop, runs, tiles, adjoint=adjoint, interpret=False)
            for adjoint in (False, True)
        ]

    assert triton_kernels(maps, token, token, beta, decay, matrix, matrix) == [
        "gdn_maps",
        "gdn_maps_gradient",
    ]
    assert triton_kernels(read, matrix, token, row, token) == ["gdn_read", "gdn_read_gradient"]
    assert triton_kernels(scan, matrix, row) == ["gdn_scan", "gdn_scan_adjoint"]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="an older lowering")
def test_lowers_for_hopper(monkeypatch):
    monkeypatch.setattr(choice, "capability", lambda: choice.HOPPER)
    runs = RUNS["both"]
    for adjoint in (False, True):
        inputs = _scan_inputs((1, 3, 2, 112, 112), runs, adjoint)
        run = functools.partial(
            gpu_scan.scan, runs=runs, tiles=gdn.Tiles(), adjoint=adjoint, interpret=False
        )
        assert "mosaic_gpu" in lowered(run, *inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("capability", [choice.AMPERE, choice.HOPPER])
@pytest.mark.parametrize("case", HARD)
def test_on_a_gpu(monkeypatch, case, capability):
    if capability > choice.capability():
        pytest.skip("an older card")
    monkeypatch.setattr(choice, "capability", lambda: capability)
    jax.clear_caches()  # what was traced for another card
    options = dict(HARD[case])
    ends, shape = options.pop("ends", None), options.pop("shape", (2, 5, 200, 2, 112))
    inputs = _inputs(shape, jnp.bfloat16, **options)
    truth = _results({n: a.astype(jnp.float32) for n, a in inputs.items()}, "xla", ends=ends)
    xla = _results(inputs, "xla", ends=ends)
    for name, found in _results(inputs, "pallas", gdn.Tiles(), ends).items():
        # a gradient that is a sum of two is rounded twice
        bound = max(1.1 * _error(xla[name], truth[name]), 3e-3 if name in ROUNDED else 3e-4)
        assert np.isfinite(found).all() and _error(found, truth[name]) < bound, name
