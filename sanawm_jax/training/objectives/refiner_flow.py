"""The refiner's objective, truncated-sigma flow matching, as pure functions of arrays.

The flow starts where the sampler starts: not at noise, but at a stage-1 clip with noise of level s
on it, 0.909375 in the release. With stage 1's latents z, the true ones r, noise e and a level sigma
in (0, s]:

    x1 = (1 - s) z + s e      alpha = sigma / s      x_t = (1 - alpha) r + alpha x1
    target v* = (x1 - r) / s  so that  x_t = r + sigma v*

NVlabs/Sana predicts the clean clip x0 and takes v = (x_t - x0) / sigma. Our network, as LTX-2's,
predicts v itself, from which the sampler takes x0 = x_t - sigma v; put into that formula it gives v
back, so both have the same loss.

Levels are drawn as u in [0, 1] and scaled by s, sigma = s u, so that alpha = u: u = 1 is the level
at which sampling starts. NVlabs/Sana's loss clamps sigma to [1e-6, s]; who calls it is not
published, and clamping alone would put all of a sampler's mass above s on one level.

Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels, P tokens a
frame.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sanawm_jax.core.params import Params, apply
from sanawm_jax.refiner.rope import VideoRope
from sanawm_jax.refiner.sampler import SIGMAS
from sanawm_jax.runtime.errors import InputError

START_SIGMA = SIGMAS[0]
MIN_SIGMA = 1e-6
LEVELS = ("uniform", "shifted_logit_normal")
_EPS = 1e-3
_UNIFORM_SHARE = 0.1
# quantiles of the standard normal at 0.5% and 99.9%
_LOW, _HIGH = -2.5758293, 3.0902323


def uniform_levels(key: jax.Array, batch: int) -> jax.Array:
    """u uniform on [1e-3, 1], (B,) float32."""
    return jax.random.uniform(key, (batch,), minval=_EPS, maxval=1.0)


def level_shift(tokens: int) -> float:
    """Mean of the logit: 0.95 at 1024 tokens to 2.05 at 4096, linear and clamped."""
    share = (min(max(tokens, 1024), 4096) - 1024) / (4096 - 1024)
    return 0.95 + share * (2.05 - 0.95)


def shifted_logit_normal_levels(key: jax.Array, batch: int, tokens: int) -> jax.Array:
    """u = sigmoid(N(shift, 1)), stretched, with a uniform share; (B,) float32.

    The sigmoid's range between its 0.5% and 99.9% percentiles is stretched to [0, 1]; what is then
    below 1e-3 is reflected there, what is above 1 is 1. A tenth is uniform on [1e-3, 1].

    Args:
      tokens: that are noised in one example; more need more noise to hide as much.
    """
    normal_key, uniform_key, choice_key = jax.random.split(key, 3)
    mean = level_shift(tokens)
    low, high = (1.0 / (1.0 + np.exp(-(mean + quantile))) for quantile in (_LOW, _HIGH))
    u = (jax.nn.sigmoid(mean + jax.random.normal(normal_key, (batch,))) - low) / (high - low)
    u = jnp.clip(jnp.where(u < _EPS, 2 * _EPS - u, u), 0.0, 1.0)
    is_uniform = jax.random.bernoulli(choice_key, _UNIFORM_SHARE, (batch,))
    return jnp.where(is_uniform, uniform_levels(uniform_key, batch), u)


def sample_sigmas(
    key: jax.Array, batch: int, tokens: int, kind: str, start: float = START_SIGMA
) -> jax.Array:
    """Noise levels in [1e-6, start], (B,) float32: `u` of one of `LEVELS` times start.

    Raises:
      InputError: unknown kind.
    """
    if kind not in LEVELS:
        raise InputError(f"levels={kind!r}; use one of {', '.join(LEVELS)}")
    if kind == "uniform":
        u = uniform_levels(key, batch)
    else:
        u = shifted_logit_normal_levels(key, batch, tokens)
    return clamp_sigmas(start * u, start)


def clamp_sigmas(sigma: jax.Array, start: float = START_SIGMA) -> jax.Array:
    """Noise levels inside the flow: [1e-6, start]."""
    return jnp.clip(sigma, MIN_SIGMA, start)


class Flow(NamedTuple):
    """One noised batch, both (B, F, H, W, c) float32."""

    noisy: jax.Array  # x_t
    target: jax.Array  # v*


def truncated_flow(
    stage1: jax.Array,
    truth: jax.Array,
    noise: jax.Array,
    sigma: jax.Array,
    start: float = START_SIGMA,
) -> Flow:
    """Point and velocity of the flow from the noised stage-1 clip to the true one.

    Args:
      stage1, truth, noise: z, r and e, (B, F, H, W, c).
      sigma: (B,) noise levels, clamped to [1e-6, start].
      start: s.
    """
    stage1, truth, noise = (a.astype(jnp.float32) for a in (stage1, truth, noise))
    alpha = (clamp_sigmas(sigma, start) / start)[:, None, None, None, None]
    first = (1 - start) * stage1 + start * noise  # x1
    return Flow((1 - alpha) * truth + alpha * first, (first - truth) / start)


def velocity_of(noisy: jax.Array, clean: jax.Array, sigma: jax.Array) -> jax.Array:
    """The velocity that a prediction of the clean clip stands for, (x_t - x0) / sigma.

    Args:
      noisy, clean: (B, F, H, W, c).
      sigma: (B,).
    """
    return (noisy - clean) / clamp_sigmas(sigma)[:, None, None, None, None]


def augment_stage1(
    key: jax.Array, stage1: jax.Array, low: float = 0.0, high: float = 0.0
) -> jax.Array:
    """(1 - a) z + a noise with a ~ U(low, high) a sample; off at 0, as by default upstream."""
    if high <= 0.0:
        return stage1
    amount_key, noise_key = jax.random.split(key)
    amount = jax.random.uniform(amount_key, (len(stage1), 1, 1, 1, 1), minval=low, maxval=high)
    return (1 - amount) * stage1 + amount * jax.random.normal(noise_key, stage1.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequence:
    """What the transformer reads: given frames at noise level 0, then noised ones.

    Given frames see each other and nothing else, the noised ones see all. The loss counts on the
    noised ones.

    Attributes:
      latents: (B, F, H, W, c) float32.
      sigma: (B,) of the noised frames.
      target: (B, f, H, W, c) float32 velocity of the noised frames.
      positions: (F,) int32 absolute latent frames, for the rotary embedding.
    """

    latents: jax.Array
    sigma: jax.Array
    target: jax.Array
    positions: jax.Array

    @property
    def context_frames(self) -> int:
        return self.latents.shape[1] - self.target.shape[1]


def clip_sequence(
    stage1: jax.Array,
    truth: jax.Array,
    noise: jax.Array,
    sigma: jax.Array,
    sink_frames: int = 1,
    start: float = START_SIGMA,
) -> Sequence:
    """A whole clip: [sink of stage 1 | all other frames noised], as `sampler.refine_at_once`.

    Args:
      stage1, truth, noise: (B, F, H, W, c).
      sigma: (B,).
      sink_frames: leading frames given as stage 1 has them, which is how sampling gives them; 0
        noises every frame.
      start: s.
    """
    sink = stage1[:, :sink_frames].astype(jnp.float32)
    rest = (a[:, sink_frames:] for a in (stage1, truth, noise))
    flow = truncated_flow(*rest, sigma=sigma, start=start)
    return Sequence(
        latents=jnp.concatenate([sink, flow.noisy], 1),
        sigma=clamp_sigmas(sigma, start),
        target=flow.target,
        positions=jnp.arange(stage1.shape[1]),
    )


class ChunkLayout(NamedTuple):
    """Frames of one streaming example: `context` given, `current` noised; absolute numbers."""

    context: tuple[int, ...]
    current: tuple[int, ...]


def chunk_layouts(
    frames: int, *, first: int = 1, chunk: int = 3, window: int = 2
) -> list[ChunkLayout]:
    """The examples of a clip: every chunk that has a full history, with what it sees.

    The first chunk has `first` frames, the others `chunk`; a last short one counts. Chunk i has a
    full history from i = window on, and sees chunks {0} and {i - window, ..., i - 1}.

    Raises:
      InputError: sizes below 1, or a clip too short for any example.
    """
    if min(first, chunk, window) < 1:
        raise InputError(f"stream: first={first}, chunk={chunk}, window={window} must be positive")
    cuts = [0, *range(first, frames, chunk), frames]
    chunks = [tuple(range(a, b)) for a, b in itertools.pairwise(cuts) if a < b]
    layouts = []
    for i in range(window, len(chunks)):
        seen = sorted({0, *range(i - window, i)})
        layouts.append(ChunkLayout(sum((chunks[j] for j in seen), ()), chunks[i]))
    if not layouts:
        raise InputError(
            f"stream: {frames} latent frames have no chunk with a history of {window}; lower "
            "stream.window or take longer clips"
        )
    return layouts


def stream_sequence(
    context: jax.Array,
    stage1: jax.Array,
    truth: jax.Array,
    noise: jax.Array,
    sigma: jax.Array,
    positions: jax.Array,
    start: float = START_SIGMA,
) -> Sequence:
    """One chunk of a stream: [sink and history, given | current chunk noised].

    Args:
      context: (B, F, H, W, c), true latents, or what `refiner_history` makes of them.
      stage1, truth, noise: (B, f, H, W, c) of the current chunk.
      sigma: (B,).
      positions: (F + f,) absolute frames of both.
      start: s.
    """
    flow = truncated_flow(stage1, truth, noise, sigma, start)
    return Sequence(
        latents=jnp.concatenate([context.astype(jnp.float32), flow.noisy], 1),
        sigma=clamp_sigmas(sigma, start),
        target=flow.target,
        positions=positions,
    )


def predict_velocity(
    graphdef: nnx.GraphDef,
    params: Params,
    latents: jax.Array,
    sigma: jax.Array,
    text: jax.Array,
    rope: VideoRope,
    positions: jax.Array,
    *,
    context_frames: int,
    dtype: Any,
    remat: str = "none",
) -> jax.Array:
    """The transformer's velocity of the frames after the context, in the compute dtype.

    Args:
      graphdef, params: the `Refiner`, adapted or not.
      latents: (B, F, H, W, c), the first `context_frames` given.
      sigma: (B,) of the frames after them.
      text: (B, L, C) from the connectors, or (1, L, C) for all.
      rope: tables of the clip from frame 0 on.
      positions: (F,) absolute frames.
      remat: see `Refiner.__call__`.
    """
    scale = apply(graphdef, params, method="timestep_scale")
    is_given = (jnp.arange(latents.shape[1]) < context_frames)[None, :, None]
    frames = jnp.take(jnp.asarray(rope.frames), positions, axis=0)
    velocity, _ = apply(
        graphdef,
        params,
        latents.astype(dtype),
        jnp.where(is_given, 0.0, scale * sigma[:, None, None]),
        text.astype(dtype),
        rope._replace(frames=frames),
        sink_frames=context_frames,
        remat=remat,
    )
    return velocity[:, context_frames:]


def sequence_loss(
    graphdef: nnx.GraphDef,
    params: Params,
    sequence: Sequence,
    text: jax.Array,
    rope: VideoRope,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> jax.Array:
    """Mean squared error of the velocity on the noised frames; () float32.

    Args:
      see `predict_velocity`.
    """
    velocity = predict_velocity(
        graphdef,
        params,
        sequence.latents,
        sequence.sigma,
        text,
        rope,
        sequence.positions,
        context_frames=sequence.context_frames,
        dtype=dtype,
        remat=remat,
    )
    return jnp.mean(jnp.square(velocity.astype(jnp.float32) - sequence.target))
