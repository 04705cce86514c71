"""Updates, schedules, averages and the autoencoder's loss on a toy model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sanawm_jax.core.params import build, leaves
from sanawm_jax.core.stack import stacked_axes
from sanawm_jax.refiner.model import Refiner
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.engine.learner import MODEL, UpdateRule
from sanawm_jax.training.engine.optimizer import (
    decay_mask,
    ema_decay,
    learning_rate,
    make_optimizer,
    matrix_axes,
)
from sanawm_jax.training.engine.state import create_state
from sanawm_jax.training.engine.step import GradientUpdate, compile_steps
from sanawm_jax.training.objectives.vae_loss import VAELossWeights, edge_loss, vae_loss
from tests import tiny_refiner


def _prepare(resident, batch, key):
    return resident[batch], jax.random.normal(key, batch.shape)


def _loss(params, examples):
    x, noise = examples
    error = x * params["a"]["kernel"] + params["a"]["bias"] + 0.1 * noise - 1.0
    return jnp.mean(error**2), {"noise": jnp.mean(noise)}


def _setup(rate=lambda step, wall: 0.01, accumulation=1, **kwargs):
    params = {"a": {"kernel": jnp.array(2.0), "bias": jnp.array(0.5)}}
    rule = UpdateRule(make_optimizer(**kwargs), rate, decay=0.9)
    steps = compile_steps(update=GradientUpdate(rule, _prepare, _loss, accumulation))
    return params, create_state({MODEL: params}, {MODEL: rule}), steps


def _batches(steps):
    return jax.random.randint(jax.random.key(1), (steps, 4), 0, 10)


def test_equals_optax_adamw():
    params, state, steps = _setup(weight_decay=0.1, clip_norm=0.5)
    resident, batches = jnp.arange(10.0), _batches(5)
    reference = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(0.01, weight_decay=0.1, mask=decay_mask)
    )
    key = jax.random.key(0)
    p, opt, ema = params, reference.init(params), params
    for i, batch in enumerate(batches):
        examples = _prepare(resident, batch, jax.random.fold_in(key, i))
        grads = jax.grad(lambda p, e: _loss(p, e)[0])(p, examples)
        updates, opt = reference.update(grads, opt, p)
        p = optax.apply_updates(p, updates)
        d = min(0.9, (1 + i) / (10 + i))
        ema = jax.tree.map(lambda e, x, d=d: d * e + (1 - d) * x, ema, p)
    state, metrics = steps(state, resident, batches, key, jnp.float32(0))
    assert int(state.step) == 5 and metrics["loss"].shape == (5,)
    for ours, theirs in ((state.model.params, p), (state.model.average, ema)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), ours, theirs)
    assert len(np.unique(metrics["noise"])) == 5  # every step has its own key


def test_randomness_depends_on_the_step_alone():
    _, whole, steps = _setup()
    _, parts, _ = _setup()
    resident, batches, key = jnp.arange(10.0), _batches(4), jax.random.key(0)
    whole, _ = steps(whole, resident, batches, key, jnp.float32(0))
    for i in (0, 2):
        parts, _ = steps(parts, resident, batches[i : i + 2], key, jnp.float32(0))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_whole_batch(parts):
    _, whole, steps = _setup()
    _, parted, in_parts = _setup(accumulation=parts)
    args = (jnp.arange(10.0), _batches(3), jax.random.key(0), jnp.float32(0))
    whole, metrics = steps(whole, *args)
    parted, part_metrics = in_parts(parted, *args)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, parted, whole)
    jax.tree.map(close, part_metrics, metrics)


def test_state_is_donated():
    _, state, steps = _setup()
    steps(state, jnp.arange(10.0), _batches(1), jax.random.key(0), jnp.float32(0))
    assert state.model.params["a"]["kernel"].is_deleted()


def test_learning_rate():
    rate = functools.partial(learning_rate, peak=1.0, warmup_steps=10, num_steps=100)
    assert float(rate(0, 0.0, schedule="constant")) == pytest.approx(0.1)
    assert float(rate(99, 0.0, schedule="constant")) == 1.0
    assert float(rate(50, 0.0)) == pytest.approx(0.5)
    assert float(rate(20, 0.5)) == pytest.approx(0.5)  # the clock is ahead of the steps
    assert float(rate(100, 0.0, final_fraction=0.1)) == pytest.approx(0.1)
    with pytest.raises(InputError, match="schedule"):
        rate(0, 0.0, schedule="linear")


def test_average_starts_quickly():
    assert float(ema_decay(0, 0.999)) == pytest.approx(0.1)
    assert float(ema_decay(10**6, 0.999)) == pytest.approx(0.999)


def test_only_kernels_decay():
    assert decay_mask({"a": {"kernel": 1, "bias": 2}, "latents_std": 3}) == {
        "a": {"kernel": True, "bias": False},
        "latents_std": False,
    }


def test_vae_loss_of_a_perfect_reconstruction_is_the_kl():
    video = jax.random.uniform(jax.random.key(0), (2, 3, 8, 8, 3), minval=-1.0)
    mean, logvar = jnp.full((2, 1, 2, 2, 4), 2.0), jnp.zeros((2, 1, 2, 2, 4))
    loss, terms = vae_loss(video, video, mean, logvar, VAELossWeights(kl=0.5))
    assert float(terms["kl"]) == pytest.approx(2.0)
    assert float(loss) == pytest.approx(1.0, abs=1e-5)


def test_vae_loss_of_an_offset():
    video = jnp.zeros((1, 1, 8, 8, 3))
    zero = jnp.zeros((1, 1, 2, 2, 4))
    loss, terms = vae_loss(video + 0.2, video, zero, zero, VAELossWeights(kl=0.0))
    assert float(terms["edges"]) == 0.0
    assert float(terms["psnr"]) == pytest.approx(20.0)  # 0.1 of a range of 1
    assert float(loss) == pytest.approx(0.2 - 1e-3 + 0.04, abs=1e-4)


def test_edges_see_every_axis():
    for axis in (1, 2, 3):
        ramp = jnp.moveaxis(jnp.arange(4.0).reshape(1, 4, 1, 1, 1), 1, axis)
        ramp = jnp.broadcast_to(ramp, (1, 4, 4, 4, 3))
        assert float(edge_loss(ramp)) == pytest.approx(1 / 3)


def test_muon_takes_matrices_of_every_layer_alone() -> None:
    """Muon orthogonalises stacked layers one by one; AdamW updates depthwise kernels and others."""
    params = {
        "segments": {"0": {"runs": {"0": {"layers": {"kernel": jnp.ones((2, 3, 8, 4))}}}}},
        "conv": {"kernel": jnp.ones((3, 3, 4, 6)), "bias": jnp.ones((6,))},
        "depthwise": {"kernel": jnp.ones((3, 3, 1, 6))},
    }
    axes = dict(leaves(matrix_axes(params)))
    assert axes["segments.0.runs.0.layers.kernel"] == ((2,), (3,))
    assert axes["conv.kernel"] == ((0, 1, 2), (3,))
    assert axes["conv.bias"] is None and axes["depthwise.kernel"] is None

    optimizer = make_optimizer(name="muon", clip_norm=1e9)
    keys = iter(jax.random.split(jax.random.key(0), 8))
    gradients = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape), params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    stacked = np.asarray(dict(leaves(updates))["segments.0.runs.0.layers.kernel"])
    for matrix in stacked.reshape(6, 8, 4):
        singular = np.linalg.svd(matrix, compute_uv=False)
        # five Newton-Schulz steps bring all singular values near one another
        assert singular.max() / singular.min() < 2.0
        assert 0.1 < np.sqrt(np.mean(matrix**2)) < 0.3  # as large as an update of AdamW


def test_muon_update_of_a_refiner_layer_is_the_update_of_that_layer_alone() -> None:
    abstract = build(Refiner, tiny_refiner.CONFIG)[1]
    keys = iter(jax.random.split(jax.random.key(1), 2 * len(jax.tree.leaves(abstract))))

    def draw(tree):
        return jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape), tree)

    params, gradients = draw(abstract), draw(abstract)
    optimizer = make_optimizer(name="muon", clip_norm=1e9, weight_decay=0.1)

    def update(params, gradients):
        return dict(leaves(optimizer.update(gradients, optimizer.init(params), params)[0]))

    together = update(params, gradients)
    stacked = {path for path in together if stacked_axes(path)}
    assert stacked == {path for path in together if path.startswith("blocks.")}
    for i in range(tiny_refiner.CONFIG.num_layers):
        one_layer = (
            {"layer": jax.tree.map(lambda a, i=i: a[i], t["blocks"])} for t in (params, gradients)
        )
        alone = update(*one_layer)
        for path in stacked:
            expected = alone[path.replace("blocks.", "layer.", 1)]
            np.testing.assert_allclose(
                together[path][i], expected, rtol=2e-4, atol=2e-5, err_msg=path
            )


def test_unknown_optimizer() -> None:
    with pytest.raises(InputError, match=r"optimizer.name='sgd'; use one of adamw, muon"):
        make_optimizer(name="sgd")
    with pytest.raises(InputError, match=r"moments_dtype='int8'; use one of float32, bfloat16"):
        make_optimizer(moments_dtype="int8")


def test_adamw_without_a_first_moment_does_not_keep_one() -> None:
    params = {"a": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones((4,))}}
    rules = (
        make_optimizer(betas=(0.0, 0.9), weight_decay=0.1, clip_norm=1e9),
        optax.adamw(1.0, 0.0, 0.9, weight_decay=0.1, mask=decay_mask(params)),
    )
    states = [rule.init(params) for rule in rules]
    assert len(jax.tree.leaves(states[0])) == 1 + 2  # a count, and the second moments
    for scale in (0.3, -1.0, 2.0):
        gradients = jax.tree.map(lambda a: scale * a, params)  # noqa: B023
        found = [
            rule.update(gradients, state, params) for rule, state in zip(rules, states, strict=True)
        ]
        states = [state for _, state in found]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found[0][0], found[1][0]
        )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_first_moments_in_bfloat16(name: str) -> None:
    params = {"a": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones((4,))}}
    gradients = jax.tree.map(lambda a: 0.3 * a, params)
    updates = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(name=name, moments_dtype=dtype)
        update, state = optimizer.update(gradients, optimizer.init(params), params)
        flat = jax.tree_util.tree_flatten_with_path(state)[0]
        first, second = (
            {leaf.dtype.name for path, leaf in flat if f".{part}" in jax.tree_util.keystr(path)}
            for part in ("mu", "nu")
        )
        assert first == {dtype} and second == {"float32"}
        assert {leaf.dtype.name for leaf in jax.tree.leaves(update)} == {"float32"}
        updates[dtype] = update
    # the first update is made before the moments are rounded
    jax.tree.map(np.testing.assert_array_equal, *updates.values())
