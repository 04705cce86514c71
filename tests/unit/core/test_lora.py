"""Adapters on linear layers: shapes, initial values, forward pass, merging and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from sanawm_jax.core.layers import Linear
from sanawm_jax.core.lora import LoraConfig, build_adapted, combine, init_adapters, merge_lora
from sanawm_jax.core.params import Params, apply, build, init, leaves, stack
from sanawm_jax.runtime.errors import InputError

WIDTH, LAYERS, RANK = 12, 3, 4


class Layer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.up = Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = Linear(2 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jnp.tanh(self.up(x)))


class Net(nnx.Module):
    """A scanned stack and a layer outside of it."""

    def __init__(self, config: str, *, rngs: nnx.Rngs):
        del config
        self.layers = stack(lambda rngs: Layer(rngs=rngs), rngs, (LAYERS,))
        self.out = Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x, _ = lax.scan(lambda x, layer: (layer(x), None), x, self.layers)
        return self.out(x)


TARGETS = (r"layers\.(up|down)", "out")


@pytest.fixture(scope="module")
def base() -> Params:
    return init(Net, "net", jax.random.key(0))


def adapters(lora: LoraConfig, *, trained: bool) -> Params:
    """Returns new adapters, or adapters whose B is not zero."""
    _, abstract = build_adapted(Net, "net", lora)
    fresh = init_adapters(abstract, jax.random.key(1))
    if not trained:
        return fresh
    return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(2), a.shape), fresh)


def run(lora: LoraConfig | None, params: Params, x: jax.Array) -> jax.Array:
    graphdef = build_adapted(Net, "net", lora)[0] if lora else build(Net, "net")[0]
    return jax.jit(lambda p: apply(graphdef, p, x))(params)


@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
def test_merged_equals_adapted(base: Params, alpha: float | None) -> None:
    lora = LoraConfig(RANK, TARGETS, alpha)
    x = jax.random.normal(jax.random.key(3), (2, WIDTH))
    trained = adapters(lora, trained=True)
    adapted = run(lora, combine(base, trained), x)
    merged = run(None, merge_lora(base, trained, lora.scale), x)
    np.testing.assert_allclose(adapted, merged, atol=1e-5)
    assert np.abs(adapted - run(None, base, x)).max() > 1e-2


def test_alpha_over_rank_scales_the_product(base: Params) -> None:
    trained = adapters(LoraConfig(RANK, ("out",)), trained=True)
    one = merge_lora(base, trained, LoraConfig(RANK, ("out",)).scale)
    half = merge_lora(base, trained, LoraConfig(RANK, ("out",), RANK / 2).scale)
    step = np.asarray(one["out"]["kernel"] - base["out"]["kernel"])
    np.testing.assert_allclose(half["out"]["kernel"] - base["out"]["kernel"], step / 2, atol=1e-6)
    by_hand = np.asarray(trained["out"]["lora_a"]) @ np.asarray(trained["out"]["lora_b"])
    np.testing.assert_allclose(step, by_hand, atol=1e-6)


def test_fresh_adapters_change_nothing_and_have_peft_s_size(base: Params) -> None:
    lora = LoraConfig(RANK, TARGETS)
    fresh = adapters(lora, trained=False)
    x = jax.random.normal(jax.random.key(3), (2, WIDTH))
    np.testing.assert_array_equal(run(lora, combine(base, fresh), x), run(None, base, x))
    a = np.asarray(fresh["layers"]["down"]["lora_a"])  # LAYERS 2*WIDTH RANK
    bound = (2 * WIDTH) ** -0.5
    assert a.shape == (LAYERS, 2 * WIDTH, RANK)
    assert 0.9 * bound < np.abs(a).max() <= bound
    assert np.std(a) == pytest.approx(bound / 3**0.5, rel=0.1)
    assert np.unique(a).size > 0.9 * a.size  # layers are not copies
    assert not np.any(fresh["layers"]["down"]["lora_b"])


def test_only_the_targets_and_only_adapters_are_trained(base: Params) -> None:
    lora = LoraConfig(RANK, (r"layers\.up",))
    fresh = adapters(lora, trained=False)
    assert [p for p, _ in leaves(fresh)] == ["layers.up.lora_a", "layers.up.lora_b"]
    x = jax.random.normal(jax.random.key(3), (2, WIDTH))
    graphdef, _ = build_adapted(Net, "net", lora)

    def loss(a: Params) -> jax.Array:
        return jnp.sum(apply(graphdef, combine(base, a), x) ** 2)

    gradient = jax.jit(jax.grad(loss))(fresh)
    assert jax.tree.structure(gradient) == jax.tree.structure(fresh)
    # B starts at zero, so A's gradient does too
    assert np.abs(gradient["layers"]["up"]["lora_b"]).max() > 0
    assert not np.any(gradient["layers"]["up"]["lora_a"])


def test_the_whole_product_is_never_made(base: Params) -> None:
    """No intermediate of the forward pass has the shape of a kernel or of a stack of them."""
    lora = LoraConfig(RANK, (r"layers\.up",))
    graphdef, _ = build_adapted(Net, "net", lora)
    both = combine(base, adapters(lora, trained=True))
    x = jnp.ones((7, WIDTH))
    text = str(jax.make_jaxpr(lambda p: apply(graphdef, p, x))(both))
    for shape in (f"[{LAYERS},{WIDTH},{2 * WIDTH}] = dot_general", f"[{WIDTH},{2 * WIDTH}] = dot"):
        assert shape not in text
    assert f"f32[7,{RANK}] = dot_general" in text


def test_bfloat16_base_stays_bfloat16(base: Params) -> None:
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), base)
    merged = merge_lora(low, adapters(LoraConfig(RANK, TARGETS), trained=True), 1.0)
    assert {a.dtype for a in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}


def test_separate_layers_are_merged_one_by_one(base: Params) -> None:
    trained = adapters(LoraConfig(RANK, TARGETS), trained=True)
    stacked = merge_lora(base, trained, 0.5)
    separate = merge_lora({**base, "layers": jax.tree.map(tuple, base["layers"])}, trained, 0.5)
    kernels = separate["layers"]["up"]["kernel"]
    assert isinstance(kernels, tuple) and len(kernels) == LAYERS
    for (path, leaf), (_, expected) in zip(leaves(separate), leaves(stacked), strict=True):
        np.testing.assert_allclose(np.asarray(leaf), expected, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    ("rank", "targets", "alpha", "words"),
    [
        (0, TARGETS, None, "rank=0"),
        (RANK, (), None, "targets is empty"),
        (RANK, ("out", "nothing"), None, "no linear layer matches 'nothing'"),
        (RANK, ("(",), None, "no expression"),
        (RANK, TARGETS, 0.0, "alpha=0.0"),
        (6, TARGETS, None, "rank=6 is more than out's full rank, 5"),
    ],
)
def test_bad_settings_are_one_line(
    rank: int, targets: tuple[str, ...], alpha: float | None, words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        build_adapted(Net, "net", LoraConfig(rank, targets, alpha))
    assert "\n" not in str(caught.value)


def test_adapters_of_another_model_are_refused(base: Params) -> None:
    with pytest.raises(InputError, match=r"has blocks\.q, which this model has not"):
        merge_lora(base, {"blocks": {"q": {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.ones(3)}}}, 1)
    wrong = {"out": {"lora_a": jnp.ones((WIDTH, 2)), "lora_b": jnp.ones((2, 6))}}
    with pytest.raises(InputError, match=r"out is for \(12, 6\), not \(12, 5\)"):
        merge_lora(base, wrong, 1.0)
