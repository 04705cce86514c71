"""The inputs of a refiner's training step: layouts, all kinds of history, adapters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import refiner as refiner_config
from sanawm_jax.core.lora import LoraConfig, build_adapted, combine, init_adapters
from sanawm_jax.core.params import Params, build, init, leaves
from sanawm_jax.core.sharding import parameter_spec
from sanawm_jax.refiner.config import LTX_2_19B, RefinerConfig
from sanawm_jax.refiner.model import Refiner
from sanawm_jax.refiner.rope import video_rope
from sanawm_jax.training.engine.learner import UpdateRule
from sanawm_jax.training.engine.optimizer import make_optimizer
from sanawm_jax.training.engine.state import create_state
from sanawm_jax.training.engine.step import GradientUpdate, train_step
from sanawm_jax.training.objectives import refiner_history as history
from sanawm_jax.training.objectives.refiner_flow import sequence_loss, stream_sequence
from sanawm_jax.training.objectives.refiner_loss import PrepareRefiner, RefinerLoss, make_objective

CLIPS, FRAMES, ROWS, COLUMNS, CHANNELS, BATCH = 5, 6, 2, 2, 4, 4
MODEL = RefinerConfig(
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    num_attention_heads=2,
    attention_head_dim=12,
    cross_attention_dim=24,
    caption_channels=8,
    num_layers=1,
)
SHARES = {kind: tuple(float(kind == i) for i in range(3)) for kind in range(3)}


def settings(**over: Any) -> ConfigDict:
    config = ConfigDict()
    refiner_config.add_fields(config)
    config.objective = "stream"
    config.stream.update(chunk=2, window=1)  # 0 | 1-2 | 3-4 | 5: three lengths
    config.update(over)
    return config


def always(config: ConfigDict, kind: int) -> ConfigDict:
    config.stream.curriculum.update(
        clean_steps=0, augment_steps=0, rollout_steps=0, augmented=SHARES[kind], final=SHARES[kind]
    )
    return config


def resident() -> dict[str, jax.Array]:
    keys = iter(jax.random.split(jax.random.key(0), 3))
    shape = (FRAMES, ROWS, COLUMNS, CHANNELS)
    return {
        "latents": jax.random.normal(next(keys), (CLIPS, *shape)),
        "stage1": jax.random.normal(next(keys), (2 * CLIPS, *shape)),
        "caption": jnp.array([0, 1, 0, 1, 1]),
        "refiner_text": jax.random.normal(next(keys), (2, 3, 8)),
    }


@pytest.fixture(scope="module")
def params() -> Params:
    return init(Refiner, MODEL, jax.random.key(0))


def parts(config: ConfigDict) -> tuple[PrepareRefiner, RefinerLoss]:
    objective = make_objective(config, FRAMES)
    rope = video_rope(MODEL, FRAMES, ROWS, COLUMNS, 16.0)
    loss = RefinerLoss(build(Refiner, MODEL)[0], rope, objective, jnp.float32)
    return PrepareRefiner(objective, CLIPS, 10_000), loss


def test_rows_are_pairs_of_a_clip_and_its_samples() -> None:
    prepare, _ = parts(settings())
    data, rows = resident(), jnp.array([1, 6, 9, 4])  # clips 1, 1, 4, 4
    examples = prepare(data, rows, jax.random.key(1))
    np.testing.assert_array_equal(examples["stage1"], data["stage1"][rows])
    np.testing.assert_array_equal(examples["truth"], data["latents"][jnp.array([1, 1, 4, 4])])
    np.testing.assert_array_equal(examples["text"], data["refiner_text"][jnp.array([1, 1, 1, 1])])
    assert {a.shape[0] for a in examples.values()} == {BATCH}
    assert len(np.unique(examples["sigma"])) == BATCH


@pytest.mark.parametrize("layout", [0, 1, 2])
def test_a_stream_s_loss_is_that_of_its_chunk(layout: int, params: Params) -> None:
    """With the true history, every layout equals a sequence that the test assembles."""
    prepare, loss = parts(always(settings(), history.CLEAN))
    examples = prepare(resident(), jnp.arange(BATCH), jax.random.key(1))
    examples["layout"] = jnp.full((BATCH,), layout)
    value, _ = jax.jit(loss)(params, examples)
    context, current = (list(frames) for frames in prepare.objective.layouts[layout])
    assert (context, current) == [([0], [1, 2]), ([0, 1, 2], [3, 4]), ([0, 3, 4], [5])][layout]
    names = ("stage1", "truth", "noise")
    sequence = stream_sequence(
        examples["truth"][:, jnp.array(context)],
        *(examples[name][:, jnp.array(current)] for name in names),
        sigma=examples["sigma"],
        positions=jnp.array(context + current),
    )
    graphdef, _ = build(Refiner, MODEL)
    expected = sequence_loss(graphdef, params, sequence, examples["text"], loss.rope)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)


def test_every_layout_is_drawn() -> None:
    prepare, _ = parts(settings())
    draw = jax.jit(lambda key: prepare(resident(), jnp.arange(BATCH), key)["layout"])
    drawn = np.array([draw(key) for key in jax.random.split(jax.random.key(0), 60)])
    assert np.all(drawn == drawn[:, :1])
    assert np.bincount(drawn[:, 0]).min() > 8


@pytest.mark.parametrize("kind", [history.CLEAN, history.AUGMENTED, history.ROLLOUT])
def test_kinds_of_history(kind: int, params: Params) -> None:
    """The sink never changes, and augmented or sampled history has no gradient."""
    prepare, loss = parts(always(settings(), kind))
    examples = prepare(resident(), jnp.arange(BATCH), jax.random.key(1))
    context = jnp.array([0, 1, 2])

    def run(params: Params) -> jax.Array:
        return loss._history(params, examples, context)

    frames = jax.jit(run)(params)
    true = examples["truth"][:, context]
    np.testing.assert_array_equal(frames[:, :1], true[:, :1])
    change = np.abs(frames[:, 1:] - true[:, 1:]).mean((1, 2, 3, 4))
    if kind == history.CLEAN:
        assert not change.any()
    else:
        assert change.min() > 1e-3 and len(np.unique(change)) == BATCH
        # an untrained network's samples are far from the truth, damage stays near
        assert (change.min() > 0.5) == (kind == history.ROLLOUT)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(run(p))))(params)
    assert all(not np.any(g) for g in jax.tree.leaves(gradient))
    value, full = jax.jit(jax.value_and_grad(lambda p: loss(p, examples)[0]))(params)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(full))


def test_history_changes_with_the_step() -> None:
    prepare, _ = parts(settings())
    draw = jax.jit(
        lambda step, key: prepare.at_step(step)(resident(), jnp.arange(BATCH), key)["history"][0]
    )
    keys = jax.random.split(jax.random.key(0), 40)
    early, late = (np.array([draw(jnp.int32(step), key) for key in keys]) for step in (0, 9_000))
    assert not early.any()
    assert set(late.tolist()) == {0, 1, 2}


def test_a_clip_s_first_frame_is_stage_1_s_also_when_that_is_noised(params: Params) -> None:
    config = settings(objective="clip", stage1_noise=(0.5, 0.5))
    prepare, loss = parts(config)
    data = resident()
    examples = prepare(data, jnp.arange(BATCH), jax.random.key(1))
    np.testing.assert_array_equal(examples["latents"][:, 0], data["stage1"][:BATCH, 0])
    assert examples["target"].shape[1] == FRAMES - 1
    assert np.isfinite(jax.jit(loss)(params, examples)[0])


def test_a_row_does_not_depend_on_the_parts_of_its_batch(params: Params) -> None:
    """With accumulation in two parts and augmented history, the loss is the mean of both parts."""
    prepare, loss = parts(always(settings(), history.AUGMENTED))
    examples = prepare(resident(), jnp.arange(BATCH), jax.random.key(1))
    run = jax.jit(lambda e: loss(params, e)[0])
    halves = [run(jax.tree.map(lambda a, i=i: a[i::2], examples)) for i in range(2)]
    assert float(run(examples)) == pytest.approx(float(np.mean(halves)), rel=1e-5)


def test_a_training_step_moves_the_adapters_and_not_the_base(params: Params) -> None:
    lora = LoraConfig(2, (r"blocks\.attn\.(q|k|v)",))
    graphdef, abstract = build_adapted(Refiner, MODEL, lora)
    adapters = init_adapters(abstract, jax.random.key(2))
    prepare, loss = parts(settings(objective="clip"))
    loss = dataclasses.replace(loss, graphdef=graphdef)
    rule = UpdateRule(make_optimizer(), lambda step, fraction: jnp.float32(1e-2))
    data = {**resident(), "base": params}
    step = jax.jit(
        lambda state: train_step(
            state,
            data,
            jnp.arange(BATCH),
            jax.random.key(3),
            jnp.float32(0),
            update=GradientUpdate(rule, prepare, loss),
        )
    )
    state = create_state({"model": adapters}, {"model": rule})
    after, metrics = step(state)
    assert float(metrics["grad_norm"]) > 0
    assert jax.tree.structure(after.model.params) == jax.tree.structure(adapters)
    moved = after.model.params["blocks"]["attn"]["q"]["lora_b"]
    assert 0 < np.abs(moved).max() < 0.1
    before, now = (
        loss.given(data)(p, prepare(data, jnp.arange(BATCH), jax.random.key(4)))[0]
        for p in (adapters, after.model.params)
    )
    assert float(before) != float(now)
    plain = dataclasses.replace(loss, graphdef=build(Refiner, MODEL)[0])
    examples = prepare(data, jnp.arange(BATCH), jax.random.key(4))
    # fresh adapters are the base
    assert float(plain(params, examples)[0]) == pytest.approx(float(before), rel=1e-6)
    assert combine(params, adapters)["blocks"]["attn"]["q"].keys() >= {"kernel", "lora_a"}


def test_every_weight_has_a_place_on_a_mesh() -> None:
    targets = (r"blocks\.(attn|cross_attn)\.\w+", r"blocks\.ffn\.up")
    gated = dataclasses.replace(LTX_2_19B, gated_attn=True, cross_attn_mod=True)
    for config in (LTX_2_19B, gated):
        base = build(Refiner, config)[1]
        adapters = build_adapted(Refiner, LTX_2_19B, LoraConfig(384, targets))[1]
        for path, leaf in [*leaves(base), *leaves(adapters)]:
            for prefix in ("", "learners.model.moments.1.0.mu."):
                assert len(parameter_spec(prefix + path, leaf.shape)) == leaf.ndim
    assert parameter_spec("blocks.attn.q.kernel", (48, 4096, 4096))[1:] == ("fsdp", "tensor")
