"""The history that a streaming refiner is trained on: true, damaged, or its own samples.

At sampling, history is what the refiner made itself, with its own errors in it. Training only on
true history would leave it unprepared for them, so a curriculum goes from true frames to damaged
ones, and then adds frames that the present weights sampled.

Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels.
Source: NVlabs/Sana, streaming refiner training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.schedule import euler_step
from sanawm_jax.training.objectives.refiner_flow import START_SIGMA

CLEAN, AUGMENTED, ROLLOUT = range(3)
ROLLOUT_STEPS = (1, 3, 5, 10)


@dataclasses.dataclass(frozen=True)
class Corruption:
    """Damage at strength 1; strength s in [0, 1] scales all of it.

    Attributes:
      noise: largest level of new noise, drawn U(0, noise s) a sample.
      gain: a channel's gain is 1 +- gain s.
      blur: largest weight of a frame's neighbours in time, U(0, blur s) a sample.
      channel_dropout: chance of a channel to be zero.
      mixup: largest weight of the frame before, U(0, mixup s) a sample; 0 is off.
      token_dropout: chance of a token to be zero; 0 is off.
    """

    noise: float = 0.1
    gain: float = 0.15
    blur: float = 0.2
    channel_dropout: float = 0.1
    mixup: float = 0.0
    token_dropout: float = 0.0


def corrupt(
    key: jax.Array, history: jax.Array, strength: jax.Array, kind: Corruption | None = None
) -> jax.Array:
    """Damaged frames, float32.

    Args:
      history: (B, F, H, W, c), F consecutive frames.
      strength: (B,) in [0, 1]; 0 changes nothing.
      kind: how much at strength 1.
    """
    kind = kind or Corruption()
    x = history.astype(jnp.float32)
    batch, _, rows, columns, channels = x.shape
    s = strength[:, None, None, None, None]
    keys = iter(jax.random.split(key, 7))

    def amount(largest: float) -> jax.Array:
        return jax.random.uniform(next(keys), (batch, 1, 1, 1, 1)) * largest * s

    level = amount(kind.noise)
    x = (1 - level) * x + level * jax.random.normal(next(keys), x.shape)
    per_channel = (batch, 1, 1, 1, channels)
    x = x * (1 + jax.random.uniform(next(keys), per_channel, minval=-1.0) * kind.gain * s)
    before = jnp.concatenate([x[:, :1], x[:, :-1]], 1)
    after = jnp.concatenate([x[:, 1:], x[:, -1:]], 1)
    weight = amount(kind.blur)
    x = (1 - weight) * x + weight * (before + after) / 2
    x = x * (jax.random.uniform(next(keys), per_channel) >= kind.channel_dropout * s)
    mix_key, token_key = next(keys), next(keys)
    if kind.mixup:
        weight = jax.random.uniform(mix_key, (batch, 1, 1, 1, 1)) * kind.mixup * s
        x = (1 - weight) * x + weight * jnp.concatenate([x[:, :1], x[:, :-1]], 1)
    if kind.token_dropout:
        shape = (batch, x.shape[1], rows, columns, 1)
        x = x * (jax.random.uniform(token_key, shape) >= kind.token_dropout * s)
    return x


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Shares (clean, augmented, rollout) of training steps, over time.

    Clean alone before `clean_steps`; then linearly to `augmented` over `augment_steps`; then
    linearly to `final` over `rollout_steps`. A `final` share of rollouts costs up to ten forward
    passes a step that draws one.

    Raises:
      InputError: shares that are negative or do not add up to 1.
    """

    clean_steps: int = 500
    augment_steps: int = 2000
    rollout_steps: int = 2500
    augmented: tuple[float, float, float] = (0.3, 0.7, 0.0)
    final: tuple[float, float, float] = (0.2, 0.3, 0.5)

    def __post_init__(self) -> None:
        for shares in (self.augmented, self.final):
            if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
                raise InputError(
                    f"history shares {tuple(shares)} must be three numbers from 0 on that add up "
                    "to 1: clean, augmented, rollout"
                )

    @property
    def has_rollouts(self) -> bool:
        return self.augmented[ROLLOUT] > 0 or self.final[ROLLOUT] > 0


def history_shares(step: jax.Array, curriculum: Curriculum) -> jax.Array:
    """Shares (3,) float32 of clean, augmented and rolled-out history at a step."""
    clean = jnp.array([1.0, 0.0, 0.0])
    augmented, final = jnp.array(curriculum.augmented), jnp.array(curriculum.final)
    to_augmented = (step - curriculum.clean_steps) / max(curriculum.augment_steps, 1)
    start = curriculum.clean_steps + curriculum.augment_steps
    to_final = (step - start) / max(curriculum.rollout_steps, 1)
    shares = clean + jnp.clip(to_augmented, 0.0, 1.0) * (augmented - clean)
    return shares + jnp.clip(to_final, 0.0, 1.0) * (final - augmented)


def draw_history_kind(key: jax.Array, step: jax.Array, curriculum: Curriculum) -> jax.Array:
    """CLEAN, AUGMENTED or ROLLOUT; () int32, one draw for a batch."""
    shares = history_shares(step, curriculum)
    return jax.random.categorical(key, jnp.log(jnp.maximum(shares, 1e-30)))


Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def euler_rollout(
    velocity: Velocity, start: jax.Array, steps: jax.Array, level: float = START_SIGMA
) -> jax.Array:
    """The flow's end from its start, without guidance.

    Args:
      velocity: (x (B, F, H, W, c), sigma (B,)) -> velocity of the same frames.
      start: (B, F, H, W, c), stage 1 with noise of level s: x1.
      steps: () int32, any number; levels fall evenly from s to 0.
      level: s.

    Returns:
      the same shape, float32, cut off from every gradient.
    """

    def body(i: jax.Array, x: jax.Array) -> jax.Array:
        sigma = level * (1.0 - i / steps)
        v = velocity(x, jnp.full((len(x),), sigma))
        return euler_step(x, v, sigma, sigma - level / steps)

    x = lax.fori_loop(0, steps, body, lax.stop_gradient(start.astype(jnp.float32)))
    return lax.stop_gradient(x)


def draw_rollout_steps(key: jax.Array) -> jax.Array:
    """1, 3, 5 or 10 Euler steps; () int32."""
    return jax.random.choice(key, jnp.array(ROLLOUT_STEPS))
