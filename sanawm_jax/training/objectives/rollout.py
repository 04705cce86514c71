"""A few-step student makes its own clip, and gets gradients chunk by chunk.

Training on the clips that the student makes itself is called self-forcing. The history of a chunk,
which the student sees as its carried state, gets no gradient. A gradient therefore needs the graph
of one chunk at a time: `roll_out` makes the whole clip without gradients, and `chunk_gradients`
runs over the chunks again. It makes the same states and differentiates one step of each chunk. The
sum equals backpropagation through the whole rollout, with the memory of one chunk.

Axis letters: B batch, F latent frames, H W latent rows and columns, c latent channels, L text
tokens, K chunks after the first.
Source: NVlabs/Sana, the trainer of the distilled SANA-WM, and Self Forcing (arXiv 2506.08009).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sanawm_jax.core.params import Params, apply
from sanawm_jax.core.sharding import undivided
from sanawm_jax.dit.state import DiTState, Window
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.schedule import NUM_TIMESTEPS, add_noise, euler_step
from sanawm_jax.sampling.stage1 import Conditions


def check_frames(frames: int, window: Window) -> None:
    """Checks that a clip is a whole number of chunks.

    Raises:
      InputError: it is not.
    """
    rest = frames - window.first
    if rest < 0 or rest % window.size:
        fitting = window.first + max(rest, 0) // window.size * window.size
        raise InputError(
            f"{frames} latent frames are not a first chunk of {window.first} and chunks of "
            f"{window.size}; use --config.frames={fitting}, or another window"
        )


@dataclasses.dataclass(frozen=True)
class Student:
    """A network that runs as a stream.

    Attributes:
      graphdef: of the DiT.
      window: how a clip is cut into chunks, and what the softmax layers see.
      dtype: compute dtype.
      remat, unroll: see `core.stack.scan_runs`.
    """

    graphdef: nnx.GraphDef
    window: Window
    dtype: Any
    remat: str = "none"
    unroll: bool = False

    def estimate(
        self,
        params: Params,
        state: DiTState | None,
        noisy: jax.Array,
        timesteps: jax.Array,
        conditions: Conditions,
    ) -> jax.Array:
        """The clean chunk that the network sees in a noisy one, (B, F, H, W, c) float32.

        Args:
          noisy: (B, F, H, W, c) float32.
          timesteps: (B, F); a frame at 0 is returned as it is.
        """
        velocity = self.velocity(params, state, noisy, timesteps, conditions)
        return clean_estimate(noisy, velocity, timesteps)

    def velocity(
        self,
        params: Params,
        state: DiTState | None,
        noisy: jax.Array,
        timesteps: jax.Array,
        conditions: Conditions,
    ) -> jax.Array:
        """The network's velocity for a noisy chunk, see `estimate`."""
        return self._run(params, state, noisy, timesteps, conditions)[0]

    def remember(
        self, params: Params, state: DiTState | None, clean: jax.Array, conditions: Conditions
    ) -> DiTState:
        """The state after a chunk, from a pass over it at timestep 0."""
        return self._run(params, state, clean, jnp.zeros(clean.shape[:2]), conditions)[1]

    def _run(
        self,
        params: Params,
        state: DiTState | None,
        latents: jax.Array,
        timesteps: jax.Array,
        conditions: Conditions,
    ) -> tuple[jax.Array, DiTState]:
        # the few frames of a chunk are not shared out: context ranks do the same
        with undivided("context"):
            return apply(
                self.graphdef,
                params,
                latents.astype(self.dtype),
                timesteps,
                *conditions,
                window=self.window,
                state=state,
                remat=self.remat,
                unroll=self.unroll,
                method="stream",
            )


def clean_estimate(noisy: jax.Array, velocity: jax.Array, timesteps: jax.Array) -> jax.Array:
    """The end x - sigma v of a straight flow, float32.

    Args:
      noisy, velocity: (B, F, H, W, c).
      timesteps: (B, F).
    """
    sigma = timesteps[..., None, None, None] / NUM_TIMESTEPS
    return noisy.astype(jnp.float32) - sigma * velocity.astype(jnp.float32)


def timesteps_of_frames(timestep: jax.Array, frames: int, *, given: bool) -> jax.Array:
    """(B, F) from one timestep per row (B,); frame 0 is at 0 where the clip's image is given."""
    repeated = jnp.broadcast_to(timestep[:, None], (len(timestep), frames))
    return repeated.at[:, 0].set(0.0) if given else repeated


def timesteps_of_chunks(timesteps: jax.Array, frames: int, window: Window) -> jax.Array:
    """(B, F) from one timestep per row and chunk (B, K + 1); the given frame 0 is at 0."""
    lengths = [window.first, *[window.size] * ((frames - window.first) // window.size)]
    repeated = jnp.repeat(timesteps, jnp.array(lengths), axis=1, total_repeat_length=frames)
    return repeated.at[:, 0].set(0.0)


def by_chunk(tree: Any, window: Window) -> tuple[Any, Any]:
    """The first chunk of arrays (B, F, ...), and the others stacked as (K, B, size, ...)."""

    def later(a: jax.Array) -> jax.Array:
        batch, frames, *rest = a.shape
        count = (frames - window.first) // window.size
        return jnp.moveaxis(a[:, window.first :].reshape(batch, count, window.size, *rest), 1, 0)

    return jax.tree.map(lambda a: a[:, : window.first], tree), jax.tree.map(later, tree)


def whole_clip(first: Any, later: Any) -> Any:
    """Inverse of `by_chunk`."""

    def join(first: jax.Array, later: jax.Array) -> jax.Array:
        chunks = jnp.moveaxis(later, 0, 1)
        return jnp.concatenate([first, chunks.reshape(len(first), -1, *later.shape[3:])], 1)

    return jax.tree.map(join, first, later)


def over_chunks(
    step: Callable[[Any, Any], tuple[Any, Any]], start: Any, clip: Any, window: Window
) -> tuple[Any, Any]:
    """Runs a function over the chunks of a clip in order.

    Args:
      step: (carry, arrays of one chunk) -> (carry, outputs (B, F, ...) of it). The carry may get
        its structure in the first call.
      start: the carry before the first chunk.
      clip: tree of (B, F, ...).

    Returns:
      The last carry, and the outputs of the whole clip.
    """
    first, later = by_chunk(clip, window)
    carry, made = step(start, first)
    if jax.tree.leaves(clip)[0].shape[1] == window.first:
        return carry, made
    carry, rest = lax.scan(step, carry, later)
    return carry, whole_clip(made, rest)


def clip_cameras(conditions: Conditions) -> dict[str, jax.Array]:
    """The conditions that have a frame axis."""
    named = {"camera": conditions.camera, "plucker": conditions.plucker}
    return {name: value for name, value in named.items() if value is not None}


def of_chunk(conditions: Conditions, cameras: dict[str, jax.Array]) -> Conditions:
    """The conditions of one chunk, which has its own cameras."""
    return conditions._replace(**cameras)


class Rollout(NamedTuple):
    """A clip that a student made.

    Attributes:
      made: (B, F, H, W, c) float32, the estimate at the exit level; frame 0 is the given one.
      inputs: (B, F, H, W, c) float32, what the network saw at that level.
    """

    made: jax.Array
    inputs: jax.Array


def roll_out(
    student: Student,
    params: Params,
    image: jax.Array,
    conditions: Conditions,
    noises: jax.Array,
    exit_level: jax.Array,
    steps: tuple[float, ...],
    *,
    renoise: bool = True,
) -> Rollout:
    """The clip that a student makes from its own history; nothing here has a gradient.

    Every chunk starts from noise. At each level the network estimates the clean chunk, which gets
    fresh noise of the next level, up to the exit level. That level's estimate is the chunk, and a
    pass over it at timestep 0 makes the state for the next chunk. The published trainer adds noise
    in this way, although the published sampler takes Euler steps.

    Args:
      image: (B, 1, H, W, c) the given frame 0.
      conditions: of the whole clip.
      noises: (levels, B, F, H, W, c) standard normal: of the start, and of each later level.
      exit_level: () int32, which of the levels is the last one.
      steps: the timesteps of the levels, and 0.
      renoise: False takes Euler steps from level to level, as sampling does.
    """
    params = lax.stop_gradient(params)
    times = jnp.asarray(steps, jnp.float32)
    batch = len(image)

    def step(state: DiTState | None, chunk: Any) -> tuple[DiTState, Rollout]:
        noise, cameras = chunk
        here = of_chunk(conditions, cameras)
        frames, is_first = noise.shape[1], state is None

        def kept(x: jax.Array) -> jax.Array:  # the given frame does not change
            return jnp.concatenate([image.astype(jnp.float32), x[:, 1:]], 1) if is_first else x

        def denoise(level: jax.Array, found: Any) -> Any:
            now, _, _ = found
            timestep = jnp.broadcast_to(times[level], (batch,))
            timesteps = timesteps_of_frames(timestep, frames, given=is_first)
            made = student.estimate(params, state, now, timesteps, here)
            sigma, following = times[level] / NUM_TIMESTEPS, times[level + 1] / NUM_TIMESTEPS
            if renoise:
                fresh = noise[:, :, jnp.minimum(level + 1, len(noises) - 1)]
                after = kept(add_noise(made, fresh, following))
            else:
                after = euler_step(now, (now - made) / sigma, sigma, following)
            return after, now, made

        begin = kept(noise[:, :, 0].astype(jnp.float32))
        # the network is compiled once for all levels
        found = lax.fori_loop(0, exit_level + 1, denoise, (begin, begin, begin))
        _, inputs, made = found
        return student.remember(params, state, made, here), Rollout(made, inputs)

    clip = (jnp.moveaxis(noises, 0, 2), clip_cameras(conditions))
    _, made = over_chunks(step, None, clip, student.window)
    return made


# (weights, the state before the chunk, the chunk's examples, its conditions) -> loss, metrics
ChunkLoss = Callable[
    [Params, DiTState | None, Any, Conditions], tuple[jax.Array, dict[str, jax.Array]]
]


def chunk_gradients(
    student: Student,
    params: Params,
    history: jax.Array,
    conditions: Conditions,
    examples: Any,
    loss: ChunkLoss,
    *,
    base: Callable[[Params], Params] = lambda params: params,
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Params]:
    """Sums of a loss of single chunks and of its gradients; only one chunk is in memory at a time.

    Args:
      params: what is trained.
      history: (B, F, H, W, c) clean latents; each chunk sees those before it. They, and the states
        that are made of them, have no gradient.
      conditions: of the whole clip.
      examples: tree of arrays (B, F, ...) that the loss reads.
      loss: of one chunk.
      base: what is trained -> the network's weights, for adapters.

    Returns:
      ((loss, metrics), gradients), each summed over the chunks.
    """
    gradient = jax.value_and_grad(lambda params, *rest: loss(base(params), *rest), has_aux=True)

    def step(carry: Any, chunk: Any) -> tuple[Any, None]:
        state, total = carry
        example, clean, cameras = chunk
        here = of_chunk(conditions, cameras)
        found = gradient(params, state, example, here)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        after = student.remember(lax.stop_gradient(base(params)), state, clean, here)
        return (after, total), None

    clip = (examples, lax.stop_gradient(history), clip_cameras(conditions))
    (_, total), _ = over_chunks(step, (None, None), clip, student.window)
    return total


def follow(
    student: Student,
    params: Params,
    rollout: Rollout,
    conditions: Conditions,
    exit_level: jax.Array,
    steps: tuple[float, ...],
    cotangent: jax.Array,
    *,
    base: Callable[[Params], Params] = lambda params: params,
) -> Params:
    """The gradient of the weights of a rollout, given that of its clip.

    Args:
      rollout: made by `roll_out` with the same weights, conditions, exit level and steps.
      cotangent: (B, F, H, W, c), the gradient of a loss with respect to `rollout.made`.
    """
    timestep = jnp.broadcast_to(jnp.asarray(steps, jnp.float32)[exit_level], (len(cotangent),))

    def loss(params: Params, state: DiTState | None, example: Any, here: Conditions) -> Any:
        inputs, direction = example
        frames = inputs.shape[1]
        timesteps = timesteps_of_frames(timestep, frames, given=state is None)
        made = student.estimate(params, state, inputs, timesteps, here)
        return jnp.sum(made * direction), {}

    examples = lax.stop_gradient((rollout.inputs, cotangent))
    return chunk_gradients(student, params, rollout.made, conditions, examples, loss, base=base)[1]
