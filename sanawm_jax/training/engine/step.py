"""The compiled train step: several updates a call, one source of randomness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sanawm_jax.core.params import Params
from sanawm_jax.core.sharding import batch_sharding, signal_sharding
from sanawm_jax.runtime.compiler_flags import options_on
from sanawm_jax.training.engine.optimizer import ema_decay
from sanawm_jax.training.engine.spikes import SpikePolicy, judge, keep_if
from sanawm_jax.training.engine.state import TrainState

Metrics = dict[str, Any]  # of () float32, or of `Share`
StepFunction = Callable[..., tuple[TrainState, Metrics]]
STOP = "stop"  # the metric in which all processes read the same wish to stop


class Share(NamedTuple):
    """A metric that is a mean over some of a batch's elements only, which may be none of a part's.

    Attributes:
      total: () sum of their values, divided by the number of rows.
      weight: () their number, divided by the number of rows.
    """

    total: jax.Array
    weight: jax.Array

    def mean(self) -> jax.Array:
        """(), NaN if there are none."""
        return self.total / self.weight


class Prepare(Protocol):
    """(resident data, batch, key) -> examples, arrays with the batch's rows on axis 0.

    All randomness of a step is drawn here, for the whole batch: a row's noise then depends neither
    on how many parts the batch is accumulated in nor on how many devices it lies on. One that
    changes over the run has a method `at_step`: () int32 -> what prepares that step.
    """

    def __call__(self, resident: Any, batch: Any, key: jax.Array) -> Any: ...


class Loss(Protocol):
    """(params, examples) -> loss and further metrics, () float32 or `Share`, means over the rows.

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
    spike: SpikePolicy | None = None,
) -> tuple[TrainState, Metrics]:
    """One update, or with `spike` none if the gradients are bad.

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
      spike: which gradients are bad, if the state has a guard.

    Returns:
      the state after, and float32 scalars: loss, learning_rate, grad_norm, the loss's own and the
      guard's.
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
    norm = optax.global_norm(gradients)
    metrics = {"loss": value, "learning_rate": lr, "grad_norm": norm, **aux}
    guard = state.guard
    if guard is not None and spike is not None:
        good, guard, decided = judge(guard, value, norm, spike)
        before = (state.params, state.opt_state, state.ema)
        params, opt_state, ema = keep_if(good, (params, opt_state, ema), before)
        metrics.update(decided)
    scalars = {k: v.mean() if isinstance(v, Share) else v for k, v in metrics.items()}
    scalars = {name: jnp.asarray(v, jnp.float32) for name, v in scalars.items()}
    # Optax types trees as single arrays
    after = TrainState(state.step + 1, params, opt_state, ema, guard)  # pyright: ignore[reportArgumentType]
    return after, scalars


def compile_steps(
    *, state_shardings: Any = None, resident_shardings: Any = None, **parts: Any
) -> StepFunction:
    """`train_step` over a leading axis of the batch, compiled, its state donated.

    Args:
      state_shardings: of a state on a mesh; batches are then split over their second axis, and
        all else is whole on every device. By default everything is on one device.
      resident_shardings: of resident data that are not whole on every device.
      parts: keyword arguments of `train_step`.

    Returns:
      (state, resident, batches (K, ...), key, wall_fraction) -> state, metrics (K,). On a mesh
      `wall_fraction` is (R, 2) of all R ranks, `place_signals`, and the metrics have `stop`.
    """

    def run(
        state: TrainState, resident: Any, batches: Any, key: jax.Array, wall_fraction: jax.Array
    ) -> tuple[TrainState, Metrics]:
        def body(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            return train_step(state, resident, batch, key, fraction, **parts)

        if wall_fraction.ndim == 0:
            fraction = wall_fraction
            return lax.scan(body, state, batches)
        # clocks and signals differ between processes; what they do must not
        fraction, stop = jnp.max(wall_fraction, 0)
        state, metrics = lax.scan(body, state, batches)
        return state, {**metrics, STOP: jnp.broadcast_to(stop, metrics["loss"].shape)}

    if state_shardings is None:
        return jax.jit(run, donate_argnums=0, compiler_options=options_on(1))
    mesh = state_shardings.step.mesh
    whole = NamedSharding(mesh, P())
    return jax.jit(
        run,
        donate_argnums=0,
        in_shardings=(
            state_shardings,
            whole if resident_shardings is None else resident_shardings,
            batch_sharding(mesh, steps=True),
            whole,
            signal_sharding(mesh),
        ),
        out_shardings=(state_shardings, whole),
        compiler_options=options_on(mesh.size),
    )
