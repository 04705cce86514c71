"""`--precision fp8`: the layers, the error, the memory, and impossible cases."""

from __future__ import annotations

import re
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sanawm_jax.checkpoints.random_weights import write_random
from sanawm_jax.checkpoints.sizes import RELEASED, TINY
from sanawm_jax.core.float8 import LARGEST, float8_matmul, quantise, quantising, scale_for
from sanawm_jax.core.params import apply, build, from_leaves, leaves
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.model import DiT
from sanawm_jax.memory.plan import dit_need
from sanawm_jax.memory.programs import num_bytes
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.precision import build_dit, check_precision
from tests import tiny_dit
from tests.sample_tiny import sample

ROUNDING = 2.0**-4  # of e4m3, relative


def test_layers_of_the_release() -> None:
    _, abstract = build_dit(RELEASED.dit, "fp8")
    in_float8 = {p for p, leaf in leaves(abstract) if leaf.dtype == jnp.float8_e4m3fn}
    assert {path.partition(".layers.")[2] for path in in_float8} == {
        f"{name}.kernel.values"
        for name in (
            *("attn.qkv", "attn.out", "attn.gate"),
            *("cross_attn.q", "cross_attn.kv", "cross_attn.out"),
            *("ffn.up", "ffn.down"),
        )
    }
    assert len(in_float8) == 2 * 8  # in the GDN and in the softmax layers
    assert not [path for path in in_float8 if "camera" in path]
    # all else is where it was
    plain = {path: leaf.shape for path, leaf in leaves(build(DiT, RELEASED.dit)[1])}
    kernels = {path.removesuffix(".values") for path in in_float8}
    rest = {path: a.shape for path, a in leaves(abstract) if ".kernel." not in path}
    assert rest == {path: shape for path, shape in plain.items() if path not in kernels}


def test_sizes_that_do_not_fit_stay() -> None:
    """A model whose sizes are not multiples of 16 cannot use FP8."""
    config = DiTConfig(num_layers=1, hidden_size=40, num_attention_heads=1, linear_head_dim=40)
    with pytest.raises(InputError, match="multiples of 16"):
        build_dit(config, "fp8")


@pytest.mark.usefixtures("flash")
def test_memory() -> None:
    sizes: Any = RELEASED.dit, (1, 128, 121, 22, 40), 2, 300, np.dtype(jnp.bfloat16)
    wide, narrow = dit_need(*sizes), dit_need(*sizes, "fp8")
    layers = (3 + 1 + 1 + 1 + 2 + 1 + 6 + 3) * 2240**2  # a byte less for each of one block
    assert wide.weights - narrow.weights == pytest.approx(20 * layers, rel=1e-3)
    assert narrow.streamed < 0.75 * wide.streamed and narrow.other <= wide.other


def test_product(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 5, 48)).astype(np.float32)
    kernel = rng.standard_normal((48, 32)).astype(np.float32) * 0.02
    bias = rng.standard_normal(32).astype(np.float32)
    quantised = quantise(jnp.asarray(kernel))
    assert quantised["values"].shape == (32, 48) and quantised["scale"].shape == ()
    got = float8_matmul(jnp.asarray(x), **quantised, bias=jnp.asarray(bias))
    exact = x @ kernel
    assert got.shape == exact.shape and got.dtype == jnp.float32
    error = np.linalg.norm(got - bias - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < ROUNDING
    half = float8_matmul(jnp.asarray(x, jnp.bfloat16), **quantised, bias=jnp.asarray(bias))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), got, rtol=0.05, atol=0.05)


def test_what_xla_is_given() -> None:
    """The program is a product of two e4m3 matrices, then a scalar factor, then a vector.

    Only then does XLA make one library call of it on a GPU; no operation may come between.
    """
    x = jax.ShapeDtypeStruct((2, 3, 32), jnp.bfloat16)
    values = jax.ShapeDtypeStruct((48, 32), jnp.float8_e4m3fn)
    scale, bias = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((48,), jnp.bfloat16)
    traced = jax.jit(float8_matmul).trace(x, values, scale, bias)
    lines = traced.lower(lowering_platforms=("cuda",)).as_text().splitlines()
    (start,) = (i for i, line in enumerate(lines) if "stablehlo.dot_general" in line)
    assert "contracting_dims = [1] x [1]" in lines[start]
    assert "(tensor<6x32xf8E4M3FN>, tensor<48x32xf8E4M3FN>) -> tensor<6x48xbf16>" in lines[start]
    names = [re.search(r"stablehlo\.(\w+)", line) for line in lines[start + 1 :]]
    arithmetic = [n[1] for n in names if n and n[1] not in ("broadcast_in_dim", "convert")]
    # the first one multiplies the scales
    assert arithmetic[:4] == ["multiply", "multiply", "add", "reshape"]


def test_scales_are_powers_of_two_and_never_zero_or_infinite() -> None:
    largest = jnp.array([0.0, 1e-45, 1e-38, 1e-3, 1.0, 448.0, 449.0, 6e4, 3e38], jnp.float32)
    scale = np.asarray(scale_for(largest))
    assert (scale > 0).all() and np.isfinite(scale).all() and (np.frexp(scale)[0] == 0.5).all()
    assert (np.asarray(largest) / scale <= LARGEST).all()
    assert scale[0] == 1 and (scale[3:] / 2 <= np.asarray(largest)[3:] / LARGEST).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zeros_and_outliers(dtype: Any, rng: np.random.Generator) -> None:
    kernel = jnp.asarray(rng.standard_normal((32, 16)), dtype)
    quantised = quantise(kernel)
    zeros = quantise(jnp.zeros_like(kernel))
    x = jnp.asarray(rng.standard_normal((4, 32)), dtype).at[1].set(0).at[2, 3].set(1e4)
    y = np.asarray(float8_matmul(x, **quantised), np.float32)
    assert np.isfinite(y).all() and not y[1].any() and y[0].any()
    assert not float8_matmul(x, **zeros).any() and not float8_matmul(0 * x, **quantised).any()
    np.testing.assert_allclose(y[2], 1e4 * np.asarray(kernel[3], np.float32), rtol=0.1, atol=50)
    for broken in (np.nan, np.inf):
        assert np.isnan(np.asarray(float8_matmul(x.at[0, 0].set(broken), **quantised))[0]).all()


def test_a_network() -> None:
    graphdef, abstract = build_dit(tiny_dit.CONFIG, "fp8")
    place = quantising(abstract, None)
    params = tiny_dit.random_params()
    narrow = from_leaves({path: place(path, leaf) for path, leaf in leaves(params)})
    shapes = {path: (a.shape, a.dtype) for path, a in leaves(abstract)}
    assert {path: (a.shape, a.dtype) for path, a in leaves(narrow)} == shapes
    kernels = [p.removesuffix(".values") for p in shapes if p.endswith(".values")]
    before = sum(num_bytes(dict(leaves(params))[path]) for path in kernels)
    assert sum(num_bytes(dict(leaves(narrow))[f"{path}.values"]) for path in kernels) == before / 4

    run = jax.jit(apply, static_argnums=0)
    inputs = tiny_dit.random_inputs(2, 3)
    exact, got = run(tiny_dit.GRAPHDEF, params, **inputs), run(graphdef, narrow, **inputs)
    error = float(jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact))
    assert 0.005 < error < 0.1


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("precision")
    (weights,) = write_random(folder / "w", part="stage1", sizes=TINY)
    Image.new("RGB", (64, 64), (200, 30, 30)).save(folder / "image.png")
    rest = {"image": str(folder / "image.png"), "prompt": "a", "action": "w-8", "dtype": "bfloat16"}
    rest |= {"save_latents": str(folder / "latents.npy"), "latents_only": True, "step": 2}
    rest |= {"weights": str(weights), "output_dir": str(folder), "cfg_scale": 3.0}
    return rest


def test_sampling(given: dict[str, Any]) -> None:
    def latents(**options: str) -> np.ndarray:
        return np.load(sample(**{**given, **options}))

    exact = latents()
    with pytest.warns(UserWarning, match=r"--precision=fp8 is emulated on a cpu: slower than bf16"):
        got = latents(precision="fp8")
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(latents(precision="fp8", offload="model"), got)
        streamed = latents(precision="fp8", offload="block")
    # layers are compiled apart from each other, and round elsewhere
    assert np.linalg.norm(streamed - got) / np.linalg.norm(got) < error


def test_what_cannot_be(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for options, words in (
        ({"precision": "fp4"}, "--precision=fp4 is unknown; use one of bf16, fp8"),
        ({"precision": "fp8", "dtype": "float32"}, "--precision=fp8 needs --dtype=bfloat16"),
    ):
        with pytest.raises(InputError, match=words):
            sample(**{**given, **options})
    with pytest.raises(InputError, match="not with --devices"):
        check_precision("fp8", jnp.bfloat16, devices=2)

    def check(capability: str) -> None:
        device = types.SimpleNamespace(
            platform="gpu", device_kind="NVIDIA A100", compute_capability=capability
        )
        monkeypatch.setattr(jax, "devices", lambda: [device])
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        check_precision("fp8", jnp.bfloat16)

    with pytest.raises(InputError, match=r"capability 8\.9 or more; NVIDIA A100 has 8\.0"):
        check("8.0")
    for capability in ("8.9", "9.0", "10.0", "12.0", "gfx942"):
        check(capability)
