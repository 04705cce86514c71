"""The refiner's objective: flow, levels, sequences, history."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.core.params import build, init
from sanawm_jax.refiner.config import RefinerConfig
from sanawm_jax.refiner.model import Refiner
from sanawm_jax.refiner.rope import video_rope
from sanawm_jax.refiner.sampler import SIGMAS
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.objectives import refiner_flow as flow
from sanawm_jax.training.objectives import refiner_history as history

SHAPE = (3, 4, 2, 2, 5)
MANY = 200_000


def draw(seed: int, shape: tuple[int, ...] = SHAPE) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def triple() -> tuple[jax.Array, jax.Array, jax.Array]:
    return draw(0), draw(1), draw(2)


def test_the_flow_starts_at_the_sampler_s_start_and_ends_at_the_truth(triple) -> None:
    stage1, truth, noise = triple
    s = flow.START_SIGMA
    assert s == SIGMAS[0] == 0.909375
    start = flow.truncated_flow(stage1, truth, noise, jnp.full((3,), s))
    np.testing.assert_allclose(start.noisy, (1 - s) * stage1 + s * noise, atol=1e-6)
    end = flow.truncated_flow(stage1, truth, noise, jnp.zeros((3,)))
    np.testing.assert_allclose(end.noisy, truth, atol=1e-5)
    np.testing.assert_allclose(start.target, end.target)


def test_velocity_and_clean_prediction_are_the_same_loss(triple) -> None:
    """The target is v* = (x_t - r) / sigma for the true latents r; v -> x0 -> v is the identity."""
    stage1, truth, noise = triple
    sigma = jnp.array([0.05, 0.4, 0.9])
    example = flow.truncated_flow(stage1, truth, noise, sigma)
    np.testing.assert_allclose(
        flow.velocity_of(example.noisy, truth, sigma), example.target, atol=2e-5
    )
    velocity = draw(3)  # what a network predicts
    clean = example.noisy - sigma[:, None, None, None, None] * velocity  # as the sampler takes it
    np.testing.assert_allclose(
        flow.velocity_of(example.noisy, clean, sigma), velocity, atol=2e-5, rtol=1e-4
    )


def test_levels_stay_inside_the_flow() -> None:
    np.testing.assert_allclose(
        flow.clamp_sigmas(jnp.array([-1.0, 0.0, 0.5, 1.0])), [1e-6, 1e-6, 0.5, 0.909375]
    )
    for kind in flow.LEVELS:
        sigma = flow.sample_sigmas(jax.random.key(0), MANY, 2048, kind)
        assert float(sigma.min()) >= 1e-6 and sigma.max() <= np.float32(flow.START_SIGMA)
        # scaled, not clamped: no mass piles up at the start
        assert np.mean(np.asarray(sigma) == np.float32(flow.START_SIGMA)) < 0.01
    with pytest.raises(InputError, match="levels='cosine'"):
        flow.sample_sigmas(jax.random.key(0), 2, 16, "cosine")


def test_uniform_levels() -> None:
    u = np.asarray(flow.uniform_levels(jax.random.key(0), MANY))
    assert 1e-3 <= u.min() < 1.1e-3 and u.max() <= 1.0
    np.testing.assert_allclose(np.quantile(u, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.01)


@pytest.mark.parametrize(
    ("tokens", "shift"), [(64, 0.95), (1024, 0.95), (2560, 1.5), (4096, 2.05), (10**6, 2.05)]
)
def test_shift_of_the_levels(tokens: int, shift: float) -> None:
    assert flow.level_shift(tokens) == pytest.approx(shift)


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_shifted_logit_normal_levels(tokens: int) -> None:
    """Compares with the distribution function: 0.9 stretched logit-normal, 0.1 uniform."""
    from scipy.stats import norm

    u = np.asarray(flow.shifted_logit_normal_levels(jax.random.key(1), MANY, tokens))
    assert u.min() >= 0 and u.max() <= 1
    mean = flow.level_shift(tokens)
    low, high = (1 / (1 + np.exp(-(mean + norm.ppf(q)))) for q in (0.005, 0.999))

    def below(t: float) -> float:
        """Returns the distribution function of the stretched variable before reflection."""
        p = low + t * (high - low)
        return float(norm.cdf(np.log(p / (1 - p)) - mean))

    for t in (0.1, 0.3, 0.6, 0.9):
        # what reflection moves is all below 0.01 + 2e-3
        expected = 0.9 * below(t) + 0.1 * (t - 1e-3) / 0.999
        assert np.mean(u <= t) == pytest.approx(expected, abs=4e-3)
    # a thousandth of the normal lies beyond the upper percentile
    assert np.mean(u == 1.0) == pytest.approx(0.9 * 1e-3, abs=4e-4)
    assert np.mean(u < 1e-3) == pytest.approx(0.0, abs=1e-4)


def test_levels_below_the_range_are_reflected() -> None:
    """They lie above 1e-3 as far as they were below it, and do not pile up there."""
    u = np.asarray(flow.shifted_logit_normal_levels(jax.random.key(4), 100_000, 1024))
    # 0.5% of the normal share are below the stretched range
    assert np.mean(u <= np.float32(1e-3)) < 1e-4


def test_clip_sequence_keeps_the_sink_of_stage_1(triple) -> None:
    sequence = flow.clip_sequence(*triple, jnp.array([0.2, 0.5, 2.0]))
    stage1, truth, noise = (a[:, 1:] for a in triple)
    expected = flow.truncated_flow(stage1, truth, noise, sequence.sigma)
    np.testing.assert_array_equal(sequence.latents[:, :1], triple[0][:, :1])
    np.testing.assert_array_equal(sequence.latents[:, 1:], expected.noisy)
    np.testing.assert_array_equal(sequence.target, expected.target)
    np.testing.assert_allclose(sequence.sigma, [0.2, 0.5, 0.909375])
    assert sequence.context_frames == 1
    assert flow.clip_sequence(*triple, jnp.ones((3,)), sink_frames=0).context_frames == 0


def test_layouts_of_a_stream() -> None:
    layouts = flow.chunk_layouts(13)  # chunks 0 | 1-3 | 4-6 | 7-9 | 10-12
    assert layouts == [
        ((0, 1, 2, 3), (4, 5, 6)),
        ((0, 1, 2, 3, 4, 5, 6), (7, 8, 9)),
        ((0, 4, 5, 6, 7, 8, 9), (10, 11, 12)),
    ]
    assert flow.chunk_layouts(7, window=1) == [((0,), (1, 2, 3)), ((0, 1, 2, 3), (4, 5, 6))]
    assert flow.chunk_layouts(6)[-1].current == (4, 5)  # a short last chunk
    for bad in (dict(frames=4), dict(frames=9, window=0)):
        with pytest.raises(InputError, match="stream: "):
            flow.chunk_layouts(**bad)


def test_augmented_stage_1() -> None:
    z = draw(0)
    assert flow.augment_stage1(jax.random.key(0), z) is z
    ones = jnp.ones((2000, 1, 1, 1, 8))
    a = np.asarray(flow.augment_stage1(jax.random.key(0), ones, 0.2, 0.6))
    assert np.mean(a) == pytest.approx(0.6, abs=0.02)  # 1 - E[amount]
    assert np.std(a.mean(-1)) > 0.1  # amounts differ from sample to sample


CONFIG = RefinerConfig(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    cross_attention_dim=24,
    caption_channels=8,
    num_layers=2,
)


def test_positions_are_absolute() -> None:
    """A late chunk of a stream has the same result as in the whole clip."""
    graphdef, _ = build(Refiner, CONFIG)
    params = init(Refiner, CONFIG, jax.random.key(0))
    rope = video_rope(CONFIG, 9, 2, 2, 16.0)
    latents, text = draw(4, (1, 3, 2, 2, 4)), draw(5, (1, 3, 8))

    @functools.partial(jax.jit, static_argnums=1)
    def velocity(positions: jax.Array, context: int = 1) -> jax.Array:
        return flow.predict_velocity(
            graphdef,
            params,
            latents,
            jnp.array([0.5]),
            text,
            rope,
            positions,
            context_frames=context,
            dtype=jnp.float32,
        )

    near, far = velocity(jnp.array([0, 1, 2])), velocity(jnp.array([0, 7, 8]))
    assert near.shape == (1, 2, 2, 2, 4)
    assert np.abs(near - far).max() > 1e-4
    # rotary embedding sees distances alone: moving all frames (past the short first one) is nothing
    moved = velocity(jnp.array([2, 3, 4])) - velocity(jnp.array([5, 6, 7]))
    assert np.abs(moved).max() < 1e-3


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_corruption_scales_with_its_strength(strength: float) -> None:
    x = 2.0 * draw(6, (64, 6, 2, 2, 16))
    kind = history.Corruption(mixup=0.1, token_dropout=0.1)
    y = history.corrupt(jax.random.key(0), x, jnp.full((64,), strength), kind)
    if strength == 0.0:
        np.testing.assert_array_equal(x, y)
        return
    zero = np.asarray(y == 0.0)
    channels = zero.all((1, 2, 3))  # B c
    assert channels.mean() == pytest.approx(0.1, abs=0.03)
    tokens = zero.all(-1)
    assert tokens.mean() == pytest.approx(0.1, abs=0.03)
    # 1 - U(0, .1) of the frame, +-.15 gain, U(0, .2) of its neighbours: still mostly itself
    kept = np.asarray(x)[~zero], np.asarray(y)[~zero]
    assert 0.9 < np.corrcoef(*kept)[0, 1] < 0.999


@pytest.mark.parametrize("field", ["noise", "gain", "blur", "channel_dropout", "mixup"])
def test_each_kind_of_corruption(field: str) -> None:
    off = dict.fromkeys(("noise", "gain", "blur", "channel_dropout", "mixup"), 0.0)
    x = jnp.broadcast_to(jnp.arange(1.0, 6.0)[None, :, None, None, None], (400, 5, 1, 1, 3))
    kind = history.Corruption(**{**off, field: 0.5})
    y = np.asarray(history.corrupt(jax.random.key(1), x, jnp.ones((400,)), kind))
    ratio = y / np.asarray(x)
    if field == "gain":  # one number a channel and sample, 1 +- 0.5
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-5)
        assert 0.5 <= ratio.min() < 0.52 and 1.48 < ratio.max() <= 1.5
    elif field == "blur":  # of a straight line only the ends change
        np.testing.assert_allclose(y[:, 1:-1], np.asarray(x)[:, 1:-1], rtol=1e-5)
        assert 0.2 < (y[:, 0] - 1).max() <= 0.25
    elif field == "channel_dropout":
        assert set(np.unique(ratio)) == {0.0, 1.0}
        assert np.mean(ratio) == pytest.approx(0.5, abs=0.06)
    elif field == "mixup":  # towards the frame before, which is one less
        assert (np.asarray(x)[:, 1:] - y[:, 1:]).max() == pytest.approx(0.5, abs=0.02)
        np.testing.assert_array_equal(y[:, 0], np.asarray(x)[:, 0])
    else:
        assert np.mean(ratio) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    ("step", "shares"),
    [
        (0, (1, 0, 0)),
        (499, (1, 0, 0)),
        (1500, (0.65, 0.35, 0)),
        (2500, (0.3, 0.7, 0)),
        (3750, (0.25, 0.5, 0.25)),
        (5000, (0.2, 0.3, 0.5)),
        (90_000, (0.2, 0.3, 0.5)),
    ],
)
def test_history_curriculum(step: int, shares: tuple[float, ...]) -> None:
    curriculum = history.Curriculum()
    found = history.history_shares(jnp.int32(step), curriculum)
    np.testing.assert_allclose(found, shares, atol=1e-6)
    keys = jax.random.split(jax.random.key(0), 4000)
    kinds = jax.vmap(lambda k: history.draw_history_kind(k, jnp.int32(step), curriculum))(keys)
    counted = np.bincount(np.asarray(kinds), minlength=3) / len(keys)
    np.testing.assert_allclose(counted, shares, atol=0.03)


def test_history_shares_add_up() -> None:
    with pytest.raises(InputError, match="add up"):
        history.Curriculum(final=(0.5, 0.5, 0.5))
    assert history.Curriculum().has_rollouts
    assert not history.Curriculum(final=(0.3, 0.7, 0.0)).has_rollouts


@pytest.mark.parametrize("steps", history.ROLLOUT_STEPS)
def test_rollout_follows_a_straight_flow_to_its_end(steps: int) -> None:
    """With the true velocity, which is constant, any number of steps ends at the true latents."""
    stage1, truth, noise = draw(0), draw(1), draw(2)
    start = flow.truncated_flow(stage1, truth, noise, jnp.full((3,), flow.START_SIGMA))
    seen = []

    def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
        jax.debug.callback(lambda s: seen.append(float(s)), sigma[0])
        return start.target

    def end(scale: jax.Array) -> jax.Array:
        x = history.euler_rollout(velocity, scale * start.noisy, jnp.int32(steps))
        return jnp.sum((x - truth) ** 2)

    error, gradient = jax.jit(jax.value_and_grad(end))(jnp.float32(1.0))
    jax.effects_barrier()
    assert float(error) < 1e-8
    assert float(gradient) == 0.0
    np.testing.assert_allclose(
        sorted(seen), flow.START_SIGMA * np.arange(1, steps + 1) / steps, rtol=1e-5
    )


def test_rollout_steps() -> None:
    keys = jax.random.split(jax.random.key(0), 100)
    assert set(np.asarray(jax.vmap(history.draw_rollout_steps)(keys)).tolist()) == {1, 3, 5, 10}
