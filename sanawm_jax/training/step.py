"""The compiled train step: several updates a call, one source of randomness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sanawm_jax.core.params import Params
from sanawm_jax.training.optimizer import ema_decay
from sanawm_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
StepFunction = Callable[..., tuple[TrainState, Metrics]]


class Loss(Protocol):
    """(params, resident data, batch, key) -> loss, further metrics; all () float32.

    A loss that changes during the run has a method `at_step`: () int32 -> the loss of that step.
    """

    def __call__(
        self, params: Params, resident: Any, batch: Any, key: jax.Array
    ) -> tuple[jax.Array, Metrics]: ...


def train_step(
    state: TrainState,
    resident: Any,
    batch: Any,
    key: jax.Array,
    wall_fraction: jax.Array,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    rate: Callable[[jax.Array, jax.Array], jax.Array],
    decay: float,
) -> tuple[TrainState, Metrics]:
    """One update.

    Args:
      state: before.
      resident: data that stay on the device for the whole run.
      batch: what the loader gave for this step, e.g. indices into `resident`.
      key: the run's key; the step folds its number in, so that a resumed run repeats itself.
      wall_fraction: () share of the time limit used up.
      loss: the objective.
      optimizer: at learning rate 1.
      rate: (step, wall_fraction) -> learning rate.
      decay: of the moving average.

    Returns:
      the state after, and float32 scalars: loss, learning_rate, grad_norm and the loss's own.
    """
    step_key = jax.random.fold_in(key, state.step)
    at_step = getattr(loss, "at_step", None)
    objective = at_step(state.step) if at_step else loss
    (value, aux), gradients = jax.value_and_grad(objective, has_aux=True)(
        state.params, resident, batch, step_key
    )
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    lr = rate(state.step, wall_fraction)
    params = optax.apply_updates(state.params, jax.tree.map(lambda u: lr * u, updates))
    ema = optax.incremental_update(params, state.ema, 1.0 - ema_decay(state.step, decay))
    metrics = {
        "loss": value,
        "learning_rate": lr,
        "grad_norm": optax.global_norm(gradients),
        **aux,
    }
    metrics = {name: jnp.asarray(v, jnp.float32) for name, v in metrics.items()}
    # Optax types trees as single arrays
    after = TrainState(state.step + 1, params, opt_state, ema)  # pyright: ignore[reportArgumentType]
    return after, metrics


def compile_steps(**parts: Any) -> StepFunction:
    """`train_step` over a leading axis of the batch, compiled, its state donated.

    Args:
      parts: keyword arguments of `train_step`.

    Returns:
      (state, resident, batches (K, ...), key, wall_fraction) -> state, metrics (K,).
    """

    def run(
        state: TrainState, resident: Any, batches: Any, key: jax.Array, wall_fraction: jax.Array
    ) -> tuple[TrainState, Metrics]:
        def body(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            return train_step(state, resident, batch, key, wall_fraction, **parts)

        return lax.scan(body, state, batches)

    return jax.jit(run, donate_argnums=0)
