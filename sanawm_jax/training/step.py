"""The compiled train step: several updates a call, one source of randomness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sanawm_jax.core.params import Params
from sanawm_jax.core.sharding import batch_sharding
from sanawm_jax.training.optimizer import ema_decay
from sanawm_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
StepFunction = Callable[..., tuple[TrainState, Metrics]]


class Prepare(Protocol):
    """(resident data, batch, key) -> examples, arrays with the batch's rows on axis 0.

    All randomness of a step is drawn here, for the whole batch: a row's noise then depends neither
    on how many parts the batch is accumulated in nor on how many devices it lies on. One that
    changes over the run has a method `at_step`: () int32 -> what prepares that step.
    """

    def __call__(self, resident: Any, batch: Any, key: jax.Array) -> Any: ...


class Loss(Protocol):
    """(params, examples) -> loss and further metrics, () float32, each a mean over the rows.

    One that reads more than what is trained, a frozen base, has a method `given`: resident data ->
    the loss with them.
    """

    def __call__(self, params: Params, examples: Any) -> tuple[jax.Array, Metrics]: ...


@runtime_checkable
class ChangingPrepare(Protocol):
    """See `Prepare`."""

    def at_step(self, step: jax.Array) -> Prepare: ...


@runtime_checkable
class LossOnResident(Protocol):
    """See `Loss`."""

    def given(self, resident: Any) -> Loss: ...


def accumulated_gradients(
    loss: Loss, params: Params, examples: Any, parts: int
) -> tuple[tuple[jax.Array, Metrics], Params]:
    """`jax.value_and_grad` of a batch, in `parts` equal parts one after the other.

    Args:
      examples: rows on axis 0, a multiple of `parts`.

    Returns:
      ((loss, metrics), gradients), means over all rows.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return gradient(params, examples)
    # a part takes every parts-th row, so that each device works on rows that it holds
    split = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), examples)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    first = jax.tree.map(lambda a: a[0], split)
    zero = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(gradient, params, first)
    )
    total, _ = lax.scan(add, zero, split)
    return jax.tree.map(lambda a: a / parts, total)


def train_step(
    state: TrainState,
    resident: Any,
    batch: Any,
    key: jax.Array,
    wall_fraction: jax.Array,
    *,
    prepare: Prepare,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    rate: Callable[[jax.Array, jax.Array], jax.Array],
    decay: float,
    accumulation: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update.

    Args:
      state: before.
      resident: data that stay on the device for the whole run.
      batch: what the loader gave for this step, e.g. indices into `resident`.
      key: the run's key; the step folds its number in, so that a resumed run repeats itself.
      wall_fraction: () share of the time limit used up.
      prepare, loss: the objective.
      optimizer: at learning rate 1.
      rate: (step, wall_fraction) -> learning rate.
      decay: of the moving average.
      accumulation: parts that a batch is cut into, to fit the memory.

    Returns:
      the state after, and float32 scalars: loss, learning_rate, grad_norm and the loss's own.
    """
    step_key = jax.random.fold_in(key, state.step)
    if isinstance(prepare, ChangingPrepare):
        prepare = prepare.at_step(state.step)
    if isinstance(loss, LossOnResident):
        loss = loss.given(resident)
    examples = prepare(resident, batch, step_key)
    (value, aux), gradients = accumulated_gradients(loss, state.params, examples, accumulation)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    lr = rate(state.step, wall_fraction)
    params = optax.apply_updates(state.params, jax.tree.map(lambda u: lr * u, updates))
    ema = state.ema
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1.0 - ema_decay(state.step, decay))
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


def compile_steps(*, state_shardings: Any = None, **parts: Any) -> StepFunction:
    """`train_step` over a leading axis of the batch, compiled, its state donated.

    Args:
      state_shardings: of a state on a mesh; batches are then split over their second axis, and
        all else is whole on every device. By default everything is on one device.
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

    if state_shardings is None:
        return jax.jit(run, donate_argnums=0)
    mesh = state_shardings.step.mesh
    whole = NamedSharding(mesh, P())
    return jax.jit(
        run,
        donate_argnums=0,
        in_shardings=(state_shardings, whole, batch_sharding(mesh, steps=True), whole, whole),
        out_shardings=(state_shardings, whole),
    )
