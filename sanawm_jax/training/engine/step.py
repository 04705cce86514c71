"""The compiled train step: several updates a call, one source of randomness."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sanawm_jax.core.params import Params
from sanawm_jax.core.sharding import batch_sharding, signal_sharding
from sanawm_jax.runtime.compiler_flags import options_on
from sanawm_jax.training.engine.learner import MODEL, Learner, UpdateRule
from sanawm_jax.training.engine.spikes import SpikePolicy, judge, keep_if
from sanawm_jax.training.engine.state import TrainState

Metrics = dict[str, Any]  # of () float32, or of `Share`
StepFunction = Callable[..., tuple[TrainState, Metrics]]
STOP = "stop"  # the metric in which all processes read the same wish to stop


class Share(NamedTuple):
    """A metric that is a mean over some elements of a batch; a part of it may have none of them.

    Attributes:
      total: () sum of their values, divided by the number of rows.
      weight: () their number, divided by the number of rows.
    """

    total: jax.Array
    weight: jax.Array

    def mean(self) -> jax.Array:
        """(), NaN if there are none."""
        return self.total / self.weight


class Update(Protocol):
    """(state, batch, key) -> state and metrics, () float32 or `Share`: one step of a recipe.

    It replaces `state.learners`; step and guard belong to the engine. The key is that of the step.
    The metrics `loss` and `grad_norm` are what the guard judges a step by.
    """

    def __call__(
        self,
        state: TrainState,
        batch: Any,
        key: jax.Array,
        *,
        resident: Any,
        wall_fraction: jax.Array,
    ) -> tuple[TrainState, Metrics]: ...


class Prepare(Protocol):
    """(resident data, batch, key) -> examples, arrays with the batch's rows on axis 0.

    All randomness of a step is drawn here, for the whole batch: a row's noise then depends neither
    on how many parts the batch is accumulated in nor on how many devices it lies on. A `Prepare`
    that changes over the run has a method `at_step`: () int32 -> the `Prepare` of that step.
    """

    def __call__(self, resident: Any, batch: Any, key: jax.Array) -> Any: ...


class Loss(Protocol):
    """(params, examples) -> loss and further metrics, () float32 or `Share`, means over the rows.

    A loss that also reads frozen weights has a method `given`: resident data -> the loss with them.
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


@dataclasses.dataclass(frozen=True)
class GradientUpdate:
    """The `Update` of a recipe whose only learner descends the gradient of a loss.

    Attributes:
      rule: of the learner.
      prepare, loss: the objective.
      accumulation: parts into which a batch is divided, to fit the memory.
    """

    rule: UpdateRule
    prepare: Prepare
    loss: Loss
    accumulation: int = 1

    def __call__(
        self,
        state: TrainState,
        batch: Any,
        key: jax.Array,
        *,
        resident: Any,
        wall_fraction: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        prepare, loss = self.prepare, self.loss
        if isinstance(prepare, ChangingPrepare):
            prepare = prepare.at_step(state.step)
        if isinstance(loss, LossOnResident):
            loss = loss.given(resident)
        examples = prepare(resident, batch, key)
        (value, aux), gradients = accumulated_gradients(
            loss, state.model.params, examples, self.accumulation
        )
        model, metrics = self.rule.update(state.model, gradients, state.step, wall_fraction)
        after = dataclasses.replace(state, learners={MODEL: model})
        return after, {"loss": value, **metrics, **aux}


def every_nth(
    n: int, step: jax.Array, update: Callable[[], tuple[Learner, Metrics]], learner: Learner
) -> tuple[Learner, Metrics]:
    """`update()` in the steps 0, n, 2n...; in the others `learner`, with metrics that are NaN.

    `metrics.jsonl` shows NaN as null. The other steps compute nothing of the update.
    """
    _, metrics = jax.eval_shape(update)

    def skip() -> tuple[Learner, Metrics]:
        return learner, jax.tree.map(lambda m: jnp.full(m.shape, jnp.nan, m.dtype), metrics)

    return lax.cond(step % n == 0, update, skip)


def train_step(
    state: TrainState,
    resident: Any,
    batch: Any,
    key: jax.Array,
    wall_fraction: jax.Array,
    *,
    update: Update,
    spike: SpikePolicy | None = None,
) -> tuple[TrainState, Metrics]:
    """One step of any recipe; with `spike` it changes no learner if the gradients are bad.

    Args:
      state: before.
      resident: data that stay on the device for the whole run.
      batch: what the loader gave for this step, e.g. indices into `resident`.
      key: of the run; the number of the step is folded in, so that a resumed run repeats itself.
      wall_fraction: () share of the time limit used up.
      update: of the recipe.
      spike: which gradients are bad, if the state has a guard.

    Returns:
      the state after, and () float32 metrics: those of the update and of the guard.
    """
    step_key = jax.random.fold_in(key, state.step)
    after, metrics = update(state, batch, step_key, resident=resident, wall_fraction=wall_fraction)
    learners, guard = after.learners, state.guard
    if guard is not None and spike is not None:
        good, guard, decided = judge(guard, metrics["loss"], metrics["grad_norm"], spike)
        learners = keep_if(good, learners, state.learners)
        metrics = {**metrics, **decided}
    scalars = {k: v.mean() if isinstance(v, Share) else v for k, v in metrics.items()}
    scalars = {name: jnp.asarray(v, jnp.float32) for name, v in scalars.items()}
    return TrainState(state.step + 1, learners, guard), scalars


def compile_steps(
    *, state_shardings: Any = None, resident_shardings: Any = None, **parts: Any
) -> StepFunction:
    """`train_step` over a leading axis of the batch, compiled, its state donated.

    Args:
      state_shardings: of a state on a mesh; batches are then split over their second axis, and
        everything else is replicated. By default everything is on one device.
      resident_shardings: of resident data that are not replicated.
      parts: the keyword arguments of `train_step`.

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
