"""Flow-matching Euler sampling with one timestep per latent frame.

Axis letters: B batch, F latent frames, H W rows and columns, C channels.
Reference: diffusers `FlowMatchEulerDiscreteScheduler` and the loop of `SanaWMPipeline`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sanawm_jax.checkpoints.files import config_fields, reading
from sanawm_jax.runtime.errors import InputError

NUM_TIMESTEPS = 1000  # the noise level sigma of timestep t is t / 1000


def shift_sigma(sigma: Any, shift: Any) -> Any:
    """Moves noise levels towards 1: s sigma / (1 + (s - 1) sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def check_sigmas(levels: Sequence[float]) -> tuple[float, ...]:
    """Noise levels of a sampler as numbers.

    Raises:
      InputError: they do not fall from at most 1 to 0.
    """
    found = tuple(float(level) for level in levels)
    falls = all(a > b for a, b in itertools.pairwise(found))
    if len(found) < 2 or not falls or found[0] > 1 or found[-1] != 0:
        raise InputError(f"sigmas={found} must fall from at most 1 to 0")
    return found


def check_steps(steps: tuple[float, ...]) -> tuple[float, ...]:
    """Timesteps of a few-step sampler, which fall from at most 1000 to 0.

    Raises:
      InputError: they do not.
    """
    falls = all(a > b for a, b in itertools.pairwise(steps))
    if len(steps) < 2 or not falls or steps[0] > NUM_TIMESTEPS or steps[-1] != 0:
        raise InputError(
            f"denoising_step_list={tuple(steps)} must fall from at most {NUM_TIMESTEPS} to 0; "
            "the last entry is 0"
        )
    return tuple(float(step) for step in steps)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Fields of a published `scheduler_config.json` that change the flow-matching schedule.

    Attributes:
      distilled_sigmas: noise levels of a refiner, falling to 0, that are not those of the release.
        This field is our own: diffusers ignores it, and its refiner takes them as `sigmas=`.
    """

    shift: float = 1.0
    num_train_timesteps: int = 1000
    shift_terminal: float | None = None
    distilled_sigmas: tuple[float, ...] | None = None

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Schedule:
        """Reads a scheduler configuration.

        Raises:
          InputError: an option that SANA-WM's sampler does not have is switched on.
        """
        options = (
            "use_dynamic_shifting",
            "invert_sigmas",
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "stochastic_sampling",
        )
        if switched := [name for name in options if raw.get(name)]:
            raise InputError(f"scheduler config: {', '.join(switched)} is not supported")
        known = {f.name for f in dataclasses.fields(cls)}
        with reading("scheduler config"):
            found = {k: v for k, v in raw.items() if k in known}
            found = config_fields(cls, found, what="scheduler config")
            if levels := found.get("distilled_sigmas"):
                found["distilled_sigmas"] = check_sigmas(levels)
            return cls(**found)

    def sigmas(self, steps: int) -> np.ndarray:
        """Noise levels (steps + 1,) float32 from 1 down to 0.

        The shift is applied twice, as in the reference: the range is spaced evenly between the
        already shifted ends, and then shifted again. Network timesteps are 1000 sigma.

        Raises:
          InputError: fewer than one step.
        """
        if steps < 1:
            raise InputError(f"{steps} sampling steps are too few; use 1 or more")
        count = self.num_train_timesteps
        # float32 and float64 alternate as in the reference: the network sees floor(1000 sigma)
        ends = np.array([count, 1], np.float32) / np.float32(count)
        ends = shift_sigma(ends, np.float32(self.shift)).astype(np.float32).astype(np.float64)
        spaced = np.linspace(ends[0] * count, ends[1] * count, steps) / count
        shifted = shift_sigma(spaced, self.shift)
        if self.shift_terminal:
            rest = 1 - shifted
            shifted = 1 - rest / (rest[-1] / (1 - self.shift_terminal))
        return np.append(shifted, 0.0).astype(np.float32)


def next_sigmas(sigmas: np.ndarray) -> np.ndarray:
    """For every level but the last, the largest level below it, as per-token stepping finds it."""
    return np.array(
        [max((s for s in sigmas if s < now - 1e-6), default=0.0) for now in sigmas[:-1]],
        np.float32,
    )


def frame_timesteps(sigma: jax.Array | float, conditioned: jax.Array, batch: int) -> jax.Array:
    """Timestep of every frame (B, F): 1000 sigma, and 0 where `conditioned` (F,) bool."""
    timesteps = jnp.where(conditioned, 0.0, sigma * 1000.0)
    return jnp.broadcast_to(timesteps, (batch, *timesteps.shape))


def add_noise(clean: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """The point (1 - sigma) clean + sigma noise of the flow at a noise level, float32."""
    return (1.0 - sigma) * clean.astype(jnp.float32) + sigma * noise.astype(jnp.float32)


def euler_step(
    latents: jax.Array,
    velocity: jax.Array,
    sigma: jax.Array | float,
    next_sigma: jax.Array | float,
    conditioned: jax.Array | None = None,
) -> jax.Array:
    """One step towards the data, x + (sigma' - sigma) v, in float32.

    Args:
      latents: (B, F, H, W, C) float32 at noise level sigma.
      velocity: predicted noise - clean, the same shape.
      sigma: noise level now; next_sigma: after the step.
      conditioned: (F,) bool, frames that stay as they are; None moves all.
    """
    moved = latents + (next_sigma - sigma) * velocity.astype(jnp.float32)
    if conditioned is None:
        return moved
    return jnp.where(conditioned[:, None, None, None], latents, moved)


def euler_rollout(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    start: jax.Array,
    sigmas: jax.Array,
    next_sigmas: jax.Array,
    conditioned: jax.Array | None = None,
) -> jax.Array:
    """All steps of a sampler in one program.

    Args:
      velocity: (latents, sigma) -> velocity of the same shape.
      start: (B, F, H, W, C) float32 at noise level sigmas[0].
      sigmas, next_sigmas: (steps,) noise levels before and after each step.
      conditioned: see `euler_step`.
    """

    def step(x: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return euler_step(x, velocity(x, pair[0]), *pair, conditioned), None

    return lax.scan(step, start, (sigmas, next_sigmas))[0]


def guide(velocity: jax.Array, scale: jax.Array) -> jax.Array:
    """Classifier-free guidance of a batch [unconditional, conditional] -> half the batch."""
    unconditional, conditional = jnp.split(velocity.astype(jnp.float32), 2)
    return unconditional + scale * (conditional - unconditional)
