"""The attention kernel, which needs whole tiles; its padding; and the choice of implementation."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import choice
from kernels_pallas.attention import api, flash_attention
from kernels_pallas.attention.tpu import splash_attention
from sanawm_jax.core.attention import attention, attention_to_both, seen_first


def _tokens(queries, keys, size, dtype=jnp.float32):
    shapes = ((2, queries, 3, size), (2, keys, 3, size), (2, keys, 3, size))
    return tuple(
        jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes)
    )


def _plain(q, k, v):
    """Computes what the kernel computes, and checks the sizes that it supports."""
    assert q.shape[1] % 128 == k.shape[1] % 128 == q.shape[3] % 64 == 0
    return jax.nn.dot_product_attention(q, k, v, scale=1.0)


@pytest.mark.parametrize(("queries", "keys", "size"), [(5, 130, 16), (128, 256, 64), (200, 7, 112)])
def test_padding_changes_nothing(queries, keys, size):
    q, k, v = _tokens(queries, keys, size)
    found = api.padded_attention(q, k, v, 0.3, _plain, dtype=jnp.float32)
    wanted = jax.nn.dot_product_attention(q, k, v, scale=0.3)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_hidden_keys_stay_hidden_from_queries_that_see_nothing_else():
    q, k, v = _tokens(3, 4, 16)
    # logits of -300 are far above those of the padding
    found = api.padded_attention(q * 0 + 1, k * 0 - 1, v, 300 / 16, _plain, dtype=jnp.float32)
    np.testing.assert_allclose(found[:, 0], v.mean(1), rtol=1e-5, atol=1e-6)


def test_half_precision_takes_large_values():
    q, k, v = _tokens(128, 128, 16)
    found = api.padded_attention(q, k, v * 1e6, 0.25, _plain)
    assert np.isfinite(found).all()


def test_short_sequences_stay_in_the_library(monkeypatch):
    ran = []

    def stands_for(name: str | None):
        def run(first, q, *_):
            ran.append(name or first)
            return q

        return run

    monkeypatch.setattr(api, "_library", stands_for(None))
    monkeypatch.setattr(api, "_mosaic", stands_for("mosaic"))
    monkeypatch.setattr(choice, "capability", lambda: 9.0)
    long, short = (jnp.zeros((1, n, 1, 8), jnp.bfloat16) for n in (8192, 300))
    options = {"scale": 1.0, "impl": "mosaic"}
    flash_attention(long, long, long, **options)
    flash_attention(long, short, short, **options)
    counts = jnp.ones((1,), jnp.int32)
    flash_attention(long, long, long, **options, key_count=counts)
    assert ran == ["mosaic", "cudnn", "cudnn"]


@pytest.mark.parametrize(("capability", "size"), [(7.5, 64), (0.0, 64), (9.0, 12), (9.0, 256)])
def test_what_cudnn_does_not_take_runs_in_xla(monkeypatch, capability, size):
    monkeypatch.setattr(choice, "capability", lambda: capability)
    q, k, v = _tokens(5, 7, size, jnp.bfloat16)
    wanted = jax.nn.dot_product_attention(q, k, v, scale=0.1)
    np.testing.assert_array_equal(flash_attention(q, k, v, 0.1), wanted)


@pytest.mark.gpu
def test_on_a_gpu():
    q, k, v = _tokens(8200, 8300, 112, jnp.bfloat16)
    wide = tuple(a.astype(jnp.float32) for a in (q[:, :500], k, v))
    truth = np.asarray(jax.nn.dot_product_attention(*wide))

    def error(impl):
        y = jax.jit(lambda *a: flash_attention(*a, 112**-0.5, impl=impl))(q, k, v)
        return np.linalg.norm(np.asarray(y[:, :500], np.float32) - truth) / np.linalg.norm(truth)

    assert error("mosaic") < 1.1 * error("cudnn")
    gradient = jax.jit(
        jax.grad(lambda q: flash_attention(q, k, v, 0.1, impl="mosaic").astype(jnp.float32).sum())
    )(q)
    assert np.isfinite(np.asarray(gradient, np.float32)).all()
    assert choice.AUTO["attention"] in choice.IMPLS["attention"]


def test_two_sets_of_keys_are_one():
    q, k, v = _tokens(5, 9, 16)
    wanted = jax.nn.dot_product_attention(q, k[:, :7], v[:, :7])
    first, second = (k[:, :4], v[:, :4]), (k[:, 4:], v[:, 4:])
    counts = jnp.full((2,), 3, jnp.int32)
    found = attention_to_both(q, first, second, key_count=counts)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)

    def with_sums(k, v):
        y, sums = jax.nn.dot_product_attention(q, k, v, return_residual=True)
        return y, jnp.swapaxes(sums, 1, 2)

    found = api.merged(with_sums(*first), with_sums(k[:, 4:7], v[:, 4:7]))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_library_still_gives_sums():
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    options = inspect.signature(dot_product_attention).parameters
    assert {"q_seqlen", "kv_seqlen", "mask_type", "scale", "return_residual"} <= options.keys()
    assert MaskType.PADDING != MaskType.NO_MASK


@pytest.mark.gpu
def test_two_sets_of_keys_on_a_gpu():
    """Checks the values, and that they have a gradient."""
    q, k, v = _tokens(300, 1500, 128, jnp.bfloat16)
    first, second = (k[:, :300], v[:, :300]), (k[:, 300:], v[:, 300:])
    seen = (a[:, :1000].astype(jnp.float32) for a in (k, v))
    truth = np.asarray(jax.nn.dot_product_attention(q.astype(jnp.float32), *seen))
    found = attention_to_both(q, first, second, key_count=jnp.full((2,), 700, jnp.int32))
    error = np.linalg.norm(np.asarray(found, np.float32) - truth) / np.linalg.norm(truth)
    assert error < 4e-3

    def total(q, *sets):
        y = attention_to_both(q, *sets, key_count=jnp.full((2,), 700, jnp.int32))
        return jnp.sum(y.astype(jnp.float32) ** 2)

    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(q, first, second)
    assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in jax.tree.leaves(gradients))
    assert np.any(np.asarray(gradients[0], np.float32))


def test_hidden_keys_last():
    q, k, v = _tokens(3, 7, 16)
    mask = jnp.array([[True, False, True, True, False, False, True], [False] * 6 + [True]])
    wanted = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
    k, v, count = seen_first(k, v, mask)
    found = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=count)
    assert count.tolist() == [4, 1]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts", [None, [150, 7]])
def test_splash_attention_and_its_gradient(counts):
    inputs = _tokens(130, 200, 112)
    count = None if counts is None else jnp.array(counts)
    weights = jax.random.normal(jax.random.key(3), inputs[0].shape)

    def splash(q, k, v):
        y = splash_attention(q, k, v, 0.1, key_count=count, block=128, interpret=True)
        return jnp.sum(y * weights), y

    def plain(q, k, v):
        y = jax.nn.dot_product_attention(q, k, v, scale=0.1, key_value_seq_lengths=count)
        return jnp.sum(y * weights), y

    found, wanted = (
        jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(*inputs) for f in (splash, plain)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), found[0][1], wanted[0][1]
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), found[1], wanted[1])


@pytest.mark.parametrize(("keys", "is_splash"), [(1024, True), (300, False)])
def test_a_tpu_runs_splash_attention_on_long_sequences(monkeypatch, keys, is_splash):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    called = []

    def run(*inputs, **options):
        called.append(options)
        return splash_attention(*inputs, **options, interpret=True)

    monkeypatch.setattr(api, "splash_attention", run)
    q, k, v = _tokens(200, keys, 16, jnp.bfloat16)
    mask = jnp.arange(keys) % 3 != 1
    found = attention(q, k, v, key_mask=jnp.stack([mask, mask]))
    wanted = jax.nn.dot_product_attention(q, k, v, mask=mask[None, None, None])
    assert bool(called) == is_splash
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(wanted, np.float32), atol=2e-2
    )


def test_the_gradient_to_two_sets_of_keys_is_that_of_one_set():
    q, k, v = _tokens(5, 4, 16)
    first, second = (k, v), tuple(jnp.flip(a, 1) + 0.5 for a in (v, k))
    counts = jnp.array([3, 1], jnp.int32)
    target = jax.random.normal(jax.random.key(9), q.shape)

    def of(attend):
        return jax.value_and_grad(lambda *args: jnp.sum(attend(*args) * target), (0, 1, 2))

    def both(q, first, second):
        return api.flash_attention_to_both(q, first, second, 0.3, key_count=counts)

    def one(q, first, second):
        k, v = (jnp.concatenate(pair, 1) for pair in zip(first, second, strict=True))
        mask = jnp.arange(8) < 4 + counts[:, None]
        return jax.nn.dot_product_attention(q, k, v, scale=0.3, mask=mask[:, None, None])

    found, expected = (of(f)(q, first, second) for f in (jax.checkpoint(both), one))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )
    # without a gradient the two sets stay apart
    np.testing.assert_allclose(both(q, first, second), one(q, first, second), rtol=1e-5, atol=1e-5)
    assert "concatenate" not in str(jax.make_jaxpr(both)(q, first, second))
