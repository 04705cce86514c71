"""Updates that are not made: a loss or gradient that is no number, or a norm far above the usual.

The decision is part of the compiled step, so that weights, moments and average never see such a
gradient, on one device or many and however far the host runs behind.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sanawm_jax.runtime.errors import InputError

POLICIES = ("none", "skip", "stop")
# metrics of a step that tell the host what was decided; no line of metrics.jsonl has them
SKIPPED_IN_ROW, NORM_LIMIT = "skipped_in_row", "norm_limit"


@dataclasses.dataclass(frozen=True)
class SpikePolicy:
    """What `config.spike` says.

    Attributes:
      policy: `skip` leaves the update out and goes on; `stop` leaves it out and ends the run;
        `none` makes every update, and a loss that is no number ends the run.
      factor: a gradient norm above this many times its running average is a spike.
      window: updates that the average is over; before as many were made nothing is a spike.
      patience: that many steps skipped in a row end the run.

    Raises:
      InputError: a policy that does not exist, or numbers out of range.
    """

    policy: str = "skip"
    factor: float = 10.0
    window: int = 100
    patience: int = 10

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InputError(f"spike.policy={self.policy!r}; use one of {', '.join(POLICIES)}")
        if not (self.factor > 1 and self.window >= 1 and self.patience >= 1):
            raise InputError(
                f"spike.factor={self.factor} must be above 1, spike.window={self.window} and "
                f"spike.patience={self.patience} at least 1"
            )

    @property
    def is_on(self) -> bool:
        """Whether any update can be left out."""
        return self.policy != "none"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """What the decision remembers; part of the training state and of its checkpoints.

    Attributes:
      norm: () float32, running average of the gradient norms of the updates made.
      made, skipped, in_row: () int32, updates made, left out, and left out since the last one made.
    """

    norm: jax.Array
    made: jax.Array
    skipped: jax.Array
    in_row: jax.Array


def new_guard() -> Guard:
    """Of a run at step 0."""
    # four buffers: a donated state must not hold one twice
    zero = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return Guard(jnp.zeros((), jnp.float32), *zero)


def judge(
    guard: Guard, loss: jax.Array, norm: jax.Array, policy: SpikePolicy
) -> tuple[jax.Array, Guard, dict[str, jax.Array]]:
    """Whether this step's update is made.

    Args:
      guard: before the step.
      loss, norm: () of the step; a gradient with any element that is no number has no finite norm.

    Returns:
      () bool; the guard after; the metrics `skipped` (so far), and the two of the host.
    """
    limit = jnp.where(guard.made >= policy.window, policy.factor * guard.norm, jnp.inf)
    good = jnp.isfinite(loss) & jnp.isfinite(norm) & (norm <= limit)
    # a plain mean at first, then an exponential one
    share = 1.0 / jnp.minimum(guard.made + 1, policy.window)
    average = guard.norm + share * (jnp.where(good, norm, guard.norm) - guard.norm)
    after = Guard(
        average.astype(jnp.float32),
        guard.made + good,
        guard.skipped + ~good,
        jnp.where(good, 0, guard.in_row + 1),
    )
    metrics = {"skipped": after.skipped, SKIPPED_IN_ROW: after.in_row, NORM_LIMIT: limit}
    return good, after, metrics


def keep_if(good: jax.Array, after: Any, before: Any) -> Any:
    """`after` where the update is made, else `before`; trees of the same structure."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), after, before)
